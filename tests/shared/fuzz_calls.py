# SPDX-License-Identifier: Apache-2.0
"""Random calls of every op that _C.so registers, read from the schemas: python tests/shared/fuzz_calls.py SEED COUNT STATE.

Half of the calls are good: any shapes, dtypes and strides, and have to succeed; a third of these is compared with the
reference in float64. In the others an argument or two is
something else; they succeed or raise an error that names the op, and what they refuse stays unwritten. Of the *_fwd and
*_bwd ops, parts and no public API, it is asked that they do not crash. STATE is a file
that holds the call under way, so that after a crash one can read which it was. Prints "COUNT calls, N refused".
"""

import mmap
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lrkern.ops
from lrkern import testing
from lrkern.reference import OPS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests import families
from tests.families import FLOATS, SMALL, Layer, strided

OTHERS = (torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)


def schemas():
    found = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("lrkern::") and s.arguments]
    return sorted(found, key=lambda s: s.name)


def base_of(schema) -> str:
    """X, of X, X_fwd and X_bwd."""
    return schema.name.removeprefix("lrkern::").removesuffix("_fwd").removesuffix("_bwd")


def draw(rng: random.Random, schema) -> tuple[dict, bool]:
    """(arguments by name, is it a good call)."""
    values = families.load(OPS[base_of(schema)].family.name).draw(rng, schema, Layer.draw(rng))
    args = {}
    for a in schema.arguments:
        if a.name in values:
            args[a.name] = values[a.name]
        elif str(a.type) == "bool":
            args[a.name] = rng.random() < 0.7
        else:
            args[a.name] = rng.choice((1.0, 0.5, -2.0, 0.0))
    good = not is_part(schema)  # parts have rules of their own for what comes together
    if rng.random() < 0.5:
        good = False
        for name in rng.sample(list(args), min(len(args), rng.choice((1, 1, 2)))):
            if name in ("Q", "C", "R"):  # 2^31 would be taken, and be too much memory
                args[name] = rng.choice((-1, 2**62))
            else:
                args[name] = something_else(rng, args[name])
    return args, good


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
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, torch.dtype):
        return rng.choice(OTHERS)
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
    wrapper, result = getattr(lrkern.ops, name, None), OPS[base_of(schema)].mutates
    train = wrapper is not None and bool(OPS[name].differentiable) and result is None and rng.random() < 0.3
    values = good and wrapper is not None and not train and rng.random() < 0.5
    given = {n: v.clone() if n in before else v for n, v in args.items()} if values else None
    trainable = OPS[name].differentiable if train else ()
    try:
        if train:
            for k, v in args.items():
                if k in trainable and isinstance(v, Tensor) and v.is_floating_point() and rng.random() < 0.7:
                    v.requires_grad_()
        with torch.set_grad_enabled(train):
            out = (wrapper if wrapper and rng.random() < 0.7 else getattr(torch.ops.lrkern, name))(**args)
        if train and out.requires_grad and out.device.type == "cpu":
            out.float().sum().backward()
            leaves = [(k, v) for k, v in args.items() if k in trainable and v is not None and v.requires_grad]
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
    if values:
        check_values(schema, given, args[result] if result else out, text)
    if good and isinstance(out, Tensor):
        foretold = getattr(torch.ops.lrkern, name)(
            **{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in args.items()}
        )
        assert (out.shape, out.dtype) == (foretold.shape, foretold.dtype), f"{list(out.shape)} {out.dtype}: {text}"
    return False


def check_values(schema, args: dict, got: Any, text: str) -> None:
    """Against the reference. What an op writes it wrote into its first argument."""
    op, results = OPS[base_of(schema)], []
    for convert in (testing.to64, lambda v: v):
        own = {n: convert(v) for n, v in args.items()}
        out = op.truth(**own)
        results.append(next(iter(own.values())) if op.mutates is not None else out)
    floats = {v.dtype for v in args.values() if isinstance(v, Tensor) and v.is_floating_point()}
    # As in test_fuzz.layers: few elements are now and then exact by luck.
    few = isinstance(got, Tensor) and got.numel() <= 64
    testing.check(got, *results, text, fp32_factor=len(floats) > 1, ulps=64 if few else 4)


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
