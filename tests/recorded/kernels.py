# SPDX-License-Identifier: Apache-2.0
"""Public names, ops, their errors and functional forms, for ../unchanged.py."""

import importlib
import inspect
import itertools
import random
import re

import torch
from torch import Tensor, nn

import lrkern.functional as F
import lrkern.ops
from lrkern.reference import OPS

from .common import DEVICES, DTYPES, attempt, device, digest, rand, train

# ---------------------------------------------------------------------------------------------------- public names

MODULES = [
    "ops",
    "ops.basis",
    "ops.multi_lora",
    "functional",
    "functional.basis",
    "nn",
    "nn.basis",
    "nn.basis_file",
    "nn.dora",
    "nn.lora",
    "nn.mixed",
    "nn.nola",
    "nn.randlora",
    "nn.vera",
    "peft",
    "peft_basis",
    "peft_layer",
    "serving",
    "serving.families",
    "serving.model",
    "serving.pool",
    "convert",
    "convert_peft",
    "testing",
    "reference",
]
FACES = [
    "ops",
    "ops.basis",
    "functional",
    "nn",
    "nn.basis",
    "nn.basis_file",
    "nn.lora",
    "peft",
    "serving",
    "convert",
    "convert_peft",
    "testing",
    "reference",
]
CONSTANTS = "METHODS", "DISTRIBUTIONS", "STREAM_VERSION"


def signature(fn) -> str:
    text = attempt(lambda: str(inspect.signature(fn)))
    return re.sub(r"\blrkern\.(\w+\.)*", "", text)  # where a class lives may change


def members(cls: type) -> dict:
    found = {}
    for name in dir(cls):
        owner = next((c for c in cls.__mro__ if name in vars(c)), object)
        if name.startswith("_") or not owner.__module__.startswith("lrkern"):
            continue
        member = getattr(cls, name)
        found[name] = signature(member) if callable(member) else type(inspect.getattr_static(cls, name)).__name__
    return found


def signatures(recording: bool):
    """When recording, of a module without __all__ what it defines itself; later, what it has."""
    for name in MODULES:
        yield f"import/{name}", attempt(lambda name=name: importlib.import_module(f"lrkern.{name}") and "imports")
    for name in FACES:
        module = importlib.import_module(f"lrkern.{name}")
        names = getattr(module, "__all__", None)
        if names is not None:
            yield f"{name}/__all__", ", ".join(sorted(names))
        for key in OPS if name == "reference" else names or dir(module):
            thing = getattr(module, key)
            home = str(getattr(thing, "__module__", ""))
            own = home.startswith(module.__name__ if recording else "lrkern")
            if key.startswith("_") or inspect.ismodule(thing) or not (names or own) or not callable(thing):
                continue
            yield f"{name}/{key}", signature(thing)
            if isinstance(thing, type):
                yield f"{name}/{key}", members(thing)
    for key in CONSTANTS:
        yield f"ops.basis/{key}", repr(getattr(lrkern.ops.basis, key))
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("lrkern::"):
            yield f"schema/{schema.name}", str(schema)


# ---------------------------------------------------------------------------------------------------- ops


def named(op, sample) -> dict:
    """All arguments by name."""
    return dict(zip(inspect.signature(op.truth).parameters, sample.args, strict=False)) | sample.kwargs


