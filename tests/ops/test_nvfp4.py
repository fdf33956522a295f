# SPDX-License-Identifier: Apache-2.0
"""The NVFP4 codec beyond the registry: e4m3 of all bfloat16, codes and scales beside torchao's, edges, random rounding."""

import math
import os
import subprocess

import numpy as np
import pytest
import torch

import lrkern.ops
from lrkern.reference import mx as reference
from tools.sources import ROOT, standard

FINITE = torch.arange(65536).to(torch.int32).short().view(torch.bfloat16)
FINITE = FINITE[FINITE.float().isfinite()]  # all 65,280
VALUES = torch.tensor(reference.VALUES)
ONE = torch.tensor([2688.0])  # the amax of which the global scale is 1


def codes_of(packed):
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def grids(dtype):
    """Rows [n, 32]: all finite bfloat16 of at most 2^100, in order and each beside a larger one; ties of the elements under
    block scales of every e4m3; random blocks of many sizes, of which those below the smallest scale are many."""
    g = torch.Generator().manual_seed(5)
    plain = FINITE[FINITE.float().abs() <= 2.0**100].float()
    alone = torch.nn.functional.pad(plain, (0, -len(plain) % 32)).view(-1, 32)
    beside = torch.stack([plain[::13] * f for f in (1.0, 0.5, -0.25, 0.3, 0.11, -0.75)], 1)
    middle = torch.cat([(VALUES[1:] + VALUES[:-1]) / 2, VALUES])
    middle = torch.cat([torch.tensor([6.0]), middle])[:16]
    scales = torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (middle * scales[:, None]).repeat(1, 2) * torch.tensor([1.0, -1.0]).repeat_interleave(16)
    drawn = torch.randn(2000, 32, generator=g) * 2.0 ** torch.randint(-30, 12, (2000, 1), generator=g)
    return [t.to(dtype) for t in (alone, torch.nn.functional.pad(beside, (0, 26)), ties, drawn)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("amax", [None, 2688.0, 1.0, 3e4, 2.0**-100])
def test_codes_and_scales_are_those_of_torchao(device, dtype, amax):
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    for x in grids(dtype):
        given = None if amax is None else torch.tensor([amax])
        scale = nv.per_tensor_amax_to_scale(x.abs().max() if given is None else given[0])
        theirs_scale, theirs = nv.nvfp4_quantize(x, 16, scale)
        codes, scales, found = lrkern.ops.nvfp4_quantize(x.to(device), None if given is None else given.to(device))
        assert found.cpu() == scale
        assert torch.equal(scales.cpu(), theirs_scale.view(torch.uint8).view(len(x), 2))
        assert torch.equal(codes.cpu(), theirs.view(torch.uint8).view(len(x), 16))
        tensor = nv.NVFP4Tensor.to_nvfp4(x, 16, per_tensor_scale=scale)
        back = lrkern.ops.nvfp4_dequantize(codes, scales, found, 32, dtype).cpu()
        assert torch.equal(back, tensor.dequantize(dtype))


E4M3 = """
#include <cstdio>
#include "mx.h"
int main() {
  uint8_t codes[65536];
  float values[256];
  for (uint32_t i = 0; i < 65536; ++i) codes[i] = static_cast<uint8_t>(lrk::e4m3_code(lrk::bit_cast<float>(i << 16)));
  for (uint32_t i = 0; i < 256; ++i) values[i] = lrk::e4m3_value(i);
  std::fwrite(codes, 1, sizeof codes, stdout);
  std::fwrite(values, 1, sizeof values, stdout);
}
"""


def test_e4m3_is_torchs_for_every_bfloat16(tmp_path):
    """csrc/mx.h's functions themselves, with the signs and subnormals that scales do not have. Beyond 448 they saturate, infinities too,
    as torch's cast does since 2.13."""
    command = [os.environ.get("CXX", "g++"), standard(), f"-I{ROOT / 'csrc'}", "-xc++", "-", "-o", tmp_path / "e4m3"]
    subprocess.run(command, input=E4M3, text=True, check=True)
    found = subprocess.run([tmp_path / "e4m3"], capture_output=True, check=True).stdout
    every = torch.arange(65536).to(torch.int32).short().view(torch.bfloat16).float()
    codes = torch.from_numpy(np.frombuffer(found[:65536], np.uint8).copy())
    want = every.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    numbers = ~every.isnan()
    assert torch.equal(codes[numbers], want[numbers]) and ((codes & 0x7F)[~numbers] == 0x7F).all()
    values = torch.from_numpy(np.frombuffer(found[65536:], np.float32).copy())
    decoded = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(values.nan_to_num(7), decoded.nan_to_num(7)) and values.isnan().sum() == 2
    assert torch.equal(values.signbit()[~values.isnan()], decoded.signbit()[~values.isnan()])


def test_scales_are_e4m3_of_every_bfloat16(device):
    """A block's largest magnitude divided by 6 becomes its scale; the clamps at 2^-6 and 448 are the only difference to a cast."""
    x = FINITE[FINITE > 0].float()
    m = x * 6  # exact in float32 but for the largest
    m, x = m[m.isfinite()], x[m.isfinite()]
    m, x = m[m / 6 == x], x[m / 6 == x]
    assert len(x) > 32000
    scales = lrkern.ops.nvfp4_quantize(m[:, None].to(device), ONE.to(device))[1].cpu()[:, 0]
    want = x.clamp(2.0**-6, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(scales, want) and scales.min() == 8 and scales.max() == 126


def test_every_code_and_scale_is_decoded(device, dtype):
    """256 scales, signs, subnormals and NaN among them, by 16 codes, and under a global scale of no power of two."""
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[::2] | codes[1::2] << 4).expand(256, 8).contiguous()
    for scale in (1.0, 1 / 3, 2.0**-20):
        given = torch.tensor([scale])
        got = lrkern.ops.nvfp4_dequantize(packed.to(device), scales.to(device), given.to(device), 16, dtype).cpu()
        by = given * scales.view(torch.float8_e4m3fn).float()
        want = (torch.cat([VALUES, -VALUES]) * by).to(dtype)
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)) and torch.equal(got.isnan(), want.isnan())
        assert got[127].isnan().all() and got.isnan().sum() == 32
        numbers = ~got.isnan()
        assert torch.equal(got.signbit()[numbers], want.signbit()[numbers])


