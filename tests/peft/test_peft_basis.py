# SPDX-License-Identifier: Apache-2.0
"""VeRA and RandLoRA: PEFT's layers on lrkern, with the projections that PEFT stores."""

import copy
import pickle
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")

import lrkern.functional  # noqa: E402
import lrkern.peft  # noqa: E402

CONFIG = {"vera": peft.VeraConfig, "randlora": peft.RandLoraConfig}
KINDS = list(CONFIG)


class Net(nn.Module):
    """Layers of different shapes share a pair: in < out, in > out and in = out, some with bias."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.same = nn.Linear(24, 40), nn.Linear(40, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        return self.same(self.down(self.up(x).relu()))


def config(kind, **options):
    if kind == "randlora":
        options = {"randlora_alpha": 1} | options  # PEFT's 640 at these sizes makes outputs of 10000
    return CONFIG[kind](**{"r": 5, "target_modules": ["up", "down", "same"], "init_weights": False} | options)


def model_of(kind, dtype=torch.float32, **options):
    torch.manual_seed(1)
    return shaken(peft.get_peft_model(Net().to(dtype), config(kind, **options)))


def shaken(model):
    """init_weights=False leaves vectors of one value: all of them get values of their own."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lambda" in name or "gamma" in name:
                p.copy_(torch.randn(p.shape) * 0.3)
    return model


def step(model, x):
    """Output and all gradients, x's too."""
    torch.manual_seed(7)  # for dropout
    x = x.clone().requires_grad_()
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
    model.zero_grad()
    return y.detach(), {name.removeprefix("_orig_mod."): g for name, g in grads.items()}


def assert_same(got, want, tol=1e-5):
    assert got[0].dtype == want[0].dtype and got[1].keys() == want[1].keys()
    for name, value in {"y": want[0], **want[1]}.items():
        ours = got[0] if name == "y" else got[1][name]
        assert ours.dtype == value.dtype, name
        error = (ours.double() - value.double()).norm() / value.double().norm()
        assert error <= tol, f"{name}: {error:.2e}"


@contextmanager
def calls():
    """Counts the layers' calls of lrkern.functional."""
    counter, names = Counter(), [f"{kind}_{form}" for kind in KINDS for form in ("linear", "add")]

    def counting(name):
        own = getattr(lrkern.functional, name)
        return lambda *args: counter.update([name]) or own(*args)

    with mock.patch.multiple(lrkern.functional, **{name: counting(name) for name in names}):
        yield counter


