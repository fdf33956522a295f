# SPDX-License-Identifier: Apache-2.0
"""While a layer is merged, W holds the adapter: nothing may count it twice, lose it, or leave a W that unmerge does not mend."""

import copy
import io
import pickle

import pytest
import torch
from layer_kinds import EACH, KINDS, shake
from torch import nn

from lrkern.nn import FusedLoRALinear


def merged(cls, settings, **more):
    layer = shake(cls(24, 20, **settings | more)).eval()
    w, x = layer.base_layer.weight.clone(), torch.randn(5, 24)
    y = layer(x)
    layer.merge()
    return layer, w, x, y


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def refused(who, must):
    return pytest.raises(RuntimeError, match=rf"\w+Linear\.{who}: the layer must {must}")


@EACH
def test_a_state_dict_is_refused_and_loading_one_too(cls, settings):
    layer, w, x, y = merged(cls, settings)
    net = nn.Sequential(nn.Linear(24, 24), layer)
    state = nn.Sequential(nn.Linear(24, 24), shake(cls(24, 20, **settings), seed=9)).state_dict()
    before, seed = [p.clone() for p in layer.parameters()], getattr(layer, "seed", None)
    with refused("state_dict", r"not be merged \(layer '1'\); unmerge\(\) first"):
        net.state_dict()
    for strict in (True, False):
        with refused("load_state_dict", r"not be merged \(layer '1'\); unmerge\(\) first"):
            net.load_state_dict(state, strict=strict)
    assert all(map(torch.equal, layer.parameters(), before)) and getattr(layer, "seed", None) == seed and layer.merged
    close(layer(x), y)
    layer.unmerge()
    close(layer.base_layer.weight, w)
    net.load_state_dict(state)
    fresh = cls(24, 20, **settings).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@EACH
def test_merging_twice_disabling_and_training(cls, settings):
    layer, w, x, y = merged(cls, settings)
    now = layer.base_layer.weight.clone()
    with refused("merge", r"not be merged already; unmerge\(\) first"):
        layer.merge()
    for call in (layer.disable_adapter, lambda: layer.enable_adapter(False)):
        with refused("disable_adapter", r"not be merged; unmerge\(\) first"):
            call()
    layer.enable_adapter()
    layer.train()
    with refused("forward", r"not be merged in training, nothing would train; unmerge\(\) or eval\(\) first"):
        layer(x)
    with torch.no_grad():
        close(layer(x), y)
    layer.requires_grad_(False)
    close(layer(x), y)  # nothing was to train
    layer.enabled = False
    with refused("forward", "be enabled while merged"):
        layer(x)
    layer.enabled = True
    assert torch.equal(layer.base_layer.weight, now)
    layer.unmerge()
    close(layer.base_layer.weight, w)
    layer.disable_adapter()
    with refused("merge", r"be enabled; enable_adapter\(\) first"):
        layer.merge()


@EACH
def test_what_is_written_while_merged_acts_after_unmerge(cls, settings):
    """unmerge takes away what merge added, not what the adapter is by then."""
    layer, w, x, y = merged(cls, settings)
    shake(layer, seed=8, by=1.0)
    if hasattr(layer, "seed"):
        layer.seed ^= 1
    if hasattr(layer, "scaling"):
        layer.scaling *= 3
    close(layer(x), y)
    layer.unmerge()
    close(layer.base_layer.weight, w)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, atol=1e-3, rtol=1e-3)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, w, atol=1e-4, rtol=1e-3)


@EACH
def test_copies_and_pickles_of_a_merged_layer(cls, settings):
    layer, w, x, y = merged(cls, settings)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
    layer.unmerge()
    shake(layer)
    for twin in twins:
        assert twin.merged and twin._as_merged.base_layer is twin.base_layer is not layer.base_layer
        close(twin(x), y)
        with refused("state_dict", "not be merged"):
            twin.state_dict()
        twin.unmerge()
        close(twin.base_layer.weight, w)
        close(twin(x), y)
    names = [name for name, _ in twin.named_modules()]
    assert names == [name for name, _ in cls(24, 20, **settings).named_modules()]


@EACH
def test_a_cast_while_merged(cls, settings):
    layer, w, *_ = merged(cls, settings)
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert layer.base_layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.base_layer.weight.float(), w, atol=0.05, rtol=0.02)


@EACH
def test_files_of_a_merged_layer(cls, settings, tmp_path):
    """They hold the adapter, which is the same."""
    files, _ = pytest.importorskip("lrkern.files"), pytest.importorskip("peft")
    layer, *_ = merged(cls, settings)
    files.save(nn.ModuleDict({"l": layer}), tmp_path / "merged")
    with pytest.raises(ValueError, match="l is merged in the model; unmerge"):
        files.load(nn.ModuleDict({"l": layer}), tmp_path / "merged")
    layer.unmerge()
    files.save(nn.ModuleDict({"l": layer}), tmp_path / "apart")
    for at in ("merged", "apart"):
        other = nn.ModuleDict({"l": cls(24, 20, **settings | ({"seed": layer.seed} if hasattr(layer, "seed") else {}))})
        files.load(other, tmp_path / at)
        for key, c in other["l"].coefficients().items():
            assert torch.equal(c, layer.coefficients()[key])


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_one_merged_layer_of_several_keeps_a_file_out(kind, tmp_path):
    files, _ = pytest.importorskip("lrkern.files"), pytest.importorskip("peft")
    cls, settings = KINDS[kind]
    more = [{}, {}] if kind == "lora" else [{"seed": 3}, {"seed": 4}]
    net = lambda seed: nn.Sequential(*(shake(cls(24, 24, **settings | each), seed) for each in more))
    files.save(net(1), tmp_path / "a")
    there = net(2)
    there[1].merge()
    before = [p.clone() for p in there.parameters()]
    with pytest.raises(ValueError, match="1 is merged in the model; unmerge.*the model is unchanged"):
        files.load(there, tmp_path / "a")
    assert all(map(torch.equal, there.parameters(), before))


def test_dora_over_a_magnitude_of_zero_is_not_merged():
    layer = shake(FusedLoRALinear(24, 20, r=4, use_dora=True))
    with torch.no_grad():
        layer.lora_magnitude_vector.weight[3] = 0
    w = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="lora_magnitude_vector must not be 0 anywhere; W is unchanged"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, w) and not layer.merged


def test_delta_weight_of_merged_dora_is_what_merge_added():
    layer, w, *_ = merged(*KINDS["dora"])
    close(layer.delta_weight(), layer.base_layer.weight - w)


def test_patched_layers_do_what_pefts_do():
    """Loading into a merged layer, its state_dict and unmerge: bit for bit, right or wrong."""
    peft = pytest.importorskip("peft")
    import lrkern.peft

    def model():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        return peft.get_peft_model(nn.Sequential(nn.Linear(24, 20)), config).eval()

    x, results = torch.randn(5, 24), []
    other = {k: v + 1 for k, v in peft.get_peft_model_state_dict(model()).items()}
    for patch in (False, True):
        ours = model()
        if patch:
            assert lrkern.peft.patch(ours).fused == 1
        seen = []
        ours.merge_adapter()
        seen += [ours(x), *(v.clone() for v in ours.state_dict().values())]
        ours.merge_adapter()
        peft.set_peft_model_state_dict(ours, other)
        seen += [ours(x), ours.train()(x), *ours.eval().state_dict().values()]
        ours.unmerge_adapter()
        seen += [v.clone() for v in ours.state_dict().values()]
        results.append(seen)
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
