# SPDX-License-Identifier: Apache-2.0
"""Data and tensor parallelism of lrkern.peft, for test_peft_train.py: what two processes check together."""

import itertools

import pytest
import torch
import torch.distributed as dist
import two_processes

from minilm import (  # isort: skip
    adapted, assert_as_exact, assert_report_is_true, assert_same, batch, bert, forward, fused_calls, lora_config, lora_layers, peft,
    with_magnitudes,
)  # fmt: skip
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lrkern.ops
import lrkern.peft

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def inputs(rank):
    """Another batch on each rank."""
    return {"inputs_embeds": batch()["inputs_embeds"].roll(rank, 0) * (1 + rank)}


def backward(model, rank, wrapper=None, **kwargs):
    """Output and gradients of the rank's batch; sharded gradients are gathered."""
    y = forward(wrapper or model, **inputs(rank), **kwargs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3 + rank))
    (y.float() * g).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {n: grad.full_tensor() if isinstance(grad, DTensor) else grad for n, grad in grads.items()}


def fused(model, rank, wrapper=None):
    """backward(), having run every layer on lrkern."""
    assert_report_is_true(model, lambda m: forward(wrapper or m, **inputs(rank)), len(lora_layers(model)))
    with fused_calls() as calls:
        result = backward(model, rank, wrapper)
    assert calls.total() == len(lora_layers(model)), calls
    return result


def mean_over_ranks(make, rank):
    """What a data-parallel run must give: this rank's output, the mean of all ranks' gradients, by one stock process."""
    runs = [backward(make(), r) for r in range(dist.get_world_size())]
    return runs[rank][0], {n: sum(run[1][n] for run in runs) / len(runs) for n in runs[0][1]}


def patched(make=lambda: adapted(2)):
    model = make()
    report = lrkern.peft.patch(model)
    assert report.fused == len(report.layers) == len(lora_layers(model)), str(report)
    return model


def patched_any(make):
    model = make()
    lrkern.peft.patch(model)
    return model


def sharded(model, **options):
    for module in (*model.base_model.model.encoder.layer, model.base_model.model.pooler):
        fully_shard(module, **options)
    return fully_shard(model, **options)


@check
def ddp(rank):
    model = patched()
    assert_same(fused(model, rank, DistributedDataParallel(model)), mean_over_ranks(lambda: adapted(2), rank))


@check
def ddp_dora(rank):
    make = lambda: adapted(2, use_dora=True)
    model = patched(make)
    got = fused(model, rank, DistributedDataParallel(model))
    assert_same(got, mean_over_ranks(make, rank), y_tol=2e-5)


@check
def fsdp2(rank):
    want, model = mean_over_ranks(lambda: adapted(2), rank), sharded(patched())
    assert_same(fused(model, rank), want)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        adapter, stock = peft.get_peft_model_state_dict(model, state), peft.get_peft_model_state_dict(adapted(2))
        assert list(adapter) == list(stock) and all(torch.equal(adapter[key], stock[key]) for key in stock)


@check
def fsdp2_dora(rank):
    make = lambda: adapted(2, use_dora=True)
    assert_same(fused(sharded(patched(make)), rank), mean_over_ranks(make, rank), y_tol=2e-5)


@check
def fsdp2_dora_reads_new_weights(rank):
    """FSDP2 gathers without counting up versions: what eval keeps of A and B must not outlive them."""
    make = lambda: with_magnitudes(adapted(2, use_dora=True))
    stock, ours = make(), sharded(patched(make))
    with torch.no_grad():
        for factor in (1.0, 1.5, 0.5):
            for p in (*stock.parameters(), *ours.parameters()):
                (p.to_local() if isinstance(p, DTensor) else p).mul_(factor)
            atol = (
                2.5e-5 if factor == 1.5 else 2e-5
            )  # seen, without FSDP too: 2.4e-5 where all weights are 1.5 times theirs
            torch.testing.assert_close(forward(ours, **inputs(rank)), forward(stock, **inputs(rank)), atol=atol, rtol=0)


@check
def fsdp2_around_every_layer(rank):
    """fully_shard gives every layer a class of its own, below which nothing can be swapped any more."""
    model = patched()
    for layer in lora_layers(model).values():
        fully_shard(layer)
    fully_shard(model)
    want = mean_over_ranks(lambda: adapted(2), rank)
    assert_same(fused(model, rank), want)
    with pytest.raises(RuntimeError, match="lrkern.peft.unpatch: FSDPLinear"):
        lrkern.peft.unpatch(model)
    model.zero_grad()
    assert_same(backward(model, rank), want)


@check
def fsdp2_before_patch(rank):
    model = sharded(adapted(2))
    lrkern.peft.patch(model)
    assert_same(fused(model, rank), mean_over_ranks(lambda: adapted(2), rank))