def rows_copied(t: Tensor) -> Tensor:
    """With its pitch; what lies between the rows stays NaN."""
    if t.is_contiguous():
        return t.clone()
    wide = torch.full((t.untyped_storage().nbytes() // t.element_size(),), float("nan"), dtype=t.dtype)
    return wide.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)


def run_op(op, fn, args: dict, cast: bool = False):
    """The result and all gradients; of an op that mutates what it wrote."""
    if op.mutates:
        args = args | {op.mutates: rows_copied(args[op.mutates])}
        fn(**args)
        return args[op.mutates]
    if not op.differentiable:
        return fn(**args)
    leaves = {k: args[k] for k in op.differentiable if args.get(k) is not None}
    return {"alone": fn(**args)} | train(fn, leaves, cast, **{k: v for k, v in args.items() if k not in leaves})


def ops(recording: bool):
    for kind, dtype, op in itertools.product(DEVICES, DTYPES, OPS.values()):
        with device(kind):
            for s in op.samples("cpu", dtype):
                name, args = f"{kind}/{str(dtype)[6:]}/{op.name}/{s.name}", named(op, s)
                yield name, run_op(op, getattr(lrkern.ops, op.name), args)
                if kind == "cpu" and dtype == torch.float32:
                    yield f"{name}/direct", attempt(run_op, op, getattr(torch.ops.lrkern, op.name), args)
                    yield f"{name}/autocast", attempt(run_op, op, getattr(lrkern.ops, op.name), args, cast=True)


UNWRITTEN = {("plan", "zeros"), ("plan", "ones")}  # plans of no row: what no row writes holds anything


def wrong_values(argument, value) -> dict:
    """What else may be given for an argument; some of it is right."""
    if isinstance(value, bool):
        return {"not": not value}
    if isinstance(value, int):
        large = {} if argument.name in ("Q", "C", "R") else {"2^31": 2**31}  # would be taken, and be too much memory
        return {"-1": -1, "0": 0, "more": value + 1, "2^62": 2**62} | large
    if isinstance(value, float):
        return {str(v): v for v in (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 2.0, 1e300, 1e-46)}
    if isinstance(value, list):
        return {
            "empty": [],
            "long": value * 5,
            "-1": [-1] * len(value),
            "2^48": [2**48] * len(value),
            "short": value[1:],
        }
    if value is None:
        return {"ones": torch.ones(2), "long": torch.ones(1, dtype=torch.int64), "scalar": torch.tensor(1.0)}
    t, shape = value.detach(), list(value.shape)
    kinds = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.complex64,
        torch.bool,
    )
    found = {"None": None} | {str(d)[6:]: t.to(d) for d in kinds if d != t.dtype}
    found |= {"meta": t.to("meta"), "sparse": t.to_sparse(), "scalar": t.new_zeros(()), "empty": t.new_zeros(0)}
    found |= {"one more dimension": t.unsqueeze(0), "zeros": torch.zeros_like(t), "ones": torch.ones_like(t)}
    if shape:
        found |= {"short": t[..., 1:], "short in front": t[1:], "turned": t.mT if len(shape) > 1 else t.flip(0)}
        found |= {"long": nn.functional.pad(t, (0, 3)), "expanded": t[..., :1].expand(shape), "flat": t.flatten()}
        found |= {"long in front": torch.cat([t, t[:1]]), "wide": t.new_zeros(*shape[:-1], 513)}
    return found | ({"training": t.clone().requires_grad_()} if t.is_floating_point() else {})


def good_arguments(space, schema, sample: dict) -> dict:
    """Of an op, its X_fwd or its X_bwd: a sample's, results of X_fwd by name, a gradient of X's result."""
    name = schema.name.split("::")[1]
    base = re.sub("_(fwd|bwd)$", "", name)
    own = {
        a.name: sample.get(a.name, a.default_value) for a in getattr(torch.ops.lrkern, base).default._schema.arguments
    }
    if name.endswith("_bwd"):
        y = getattr(space, base)(**own)
        if hasattr(torch.ops.lrkern, f"{base}_fwd"):
            results = getattr(torch.ops.lrkern, f"{base}_fwd").default._schema.returns
            own |= dict(zip((r.name for r in results), getattr(space, f"{base}_fwd")(**own), strict=True))
        own |= {k: rand(*y.shape, seed=2, dtype=y.dtype) for k in (f"d{n}" for n in "ys") if k not in own}
    return {a.name: own.get(a.name, True) for a in schema.arguments}


def call(fn, args: dict):
    """The result or the error, and what was written."""
    args = {
        k: v.clone() if k == "y" and isinstance(v, Tensor) and v.layout is torch.strided else v for k, v in args.items()
    }
    out = attempt(fn, **args)
    return args["y"] if out is None else out


