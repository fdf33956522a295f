# SPDX-License-Identifier: Apache-2.0
"""Every rule of lrkern.optim over a small model, for tests: what makes both, and how a step goes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from lrkern import optim
from lrkern.nn import FusedLoRALinear, variants

STEPS = 12
IN, MID, OUT = 12, 16, 8


class Case(NamedTuple):
    layer: type
    settings: dict
    rule: Callable[[nn.Module], optim.Rule]  # with something to do before and after half of STEPS
    moves: str  # what of the layers it must have changed: a parameter or a setting


GROUPS = [optim.PruneGroup(("0",), ("2",), 2)]
RULES = {
    "adalora": Case(
        variants.AdaLoRALinear,
        {"r": 4},
        lambda m: optim.AdaLoRABudget(m, 2, STEPS, tinit=1, tfinal=3, deltaT=2),
        "lora_E",
    ),
    "beamlora": Case(
        variants.BeamLoRALinear,
        {"r": 4},
        lambda m: optim.BeamLoRABeam(m, 4, 100, threshold=0.6, seed=2),
        "lora_A",
    ),
    "cola": Case(variants.COLALinear, {"r": 2}, lambda m: optim.COLARestart(m, 5, 2, seed=2), "links"),
    "dylora": Case(variants.DyLoRALinear, {"r": 4}, lambda m: optim.DyLoRASampler(m, seed=2), "active"),
    "increlora": Case(
        variants.IncreLoRALinear,
        {"r": 1, "reserve": 2},
        lambda m: optim.IncreLoRAGrowth(m, 4, 3, add=2, seed=2),
        "r",
    ),
    "loraprune": Case(
        variants.LoRAPruneLinear,
        {"r": 2},
        lambda m: optim.LoRAPrunePruning(m, GROUPS, STEPS, every=2),
        "mask",
    ),
    "prilora": Case(variants.PRILoRALinear, {"r": 2}, lambda m: optim.PRILoRAPruning(m, every=4), "mask_A"),
    "relora": Case(
        FusedLoRALinear, {"r": 2}, lambda m: optim.ReLoRARestart(m, 5, keep=0.25, seed=2), "base_layer.weight"
    ),
    "roselora": Case(variants.RoseLoRALinear, {"r": 2}, lambda m: optim.RoseLoRATopK(m, STEPS, 0.3), "lora_A"),
    "sora": Case(variants.SoRALinear, {"r": 4}, lambda m: optim.SoRAProx(m, 4.0), "lora_gate"),
}


def model(case: Case, seed: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers "0" and "2", all of this dtype."""
    torch.manual_seed(seed)
    linears = nn.Linear(IN, MID, dtype=dtype), nn.Linear(MID, OUT, dtype=dtype)
    first, second = (case.layer.from_linear(linear, **case.settings, adapter_dtype=dtype) for linear in linears)
    return nn.Sequential(first, nn.Tanh(), second)


def adamw(m: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02)


def batch(n: int, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of step n: x and what y should be."""
    g = torch.Generator().manual_seed(100 * n + part)
    return torch.randn(6, IN, generator=g), torch.randn(6, OUT, generator=g)


def train(m: nn.Module, optimizer, rule: optim.Rule, steps, parts: int = 1) -> None:
    """Steps of a plain loop, each of so many batches."""
    for n in steps:
        for part in range(parts):
            x, want = (t.to(m[0].base_layer.weight.dtype) for t in batch(n, part))
            (nn.functional.mse_loss(m(x), want) / parts).backward()
        optimizer.step()
        rule.step(optimizer)
        optimizer.zero_grad()


def layer_values(m: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, by their plain names."""
    return {n.removeprefix("module."): p.detach().clone() for n, p in m.named_parameters()}


def flat(state, name: str = "") -> dict[str, object]:
    """A nested state by path."""
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, list):
        pairs = enumerate(state)
    else:
        return {name: state}
    return {k: v for key, value in pairs for k, v in flat(value, f"{name}/{key}").items()}


def same(got, want) -> None:
    """Nested states, bit for bit."""
    got, want = flat(got), flat(want)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for key, value in want.items():
        equal = torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value
        assert equal, f"{key}: {got[key]}, should be {value}"