@check
def mixed_training(rank):
    """Other names on each rank. DDP finds out that an adapter has no rows on one; FSDP2 reduces what has a gradient, so there
    each rank must have rows of the same adapters."""

    def make():
        model = adapted(2)
        torch.manual_seed(6)
        model.add_adapter("b", lora_config(r=20))
        model.set_requires_grad(["default", "b"])
        lrkern.peft.patch(model, mixed_training=True)
        return model.train()

    def want(who):
        runs, grads = [backward(make(), r, adapter_names=who[r]) for r in range(2)], {}
        for name, grad in [*runs[0][1].items(), *runs[1][1].items()]:
            grads[name] = grads.get(name, 0) + grad / 2
        return runs[rank][0], grads

    who = (["default", "b", "b"], ["__base__", "default", "default"])
    model = make()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    assert_same(backward(model, rank, wrapper, adapter_names=who[rank]), want(who))
    who = (["default", "b", "b"], ["b", "__base__", "default"])
    assert_same(backward(sharded(make()), rank, adapter_names=who[rank]), want(who))


@check
def fsdp2_reports_what_is_not_fused(rank):
    """A rank that is too large, a dtype that only the gathered factors have, factors that are still sharded when gathered."""
    wide = lambda: adapted(1, target_modules=["query", "key"], rank_pattern={"key": 600}, use_dora=False)
    for options in (
        {},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        {"reshard_after_forward": False},
    ):
        assert_report_is_true(sharded(patched_any(wide), **options), fused=1)
    model = sharded(
        patched_any(lambda: adapted(1).to(torch.float64)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32)
    )
    assert_report_is_true(model, lambda m: forward(m, inputs_embeds=inputs(rank)["inputs_embeds"].double()), fused=7)
    model = sharded(adapted(1))
    before = dict(model.named_parameters())
    assert lrkern.peft.report(model).fused == 0, "not patched"
    assert lrkern.peft.patch(model).fused == 7
    assert all(before[name] is p for name, p in model.named_parameters())


@check
def fsdp2_offloaded_and_checkpointed(rank):
    want = mean_over_ranks(lambda: adapted(2), rank)
    model = sharded(patched().train(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_report_is_true(model, lambda m: backward(m, rank), fused=13)
    model.zero_grad()
    assert_same(backward(model, rank), want)


@check
def fsdp1(rank):
    """The older FSDP swaps plain tensors in for the parameters during forward and backward."""
    for make in (lambda: adapted(2), lambda: adapted(2, use_dora=True)):
        want, model = mean_over_ranks(make, rank), patched(make)
        wrapper = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with torch.no_grad():
            assert_report_is_true(wrapper, lambda m: forward(m, **inputs(rank)), fused=13)
        with fused_calls() as calls:
            y = forward(wrapper, **inputs(rank))
        assert calls.total() == 13
        torch.testing.assert_close(y, want[0], atol=2e-5, rtol=0)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3 + rank))
        (y * g).sum().backward()
        with FullyShardedDataParallel.summon_full_params(wrapper, with_grads=True):
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if n in want[1]}
        assert_same((y.detach(), grads), want, y_tol=2e-5)