def calls(recording: bool):
    """Every argument wrong in every way, and two at a time: what is taken, which error comes first, and its text."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("lrkern::") and s.arguments]
    chosen = ("odd", "dropout_fp32_pitch", "dropout", "ternary6")
    for kind, schema in itertools.product(DEVICES, sorted(schemas, key=lambda s: s.name)):
        name = schema.name.split("::")[1]
        op = OPS[re.sub("_(fwd|bwd)$", "", name)]
        samples = [(d, s) for d in DTYPES[:2] for s in op.samples("cpu", d) if s.name in chosen]
        with device(kind) as space:
            ways = {"direct": getattr(space, name)}
            ways |= {"wrapper": getattr(lrkern.ops, name)} if hasattr(lrkern.ops, name) else {}
            for (d, s), (way, fn) in itertools.product(samples, ways.items()):
                args = good_arguments(space, schema, named(op, s))
                where = f"{kind}/{name}/{str(d)[6:]}/{s.name}/{way}"
                each = {(a.name, k): v for a in schema.arguments for k, v in wrong_values(a, args[a.name]).items()}
                if kind == "emulated":  # has no fakes
                    each = {key: v for key, v in each.items() if key[1] != "meta"}
                for (a, k), v in each.items():
                    if (a, k) not in UNWRITTEN:
                        yield f"{where}/{a}: {k}", call(fn, args | {a: v})
                rng = random.Random(f"{name} {s.name}")
                for i in range(40):
                    two = dict(rng.sample(list(each.items()), 2))
                    label = ", ".join(f"{a}: {k}" for a, k in two)
                    if len({a for a, _ in two}) == 2 and not UNWRITTEN & two.keys():
                        yield f"{where}/{i} {label}", call(fn, args | {a: v for (a, _), v in two.items()})


# ---------------------------------------------------------------------------------------------------- functional


def functional(recording: bool):
    yield "scaling", [F.lora_scaling(*a) for a in ((8, 4), (8, 4, True), (8, 0))]
    ways = [F.randlora_way(T, I, O) for T in (*range(40), 100, 1000) for I in (8, 24, 300) for O in (8, 40, 500)]
    yield "randlora_way", digest(" ".join(ways).encode())
    for kind, dtype, (I, O), T in itertools.product(DEVICES, DTYPES, ((24, 40), (40, 24)), (3, 20, 70)):
        name, fill = (
            f"{kind}/{str(dtype)[6:]}/{I}x{O}/{T}",
            lambda *s, seed=0, d=dtype, std=0.3: rand(*s, seed=seed, std=std, dtype=d),
        )
        x, w, bias, y = fill(T, I), fill(O, I, seed=1), fill(O, seed=2), fill(T, O, seed=3)
        base = {"x": x, "weight": w, "bias": bias}
        f32 = lambda *s, seed: rand(*s, seed=seed, std=0.3)
        a, b, m = f32(5, I, seed=4), f32(O, 5, seed=5), f32(O, seed=6)
        r, low, high = 7, min(I, O), max(I, O)
        n = -(-low // r)
        d, lam, gam = f32(r, seed=7), f32(r, n, seed=8), f32(n, low, seed=9)
        basis = lambda rows, cols, tensor, m, r=r: F.Basis(99, m, rows, cols, r, 0.5, "uniform8", tensor)
        with device(kind):
            for p, cast in itertools.product((0.0, 0.4), (False, True) if kind == "cpu" else (False,)):
                at, do = f"{name}/p={p} autocast={cast}", {"dropout_p": p, "training": True, "cast": cast}
                yield f"{at}/lora", train(F.lora_linear, base | {"a": a, "b": b}, scale=0.5, **do)
                yield f"{at}/lora_add", train(F.lora_add, {"y": y, "x": x, "a": a, "b": b}, scale=0.5, **do)
                yield f"{at}/dora", train(F.dora_linear, base | {"a": a, "b": b, "magnitude": m}, scale=0.5, **do)
                for frozen, normal in itertools.product((False, True), repeat=2):
                    coefs = {"alpha": f32(9, seed=10), "beta": f32(8, seed=11)}
                    more = {
                        "seed": 5,
                        "r": 4,
                        "scale": 0.5,
                        "normalize": normal,
                        "frozen_a": frozen,
                        "distribution": "sign",
                    }
                    yield f"{at}/nola {frozen} {normal}", train(F.nola_linear, base | coefs, **more, **do)
                for stored in (False, True):
                    fit = lambda p, stored=stored: p.fill(torch.empty(0)) if stored else p
                    A, B = fit(basis(r, I, 0, "vera")), fit(basis(r, O, 1, "vera"))
                    for save in (False, True):
                        v, more = {"d": d, "b": m}, {"A": A, "B": B, "save_output": save}
                        yield f"{at}/vera {stored} {save}", train(F.vera_linear, base | v, **more, **do)
                        yield f"{at}/vera_add {stored} {save}", train(F.vera_add, {"y": y, "x": x} | v, **more, **do)
                    A, B = fit(basis(r, low, 0, "randlora")), fit(basis(n * r, high, 1, "randlora"))
                    for paper in (False, True):
                        v, more = {"lam": lam, "gam": gam}, {"A": A, "B": B, "scale": 0.5, "paper_pairing": paper}
                        yield f"{at}/randlora {stored} {paper}", train(F.randlora_linear, base | v, **more, **do)
                        yield (
                            f"{at}/randlora_add {stored} {paper}",
                            train(F.randlora_add, {"y": y, "x": x} | v, **more, **do),
                        )
                        yield (
                            f"{at}/randlora_delta {stored} {paper}",
                            F.randlora_delta(lam, gam, A, B, I, O, 0.5, paper),
                        )
            yield f"{name}/dora_norm", F.dora_norm(w, a, b, 0.5)
            yield f"{name}/nola_factors", F.nola_factors(f32(3, 9, seed=10), f32(3, 8, seed=11), 5, 4, I, O)
            yield f"{name}/frozen", F.lora_linear(x, w, bias, a, b, 0.5)
            yield (
                f"{name}/of wrong sizes",
                [attempt(F.lora_linear, x, w, bias, a, b[1:]), attempt(F.lora_linear, x.half(), w, None, a, b)],
            )
