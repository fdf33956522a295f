# SPDX-License-Identifier: Apache-2.0
"""Requests with adapters of their own in one batch: stock PEFT's adapter_names= beside lrkern.serving."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from demo_model import RANK, Rater, median_and_noise, time_steps
from torch import Tensor, nn

import lrkern.peft
from lrkern.serving import AdapterPool, MultiLoraModel

BOUND, TARGET = 1e-4, 0.25  # of |dy|; of lrkern's time beside PEFT's
Names = list[str | None]  # of a batch's requests, None for the base


def stock_model(model: Rater, folders: dict[str, Path]) -> peft.PeftModel:
    """PEFT with every adapter loaded, each with its head."""
    (first, folder), *others = folders.items()
    model = peft.PeftModel.from_pretrained(model, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(str(folder), name)
    return model.eval()


class Served:
    """The same with one frozen model and a pool; the heads are a row each."""

    def __init__(self, model: Rater, folders: dict[str, Path]):
        device, score = model.device, model.score
        self.heads = {None: torch.cat([score.weight[0], score.bias])}
        model.score = nn.Identity()  # the model then gives embeddings [requests, hidden]
        pool = AdapterPool(model, pages=len(folders) * -(-RANK // 16), max_rank=RANK)
        for name, folder in folders.items():
            config, tensors = lrkern.peft.read_adapter(folder)
            weight, bias = (tensors.pop(f"base_model.model.score.{part}").to(device) for part in ("weight", "bias"))
            self.heads[name] = torch.cat([weight[0], bias])
            pool.add(name, config | {"modules_to_save": None}, tensors)
        self.model = MultiLoraModel(model.eval(), pool)

    def __call__(self, names: Names, **batch: Tensor) -> Tensor:
        heads = torch.stack([self.heads[name] for name in names])
        return (self.model(**batch, adapters=names) * heads[:, :-1]).sum(1) + heads[:, -1]


class One(nn.Module):
    """A linear of zeros: what comes out is the adapter's part alone."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = nn.Linear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def parts_are_bit_equal(served: Served, folders: dict[str, Path], names: Names, batch: dict[str, Tensor]) -> bool:
    """Whether the adapters' part of the first layer is the same bits for each request alone and for all in one batch."""
    layer = served.model.pool.layers[0]
    linear, seen = served.model.model.get_submodule(layer), []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    served(names, **batch)
    handle.remove()
    one = One(linear).eval()
    pool = AdapterPool(one, pages=len(folders) * -(-RANK // 16), max_rank=RANK)
    for name, folder in folders.items():
        config, tensors = lrkern.peft.read_adapter(folder)
        own = {key.replace(layer, "linear"): t for key, t in tensors.items() if f".{layer}.lora_" in key}
        pool.add(name, config | {"modules_to_save": None, "target_modules": ["linear"]}, own)
    with MultiLoraModel(one, pool) as model:
        together = model(seen[0], adapters=names)
        alone = [model(x[None], adapters=[name]) for x, name in zip(seen[0], names, strict=True)]
    return bool(together.any()) and torch.equal(together, torch.cat(alone))


@torch.no_grad()
def mixed_batch(
    base: Rater,
    stock: peft.PeftModel,
    served: Served,
    folders: dict[str, Path],
    names: Names,
    batch: dict[str, Tensor],
    rounds: int,
) -> dict:
    """Figures of one batch, a name a request: the gap to one request at a time, and the time of each way."""
    device = str(served.model.pool.device)

    def one_by_one() -> Tensor:
        scores = []
        for i, name in enumerate(names):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            if name is None:
                with stock.disable_adapter():
                    scores.append(stock(**row))
            else:
                stock.set_adapter(name)
                scores.append(stock(**row))
        return torch.cat(scores)

    ways = {
        "base": lambda: base(**batch),
        "peft": lambda: stock(**batch, adapter_names=["__base__" if name is None else name for name in names]),
        "lrkern": lambda: served(names, **batch),
    }
    gap = float((served(names, **batch) - one_by_one()).abs().max())
    equal = parts_are_bit_equal(served, folders, names, batch)
    times = {way: median_and_noise(values)[0] for way, values in time_steps(ways, rounds, 12.0, device).items()}
    alone = median_and_noise(time_steps({"alone": one_by_one}, 3, 0.0, device)["alone"])[0]
    extra = {way: times[way] - times["base"] for way in ("peft", "lrkern")}
    ratio = extra["lrkern"] / extra["peft"]
    return dict(requests=len(names), adapters=len(set(names) - {None}), base_rows=names.count(None), base_ms=times["base"],
                alone_ms=alone, peft_ms=extra["peft"], lrkern_ms=extra["lrkern"], ratio=ratio, target=TARGET,
                met=ratio <= TARGET, gap=gap, bound=BOUND, bit_equal=equal, ok=gap <= BOUND and equal)  # fmt: skip
