# SPDX-License-Identifier: Apache-2.0
"""weight and bias of an adapter layer: to be asked what they are like, not to compute with."""

import pytest
import torch
from torch import nn

import lrkern.nn


def layer(**like):
    made = lrkern.nn.FusedLoRALinear.from_linear(nn.Linear(16, 32, **like), r=2)
    nn.init.normal_(made.lora_B.weight)
    return made


def test_what_they_are_like():
    m = layer(dtype=torch.bfloat16)
    assert m.weight.dtype == m.bias.dtype == torch.bfloat16 and m.weight.shape == (32, 16) and len(m.bias) == 32
    assert isinstance(m.weight, torch.Tensor) and not m.weight.requires_grad and m.weight.device.type == "cpu"
    assert layer(bias=False).bias is None and "weight" not in m.state_dict()


def test_they_do_not_compute():
    m, x = layer(), torch.randn(3, 16)
    for compute in (lambda: nn.functional.linear(x, m.weight), lambda: m.weight @ x.mT, lambda: x.mv(m.weight[0])):
        with pytest.raises(RuntimeError, match="leaves the adapter out"):
            compute()
    with pytest.raises((AttributeError, KeyError)):
        m.weight = nn.Parameter(torch.zeros(32, 16))


def test_a_fast_path_that_reads_w_is_not_taken(monkeypatch):
    m, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 3, 16)
    base = m(x)
    m.linear1 = lrkern.nn.FusedLoRALinear.from_linear(m.linear1, r=2)
    nn.init.normal_(m.linear1.lora_B.weight)
    with torch.no_grad():
        y = m(x)
    assert not torch.allclose(y, base, atol=1e-2)
    torch.testing.assert_close(y, m(x))  # gradients keep it away from that path
