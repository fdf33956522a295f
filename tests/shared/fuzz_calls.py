# SPDX-License-Identifier: Apache-2.0
"""Random calls of every op that _C.so registers, read from the schemas: python tests/shared/fuzz_calls.py SEED COUNT STATE.

Half of the calls are good: any shapes, dtypes and strides, and have to succeed. In the others an argument or two is
something else; they succeed or raise an error that names the op, and what they refuse stays unwritten. Of the *_fwd and
*_bwd ops, parts and no public API, it is asked that they do not crash. STATE is a file
that holds the call under way, so that after a crash one can read which it was. Prints "COUNT calls, N refused".
"""

import mmap
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

import lrkern.ops

SMALL = (0, 1, 2, 3, 5, 8, 16, 17, 31, 64, 65)
LARGE = (127, 256, 257, 512, 513, 600)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)
LETTERS = {"x": "TI", "a": "RI", "b": "OR", "s": "TR", "ds": "TR", "y": "TO", "dy": "TO", "base": "TO", "weight": "OI",
           "bias": "O", "base_scale": "O"}  # fmt: skip
FACTORS = ("a", "b", "s", "ds", "base_scale")
TRAINABLE = {*LETTERS, "a_pool", "b_pool", "coef", "g"}


def schemas():
    found = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("lrkern::") and s.arguments]
    return sorted(found, key=lambda s: s.name)


def strided(rng: random.Random, shape: list[int], dtype: torch.dtype, rows: bool) -> Tensor:
    """Random values under random strides; `rows`: its last dimension stays contiguous and its rows at one pitch."""
    fill = lambda *s: (torch.randn(s) if dtype.is_floating_point else torch.ones(s)).to(dtype)
    kind = rng.choice(("plain", "plain", "pitch", "offset") if rows else ("plain", "pitch", "offset", "turned", "wide"))
    if not shape or kind == "plain":
        return fill(*shape)
    if kind in ("pitch", "offset"):
        more = rng.randint(1, 9)
        t = fill(*shape[:-1], shape[-1] + more)
        return t[..., : shape[-1]] if kind == "pitch" else t[..., more:]
    if kind == "turned":
        return fill(*reversed(shape)).permute(*reversed(range(len(shape))))
    return fill(*[n if rng.random() < 0.5 else 1 for n in shape]).expand(shape)


def draw(rng: random.Random, schema) -> tuple[dict, bool]:
    """(arguments by name, is it a good call)."""
    size = lambda: rng.choice(LARGE if rng.random() < 0.04 else SMALL)
    lead = [size(), *rng.choices((0, 1, 2, 3), k=rng.choice((0, 0, 1, 2)))]
    dims = {"I": size(), "O": size(), "R": rng.choice((0, 1, 2, 4, 8, 16, 17, 33, 70))}
    dtype = rng.choice(FLOATS)
    factor = rng.choice((dtype, torch.float32))
    p = rng.choice((0.0, 0.0, 0.3, 1.0))
    without = {a.name for a in schema.arguments if a.name in ("bias", "base_scale", "base") and rng.random() < 0.5}
    if schema.name == "lrkern::linear_expand" and rng.random() < 0.3:
        without |= {"x", "weight"}
    multi = draw_multi(rng, schema, lead, dims, factor, p) if "multi_lora" in schema.name else {}
    if "basis" in schema.name:
        multi = draw_basis(rng, lead, dims, dtype)
    args = {}
    for a in schema.arguments:
        if a.name in multi:
            args[a.name] = multi[a.name]
        elif a.name in LETTERS:
            shape = [n for letter in LETTERS[a.name] for n in (lead if letter == "T" else [dims[letter]])]
            rows = a.alias_info is not None
            args[a.name] = strided(rng, shape, factor if a.name in FACTORS else dtype, rows)
        elif a.name == "seed":
            args[a.name] = torch.tensor([rng.getrandbits(63)]) if p or rng.random() < 0.3 else None
        elif str(a.type) == "bool":
            args[a.name] = rng.random() < 0.7
        elif a.name == "dropout_p":
            args[a.name] = p
        else:
            args[a.name] = rng.choice((1.0, 0.5, -2.0, 0.0))
        if a.name in without and "Optional" in str(a.type):
            args[a.name] = None
    good = not is_part(schema)  # parts have rules of their own for what comes together
    if rng.random() < 0.5:
        good = False
        for name in rng.sample(list(args), min(len(args), rng.choice((1, 1, 2)))):
            if name in ("Q", "C", "R"):  # 2^31 would be taken, and be too much memory
                args[name] = rng.choice((-1, 2**62))
            else:
                args[name] = something_else(rng, args[name])
    return args, good


