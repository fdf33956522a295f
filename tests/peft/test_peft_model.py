# SPDX-License-Identifier: Apache-2.0
"""lrkern.peft on all-MiniLM-L6-v2: what PEFT's users do with a model, its adapters and its files, beside stock PEFT."""

import copy
import io
import json

import pytest
import torch

from minilm import (  # isort: skip
    ENCODER, LINEARS, adapted, assert_equal, assert_patch_changes_nothing, assert_same, bert, forward,
    fused_calls, lora_config, lora_layers, patched, peft, registered, step, with_magnitudes,
    one_thread,  # noqa: F401, a fixture
)  # fmt: skip
from safetensors.torch import load_file
from torch import nn

import lrkern.peft

# ---- 1, 2: adoption -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "n"), [(ENCODER, 36), ("all-linear", LINEARS)])
def test_register_fuses_every_layer_peft_creates(target, n):  # row 1
    stock, ours = adapted(target_modules=target), registered(target_modules=target)
    assert lrkern.peft.report(ours).fused == len(lora_layers(ours)) == n
    assert lrkern.peft.report(stock).fused == 0, "registration is of one config, nothing global"
    with fused_calls() as calls:
        got = step(ours)
    assert calls == {"lora_linear": n}
    assert_same(got, step(stock))
    assert sum("lora_" in name for name in got[1]) == 2 * n


def test_register_is_seen_in_no_file_and_leaves_other_configs_alone():
    config, other = lora_config(), lora_config()
    lrkern.peft.register(config, bert(1))
    assert config.to_dict() == other.to_dict()
    assert other._custom_modules is None
    assert lrkern.peft.report(peft.get_peft_model(bert(1), other)).fused == 0


@pytest.mark.parametrize("config", [peft.IA3Config(target_modules=["dense"], feedforward_modules=["dense"]),
                                    peft.LoHaConfig(target_modules=["query"])], ids=lambda c: c.peft_type.value)  # fmt: skip
def test_register_refuses_what_is_not_lora(config):
    with pytest.raises((TypeError, ValueError), match="LoraConfig"):
        lrkern.peft.register(config, bert(1))


def test_register_refuses_a_model_without_a_layer_to_adapt():
    with pytest.raises(ValueError, match="lrkern.peft.register"):
        lrkern.peft.register(lora_config(target_modules=["0"]), nn.Sequential(nn.ReLU()))


def test_patch_adopts_a_model_in_place():  # row 2
    model = adapted()
    keys, text, tensors = list(model.state_dict()), repr(model), list(map(id, model.parameters()))
    classes = [type(m) for m in model.modules()]
    want = step(model)
    report = lrkern.peft.patch(model)
    assert report.fused == len(report.layers) == LINEARS
    assert set(report.layers) == set(lora_layers(model))
    assert list(model.state_dict()) == keys and list(map(id, model.parameters())) == tensors
    assert repr(model) == text
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    with fused_calls() as calls:
        got = step(model)
    assert calls == {"lora_linear": LINEARS}
    assert_same(got, want)


def test_unpatch_restores_classes_and_bits():
    model = adapted()
    want, classes = step(model), [type(m) for m in model.modules()]
    lrkern.peft.patch(model)
    lrkern.peft.patch(model)
    assert [type(m) for m in model.modules()] != classes
    lrkern.peft.unpatch(model)
    lrkern.peft.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    with fused_calls() as calls:
        assert_equal(step(model), want)
    assert not calls


def test_unpatch_makes_a_registered_model_stock():
    stock, ours = adapted(), registered()
    lrkern.peft.unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert_equal(step(ours), step(stock))


def test_patching_twice_is_patching_once():
    model = patched()
    classes, want = [type(m) for m in model.modules()], step(model)
    report = lrkern.peft.patch(model)
    assert report.fused == LINEARS and report.layers == lrkern.peft.report(model).layers
    assert [type(m) for m in model.modules()] == classes
    assert_equal(step(model), want)


def test_report_changes_nothing():
    model = adapted(1)
    classes = [type(m) for m in model.modules()]
    report = lrkern.peft.report(model)
    assert report.fused == 0 and all(report.layers.values()), "a stock layer runs PEFT's code, and the report says so"
    assert [type(m) for m in model.modules()] == classes
    assert lrkern.peft.patch(model).fused == lrkern.peft.report(model).fused == len(report.layers)