# block, amax -> scale, code of the first element, global scale (None: NaN): the table of docs/ops.md, "NVFP4"
EDGES = {
    "zeros": ([0.0] * 16, None, 0x08, 0, 2.0**-120),
    "minus zero": ([-0.0] * 16, 2688.0, 0x08, 8, 1.0),
    "nan": ([math.nan] + [1.0] * 15, 2688.0, 0x7F, 0, 1.0),
    "inf": ([math.inf] + [1.0] * 15, 2688.0, 0x7F, 0, 1.0),
    "-inf": ([1.0] * 15 + [-math.inf], 2688.0, 0x7F, 0, 1.0),
    "nan, no amax": ([1.0] * 15 + [math.nan], None, 0x7F, 0, None),
    "-inf, no amax": ([-math.inf] + [1.0] * 15, None, 0x7F, 0, None),
    "amax is nan": ([1.0] * 16, math.nan, 0x7F, 0, None),
    "amax is zero": ([1.0] * 16, 0.0, 0x7E, 7, 2.0**-120),
    "amax is too small": ([1e4] * 16, 2688.0, 0x7E, 7, 1.0),
    "below the smallest scale": ([2.0**-7] * 16, 2688.0, 0x08, 1, 1.0),
    "tiny beside amax": ([2.0**-9] * 16, 2688.0, 0x08, 0, 1.0),
    "tiny": ([1e-40] * 16, None, 0x08, 0, 2.0**-120),
    "largest": ([torch.finfo(torch.float32).max] * 16, None, 0x7E, 7, torch.finfo(torch.float32).max / 2688),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(device, name):
    block, amax, scale, code, whole = EDGES[name]
    amax = None if amax is None else torch.tensor([amax]).to(device)
    x = torch.tensor([block, [0.5] * 16]).flatten()[None].to(device)
    if EDGES[name][1] is None and whole is not None:
        x = x[:, :16]
    codes, scales, found = lrkern.ops.nvfp4_quantize(x, amax)
    assert (scales[0, 0].item(), codes[0, 0].item() & 15) == (scale, code)
    assert math.isnan(found.item()) if whole is None else found.item() == torch.tensor(whole).item()
    back = lrkern.ops.nvfp4_dequantize(codes, scales, found, x.shape[1])[0]
    assert back[:16].isnan().all() if scale == 0x7F else back[:16].isfinite().all()
    assert (back[16:].isnan().all() and (scales == 0x7F).all()) if whole is None else back[16:].isfinite().all()
    seeded = lrkern.ops.nvfp4_quantize(x, amax, torch.tensor([5]).to(device))
    assert torch.equal(seeded[1], scales) and (scale != 0x7F or not seeded[0][0, :8].any())


@pytest.mark.parametrize("K", [16, 40, 256])
def test_a_matrix_that_lies_across_is_its_copy(device, dtype, K):
    x = torch.randn(K, 19).to(device, dtype).mT
    for seed in (None, torch.tensor([7]).to(device)):
        across, copied = (lrkern.ops.nvfp4_quantize(t, None, seed) for t in (x, x.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(across, copied, strict=True))


def test_random_rounding_is_unbiased_and_the_same_everywhere(device):
    """The mean of 1024 draws is the value within five standard errors; to the nearest it is not. One seed has one result."""
    x = torch.cat([torch.tensor([6.0]), torch.linspace(-6, 6, 15)]).expand(1024, 16)
    seed = torch.tensor([2**61 + 3])
    got = lrkern.ops.nvfp4_quantize(x.to(device), ONE.to(device), seed.to(device))
    want = reference.nvfp4_quantize(x, ONE, seed)
    assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))
    back = lambda made: lrkern.ops.nvfp4_dequantize(*made, 16).cpu().double().mean(0)
    below = torch.stack([VALUES[v.abs() >= VALUES].amax() for v in x[0]])
    above = torch.stack([VALUES[v.abs() <= VALUES].amin() for v in x[0]])
    error = (back(got) - x[0]).abs()
    assert (error <= 5 * (above - below) / 2 / 32 + (above - below) * 2.0**-16).all()
    assert (back(lrkern.ops.nvfp4_quantize(x.to(device), ONE.to(device))) - x[0]).abs().max() > 0.2
    other = lrkern.ops.nvfp4_quantize(x.to(device), ONE.to(device), seed.to(device) + 1)
    assert not torch.equal(other[0], got[0])


def test_two_levels_lose_less_than_mxfp4(device):
    """Relative mean square errors on Gaussian blocks of many sizes within bands of published ones: .009 and .0126 to .0137."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4096, 64, generator=g).to(device)
    loss = lambda y: ((y - x).square().sum() / x.square().sum()).item()
    nv = loss(lrkern.ops.nvfp4_dequantize(*lrkern.ops.nvfp4_quantize(x), 64))
    mx = loss(lrkern.ops.mx_dequantize(*lrkern.ops.mx_quantize(x, "floor")[:2], 64))
    assert 0.0085 < nv < 0.0096 < 0.0125 < mx < 0.0145
