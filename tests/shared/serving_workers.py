# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism of lrkern.serving, for test_serving.py: what two processes check together."""

import torch
import torch.distributed as dist
import two_processes
from torch import Tensor, nn

from lrkern.serving import AdapterPool, MultiLoraModel

CHECKS = {}
HIDDEN, INNER, RANKS = 32, 48, {"small": 5, "large": 40}
MODES = {"up": "column", "down": "row"}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Block(nn.Module):
    """gate (never sharded), up (by columns), down (by rows)."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(torch.tanh(self.gate(x)))))


class RowLinear(nn.Linear):
    """Megatron's: this process's columns of W, y summed over the group."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        dist.all_reduce(y)
        return y + self.bias


def whole() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def sharded(rank: int) -> Block:
    model, world = whole(), dist.get_world_size()
    up, down = nn.Linear(HIDDEN, INNER // world), RowLinear(INNER // world, HIDDEN)
    with torch.no_grad():
        up.weight.copy_(model.up.weight.chunk(world)[rank])
        up.bias.copy_(model.up.bias.chunk(world)[rank])
        down.weight.copy_(model.down.weight.chunk(world, 1)[rank])
        down.bias.copy_(model.down.bias)
    model.up, model.down = up, down
    return model.eval()


def fill(pool: AdapterPool) -> AdapterPool:
    for name, r in RANKS.items():
        g, tensors = torch.Generator().manual_seed(r), {}
        for layer, (i, o) in (("gate", (HIDDEN, HIDDEN)), ("up", (HIDDEN, INNER)), ("down", (INNER, HIDDEN))):
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(r, i, generator=g)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(o, r, generator=g)
        pool.add(
            name, {"peft_type": "LORA", "r": r, "lora_alpha": 0.3, "target_modules": ["gate", "up", "down"]}, tensors
        )
    return pool


def serve(model: Block, pool: AdapterPool) -> Tensor:
    x = torch.randn(5, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    who = ["small", None, "large", ["small", "large"], "small"]
    with MultiLoraModel(model, pool) as served:
        return served(x, adapters=who, scales=[1, None, 0.5, [2, -1], 1])


@check
def column_and_row_parallel(rank):
    """The sharded model is the whole one, base rows and adapter rows."""
    model = whole()
    want = serve(model, fill(AdapterPool(model, pages=4)))
    model = sharded(rank)
    pool = fill(AdapterPool(model, pages=4, parallel=MODES))
    assert [layer.local for layer in pool._layers.values()] == [(32, 32), (32, 24), (24, 32)]
    assert [layer.whole for layer in pool._layers.values()] == [(32, 32), (32, 48), (48, 32)]
    got = serve(model, pool)
    assert (want - whole()(torch.zeros(1, HIDDEN))).abs().max() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    results = [torch.empty_like(got) for _ in range(dist.get_world_size())]
    dist.all_gather(results, got)
    assert torch.equal(*results), "both processes have the same bits"


@check
def vectors_column_and_row_parallel(rank):
    """VeRA: A's columns or B's are split, d is whole, and so is what they answer."""

    def fill(pool: AdapterPool) -> AdapterPool:
        g = torch.Generator().manual_seed(3)
        pair = {
            "base_model.vera_A": torch.randn(5, INNER, generator=g),
            "base_model.vera_B": torch.randn(INNER, 5, generator=g),
        }
        for name in ("small", "large"):
            tensors = dict(pair)
            for layer, o in (("gate", HIDDEN), ("up", INNER), ("down", HIDDEN)):
                tensors[f"base_model.model.{layer}.vera_lambda_d"] = torch.randn(5, generator=g) * 0.3
                tensors[f"base_model.model.{layer}.vera_lambda_b"] = torch.randn(o, generator=g) * 0.3
            settings = {"peft_type": "VERA", "r": 5, "projection_prng_key": 0, "target_modules": ["gate", "up", "down"]}
            pool.add(name, settings, tensors)
        return pool

    model = whole()
    want = serve(model, fill(AdapterPool(model, pages=1)))
    model = sharded(rank)
    got = serve(model, fill(AdapterPool(model, pages=1, parallel=MODES)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    x = torch.randn(5, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert (want - whole()(x)).abs().max() > 0.1


@check
def magnitudes_and_biases_parallel(rank):
    """DoRA where rows of W are whole, biases everywhere; DoRA of a linear that is split by rows is refused."""
    sizes = {"gate": (HIDDEN, HIDDEN), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}

    def adapter(seed: int, layers: list[str], **config):
        g, tensors = torch.Generator().manual_seed(seed), {}
        for layer in layers:
            i, o = sizes[layer]
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(5, i, generator=g)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(o, 5, generator=g)
            if config.get("use_dora"):
                tensors[f"base_model.model.{layer}.lora_magnitude_vector"] = torch.rand(o, generator=g) + 0.5
            if config.get("bias"):
                tensors[f"base_model.model.{layer}.base_layer.bias"] = torch.randn(o, generator=g)
        return {"peft_type": "LORA", "r": 5, "lora_alpha": 0.3, "target_modules": layers} | config, tensors

    def fill(pool: AdapterPool) -> AdapterPool:
        pool.add("small", *adapter(1, ["gate", "up"], use_dora=True, bias="lora_only"))
        pool.add("large", *adapter(2, ["gate", "up", "down"], bias="lora_only"))
        return pool

    x = torch.randn(4, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    model, who = whole(), ["small", None, "large", ["small", "large"]]
    want = MultiLoraModel(model, fill(AdapterPool(model, pages=4)))(x, adapters=who)
    model = sharded(rank)
    pool = fill(AdapterPool(model, pages=4, parallel=MODES))
    torch.testing.assert_close(MultiLoraModel(model, pool)(x, adapters=who), want, atol=1e-5, rtol=1e-5)
    assert ((want - whole()(x)).abs().amax((1, 2)) > 0.1).tolist() == [True, False, True, True]
    try:
        pool.add("rows", *adapter(3, ["down"], use_dora=True))
    except ValueError as error:
        assert "down must not be split by rows for DoRA" in str(error)
    else:
        raise AssertionError("not refused")


@check
def eviction_is_the_same_on_every_rank(rank):
    model = sharded(rank)
    pool = fill(AdapterPool(model, pages=3, parallel=MODES))
    reference = whole()
    stock = fill(AdapterPool(reference, pages=4))
    x = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    with MultiLoraModel(model, pool) as ours, MultiLoraModel(reference, stock) as theirs:
        for name in ("small", "large", "small", None, "large"):
            torch.testing.assert_close(ours(x, adapters=[name]), theirs(x, adapters=[name]), atol=1e-5, rtol=1e-5)


@check
def a_shard_of_an_adapter_is_refused(rank):
    """Files hold whole adapters: what fits the shard does not fit the layer."""
    pool = AdapterPool(sharded(rank), pages=4, parallel=MODES)
    tensors = {
        f"base_model.model.up.lora_{x}.weight": torch.ones(shape) for x, shape in (("A", (4, 32)), ("B", (24, 4)))
    }
    try:
        pool.add("shard", {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "target_modules": ["up"]}, tensors)
    except ValueError as error:
        assert "up.lora_B must have shape [48, 4], got [24, 4]" in str(error)
    else:
        raise AssertionError("not refused")


if __name__ == "__main__":
    two_processes.main(CHECKS)
