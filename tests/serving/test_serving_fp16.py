# SPDX-License-Identifier: Apache-2.0
"""Pools of float16 whose scale · S is out of its range, as ../peft/test_peft_fp16.py: requests get what PEFT computes."""

import peft
import torch
from torch import nn

from lrkern.serving import AdapterPool, MultiLoraModel

X = torch.zeros(2, 1, 16)
X[..., 0] = 1000.0


def base():
    net = nn.Sequential(nn.Linear(16, 8, bias=False))
    nn.init.zeros_(net[0].weight)
    return net.half().eval()


def files(model):
    return model.peft_config["default"], peft.get_peft_model_state_dict(model)


@torch.no_grad()
def serve(model, scale):
    net = base()
    pool = AdapterPool(net, pages=4)
    pool.add("one", *files(model))
    with MultiLoraModel(net, pool) as served:
        y = served(X.half(), adapters=["one", None], scales=[scale, None])
    assert y.dtype == torch.float16 and not y[1].any()
    return y[0, 0].float()


@torch.no_grad()
def test_factors():
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=64, target_modules=["0"]))
    a, b = (m["default"].weight for m in (model.base_model.model[0].lora_A, model.base_model.model[0].lora_B))
    a.zero_(), b.zero_()
    a[0, 0], b[:, 0] = 10.0, 1e-3
    torch.testing.assert_close(serve(model, 1.0), torch.full((8,), 160.0), rtol=4e-3, atol=0)
    torch.testing.assert_close(serve(model, 8.0), torch.full((8,), 1280.0), rtol=4e-3, atol=0)


@torch.no_grad()
def test_vectors():
    """A request's scale meets b, not d."""
    config = peft.VeraConfig(r=4, target_modules=["0"], save_projection=True)
    model = peft.get_peft_model(base(), config)
    layer = model.base_model.model[0]
    A, B = layer.vera_A["default"], layer.vera_B["default"]
    A.copy_(torch.ones_like(A)), B.copy_(torch.ones_like(B))
    layer.vera_lambda_d["default"].fill_(10.0), layer.vera_lambda_b["default"].fill_(1e-3)
    delta = model.eval()(X[:1].half())[0, 0].float()
    torch.testing.assert_close(delta, torch.full((8,), 40.0), rtol=4e-3, atol=0)
    torch.testing.assert_close(serve(model, 16.0), 16 * delta, rtol=4e-3, atol=0)