def test_peft_itself_is_untouched():
    import peft.tuners.lora.layer as layer

    before = {k: v for k, v in vars(layer.Linear).items()}
    forward_of_linear, dispatch = nn.Linear.forward, layer.dispatch_default
    step(patched(1, use_dora=True))
    registered(1)
    assert dict(vars(layer.Linear)) == before
    assert nn.Linear.forward is forward_of_linear and layer.dispatch_default is dispatch
    assert type(lora_layers(adapted(1)).popitem()[1]) is layer.Linear


# ---- 3, 4: files ----------------------------------------------------------------------------------------------------


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("make", [patched, registered])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_stock_peft_loads_what_we_saved(tmp_path, make, config):  # row 3
    ours = make(**config)
    tensors, fields = saved(ours, tmp_path / "ours")
    want_tensors, want_fields = saved(adapted(**config), tmp_path / "stock")
    assert list(tensors) == list(want_tensors) and len(tensors) == LINEARS * (3 if config else 2)
    assert all(torch.equal(tensors[key], want_tensors[key]) for key in tensors)
    assert fields == want_fields and "_custom_modules" not in fields
    loaded = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "ours"))
    assert {type(m) for m in lora_layers(loaded).values()} == {peft.tuners.lora.layer.Linear}
    torch.testing.assert_close(forward(ours), forward(loaded), atol=1e-5, rtol=0)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("way", ["register", "patch"])
def test_a_stock_file_is_fused(tmp_path, way, low_cpu_mem_usage):  # row 4
    stock, folder = adapted(r=4, lora_alpha=3, use_rslora=True), str(tmp_path)
    stock.save_pretrained(folder)
    base, config = bert(), peft.LoraConfig.from_pretrained(folder)
    if way == "register":
        lrkern.peft.register(config, base)
    ours = peft.PeftModel.from_pretrained(
        base, folder, config=config, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    if way == "patch":
        lrkern.peft.patch(ours)
    assert lrkern.peft.report(ours).fused == LINEARS
    with fused_calls() as calls:
        assert_same(step(ours), step(stock))
    assert calls == {"lora_linear": LINEARS}


def test_a_second_file_into_a_patched_model(tmp_path):
    torch.manual_seed(4)
    other = peft.get_peft_model(bert(), lora_config(r=3)).eval()
    other.save_pretrained(tmp_path)
    model = patched()
    model.load_adapter(str(tmp_path), "other", is_trainable=True)
    model.set_adapter("other")
    with fused_calls() as calls:
        torch.testing.assert_close(forward(model), forward(other), atol=1e-5, rtol=0)
    assert calls == {"lora_linear": LINEARS}


# ---- 5: merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merge_and_unmerge(config):  # row 5
    model = patched(**config)
    want = forward(model)
    model.merge_adapter(safe_merge=True)
    with fused_calls() as calls:
        torch.testing.assert_close(forward(model), want, atol=5e-5, rtol=0)
    assert not calls
    assert all("merged" in why for why in lrkern.peft.report(model).layers.values())
    model.unmerge_adapter()
    with fused_calls() as calls:
        torch.testing.assert_close(forward(model), want, atol=5e-5, rtol=0)
    assert calls.total() == LINEARS


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merge_and_unload_leaves_a_plain_model(config):  # row 5
    model, stock = patched(**config), adapted(**config)
    want = forward(model)
    merged, merged_stock = model.merge_and_unload(), stock.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in bert().modules()]
    torch.testing.assert_close(forward(merged), want, atol=5e-5, rtol=0)
    assert torch.equal(forward(merged), forward(merged_stock))


def test_disable_adapter_is_the_base_model():  # row 5
    model, base = patched(), bert()
    want = forward(model)
    with model.disable_adapter(), fused_calls() as calls:
        assert torch.equal(forward(model), forward(base))
        assert all("disabled" in why for why in lrkern.peft.report(model).layers.values())
    assert not calls
    assert torch.equal(forward(model), want)
    assert torch.equal(forward(model.unload()), forward(base))


# ---- 6: plain LoRA in all its configurations ------------------------------------------------------------------------

