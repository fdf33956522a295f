# SPDX-License-Identifier: Apache-2.0
"""Patched PEFT models on CUDA, and over its kernels emulated, beside stock PEFT on the same device."""

import pytest
import torch

peft = pytest.importorskip("peft")

from test_peft import Net, lora_grads  # noqa: E402

import lrkern.peft  # noqa: E402

ON_KERNELS = pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
ON_CUDA = pytest.mark.parametrize("device", ["cuda"], indirect=True)
PLACES = {"target_modules": ["up", "down"]}
CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **PLACES),
    "dora": peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **PLACES),
    "dropout": peft.LoraConfig(r=4, lora_dropout=1.0, init_lora_weights=False, **PLACES),
    "vera": peft.VeraConfig(r=8, init_weights=False, save_projection=True, **PLACES),
    "randlora": peft.RandLoraConfig(r=4, randlora_alpha=8, init_weights=False, save_projection=True, **PLACES),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_on(device, config, dtype):
    torch.manual_seed(0)
    return peft.get_peft_model(Net().to(dtype), config).to(device)


def assert_close(got, want, tol):
    (y, grads), (y0, grads0) = got, want
    assert grads.keys() == grads0.keys()
    for name, g, g0 in (("y", y, y0), *((n, grads[n], grads0[n]) for n in grads)):
        assert g.dtype == g0.dtype and g.device == g0.device, name
        assert (g.double() - g0.double()).norm() <= tol * g0.double().norm(), name


# Relative Frobenius difference; seen, emulated beside PEFT on the CPU: 3e-7, in bfloat16 0.04, where both round y and dx.
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-2)], ids=["float32", "bfloat16"])
@EACH
@ON_KERNELS
def test_patched_equals_peft_on_the_kernels(config, dtype, tol, device):
    model, x = model_on(device, config, dtype), torch.randn(3, 15, 16).to(device, dtype)
    want = lora_grads(model, x)
    report = lrkern.peft.patch(model)
    assert report.fused == len(report.layers) == 2
    assert_close(lora_grads(model, x), want, tol)
    model.eval()
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    lrkern.peft.unpatch(model)
    model.merge_adapter()
    assert_close((merged, {}), (model(x), {}), tol)


@EACH
@ON_CUDA  # the emulated library has no autocast
def test_patched_equals_peft_under_autocast(config, device):
    model, x = model_on(device, config, torch.float32), torch.randn(3, 15, 16, device=device)

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            return lora_grads(model, x)

    want = run()
    lrkern.peft.patch(model)
    assert_close(run(), want, 5e-2)
