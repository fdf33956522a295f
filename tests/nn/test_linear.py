# SPDX-License-Identifier: Apache-2.0
"""What a new kind of layer gets from AdapterLinear and LowRankLinear, shown on one that nobody but this file knows."""

import copy

import pytest
import torch
from layer_kinds import EACH, shake
from torch import nn

pytest.importorskip("safetensors")
from safetensors.torch import load_file

from lrkern.convert import to_lora
from lrkern.functional import lora_scaling
from lrkern.nn.linear import AdapterLinear, LowRankLinear, constant


@pytest.fixture
def Middle(monkeypatch):
    monkeypatch.setattr(AdapterLinear, "KINDS", dict(AdapterLinear.KINDS))

    class Middle(LowRankLinear):
        """ΔW = scaling · B M A, frozen A and B, M trains."""

        SETTINGS = ("r", "lora_alpha", "dropout")

        def _set_up(self, base, r=4, lora_alpha=6.0, dropout=0.0, adapter_dtype=None):
            self._whole("r", r, 0, 512)
            self._probability("dropout", dropout)
            like = self._adopt(base, r, adapter_dtype)
            self.lora_alpha, self.dropout, self.scaling = lora_alpha, dropout, lora_scaling(lora_alpha, r)
            self.register_buffer("A", torch.randn(r, self.in_features, **like))
            self.register_buffer("B", torch.randn(self.out_features, r, **like))
            self.middle = constant(0.0, r, r, **like)

        def factors(self):
            return self.A, self.B @ self.middle, self.scaling

    return Middle


def trained(layer):
    nn.init.normal_(layer.middle)
    return layer


def test_forward_gradient_and_merge(Middle):
    layer, x = Middle(24, 20), torch.randn(5, 24)
    assert torch.equal(layer(x), layer.base_layer(x)) and AdapterLinear.KINDS["Middle"] is Middle
    y = trained(layer)(x)
    delta = layer.scaling * layer.B @ layer.middle @ layer.A
    torch.testing.assert_close(y, layer.base_layer(x) + x @ delta.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.delta_weight(), delta, atol=1e-5, rtol=1e-5)
    y.sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["middle"] == [*layer.coefficients()]
    w = layer.base_layer.weight.clone()
    layer.eval().merge()
    torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, w, atol=1e-5, rtol=1e-5)
    none = Middle(24, 20, r=0)
    none.merge()
    assert torch.equal(none(x), none.base_layer(x)) and none.merged


def test_settings_state_and_refusals(Middle):
    layer, base, x = trained(Middle(24, 20, dropout=0.5)).eval(), nn.Linear(24, 20), torch.randn(3, 24)
    assert repr(layer).startswith("Middle(\n  in_features=24, out_features=20, r=4, lora_alpha=6.0, dropout=0.5")
    twin = Middle.from_linear(base, **layer.settings).eval()
    twin.load_state_dict(layer.state_dict())
    assert twin.base_layer is base and torch.equal(twin(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    assert Middle(8, 8, dtype=torch.bfloat16).middle.dtype == torch.float32
    with pytest.raises(TypeError, match=r"Middle._set_up\(\) got an unexpected keyword argument 'rank'"):
        Middle(8, 8, rank=3)
    with pytest.raises(ValueError, match=r"Middle: dropout must lie in \[0, 1\], got 2"):
        Middle(8, 8, dropout=2)
    with torch.no_grad():
        layer.middle[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Middle.merge: W \+ delta_weight\(\) must be finite, got inf or nan"):
        layer.merge()


def test_as_plain_lora(Middle, tmp_path):
    layer = trained(Middle(24, 20))
    to_lora({"there": layer}, tmp_path)
    a, b = (load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.there.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(b @ a, layer.delta_weight(), atol=1e-5, rtol=1e-5)


@EACH
def test_conv1d(cls, settings):
    """transformers' Conv1D has W transposed, and merging writes it."""
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv, x = Conv1D(32, 20), torch.randn(4, 20)
    layer = shake(cls.from_conv1d(conv, **settings).eval())
    assert (layer.in_features, layer.out_features) == (20, 32) and not conv.bias.requires_grad
    y, plain = layer(x), conv(x)
    layer.merge()
    torch.testing.assert_close(conv(x), y, atol=2e-5, rtol=1e-4)
    layer.unmerge()
    torch.testing.assert_close(conv(x), plain, atol=2e-5, rtol=1e-4)
    with pytest.raises(TypeError, match=f"{cls.__name__}.from_conv1d: conv must be a Conv1D, got Linear"):
        cls.from_conv1d(nn.Linear(2, 2))