PLAIN = [
    {"r": 1, "lora_alpha": 1},
    {"use_rslora": True, "lora_alpha": 4},
    {"rank_pattern": {"query": 3, r".*layer\.1\..*dense": 16}, "alpha_pattern": {"value": 40}},
    {"target_modules": ["query", "value"], "layers_to_transform": [0, 2]},
    {"target_modules": ENCODER, "exclude_modules": ["key"]},
    {"bias": "all"},
    {"bias": "lora_only", "target_modules": ["query"]},
    {"init_lora_weights": "pissa", "target_modules": ["query", "value"]},  # an SVD of every weight takes its time
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"modules_to_save": ["pooler"], "target_modules": ENCODER},
    {"layer_replication": [[0, 2], [1, 3]]},
]


@pytest.mark.parametrize("make", [patched, registered])
@pytest.mark.parametrize("config", PLAIN, ids=str)
def test_every_plain_configuration_is_fused(config, make):  # row 6
    stock, ours = adapted(3, **config), make(3, **config)
    report = lrkern.peft.report(ours)
    assert report.fused == len(report.layers) == len(lora_layers(stock)), str(report)
    with fused_calls() as calls:
        got = step(ours)
    assert calls == {"lora_linear": report.fused}
    twice = "layer_replication" in config  # seen of such a model: 1.03e-5 in 1 of 12672 elements
    assert_same(got, step(stock), y_tol=1.1e-5 if twice else 1e-5)


def test_trained_tokens_and_modules_beside_the_adapter():
    ids = {"inputs_embeds": None, "input_ids": torch.tensor([[3, 5, 7]] * 3), "attention_mask": None}
    config = {
        "trainable_token_indices": {"word_embeddings": [3, 5]},
        "modules_to_save": ["pooler"],
        "target_modules": ENCODER,
    }
    stock, ours = adapted(2, **config), patched(2, **config)
    with fused_calls() as calls:
        got, want = step(ours, **ids), step(stock, **ids)
    assert calls == {"lora_linear": 12}
    assert_same(got, want)
    assert any("trainable_tokens" in name for name in want[1]) and any("modules_to_save" in name for name in want[1])


def test_the_trainable_parameters_are_peft_s(capsys):
    counts = []
    for model in (adapted(bias="lora_only"), patched(bias="lora_only"), registered(bias="lora_only")):
        model.print_trainable_parameters()
        counts.append((capsys.readouterr().out, model.get_nb_trainable_parameters()))
    assert counts[0] == counts[1] == counts[2]


# ---- 7: variants ----------------------------------------------------------------------------------------------------


class Unknown(peft.tuners.lora.layer.LoraVariant):
    """A variant lrkern has never heard of."""

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        return result + torch.tanh(module.lora_A[active_adapter](x)) @ module.lora_B[active_adapter].weight.T


def unknown():
    model = adapted(2)
    for layer in lora_layers(model).values():
        layer.lora_variant["default"] = Unknown()
    return model, {}


def arrow():
    model = adapted(2, target_modules=["query", "value"])
    model.add_adapter("task_1", lora_config(target_modules=["query", "value"]))
    model.add_adapter("task_2", lora_config(target_modules=["query", "value"]))
    router = peft.ArrowConfig(top_k=2, rng_seed=0)
    router.task_adapter_names, router.gks_adapter_names = ["default", "task_1", "task_2"], []
    model.add_adapter("arrow_router", lora_config(target_modules=["query", "value"], arrow_config=router))
    model.set_adapter("arrow_router")
    return model.eval(), {}


def bdlora():
    from peft.tuners.lora import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["output.dense"], target_modules_bd_b=["query"], nblocks=2)
    model = adapted(2, target_modules=["query", "attention.output.dense"], use_bdlora=blocks)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return model, {}


def mica():
    model = adapted(2, init_lora_weights="mica", r=4)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A["default"].weight, std=0.05)
    return model, {}


def variant(**config):
    return lambda: (adapted(2, **config), {})


def sub_config(name, **config):
    return getattr(peft.tuners.lora.config, name)(**config)


