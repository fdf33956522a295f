# SPDX-License-Identifier: Apache-2.0
"""lrkern.save and load: folders of PEFT's and of lrkern's own, beside PEFT; what they refuse, and that nothing has changed then."""

import json
import shutil

import pytest
import torch
from door_models import LINEARS, Net, X, adapted, change, given, same, state
from safetensors.torch import load_file, save_file
from torch import nn

import lrkern
import lrkern.files
from lrkern.files.own import read_layers
from lrkern.nn import FusedLoRALinear, NOLALinear
from lrkern.nn.linear import AdapterLinear

pytest.importorskip("peft")
import peft
from tiny_models import tiny


def out(net, x=X):
    with torch.no_grad():
        return net(x)


# ---------------------------------------------------------------------------------------------------- PEFT's folders


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True, "rank_pattern": {"m.l": 2}, "alpha_pattern": {"x.l": 5}}], ids=["", "patterns"]
)
@pytest.mark.parametrize("method", ["adalora", "dora", "lora"])
def test_stock_peft_reads_what_is_saved(method, more, tmp_path):
    if method == "adalora":
        more = {"lora_alpha": 3.0} if more else {}
    net = adapted(method, **more)
    lrkern.save(net, tmp_path)
    again = peft.PeftModel.from_pretrained(Net().eval(), tmp_path)
    torch.testing.assert_close(out(again), out(net), rtol=1e-5, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with again.disable_adapter(), lrkern.disable(net):
        assert torch.equal(out(again), out(net))


def stock(kind, **more):
    settings = {"target_modules": ["l"], "modules_to_save": ["head"], "lora_alpha": 6} | more
    if kind == "adalora":
        config = peft.AdaLoraConfig(init_r=4, total_step=10, **settings)
    else:
        config = peft.LoraConfig(r=4, use_dora=kind == "dora", **settings)
    model = peft.get_peft_model(Net(), config).eval()
    change_stock(model)
    return model


@torch.no_grad()
def change_stock(model):
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.requires_grad and "ranknum" not in name:
            p.add_(0.1 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("kind", ["adalora", "dora", "lora", "lora_only"])
def test_what_stock_peft_saved_goes_into_a_base_model(kind, tmp_path):
    more = {"bias": "lora_only"} if kind == "lora_only" else {}
    theirs = stock("lora" if more else kind, **more)
    theirs.save_pretrained(tmp_path)
    net = Net().eval()
    report = lrkern.load(net, tmp_path)
    torch.testing.assert_close(out(net), out(theirs), rtol=1e-5, atol=1e-6)
    assert list(report.layers) == LINEARS and report.method == ("lora" if more else kind)
    trains = {n for n, p in net.named_parameters() if p.requires_grad}
    of_layers = {n for n in trains if not n.startswith("head") and not n.endswith("base_layer.bias")}
    assert {n for n in trains if n.endswith("base_layer.bias")} == (
        {"l.base_layer.bias", "x.l.base_layer.bias"} if more else set()
    )
    assert report.modules_to_save.keys() == {"head"} and len(of_layers) == {"lora": 6}.get(report.method, 9)
    again = Net().eval()  # adapted already, with other values
    of_file = {"train_bias": True} if more else {}
    lrkern.adapt(again, report.method, r=4, lora_alpha=6, modules_to_save="head", **of_file)
    change(again)
    lrkern.load(again, tmp_path)
    assert torch.equal(out(again), out(net))


def test_pefts_miss_goes_into_a_base_model(tmp_path):
    theirs = peft.get_peft_model(Net(), peft.MissConfig(r=4, target_modules=["l"], modules_to_save=["head"])).eval()
    change_stock(theirs)
    theirs.save_pretrained(tmp_path)
    net = Net().eval()
    report = lrkern.load(net, tmp_path)
    torch.testing.assert_close(out(net), out(theirs), rtol=1e-5, atol=1e-6)
    assert report.method == "miss" and report.modules_to_save.keys() == {"head"}


def edit(folder, change_config=None, change_tensors=None):
    if change_config:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        change_config(config)
        path.write_text(json.dumps(config))
    if change_tensors:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change_tensors(tensors)
        save_file(tensors, path)


L = "base_model.model.l."
WRONG = {
    "mask": ("adalora", lambda c: c.update(rank_pattern={"l.lora_E": [True] * 3}), None, "l must have 3 ranks, as init_r and rank_pattern say, got 4"),
    "pattern": ("adalora", lambda c: c.update(rank_pattern={"l": 3}), None, "rank_pattern must be an object of lists of true or false by name"),
    "init_r": ("adalora", lambda c: c.update(init_r=2.0), None, "init_r must be a whole number in 1..65536, got 2.0"),
    "values": ("adalora", None, lambda t: t.update({f"{L}lora_E": torch.full((4, 1), float("inf"))}), "lora_E must be finite"),
    "lacks": ("adalora", None, lambda t: t.pop(f"{L}lora_E"), "lacks l.lora_E"),
    "head lacks": ("lora", None, lambda t: t.pop("base_model.model.head.1.bias"), "lacks head.1.bias of modules_to_save"),
    "head more": ("lora", None, lambda t: t.update({"base_model.model.head.2.bias": torch.ones(2)}), "head.2.bias"),
    "head nan": ("lora", None, lambda t: t["base_model.model.head.1.bias"].fill_(float("nan")), "head.1.bias must be finite"),
    "head shape": ("lora", None, lambda t: t.update({"base_model.model.head.1.bias": torch.ones(6)}), r"head.1.bias must have shape \[5\]"),
    "no head": ("lora", lambda c: c.update(modules_to_save=None), None, "head"),
    "rank": ("lora", lambda c: c.update(r=3), None, "shape|must have r=4, scaling=8, got r=3"),
    "type": ("lora", lambda c: c.update(peft_type="IA3"), None, "peft_type must be one of LORA, .*ADALORA.*, got 'IA3'"),
    "init": ("lora", lambda c: c.update(init_lora_weights="pissa"), None, "init_lora_weights must leave the base weights"),
    "bias": ("lora", lambda c: c.update(lora_bias=True), None, "lora_bias=True"),
    "more": ("lora", lambda c: c.update(use_qalora=True), None, "use_qalora must be off"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("bare", [True, False], ids=["base", "adapted"])
def test_pefts_folders_that_are_refused(case, bare, tmp_path):
    method, config, tensors, why = WRONG[case]
    lrkern.save(adapted(method), tmp_path)
    edit(tmp_path, config, tensors)
    refused(Net().eval() if bare else adapted(method), tmp_path, why)


def refused(net, folder, why):
    before, kinds = state(net), [type(m) for m in net.modules()]
    trains = [p.requires_grad for p in net.parameters()]
    with pytest.raises(ValueError, match=f"^lrkern.load: .*{why}.*; the model is unchanged$"):
        lrkern.load(net, folder)
    assert same(state(net), before) and kinds == [type(m) for m in net.modules()]
    assert trains == [p.requires_grad for p in net.parameters()]


def test_a_transformers_model_with_a_head(tmp_path):
    """Names, Conv1D and PEFT's automatic modules_to_save; the other way round too, and into a pool."""
    import transformers

    from lrkern.serving import AdapterPool, MultiLoraModel

    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=64, num_labels=3, pad_token_id=0
    )
    make = lambda: (torch.manual_seed(0), transformers.GPT2ForSequenceClassification(config).eval())[1]
    ids = torch.randint(3, 90, (2, 6))
    logits = lambda m: m(ids).logits.detach()
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    ).eval()
    change_stock(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = make()
    lrkern.load(mine, tmp_path / "theirs")
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-5, atol=1e-6)
    mine = make()
    report = lrkern.adapt(mine, "nola", r=3, k=6, l=7, modules_to_save=["score"])
    assert len(report.layers) == 8 and "score" not in report.layers and report.modules_to_save == {"score": 96}
    assert len(lrkern.adapt(make(), "lora").layers) == 8  # the head stays out without being saved
    whole = make()
    lrkern.adapt(whole, "lora", r=3, modules_to_save=["score"])
    change_stock(whole)
    lrkern.save(whole, tmp_path / "lora")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(make(), tmp_path / "lora")), logits(whole), rtol=1e-5, atol=1e-6
    )
    base = make()
    pool = AdapterPool(base, pages=16)  # heads of its own for each request
    pool.load("a", tmp_path / "lora")
    served = MultiLoraModel(base, pool)(ids, adapters=["a", None]).logits
    torch.testing.assert_close(served[0], logits(whole)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(served[1], logits(make())[1], rtol=1e-4, atol=1e-5)
    for p in mine.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    lrkern.save(mine, tmp_path / "mine")
    again = make()
    lrkern.load(again, tmp_path / "mine")
    assert torch.equal(logits(again), logits(mine))


def test_lora_over_a_quantised_base_and_a_file_of_own(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(lrkern.nn.MXFP4Linear.from_linear(nn.Linear(32, 64)), nn.Linear(64, 32)).eval()

    net, x = make(), torch.randn(3, 32)
    lrkern.adapt(net, "lora", r=2)
    for p in net.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    lrkern.save(net, tmp_path / "lora")
    again = make()
    lrkern.load(again, tmp_path / "lora")
    assert torch.equal(out(again, x), out(net, x)) and type(again[0].base_layer) is lrkern.nn.MXFP4Linear
    slora = make()
    lrkern.adapt(slora, "slora", r=2)
    for p in slora.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    lrkern.save(slora, tmp_path / "slora")
    again = make()
    lrkern.load(again, tmp_path / "slora")
    assert torch.equal(out(again, x), out(slora, x))
    again = make()
    lrkern.load(again, tmp_path / "slora" / "adapter.safetensors")
    assert torch.equal(out(again, x), out(slora, x))


@pytest.mark.parametrize("method", ["lora", "slora"])
def test_over_bitsandbytes(method, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def make():
        torch.manual_seed(0)
        packed = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
        return nn.Sequential(packed, nn.Linear(64, 32)).to("cpu").eval()

    net, x = make(), torch.randn(3, 64)
    y = out(net, x)
    lrkern.adapt(net, method, r=2)
    for p in net.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    lrkern.save(net, tmp_path)
    again = make()
    lrkern.load(again, tmp_path)
    assert torch.equal(out(again, x), out(net, x)) and not torch.allclose(out(net, x), y)
    with lrkern.disable(again):
        assert torch.equal(out(again, x), y)
    assert type(again[0].weight) is type(again[0].base_layer.weight)


@pytest.mark.parametrize("method", ["lora", "slora"])
def test_sixteen_bit_adapters(method, tmp_path):
    make = lambda: Net().to(torch.bfloat16).eval()
    net = make()
    lrkern.adapt(net, method, adapter_dtype=torch.bfloat16, modules_to_save="head", **given(method))
    change(net)
    lrkern.save(net, tmp_path)
    again = make()
    lrkern.load(again, tmp_path)
    x = X.to(torch.bfloat16)
    torch.testing.assert_close(out(again, x), out(net, x), rtol=2e-2, atol=2e-2)
    if method == "slora":
        refused(
            Net().eval(),
            tmp_path,
            "l must be of the model's base, got a W of torch.float32 beside coefficients in torch.bfloat16",
        )
    assert again.head[1].weight.dtype == torch.bfloat16 and torch.equal(again.head[1].weight, net.head[1].weight)


# ---------------------------------------------------------------------------------------------------- lrkern's own folders


def test_an_own_folder(tmp_path):
    net = adapted("nola", seed=3, dropout=0.25)
    lrkern.save(net, tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter.safetensors",
        "lrkern.json",
        "saved_modules.safetensors",
    ]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    config = json.loads((folder / "lrkern.json").read_text())
    assert (config["format"], config["lrkern"], config["method"]) == (1, lrkern.__version__, "nola")
    assert config["base"] == {"class": "Net", "name_or_path": None} and config["layers"] == LINEARS
    assert (
        config["settings"].items() >= {"r": 4, "k": 6, "l": 7, "dropout": 0.25}.items()
        and "seed" not in config["settings"]
    )
    assert config["modules_to_save"] == ["head"] and config["files"].keys() == {
        "adapter.safetensors",
        "saved_modules.safetensors",
    }
    saved = load_file(folder / "saved_modules.safetensors")
    assert saved.keys() == {f"head.{k}" for k in net.head.state_dict()} and torch.equal(
        saved["head.1.bias"], net.head[1].bias
    )
    lrkern.files.save(net, tmp_path / "by files")
    assert (folder / "adapter.safetensors").read_bytes() == (tmp_path / "by files").read_bytes()
    assert all(isinstance(m, NOLALinear) for m in read_layers(folder / "adapter.safetensors").values())
    without = adapted("nola", modules_to_save=None, exclude_modules=["head.1"])
    lrkern.save(without, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "lrkern.json"]
    model = tiny("llama")
    model.config._name_or_path = "some/llama"
    lrkern.adapt(model, "vera", r=4)
    lrkern.save(model, tmp_path / "llama")
    base = json.loads((tmp_path / "llama" / "lrkern.json").read_text())["base"]
    assert base == {"class": "LlamaForCausalLM", "name_or_path": "some/llama"}
    model = tiny("llama")
    model.config._name_or_path = "some/llama"
    lrkern.adapt(model, "lora", r=4)
    lrkern.save(model, tmp_path / "lora")
    config = peft.PeftConfig.from_pretrained(tmp_path / "lora")
    assert config.base_model_name_or_path == "some/llama" and config.r == 4


def test_half_a_folder_is_no_folder(tmp_path):
    """What was written by two saves does not go together, and what is refused writes nothing."""
    first, second = adapted("nola"), adapted("nola")
    change(second)
    lrkern.save(first, tmp_path / "first")
    lrkern.save(second, tmp_path / "second")
    for name in ("adapter.safetensors", "saved_modules.safetensors"):
        mixed = tmp_path / name
        shutil.copytree(tmp_path / "first", mixed)
        shutil.copy(tmp_path / "second" / name, mixed / name)
        refused(Net().eval(), mixed, f"{name} must be the one that lrkern.json was written with")
    first.l.nola_alpha.data[0] = float("nan")
    with pytest.raises(ValueError, match="nola_alpha must be finite"):
        lrkern.save(first, tmp_path / "third")
    first.l.nola_alpha.data[0] = 0
    first.head[1].bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="^lrkern.save: head.1.bias must be finite"):
        lrkern.save(first, tmp_path / "third")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter.safetensors",
        "first",
        "saved_modules.safetensors",
        "second",
    ]


def rewrite(change_it):
    def act(folder):
        path = folder / "lrkern.json"
        config = json.loads(path.read_text())
        change_it(config)
        path.write_text(json.dumps(config))

    return act


OWN = {
    "format": (rewrite(lambda c: c.update(format=2)), "lrkern.json cannot be read: format must be 1, got 2"),
    "no format": (rewrite(lambda c: c.pop("format")), "format must be 1, got None"),
    "no object": (lambda f: (f / "lrkern.json").write_text("[]"), r"must be an object, got \[\]"),
    "no json": (lambda f: (f / "lrkern.json").write_text("{"), "lrkern.json cannot be read: must be JSON"),
    "method": (rewrite(lambda c: c.update(method=3)), "method must be a str, got 3"),
    "other method": (rewrite(lambda c: c.update(method="vera")), "method must be nola, got 'vera'"),
    "other layers": (rewrite(lambda c: c["layers"].pop()), "lrkern.json must name the layers of adapter.safetensors"),
    "files": (rewrite(lambda c: c["files"].update({"../x": "0"})), "files must be"),
    "names": (rewrite(lambda c: c.update(modules_to_save=[3])), "modules_to_save must be names"),
    "another": (rewrite(lambda c: c.update(modules_to_save=["l"])), "must hold modules_to_save and no more, got head"),
    "lost": (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors cannot be read: No such file"),
    "both": (lambda f: (f / "adapter_config.json").write_text("{}"), "must hold one adapter, got lrkern.json and adapter_config.json"),
    "pipe": (lambda f: ((f / "adapter.safetensors").unlink(), __import__("os").mkfifo(f / "adapter.safetensors")), "must be a file, got a pipe"),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_own_folders_that_are_refused(case, tmp_path):
    act, why = OWN[case]
    lrkern.save(adapted("nola"), tmp_path / "folder")
    act(tmp_path / "folder")
    refused(Net().eval(), tmp_path / "folder", why)


def test_another_model_is_refused(tmp_path):
    lrkern.save(adapted("nola"), tmp_path / "nola")
    lrkern.save(adapted("lora"), tmp_path / "lora")
    for folder in ("nola", "lora"):
        refused(nn.Sequential(nn.Linear(24, 16)), tmp_path / folder, "the model does not|this model's linears")
        less = Net().eval()
        lrkern.adapt(less, folder, target_modules=["x.l"], modules_to_save="head", **given(folder))
        refused(less, tmp_path / folder, "which only the folder has|more that the model does not")
        bare = adapted(folder, modules_to_save=None, exclude_modules=["head.1"])
        refused(
            bare,
            tmp_path / folder,
            "modules_to_save must be those that the model has already, got head, which only the folder has",
        )
        whole = adapted(folder, modules_to_save=["head", "x.m.l"])
        refused(whole, tmp_path / folder, "")
    refused(adapted("lora"), tmp_path / "nola", "got FusedLoRALinear")
    refused(adapted("nola"), tmp_path / "lora", "must be a FusedLoRALinear in the model, got NOLALinear")
    refused(adapted("nola", l=8), tmp_path / "nola", "differs from the model's")
    merged = adapted("nola")
    lrkern.merge(merged)
    with pytest.raises(ValueError, match="l is merged in the model"):
        lrkern.load(merged, tmp_path / "nola")
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["l"]))
    refused(theirs, tmp_path / "nola", "model must not be PEFT's")
    with pytest.raises(ValueError, match="^lrkern.load: .*must be a path"):
        lrkern.load(Net(), 3)
    refused(Net().eval(), tmp_path / "none", "must be a PEFT folder, got nothing there")


def test_what_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="^lrkern.save: model must have adapters of lrkern, got Net with none"):
        lrkern.save(Net(), tmp_path / "a")
    net = adapted("nola", target_modules=["x.l"])
    net.l = FusedLoRALinear.from_linear(net.l, r=2)
    with pytest.raises(ValueError, match="^lrkern.save: model must have layers of one method, got lora and nola"):
        lrkern.save(net, tmp_path / "a")
    for method, other in (("nola", "lora"), ("lora", "nola")):
        lrkern.save(adapted(method), tmp_path / method)
        with pytest.raises(
            ValueError, match="must hold no adapter in another format, got one with (lrkern|adapter_config).json"
        ):
            lrkern.save(adapted(other), tmp_path / method)
        net = adapted(method)
        with lrkern.disable(net):
            with pytest.raises(ValueError, match="must not be disabled"):
                lrkern.save(net, tmp_path / "b")
            with pytest.raises(ValueError, match="must not be disabled"):
                lrkern.load(net, tmp_path / method)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_merged_disabled_and_compiled_models_are_saved_as_any(tmp_path):
    net = adapted("nola")
    lrkern.save(net, tmp_path / "plain")
    y = out(net)
    lrkern.merge(net)
    lrkern.save(net, tmp_path / "merged")
    lrkern.unmerge(net)
    lrkern.save(torch.compile(net, backend="eager"), tmp_path / "compiled")
    for name in ("plain", "merged", "compiled"):
        again = Net().eval()
        lrkern.load(again, tmp_path / name)
        assert torch.equal(out(again), y)
    inner = adapted("nola")
    lrkern.load(torch.compile(inner, backend="eager"), tmp_path / "plain")
    assert torch.equal(out(inner), y)


def test_layers_are_connected_after_a_load(tmp_path, monkeypatch):
    lrkern.save(adapted("nola"), tmp_path)
    seen = []
    monkeypatch.setattr(NOLALinear, "connect", classmethod(lambda cls, layers: seen.append(dict(layers))))
    net = Net().eval()
    lrkern.load(net, tmp_path)
    assert (
        seen[-1] == {n: m for n, m in net.named_modules() if isinstance(m, AdapterLinear)} and list(seen[-1]) == LINEARS
    )
