# SPDX-License-Identifier: Apache-2.0
"""Adapters of a pool beside stock PEFT with one of them at a time."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from minilm import batch, bert, peft
from test_serving import hidden
from torch import Tensor, nn

from lrkern.serving import AdapterPool, MultiLoraModel


def files(model: peft.PeftModel) -> tuple[peft.PeftConfig, dict[str, Tensor]]:
    return model.peft_config["default"], peft.get_peft_model_state_dict(model)


class Alone:
    """stock(name): one layer of MiniLM, bert(1), with that adapter alone."""

    def __init__(self, stock: Callable[[str], peft.PeftModel], names: Iterable[str]):
        self.stock, self.names = stock, list(names)
        self.hidden = cache(self._hidden)

    def pool(self, model: nn.Module, names: Iterable[str] | None = None, **options: Any) -> AdapterPool:
        pool = AdapterPool(model, **{"pages": 16} | options)
        for name in self.names if names is None else names:
            pool.add(name, *files(self.stock(name)))
        return pool

    @torch.no_grad()
    def _hidden(self, name: str | None) -> Tensor:
        return hidden((bert(1) if name is None else self.stock(name))(**batch(8)))

    def check_rows(self, got: Tensor, who: Sequence[str | None], atol: float) -> None:
        for row, name in enumerate(who):
            said = lambda m, n=name: f"{n}: {m}"
            torch.testing.assert_close(got[row], self.hidden(name)[row], atol=atol, rtol=0, msg=said)


def check_beams(stocks: dict[str | None, nn.Module], model: nn.Module, pages: int) -> None:
    """generate with three beams a request: adapters a and b of stocks over the model equal stock PEFT's, token by token."""
    pool = AdapterPool(model, pages=pages)
    for name in "ab":
        pool.add(name, *files(stocks[name]))
    who = ["b", None, "a", "b"]
    ids = torch.randint(3, 97, (4, 5), generator=torch.Generator().manual_seed(1))
    options = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=3
    )
    with MultiLoraModel(model, pool) as served:
        got = served.generate(input_ids=ids, adapters=who, **options).unflatten(0, (4, -1))
    each = {name: m.generate(input_ids=ids, **options).unflatten(0, (4, -1)) for name, m in stocks.items()}
    assert not torch.equal(each["a"], each["b"]) and not torch.equal(each["a"], each[None])
    for row, name in enumerate(who):
        assert torch.equal(got[row], each[name][row]), (row, name)