def mixed_precision(rank, make):
    """bf16 parameters and activations, fp32 gradients: as far from the truth as stock PEFT under the same policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    got = fused(sharded(patched(make), mp_policy=policy), rank)
    stock = backward(sharded(make(), mp_policy=policy), rank)
    truth = mean_over_ranks(make, rank)
    assert got[0].dtype == got[1]["base_model.model.pooler.dense.lora_A.default.weight"].dtype == torch.float32
    assert_as_exact(got, stock, truth)


@check
def fsdp2_mixed_precision(rank):
    mixed_precision(rank, lambda: adapted(2))


@check
def fsdp2_mixed_precision_dora(rank):
    mixed_precision(rank, lambda: adapted(2, use_dora=True))


SHAPES = {"x": (2, 4, 16), "weight": (8, 16), "bias": (8,), "a": (4, 16), "b": (8, 4), "base_scale": (8,)}
SHAPES |= {"y": (2, 4, 8), "s": (2, 4, 4)}


def parallel(placements, op=lrkern.ops.lora_linear, **options):
    """An op on DTensors of these placements (None leaves an argument out) against the same on whole tensors, forward and
    backward. Returns how the output is placed."""
    mesh, results = init_device_mesh("cpu", (2,)), []
    torch.manual_seed(0)
    tensors = {name: torch.randn(SHAPES[name]) for name, placement in placements.items() if placement}
    for shard in (False, True):
        t = {
            name: (distribute_tensor(v, mesh, [placements[name]]) if shard else v.clone()).requires_grad_()
            for name, v in tensors.items()
        }
        extra = dict(options)
        if "seed" in extra and shard:
            extra["seed"] = distribute_tensor(extra["seed"], mesh, [Replicate()])
        given = {"bias": None} | t if "weight" in t else t
        y = op(**given, scale=0.5, **extra)
        whole = y.full_tensor() if shard else y
        whole.cos().sum().backward()
        results.append((whole.detach(), {name: v.grad.full_tensor() if shard else v.grad for name, v in t.items()}))
    assert_same(results[1], results[0])
    return y.placements


R, S = Replicate(), Shard
COLUMN = {"x": R, "weight": S(0), "bias": S(0), "a": R, "b": S(0)}
ROW = {"x": S(2), "weight": S(1), "bias": R, "a": S(1), "b": R}
TOKENS = {"x": S(0), "weight": R, "bias": R, "a": R, "b": R}


@check
def dtensor_column_parallel(rank):
    assert parallel(COLUMN) == (Shard(2),), "the output stays sharded by columns"
    assert parallel(COLUMN | {"bias": None}) == (Shard(2),)
    parallel(COLUMN | {"base_scale": S(0)})


@check
def dtensor_row_parallel(rank):
    parallel(ROW)
    assert parallel(ROW | {"bias": None})[0].is_partial(), "the sum over ranks is left to whoever needs it"


@check
def dtensor_data_and_sequence_parallel(rank):
    assert parallel(TOKENS) == (Shard(0),)
    assert parallel(TOKENS | {"x": S(1)}) == (Shard(1),)


@check
def dtensor_of_any_placement(rank):
    """What no rule covers is gathered first, never wrong."""
    for x, w, a, b in itertools.product((R, S(0), S(2)), (R, S(0), S(1)), (R, S(0), S(1)), (R, S(0), S(1))):
        parallel({"x": x, "weight": w, "bias": S(0), "a": a, "b": b, "base_scale": R})
    parallel(dict.fromkeys(("x", "weight", "bias", "a", "b", "base_scale"), R))


@check
def dtensor_of_the_other_ops(rank):
    add, shrink, expand = lrkern.ops.lora_add, lrkern.ops.lora_shrink, lrkern.ops.linear_expand
    assert parallel({"y": S(0), "x": S(0), "a": R, "b": R}, add) == (Shard(0),)
    assert parallel({"y": S(2), "x": R, "a": R, "b": S(0)}, add) == (Shard(2),)
    parallel({"y": S(1), "x": S(2), "a": S(1), "b": S(1)}, add)  # no rule
    assert parallel({"x": S(1), "a": R}, shrink) == (Shard(1),)
    assert parallel({"x": S(2), "a": S(1)}, shrink)[0].is_partial()
    assert parallel({"x": S(0), "weight": R, "bias": R, "s": S(0), "b": R}, expand) == (Shard(0),)
    assert parallel({"x": R, "weight": S(0), "bias": S(0), "s": R, "b": S(0)}, expand) == (Shard(2),)
    for op, of in ((add, "yxab"), (shrink, "xa")):
        parallel({n: S(0) if n in "yx" else R for n in of}, op, dropout_p=0.5, seed=torch.tensor([5]))


@check
def dtensor_dropout_has_the_mask_of_the_whole(rank):
    for placements in (COLUMN, ROW, TOKENS, TOKENS | {"x": S(1)}):
        parallel(placements, dropout_p=0.5, seed=torch.tensor([5]))


@check
def dtensor_layer(rank):
    """A patched layer whose base and B are sharded by columns, as PEFT's tensor parallelism leaves them."""
    mesh, x, results = init_device_mesh("cpu", (2,)), torch.randn(4, 384), []
    dist.broadcast(x, 0)
    for ours, shard in ((False, False), (True, True)):
        model = adapted(1, target_modules=["query"])
        layer = next(iter(lora_layers(model).values()))
        if ours:
            lrkern.peft.patch(model)
        if shard:
            for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
                placement = Replicate() if module is layer.lora_A["default"] else Shard(0)
                for name, p in list(module.named_parameters()):
                    local = distribute_tensor(p.detach(), mesh, [placement])
                    module.register_parameter(name, torch.nn.Parameter(local, p.requires_grad))
        given = distribute_tensor(x, mesh, [Replicate()]) if shard else x
        if ours:
            assert_report_is_true(model, lambda m, layer=layer, given=given: layer(given))
        y = layer(given)
        whole = y.full_tensor() if shard else y
        whole.cos().sum().backward()
        grads = {n: p.grad.full_tensor() if shard else p.grad for n, p in layer.named_parameters() if p.requires_grad}
        results.append((whole.detach(), grads))
    assert_same(results[1], results[0])


if __name__ == "__main__":
    bert(1)  # both processes read the weights before the first check's clock runs
    two_processes.main(CHECKS)