VARIANTS = {
    "lora_bias": variant(lora_bias=True),
    "ALoraLinearVariant": lambda: (adapted(2, alora_invocation_tokens=[7]), {"alora_offsets": [3, None, 10]}),
    "ArrowLinearVariant": arrow,
    "BdLoraLinearVariant": bdlora,
    "VeloraLinearVariant": variant(velora_config=sub_config("VeloraConfig", init_type="random")),
    "MontecloraLinearVariant": variant(monteclora_config=sub_config("MontecloraConfig")),
    "MiCALinearVariant": mica,
    "KasaLinearVariant": variant(kasa_config=sub_config("KasaConfig"), r=4),
    "Unknown": unknown,
}


@pytest.mark.parametrize("why", VARIANTS)
def test_any_other_variant_runs_as_peft_bit_for_bit_and_is_named(why):  # row 7
    model, kwargs = VARIANTS[why]()
    assert_patch_changes_nothing(model, why, **kwargs)


# ---- 8: several adapters --------------------------------------------------------------------------------------------


def two_adapters(**config):
    """`default` on every linear; `other`, of another rank and scale, on three a layer."""
    model = adapted(3, **config)
    model.add_adapter(
        "other", lora_config(r=5, lora_alpha=3, use_rslora=True, target_modules=["query", "key", "value"])
    )
    return model.eval()


def test_adapters_come_and_go():  # row 8
    stock, ours = two_adapters(), two_adapters()
    lrkern.peft.patch(ours)
    for model in (stock, ours):
        model.set_adapter("other")
    with fused_calls() as calls:
        assert_same(step(ours), step(stock))
    assert calls == {"lora_linear": 9}, "ten layers have no adapter named other"
    for model in (stock, ours):
        torch.manual_seed(6)
        model.add_adapter("late", lora_config(r=2, use_dora=True, target_modules=["query", "word_embeddings"]))
        model.set_adapter("late")
    with fused_calls() as calls:
        assert_same(step(ours), step(stock), y_tol=2e-5)
    assert calls == {"dora_linear": 3}
    for model in (stock, ours):
        model.delete_adapter("late")
        model.set_adapter("default")
    with fused_calls() as calls:
        assert_same(step(ours), step(stock))
    assert calls == {"lora_linear": 19}


def test_an_adapter_on_new_layers_of_a_patched_model_is_taken_by_the_next_patch():
    model = patched(2, target_modules=["query"])
    model.add_adapter("wide", lora_config())
    model.set_adapter("wide")
    want = forward(model)
    assert lrkern.peft.report(model).fused == 2
    assert lrkern.peft.patch(model).fused == len(lora_layers(model)) == 13
    torch.testing.assert_close(forward(model), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_several_active_adapters_are_summed(dropout):  # row 8
    stock, ours = (m.train() for m in (two_adapters(lora_dropout=dropout), two_adapters(lora_dropout=dropout)))
    for model in (stock, ours):
        model.base_model.set_adapter(["default", "other"])
    report = lrkern.peft.patch(ours)
    assert report.fused == 19, str(report)
    with fused_calls() as calls:
        got = step(ours)
    assert calls["lora_linear"] + calls["lora_add"] >= 19
    assert_same(got, step(stock))
    assert sum("lora_" in name for name in got[1]) == 2 * (19 + 9), "both adapters train"


def test_a_mixed_batch_runs_as_peft():  # row 8, more in test_peft_mixed.py
    model, names = two_adapters(), ["other", "__base__", "default"]
    with torch.no_grad():
        want = forward(model, adapter_names=names)
        lrkern.peft.patch(model)
        with fused_calls() as calls:
            torch.testing.assert_close(forward(model, adapter_names=names), want, atol=1e-5, rtol=0)
        assert calls == {"lora_add": 19 + 9}, "each adapter on its rows"
        with fused_calls() as calls:
            forward(model)
        assert calls == {"lora_linear": 19}


def test_a_weighted_adapter():
    stock = two_adapters(target_modules=["query", "key", "value"])
    ours = copy.deepcopy(stock)
    lrkern.peft.patch(ours)
    for model in (stock, ours):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type="cat")
        model.set_adapter("sum")
    with fused_calls() as calls:
        assert_same(step(ours), step(stock))
    assert calls == {"lora_linear": 9}