def draw_multi(rng: random.Random, schema, lead: list[int], dims: dict, factor: torch.dtype, p: float) -> dict:
    """Adapters, pools and a plan that go together, by argument name."""
    T, A, K = torch.Size(lead).numel(), rng.choice((0, 1, 2, 5)), rng.choice((1, 1, 2, 3))
    L, M = 1 if "linear" in schema.name else rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 5))
    fill = lambda *shape, dtype=factor: torch.randn(shape).to(dtype)
    index = torch.tensor(rng.choices(range(-1, A), k=T * K), dtype=torch.int32).reshape(T, K)
    P = 16 * (A * L * M + rng.choice((0, 0, 1)))
    pages = torch.tensor(rng.sample(range(P // 16), A * L * M), dtype=torch.int32).reshape(A, L, M)
    ranks = torch.tensor(rng.choices(range(16 * M + 1), k=A * L), dtype=torch.int32).reshape(A, L)
    table = {"index": index, "adapters": A, "pages": pages, "ranks": ranks}
    I = max(1, dims["I"]) if "embedding" in schema.name else dims["I"]
    s, ids = fill(*lead, K, L, 16 * M), torch.randint(max(1, I), lead)
    return table | {
        "ids": ids,
        "plan": lrkern.ops.multi_lora_plan(index, A), "a_pool": fill(P, I), "b_pool": fill(P, dims["O"]), "s": s,
        "ds": s, "slice": rng.randrange(L), "scales": fill(T, K, dtype=torch.float32) if rng.random() < 0.7 else None,
        "dropout_p": torch.tensor(rng.choices((0.0, 0.3, 1.0), k=A)) if p else None,
        "seed": torch.tensor([rng.getrandbits(63)]) if p else None,
    }  # fmt: skip


def draw_basis(rng: random.Random, lead: list[int], dims: dict, dtype: torch.dtype) -> dict:
    """A stream, its sizes, and tensors that go with them, by argument name."""
    Q, C, R, transposed = dims["O"], dims["I"], rng.choice((1, 2, 7)), rng.random() < 0.5
    n, m = (C, Q) if transposed else (Q, C)
    segments = [(rng.choice(SMALL), rng.choice(SMALL), rng.choice((1.0, -0.5))) for _ in range(rng.choice((1, 2, 4)))]
    widths, counts, scales = map(list, zip(*segments, strict=True))
    vector = lambda size: torch.randn(size) if rng.random() < 0.5 else None
    fill = lambda *shape: torch.randn(shape)
    return {
        "like": fill(1).to(dtype), "seed": rng.getrandbits(63), "method": rng.randrange(64), "tensor": rng.getrandbits(31),
        "distribution": rng.randint(2, 7), "first": rng.choice((0, 3, 2**15)), "R": R, "Q": Q, "C": C, "q0": rng.randrange(99),
        "c0": rng.choice((0, 5, 2**30)), "transposed": transposed, "fp32": rng.random() < 0.5, "scale": 0.5,
        "widths": widths, "counts": counts, "scales": scales, "coef": fill(*lead, sum(counts)),
        "base": fill(R, sum(widths)) if rng.random() < 0.5 else None, "g": fill(*lead, R, sum(widths)),
        "x": strided(rng, [*lead, n], dtype, True), "y": fill(*lead, m).to(rng.choice(FLOATS)), "in_scale": vector(n),
        "out_scale": vector(m), "row_scale": vector(Q), "col_scale": vector(C),
    }  # fmt: skip


def is_part(schema) -> bool:
    return schema.name.endswith(("_fwd", "_bwd"))


def undefined(schema, args: dict) -> bool:
    """None for a tensor that is not optional: torch passes an undefined one on, of which our errors know no name."""
    return any(args[a.name] is None and str(a.type) == "Tensor" for a in schema.arguments)


def something_else(rng: random.Random, value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((-1, value + 1, 2**31, 2**62))
    if isinstance(value, float):
        return rng.choice((float("nan"), float("inf"), -1.0, 2.0, 1e300, 1e-46, 0.0))
    if isinstance(value, list):
        return rng.choice(([], value * 5, [-1] * len(value), [2**48] * len(value), value[1:]))
    shape = list(value.shape) if value is not None else [2]
    kind = rng.randrange(7)
    if kind == 0:
        return None
    if kind == 1 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(SMALL)
    elif kind == 2:
        shape = rng.choices(SMALL, k=rng.randint(0, 5))
    elif kind == 3 and value is not None:
        return value.to("meta")
    elif kind == 4:
        return torch.zeros(shape).to_sparse()
    elif kind == 5 and value is not None:
        return value.unsqueeze(rng.randint(0, value.dim()))
    dtype = rng.choice((*FLOATS, *OTHERS)) if kind == 6 else value.dtype if value is not None else torch.float32
    return strided(rng, shape, dtype, False)


def text_of(value) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    strides = "" if value.layout is not torch.strided else f"/{list(value.stride())}"
    return f"{value.device.type}:{str(value.dtype)[6:]}{list(value.shape)}{strides}"


def call(rng: random.Random, schema, note) -> bool:
    """One call; True where it was refused. Raises AssertionError where the op misbehaves."""
    args, good = draw(rng, schema)
    name = schema.name.removeprefix("lrkern::")
    text = f"{name}({', '.join(f'{k}={text_of(v)}' for k, v in args.items())})"
    note(text)
    written = [a.name for a in schema.arguments if a.alias_info is not None]
    plain = lambda t: (
        isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu" and not t.is_complex()
    )
    before = {n: args[n].clone() for n in written if plain(args[n])}
    wrapper = getattr(lrkern.ops, name, None)
    train = wrapper is not None and not written and rng.random() < 0.3
    try:
        if train:
            for k, v in args.items():
                if k in TRAINABLE and isinstance(v, Tensor) and v.is_floating_point() and rng.random() < 0.7:
                    v.requires_grad_()
        with torch.set_grad_enabled(train):
            out = (wrapper if wrapper and rng.random() < 0.7 else getattr(torch.ops.lrkern, name))(**args)
        if train and out.requires_grad and out.device.type == "cpu":
            out.float().sum().backward()
            leaves = [(k, v) for k, v in args.items() if k in TRAINABLE and v is not None and v.requires_grad]
            missing = [k for k, v in leaves if v.grad is None or v.grad.shape != v.shape]
            assert not missing, f"no gradient of {missing}: {text}"
    except (RuntimeError, TypeError, AttributeError) as error:
        assert not good, f"a good call is refused: {text}\n{error}"
        assert name in str(error) or is_part(schema) or undefined(schema, args), (
            f"an error that does not name the op: {text}\n{error}"
        )
        for n, was in before.items():
            same = torch.equal(was.float().nan_to_num(7), args[n].detach().float().nan_to_num(7))
            assert same, f"refused, yet {n} was written: {text}"
        return True
    if good and isinstance(out, Tensor) and "multi_lora" not in name and "basis" not in name:
        shape = list((args.get("x") if args.get("x") is not None else args["s"]).shape[:-1])
        assert list(out.shape)[:-1] == shape, f"{list(out.shape)}: {text}"
    return False


def main() -> int:
    seed, count, state = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    rng, ops = random.Random(seed), schemas()
    torch.manual_seed(seed)
    torch.set_num_threads(1 + seed % 3)
    state.write_bytes(bytes(4096))
    with state.open("r+b") as f, mmap.mmap(f.fileno(), 4096) as page:  # survives a crash, costs no system call

        def note(text: str) -> None:
            page[:] = text.encode()[:4096].ljust(4096, b"\0")

        refused = sum(call(rng, rng.choice(ops), note) for _ in range(count))
    print(f"{count} calls, {refused} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
