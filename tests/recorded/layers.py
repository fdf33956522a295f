# SPDX-License-Identifier: Apache-2.0
"""The modules of lrkern.nn from their making to their merging, for ../unchanged.py."""

import copy
import itertools

import torch
from torch import nn

from lrkern.nn import FusedLoRALinear, NOLALinear, RandLoRALinear, VeRALinear

from .common import DTYPES, attempt, rand, shaken, step

BASIS = ({}, {"distribution": "ternary6", "dropout": 0.3}, {"seed": 2**62, "adapter_dtype": torch.bfloat16})
LAYERS = [
    *(
        (FusedLoRALinear, {"r": 4, "init": init, "use_dora": dora})
        for init in ("kaiming", "gaussian", "pissa", "olora")
        for dora in (False, True)
    ),
    *(
        (FusedLoRALinear, {"r": 3, "dropout": 0.3, "use_dora": dora, "train_bias": True, "use_rslora": True})
        for dora in (False, True)
    ),
    (FusedLoRALinear, {"r": 0}),
    (FusedLoRALinear, {"r": 5, "adapter_dtype": torch.bfloat16, "bias": False}),
    *(
        (NOLALinear, {"r": 4, "k": 9, "l": 8, "seed": 5, "normalize": n, "frozen_a": f} | more)
        for n in (False, True)
        for f in (False, True)
        for more in BASIS
    ),
    *(
        (VeRALinear, {"r": 9, "max_in": 64, "seed": 6, "save_output": save} | more)
        for save in (False, True)
        for more in BASIS
    ),
    *(
        (RandLoRALinear, {"r": 6, "randlora_alpha": 9.0, "seed": 7, "paper_pairing": p} | more)
        for p in (False, True)
        for more in BASIS
    ),
]
WHOLE, WRONG_SEEDS = (-1, 0, 1.5, "x", True, 2**31), (-1, 2**63, 1.5, "x")
WRONG = [
    *(
        (FusedLoRALinear, {k: v})
        for k, vs in {"r": (-1, 513), "dropout": (-0.1, 1.1, float("nan")), "init": ("x", None)}.items()
        for v in vs
    ),
    (FusedLoRALinear, {"r": 0, "use_dora": True}),
    (FusedLoRALinear, {"bias": False, "train_bias": True}),
    (FusedLoRALinear, {"rank": 3}),
    *((cls, {"r": v}) for cls in (NOLALinear, VeRALinear, RandLoRALinear) for v in WHOLE),
    *((cls, {"seed": v}) for cls in (NOLALinear, VeRALinear, RandLoRALinear) for v in WRONG_SEEDS),
    *(
        (cls, {k: v})
        for cls in (NOLALinear, VeRALinear, RandLoRALinear)
        for k, vs in {"dropout": (-0.1, 1.1), "distribution": ("x", None), "rank": (3,)}.items()
        for v in vs
    ),
    *((NOLALinear, {k: v}) for k in ("k", "l") for v in (*WHOLE, 4097)),
    *((VeRALinear, {k: v}) for k in ("max_in", "max_out") for v in WHOLE),
    *(
        (cls, {k: v})
        for cls, k in ((NOLALinear, "lora_alpha"), (VeRALinear, "d_initial"), (RandLoRALinear, "randlora_alpha"))
        for v in (float("nan"), float("inf"), "x")
    ),
]


def life(layer: nn.Module, fresh: nn.Module):
    """What a layer does from its making to its merging; fresh: another one of the same settings."""
    run = lambda x, m=layer: attempt(m, x)  # not every pair of dtypes is taken
    w, dtype = layer.base_layer.weight, layer.base_layer.weight.dtype
    yield "new", {"repr": repr(layer), "state": layer.state_dict(), "scaling": str(getattr(layer, "scaling", None))}
    if not isinstance(layer, FusedLoRALinear):
        yield "settings", str(layer.settings)
    yield "trains", ", ".join(n for n, p in layer.named_parameters() if p.requires_grad)
    shaken(layer)
    for T in (1, 3, 20, 200):
        x = rand(T, layer.in_features, dtype=dtype)
        yield f"train/{T}", attempt(step, layer.train(), x)
        yield f"eval/{T}", [attempt(step, layer.eval(), x), run(x), run(x[:, None])]
    yield "autocast", attempt(step, layer, x, cast=True)
    with torch.no_grad():
        yield "no_grad", [run(x), run(x), run(x[0])]
    yield "delta_weight", layer.delta_weight()
    for hook in ("factors", "projections"):
        found = getattr(layer, hook, None) if type(layer) in (NOLALinear, VeRALinear, RandLoRALinear) else None
        yield hook, str(found()) if hook == "projections" and found else found() if found else None
    yield "loaded", str(attempt(fresh.load_state_dict, layer.state_dict()))
    yield "loaded", {"state": fresh.state_dict(), "y": run(x, fresh.eval()), "copy": run(x, copy.deepcopy(layer))}
    for key in layer.state_dict():
        yield (
            f"without {key}",
            attempt(fresh.load_state_dict, {k: v for k, v in layer.state_dict().items() if k != key}),
        )
        for value in (torch.tensor(-1), torch.tensor(1.5), torch.ones(2, 2), torch.ones(3)):
            yield f"{key}: {value.tolist()}", attempt(fresh.load_state_dict, layer.state_dict() | {key: value})
    layer.disable_adapter()
    yield "disabled", [repr(layer), run(x)]
    layer.enable_adapter()
    layer.merge()
    yield "merged", [repr(layer), w, run(x), attempt(layer.delta_weight)]
    layer.unmerge()
    yield "unmerged", [repr(layer), w, run(x)]
    with torch.no_grad():
        last = [p for p in layer.parameters() if p.requires_grad]
        for p in last[-1:]:
            p.fill_(float("inf"))
    yield "merge of inf", [attempt(layer.merge), w, repr(layer)]


def modules(recording: bool):
    for (cls, settings), (I, O), dtype in itertools.product(LAYERS, ((24, 40), (40, 24), (64, 64)), DTYPES[:2]):
        if cls is FusedLoRALinear and settings.get("adapter_dtype", dtype) != dtype:  # refused
            continue
        name = f"{cls.__name__} {settings} {I}x{O} {str(dtype)[6:]}"
        torch.manual_seed(0)
        layer, fresh = (cls(I, O, dtype=dtype, **settings) for _ in range(2))
        for what, value in life(layer, fresh):
            yield f"{name}/{what}", value
        base = nn.Linear(I, O, dtype=dtype)
        over = attempt(
            lambda cls=cls, s=settings, base=base: cls.from_linear(base, **{k: v for k, v in s.items() if k != "bias"})
        )
        yield f"{name}/from_linear", [repr(over), over.state_dict(), str(over.base_layer is base)]
    for cls, settings in WRONG:
        yield f"{cls.__name__} {settings}", repr(attempt(cls, 24, 40, **settings))
    for cls in (FusedLoRALinear, NOLALinear, VeRALinear, RandLoRALinear):
        yield f"{cls.__name__}/from_linear", [attempt(cls.from_linear, m) for m in (nn.ReLU(), None, cls(4, 4, r=1))]
        yield f"{cls.__name__}/seeds", [str(getattr(cls(8, 8, r=1, bias=False), "seed", None)) for _ in range(2)]