def test_scaling_is_read_when_the_layer_runs():
    stock, ours = adapted(2), patched(2)
    for model in (stock, ours):
        for layer in lora_layers(model).values():
            layer.set_scale("default", 3.0)
            layer.scale_layer(0.5)
    assert_same(step(ours), step(stock))
    for model in (stock, ours):
        for layer in lora_layers(model).values():
            layer.unscale_layer()
    assert_same(step(ours), step(stock))
    with peft.helpers.rescale_adapter_scale(ours, 0.25):
        got = forward(ours)
    with peft.helpers.rescale_adapter_scale(stock, 0.25):
        torch.testing.assert_close(got, forward(stock), atol=1e-5, rtol=0)


# ---- 9: hotswap -----------------------------------------------------------------------------------------------------


def adapter_files(folder, **config):
    """Two adapters of different values, saved by stock PEFT."""
    for name, rank in (("one", 8), ("two", config.pop("second_rank", 8))):
        torch.manual_seed(rank + len(name) + ord(name[0]))
        model = peft.get_peft_model(bert(2), lora_config(r=rank, **config))
        (with_magnitudes(model) if config.get("use_dora") else model).save_pretrained(folder / name)
    return str(folder / "one"), str(folder / "two")


@pytest.mark.parametrize("config", [{}, {"second_rank": 4}, {"second_rank": 16}], ids=str)
def test_hotswap(tmp_path, config):  # row 9
    one, two = adapter_files(tmp_path, **config)
    ours = peft.PeftModel.from_pretrained(bert(2), one).eval()
    lrkern.peft.patch(ours)
    with torch.no_grad():
        for path in (one, two, one):
            peft.utils.hotswap.hotswap_adapter(ours, path, "default", torch_device="cpu")
            want = forward(peft.PeftModel.from_pretrained(bert(2), path).eval())
            with fused_calls() as calls:
                torch.testing.assert_close(forward(ours), want, atol=2e-5, rtol=0)
            assert calls.total() == 13


def test_hotswap_prepared_for_compilation(tmp_path):  # scalings become tensors, ranks are padded
    one, two = adapter_files(tmp_path, second_rank=4)
    model = peft.PeftModel.from_pretrained(bert(2), one).eval()
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=16)
    lrkern.peft.patch(model)
    with torch.no_grad():
        for path in (two, one):
            peft.utils.hotswap.hotswap_adapter(model, path, "default", torch_device="cpu")
            want = forward(peft.PeftModel.from_pretrained(bert(2), path).eval())
            torch.testing.assert_close(forward(model), want, atol=2e-5, rtol=0)


# ---- 10: without a PeftModel ----------------------------------------------------------------------------------------


def test_injected_adapters():  # row 10
    stock, ours = bert(2), bert(2)
    for model in (stock, ours):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(lora_config(), model)
    assert lrkern.peft.patch(ours).fused == 13
    with fused_calls() as calls:
        assert_same(step(ours), step(stock))
    assert calls == {"lora_linear": 13}
    base, config = bert(2), lora_config()
    lrkern.peft.register(config, base)
    assert lrkern.peft.report(peft.inject_adapter_in_model(config, base)).fused == 13


def test_adapters_of_transformers(tmp_path):  # row 10
    stock, ours = bert(2), bert(2)
    for model in (stock, ours):
        torch.manual_seed(1)
        model.add_adapter(lora_config(target_modules=["query", "dense"]), "mine")
    lrkern.peft.patch(ours)
    with fused_calls() as calls:
        assert_same(step(ours), step(stock))
    assert calls == {"lora_linear": 9}
    ours.save_pretrained(tmp_path)
    again = bert(2)
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(forward(again), forward(ours), atol=1e-5, rtol=0)
    with fused_calls() as calls:
        ours.disable_adapters()
        assert torch.equal(forward(ours), forward(bert(2)))
        assert not calls
        ours.enable_adapters()
        torch.testing.assert_close(forward(ours), forward(again), atol=1e-5, rtol=0)


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [patched, registered])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_fused_too_and_independent(way, make, config):
    model = make(2, **config)
    want = step(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    with fused_calls() as calls:
        assert_equal(step(twin), want)
    assert calls.total() == 13
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.01)
    assert not torch.equal(step(twin)[0], want[0])
    assert_equal(step(model), want)