@pytest.mark.parametrize("rows", [(3,), (2, 0), (2, 9), (3, 20), (70,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"r": 16}, {"bias": "all"}, {"target_modules": ["same"]}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_patched_equals_peft(kind, options, rows):
    model, x = model_of(kind, **options), torch.randn(*rows, 24)
    want = step(model, x)
    report = lrkern.peft.patch(model)
    layers = len(options.get("target_modules", "abc"))
    assert report.fused == len(report.layers) == layers and "own code" not in str(report)
    with calls() as counter:
        got = step(model, x)
    assert counter == {f"{kind}_linear": layers}
    if x.numel():
        assert_same(got, want)
    else:
        assert got[0].shape == want[0].shape and all(not g.any() for g in got[1].values())
    lrkern.peft.unpatch(model)
    assert torch.equal(step(model, x)[0], want[0]) and not any(
        "lrkern" in key for m in model.modules() for key in vars(m)
    )


@pytest.mark.parametrize("rows", [(4,), (3, 11)], ids=str)
@pytest.mark.parametrize("how", ["all bfloat16", "base bfloat16", "base float16", "projections bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, how, rows):
    """As near to the float32 result of the same numbers as PEFT's own code is."""
    dtype = torch.float16 if "float16" in how and "bfloat16" not in how else torch.bfloat16
    model = model_of(kind)
    if how.startswith("all"):
        model.to(dtype)
    elif how.startswith("base"):
        for layer in (model.base_model.model.up, model.base_model.model.down, model.base_model.model.same):
            layer.base_layer.to(dtype)
    elif kind == "vera":
        pytest.skip("PEFT's VeRA takes projections of the vectors' dtype")
    else:  # drawn in bfloat16, and computed in float32 by PEFT on the CPU
        for name, buffer in model.named_buffers():
            if "randlora_" in name:
                buffer.data = buffer.data.to(dtype)
    x = torch.randn(*rows, 24).to(torch.float32 if how.startswith("proj") else dtype)
    truth = step(copy.deepcopy(model).float(), x.float())
    want = step(model, x)
    assert lrkern.peft.patch(model).fused == 3
    with calls() as counter:
        got = step(model, x)
    assert counter == {f"{kind}_linear": 3}
    if how.startswith("proj"):
        assert_same(got, want)
        return
    ratios = []
    for name, exact in {"y": truth[0], **truth[1]}.items():
        ours, theirs = (run[0] if name == "y" else run[1][name] for run in (got, want))
        assert ours.dtype == theirs.dtype, name
        ratios.append((ours.double() - exact).norm() / (theirs.double() - exact).norm())
    assert sum(ratios) / len(ratios) <= 1.25 and max(ratios) <= 3, ratios


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model, x = model_of(kind), torch.randn(6, 24)
    with torch.autocast("cpu", torch.bfloat16):
        want = step(model, x)
        lrkern.peft.patch(model)
        got = step(model, x)
    assert_same(got, want, 2e-2)  # 0.009 seen, PEFT's own distance from float32


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_pefts(kind):
    model, x = model_of(kind, **{f"{kind}_dropout": 0.4}), torch.randn(5, 24)
    want = step(model, x)
    lrkern.peft.patch(model)
    assert_same(step(model, x), want)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    lrkern.peft.unpatch(model)
    assert not torch.allclose(want[0], model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_and_what_turns_them_off(kind):
    model, x = model_of(kind), torch.randn(5, 24)
    model.add_adapter("other", config(kind, target_modules=["up", "same"]))
    shaken(model)
    stock = copy.deepcopy(model)
    lrkern.peft.patch(model)
    seen = []
    for active in (["default"], ["other"], ["default", "other"]):
        for m in (stock, model):
            m.base_model.set_adapter(active)
        with calls() as counter:
            assert_same(step(model, x), step(stock, x))
        add = {f"{kind}_add": 2} if len(active) == 2 else {}
        assert counter == {f"{kind}_linear": 2 if active == ["other"] else 3, **add}
        seen.append(model(x))
    assert lrkern.peft.report(model).fused == 3
    model.base_model.set_adapter("other")
    assert lrkern.peft.report(model).layers["base_model.model.down"] == "no active adapter"
    model.base_model.set_adapter("default")
    with model.disable_adapter(), stock.disable_adapter(), calls() as counter:
        assert torch.equal(model(x), stock(x)) and not counter
        assert set(lrkern.peft.report(model).layers.values()) == {"adapters disabled or merged"}
    model.merge_adapter(["default"])
    with calls() as counter:
        torch.testing.assert_close(model(x), seen[0], atol=1e-4, rtol=1e-4)
        assert not counter
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), seen[0], atol=1e-4, rtol=1e-4)


class Scaled(nn.Linear):
    """A base layer of another kind, which runs as it is."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", KINDS)
def test_any_base_layer(kind):
    transformers = pytest.importorskip("transformers")
    net = Net()
    net.up = transformers.pytorch_utils.Conv1D(40, 24)
    net.down = Scaled(40, 16)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = shaken(peft.get_peft_model(net, config(kind)))
    x = torch.randn(5, 24)
    want = step(model, x)
    lrkern.peft.patch(model)
    with calls() as counter:
        assert_same(step(model, x), want)
    assert counter == {f"{kind}_linear": 1, f"{kind}_add": 2}


def watched(model):
    model.base_model.model.up.get_submodule(f"{model.peft_type.value.lower()}_dropout.default").register_forward_hook(
        lambda *_: None
    )


def halved(model):
    layer = model.base_model.model.up
    kind = model.peft_type.value.lower()
    buffers = getattr(layer, f"{kind}_A")
    buffers["default"] = buffers["default"][:, ..., :7]


def replaced(model):
    model.base_model.model.up.forward = lambda x: torch.ones(*x.shape[:-1], 40)


def doubled(model):
    kind = model.peft_type.value.lower()
    for name in ("A", "B"):
        getattr(model.base_model.model.up, f"{kind}_{name}")["default"] = torch.ones(3, 3, 3).double()


@pytest.mark.parametrize(("spoil", "why"), [
    (watched, "hooks on {}_dropout"), (halved, "projections ["), (replaced, "its forward was replaced"),
    (doubled, "tensors of dtype"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_fused_runs_as_peft(kind, spoil, why):
    model, x = model_of(kind), torch.randn(5, 24)
    spoil(model)

    def outcome():
        if spoil in (watched, replaced):
            return step(model, x)[0]
        with pytest.raises(RuntimeError) as error:
            model(x)
        return error.type

    want = outcome()
    report = lrkern.peft.patch(model)
    assert why.format(kind) in report.layers["base_model.model.up"] and why.format(kind) in str(report)
    with calls() as counter:
        got = outcome()
    assert counter[f"{kind}_linear"] < 3
    if spoil in (watched, replaced):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    else:
        assert got is want, "PEFT's own error"


@pytest.mark.parametrize("kind", KINDS)
def test_one_vector_is_pefts(kind):
    """[I] without a row dimension runs PEFT's code."""
    model, x = model_of(kind), torch.randn(24)
    want = model(x)
    lrkern.peft.patch(model)
    with calls() as counter:
        assert torch.equal(model(x), want)
    assert not counter


def saved_sizes(model, x):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        model(x.requires_grad_())
    return Counter(sizes)


@pytest.mark.parametrize(("kind", "shape", "sizes"), [
    ("vera", (24, 40), [(61, 40)]),  # w = v B [T, O]
    ("randlora", (24, 40), [(25, 24), (24, 25)]),  # U = Λ A Γ [n r, I]
    ("randlora", (140, 121), [(61, 125)]),  # x B [T, n r]
])  # fmt: skip
def test_what_is_not_saved(kind, shape, sizes):
    torch.manual_seed(1)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(*shape)), config(kind, target_modules=["0"], r=5))
    x = torch.randn(61, shape[0])
    before = saved_sizes(model, x)
    lrkern.peft.patch(model)
    if (kind, shape) != ("randlora", (24, 40)):
        assert saved_sizes(model, x)[sizes[0]]  # by default as PEFT, for the faster backward
        model.base_model.model[0].save_output = False
    after = saved_sizes(model, x)
    assert any(before[size] for size in sizes) and not any(after[size] for size in sizes), (before, after)
    if kind == "vera":
        assert [size for size in after if size[0] == 61] == [(61, 5)], "x Aᵀ alone grows with T"


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_views_of_pefts(kind):
    model = model_of(kind)
    lrkern.peft.patch(model)
    for layer in (model.base_model.model.up, model.base_model.model.down, model.base_model.model.same):
        for x, ours in zip("AB", layer._plan().adapters[0][2:4], strict=True):
            stored = getattr(layer, f"{kind}_{x}")["default"]
            assert ours.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files_stay_pefts(kind, tmp_path):
    model, x = model_of(kind), torch.randn(5, 24)
    state = list(model.state_dict())
    lrkern.peft.patch(model)
    want = model(x)
    assert list(model.state_dict()) == state and f"{kind}.Linear" in repr(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lrkern.peft.report(twin).fused == 3 and torch.equal(twin(x), want)
    model.save_pretrained(tmp_path)
    base = Net()
    base.load_state_dict({k.replace("base_model.model.", "").replace("base_layer.", ""): v
                          for k, v in model.state_dict().items() if kind not in k})  # fmt: skip
    stock = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(stock(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    model, x = model_of(kind), torch.randn(5, 24)
    want = step(model, x)
    lrkern.peft.patch(model)
    assert_same(step(torch.compile(model, backend="aot_eager"), x), want)


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_no_name_of_ours_hides_one_of_pefts(kind):
    made = peft.LoraConfig(target_modules=["up"]) if kind == "lora" else config(kind)
    model = peft.get_peft_model(Net(), made)
    theirs = set(dir(model.base_model.model.up))
    lrkern.peft.patch(model)
    layer = type(model.base_model.model.up)
    ours = {name for cls in layer.__mro__ if cls.__module__.startswith("lrkern") for name in vars(cls)}
    meant = {"forward", "train", "_load_from_state_dict", "base_layer", "lora_A", "lora_B", "_abc_impl"}
    assert {name for name in ours & theirs if not name.startswith("__")} <= meant
