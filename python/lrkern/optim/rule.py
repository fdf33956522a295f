# SPDX-License-Identifier: Apache-2.0
"""What goes with a method beside its optimizer: the base class, and what several of them share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.linear import AdapterLinear
from . import surgery


class Rule:
    """A rule that acts once a step on all layers of its kind in a model: masks, ranks, thresholds, restarts.

        rule = lrkern.optim.AdaLoRABudget(model, target_r=4, total_steps=1000)
        for x in data:
            loss(model(x)).backward()
            optimizer.step()
            rule.step(optimizer)  # after both, once a step of the optimizer, while the gradients are there
            optimizer.zero_grad()

    Under gradient accumulation that is once for all its batches. Where a GradScaler skipped the optimizer's step, call ``skip`` instead.
    ``StepCallback`` does all this in transformers' Trainer. ``steps`` is the number of steps so far.

    Under DistributedDataParallel every process has its own rule and calls it alike. All come to the same decisions: gradients are the
    same there, what each process has seen for itself is averaged over all, and draws come from a generator that the rule owns, begun from
    ``seed``. torch's own generator is left as it is. Where ``step`` returns True, parameters that train are new ones: wrap the model in
    DistributedDataParallel anew, or call ``surgery.rewrap`` of the wrapper. Parameters and optimizers that are sharded (FSDP2,
    ZeroRedundancyOptimizer) are refused.

    ``state_dict`` has what a run needs to go on bit for bit as if it had not been broken off, beside the model's state_dict and the
    optimizer's. Load it first, over a model made as at the beginning: it gives the layers the shapes that they had, which the
    model's state_dict then fits and a new optimizer takes.
    """

    LAYER: ClassVar[type[AdapterLinear]]
    SETTINGS: ClassVar[tuple[str, ...]] = ()  # arguments; attributes of these names
    MOVES: ClassVar[tuple[str, ...]] = ()  # attributes of a layer that steps change
    SEEN: ClassVar[tuple[str, ...]] = ()  # what a layer gathers and neither its files nor its state_dict have
    OPTIMIZER: ClassVar[bool] = False  # whether a step needs to be given the optimizer
    RESHAPES: ClassVar[str] = ""  # "parameters" that train become others, or what is "frozen"

    def __init__(self, model: nn.Module, **settings: Any):
        found = {plain(name): m for name, m in model.named_modules() if isinstance(m, self.LAYER)}
        if not found:
            raise ValueError(f"{type(self).__name__}: model must have {self.LAYER.__name__} layers, got none")
        self.layers: dict[str, AdapterLinear] = found
        self.steps = 0
        for name in self.SETTINGS:
            setattr(self, name, settings[name])

    @torch.no_grad()
    def step(self, optimizer: Optimizer | None = None) -> bool:
        """Acts for the step that the optimizer has just taken. Returns whether parameters that train are new ones now, in the optimizer too."""
        kind = type(self).__name__
        for name, layer in self.layers.items():
            if layer.merged:
                raise RuntimeError(f"{kind}.step: layers must not be merged, got {name!r} merged; unmerge() first")
            if any(hasattr(p, "device_mesh") for p in layer.parameters()):
                raise TypeError(f"{kind}.step: parameters must be whole in every process, got a DTensor in {name!r}")
        if optimizer is None and self.OPTIMIZER:
            raise TypeError(f"{kind}.step: optimizer must be the one that trains the model, got None")
        new = self._step(self.steps + 1, None if optimizer is None else surgery.bare(optimizer))
        self.steps += 1
        return bool(new)

    def skip(self) -> None:
        """In place of ``step`` where the optimizer's step was skipped: forgets what its batches showed."""

    def _step(self, n: int, optimizer: Optimizer | None) -> bool | None:
        """The n-th step, under no_grad."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """What the rule itself keeps, of tensors, numbers, texts, lists and dicts."""
        return {}

    def _load(self, state: dict[str, Any]) -> None:
        """Takes it back. Tensors are on the CPU or where they were."""

    def state_dict(self) -> dict[str, Any]:
        """Fit for torch.save, and torch.load with weights_only."""
        layers = {}
        for name, layer in self.layers.items():
            shapes = {n: [*p.shape] for n, p in layer._parameters.items() if p is not None}
            seen = {n: getattr(layer, n).clone() for n in self.SEEN if getattr(layer, n) is not None}
            layers[name] = {"moves": {n: getattr(layer, n) for n in self.MOVES}, "shapes": shapes, "seen": seen}
        settings = {name: getattr(self, name) for name in self.SETTINGS}
        return {
            "kind": type(self).__name__,
            "settings": settings,
            "steps": self.steps,
            "layers": layers,
            "state": self._state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the model's and the optimizer's. The rule and the layers' names must be those of the state, or nothing changes."""
        now = self.state_dict()
        for what in ("kind", "settings"):
            if state.get(what) != now[what]:
                raise ValueError(f"{now['kind']}.load_state_dict: {what} must be {now[what]}, got {state.get(what)}")
        if (must := sorted(now["layers"])) != (got := sorted(state["layers"])):
            raise ValueError(f"{now['kind']}.load_state_dict: layers must be {must}, got {got}")
        for name, saved in state["layers"].items():
            layer = self.layers[name]
            for n, shape in saved["shapes"].items():
                _reshape(layer, n, shape)
            for n in self.MOVES:
                setattr(layer, n, saved["moves"][n])
            for n in self.SEEN:
                t = saved["seen"].get(n)
                setattr(layer, n, t if t is None else t.to(layer.base_layer.weight.device, copy=True))
        self.steps = state["steps"]
        self._load(state["state"])

    def _must(self, name: str, fits: bool, must: str) -> None:
        if not fits:
            raise ValueError(f"{type(self).__name__}: {name} must {must}, got {getattr(self, name)!r}")

    def _whole(self, name: str, low: int = 0) -> None:
        value = getattr(self, name)
        self._must(name, type(value) is int and value >= low, f"be a whole number >= {low}")

    def _share(self, name: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        self._must(name, number and 0 <= value <= 1, "lie in [0, 1]")

    def _gradients(self, *parts: str) -> dict[str, tuple[Tensor, Tensor]]:
        """By "layer/part" a parameter and its gradient, in float32."""
        found = {}
        for name, layer in self.layers.items():
            for part in parts:
                p = layer.get_parameter(part)
                if p.grad is None:
                    must = f"{name}.{part} must have a gradient; call it after backward() and before zero_grad()"
                    raise RuntimeError(f"{type(self).__name__}.step: {must}")
                found[f"{name}/{part}"] = p.float(), p.grad.float()
        self._decidable(*(g for _, g in found.values()))
        return found

    def _decidable(self, *scores: Tensor) -> None:
        """Scores with inf or nan order nothing, and averages never get rid of one."""
        fine = torch.stack([t.isfinite().all().to(scores[0].device) for t in scores]).all()
        if not fine:
            must = "gradients and scores must be finite, got inf or nan; nothing is changed. Where the optimizer skipped its step, call skip()"
            raise RuntimeError(f"{type(self).__name__}.step: {must}")


class Generator:
    """Draws that all processes and a resumed run agree on."""

    def __init__(self, seed: int):
        self.own = torch.Generator().manual_seed(seed)

    def whole(self, low: int, high: int) -> int:
        """From low..high."""
        return int(torch.randint(low, high + 1, (), generator=self.own))

    @contextmanager
    def as_torchs(self, device: torch.device) -> Iterator[None]:
        """Inside, torch's generator draws from a seed of this one's; outside it is what it was."""
        seed, devices = self.whole(0, 2**62), [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)
            for d in devices:
                with torch.cuda.device(d):
                    torch.cuda.manual_seed(seed)
            yield

    def state(self) -> Tensor:
        return self.own.get_state()

    def load(self, state: Tensor) -> None:
        self.own.set_state(state.cpu())


class Averages:
    """Of scores I by key: Ī = beta1 Ī + (1 - beta1) I and Ū = beta2 Ū + (1 - beta2) |I - Ī|, from zero; the sensitivity and its uncertainty
    of AdaLoRA, whose product ranks."""

    def __init__(self, beta1: float, beta2: float):
        self.betas = beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    def update(self, key: str, now: Tensor) -> None:
        (b1, b2), zero = self.betas, torch.zeros_like(now)
        self.mean[key] = b1 * self.mean.get(key, zero).to(now) + (1 - b1) * now
        self.spread[key] = b2 * self.spread.get(key, zero).to(now) + (1 - b2) * (now - self.mean[key]).abs()

    def product(self, key: str) -> Tensor:
        return self.mean[key] * self.spread[key]

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"mean": {**self.mean}, "spread": {**self.spread}}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.mean, self.spread = {**state["mean"]}, {**state["spread"]}


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def over_processes(t: Tensor) -> Tensor:
    """The mean of t over the processes of a distributed run."""
    if distributed():
        t = t.clone()
        dist.all_reduce(t)
        t /= dist.get_world_size()
    return t


def plain(name: str) -> str:
    """Without what DistributedDataParallel and torch.compile put before or into names."""
    return name.removeprefix("module.").replace("_orig_mod.", "")


def _reshape(layer: AdapterLinear, name: str, shape: list[int]) -> None:
    """A parameter of another shape in the place of one, or, frozen, where there was none."""
    p = layer._parameters.get(name)
    if p is None or [*p.shape] != shape:
        like = layer._parameters["lora_A"] if p is None else p
        setattr(layer, name, nn.Parameter(like.new_zeros(shape), p is not None and p.requires_grad))
