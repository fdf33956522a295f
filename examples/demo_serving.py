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

BOUND = 1e-4


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
        model.score = nn.Identity()  # the model then gives embeddings [requests, hidden]
        device, self.heads = model.device, {}
        pool = AdapterPool(model, pages=len(folders) * -(-RANK // 16), max_rank=RANK)
        for name, folder in folders.items():
            config, tensors = lrkern.peft.read_adapter(folder)
            weight, bias = (tensors.pop(f"base_model.model.score.{part}").to(device) for part in ("weight", "bias"))
            self.heads[name] = torch.cat([weight[0], bias])
            pool.add(name, config | {"modules_to_save": None}, tensors)
        self.model = MultiLoraModel(model.eval(), pool)

    def __call__(self, names: list[str], **batch: Tensor) -> Tensor:
        heads = torch.stack([self.heads[name] for name in names])
        return (self.model(**batch, adapters=names) * heads[:, :-1]).sum(1) + heads[:, -1]


@torch.no_grad()
def mixed_batch(
    base: Rater, stock: peft.PeftModel, served: Served, names: list[str], batch: dict[str, Tensor], device: str
) -> dict:
    """Figures of one batch, a name a request: the gap to one adapter at a time, and the time of each way."""
    alone = torch.empty(len(names), device=device)
    for name in dict.fromkeys(names):
        stock.set_adapter(name)
        rows = torch.tensor([name == n for n in names], device=device)
        alone[rows] = stock(**batch)[rows]
    ways = {
        "base": lambda: base(**batch),
        "peft": lambda: stock(**batch, adapter_names=names),
        "lrkern": lambda: served(names, **batch),
    }
    gap = float((served(names, **batch) - alone).abs().max())
    times = {way: median_and_noise(values)[0] for way, values in time_steps(ways, 15, 12.0, device).items()}
    extra = {way: times[way] - times["base"] for way in ("peft", "lrkern")}
    return dict(requests=len(names), adapters=len(set(names)), base_ms=times["base"], peft_ms=extra["peft"], gap=gap,
                lrkern_ms=extra["lrkern"], ratio=extra["lrkern"] / extra["peft"], bound=BOUND, ok=gap <= BOUND)  # fmt: skip
