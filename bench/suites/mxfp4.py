# SPDX-License-Identifier: Apache-2.0
"""Suite `mxfp4`: one linear layer whose W is in MXFP4, frozen; for training x takes a gradient. method=quantize: W to MXFP4.

    fp32, bf16  F.linear over a dense W of that dtype, x in it too
    eager       the reference: W decoded whole by torch ops, then F.linear
    torchao     its MXTensor, decoded whole, then F.linear; of quantize its to_mx
    bnb         bitsandbytes' Linear4bit, fp4 or nf4, blocks of 64: W of its own tables
    int4pack    torch's _weight_int4pack_mm_for_cpu, groups of 32: W of its own grid, forward alone
    gnf4        grouped-nf4-gemm's C kernels for the CPU with one expert, from the same bytes as lrkern
    lrkern      mx_linear; of method=lora mx_linear_expand of rank R; of quantize mx_quantize

On CUDA, at the sizes of larger layers, also

    copy        a plain copy that reads half and writes half as many bytes as W in MXFP4 has; "of copy" is a W's bytes a second
                against those
    marlin      vLLM's Marlin kernel (pip install vllm), from the same bytes, forward alone
    humming     humming's (pip install humming-kernels), likewise
    fused       lrkern with LRKERN_FUSED=all

torchao, bnb and gnf4 are there after `make peers`. x is in the case's dtype but for fp32 and bf16, and what int4pack and gnf4 turn it
into. With one token what each reads of W rotates over 512 MiB; "of read" is its W against the bandwidth of a plain read in this run.
pass=bwd is dx alone; eager and torchao keep the W that they decoded in the untimed forward.
"""

import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import suite
import timing
import torch
import torch.nn.functional as F
from peers import fp4
from suite import Call, Case, by_path
from torch import Tensor

from lrkern import ops
from lrkern.reference import Draw
from lrkern.reference import mx as reference

SIDES = ((4096, 14336), (14336, 4096), (4096, 4096))  # I, O
FEW, MANY = (1, 2, 4, 8, 16), (512, 2048, 8192)  # tokens
PEERS = Path(sys.prefix) / "peers"
sys.path.append(str(PEERS))
os.environ.setdefault("GNF4_NATIVE_CACHE", str(PEERS / "gnf4-native"))  # what it compiles goes there


class Layer:
    """What the copies of the data have in common: the values of W, and what a provider makes of them once."""

    def __init__(self, I: int, O: int, device: str):
        self.dense = Draw(device, torch.float32, 0)(O, I, std=I**-0.5)
        self.codes, self.scales, _ = ops.mx_quantize(self.dense)
        self.weight = ops.mx_dequantize(self.codes, self.scales, I)
        self.made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


layer_of = lru_cache(maxsize=1)(Layer)


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw = Draw(device, case.dtype, seed)
        self.case, self.seed, self.device, train = case, seed, device, "bwd" in case.passes
        T, I, O, R = case.T, case.I, case.O, case.R
        self.layer = layer = layer_of(I, O, device)
        if case.method == "quantize":
            super().__init__({"x": layer.dense.to(case.dtype, copy=True)})
            return
        packed = {"codes": layer.codes.clone(), "scales": layer.scales.clone()}
        inputs = {"x": draw(T, I).requires_grad_(train), **packed, "bias": draw(O)}
        truth = reference.mx_linear
        if case.method == "lora":
            inputs |= {"s": draw(T, R), "b": draw(O, R)}
            truth = reference.mx_linear_expand
        super().__init__(inputs, draw(T, O), truth)

    def enough(self, reads: int) -> bool:
        """Whether the copies before this one hold enough of what a provider reads, so many bytes of each."""
        return self.seed * reads >= max(rotation(self.case), 2 * timing.last_level_cache(), 1)

    @property
    def whole(self) -> bool:
        """Whether this copy is for those that decode W whole: each call's new memory leaves no cache of the last one's."""
        return self.seed < 2

    def low(self, y: Tensor) -> Tensor:
        """y, and S Bᵀ of method=lora."""
        if self.case.method != "lora":
            return y
        return torch.addmm(y, self.inputs["s"].to(y.dtype), self.inputs["b"].to(y.dtype).mT)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
        import cpu_grouped

        ctx.given = given
        return cpu_grouped.gemv_mxfp4_grouped_cpu(x.float(), **given).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        import cpu_grouped

        return cpu_grouped.dgrad_mxfp4_grouped_cpu(dy.float().contiguous(), **ctx.given).to(dy.dtype), None


def grouped_product(x: Tensor, codes: Tensor, scales: Tensor, counts: dict[int, int]) -> Tensor:
    """grouped-nf4-gemm's x Wᵀ of rows that are sorted by expert, so many of each; codes [E, O, I / 2], scales [E, O, I / 32]."""
    given = {"packed": codes, "scales": scales, "sizes": [*counts.values()], "expert_ids": [*counts]}
    return _Grouped.apply(x, given)


def start_pool() -> None:
    """grouped-nf4-gemm's own threads, as many as torch has: as fast as its OpenMP, whose threads spin on into the calls of others."""
    import cpu_grouped

    cpu_grouped.pool_start(torch.get_num_threads())


def rotation(case: Case) -> int:
    return timing.READ if case.T == 1 and case.method != "quantize" else 0


def fastest(calls: dict[str, Callable[[], Any]]) -> str:
    """The name of the call that takes the least time, by its best of three."""

    def best(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    with torch.no_grad():
        return min(calls, key=lambda name: best(calls[name]))


class Suite(suite.Suite):
    data = Data
    against = "bf16"

    def cases(self, quick: bool) -> list[Case]:
        def case(method, T, passes, dtype, R=None, I=4096, O=4096):
            return Case(method=method, T=T, I=I, O=O, R=R, passes=passes, dtype=dtype)

        bf16, fp32 = torch.bfloat16, torch.float32
        if self.device == "cuda":
            return [
                case(method, T, passes, bf16, 16 if method == "lora" else None, I, O)
                for I, O in SIDES[: 1 if quick else None]
                for method in ("linear", "lora")
                for T, passes in [*((T, "no_grad") for T in FEW + MANY), *((T, "fwd+bwd") for T in MANY)]
                if not quick or T in (1, 16, 8192)
            ]
        aim = [
            case("linear", 1, "no_grad", bf16),
            case("linear", 512, "no_grad", bf16),
            case("linear", 1, "bwd", bf16),
            case("lora", 1, "no_grad", bf16, 16),
        ]
        if quick:
            return aim
        return [
            *aim,
            case("linear", 1, "no_grad", fp32),
            case("linear", 1, "bwd", fp32),
            case("linear", 1, "fwd+bwd", bf16),
            case("linear", 512, "fwd+bwd", bf16),
            case("lora", 1, "no_grad", fp32, 16),
            case("lora", 512, "no_grad", bf16, 16),
            case("quantize", 1, "no_grad", bf16),
            case("quantize", 1, "no_grad", fp32),
        ]

    def rotation(self, case: Case) -> int:
        return rotation(case)

    def slow(self, case: Case) -> tuple[str, ...]:
        return (*super().slow(case), *(("torchao", "bnb", "gnf4") if case.T > 64 else ()))

    def work(self, case: Case, d: Data) -> tuple[int, int] | None:
        if case.method == "quantize":
            return None
        times = 1 + (case.passes == "fwd+bwd")
        low = case.T * case.O * (case.R or 0)
        moved = sum(t.nbytes for t in d.inputs.values()) + (d.dy.nbytes if times > 1 else case.T * case.O * 2)
        return 2 * times * (case.T * case.I * case.O + low), moved * times

    def _dense(self, d: Data, dtype: torch.dtype) -> Call | None:
        """Trained only in the case's own dtype."""
        reads = d.layer.weight.numel() * dtype.itemsize
        if d.case.method == "quantize" or d.enough(reads) or ("bwd" in d.case.passes and d.case.dtype != dtype):
            return None
        if self.device == "cuda" and d.case.dtype != dtype:
            return None
        x = d.inputs["x"]
        x = x if x.dtype == dtype else x.detach().to(dtype)
        weight, bias = d.layer.weight.to(dtype, copy=True), d.inputs["bias"].to(dtype)
        return Call(lambda: d.low(F.linear(x, weight, bias)), exact=d.case.dtype == dtype, reads=reads)

    def fp32(self, d: Data) -> Call | None:
        return self._dense(d, torch.float32)

    def bf16(self, d: Data) -> Call | None:
        return self._dense(d, torch.bfloat16)

    def eager(self, d: Data) -> Call | None:
        if d.case.method == "quantize":
            return Call(lambda: reference.mx_quantize(d.inputs["x"])[0])
        return Call(lambda: d.truth(**d.inputs), reads=self._packed(d)) if d.whole else None

    def torchao(self, d: Data) -> Call | None:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode, to_mx

        e2m1, even = torch.float4_e2m1fn_x2, ScaleCalculationMode.EVEN
        if d.case.method == "quantize":
            return Call(lambda: to_mx(d.inputs["x"], e2m1, 32, even)[1])
        x, bias = d.inputs["x"], d.inputs["bias"]
        if not d.whole:
            return None
        make = lambda: MXTensor.to_mx(d.layer.weight.to(torch.bfloat16), e2m1, 32, even)
        packed = d.layer.once("torchao", make)
        return Call(lambda: d.low(F.linear(x, packed.dequantize(x.dtype), bias)), reads=self._packed(d))

    def bnb(self, d: Data) -> Call | None:
        import bitsandbytes

        x, bias, dense = d.inputs["x"], d.inputs.get("bias"), d.layer.dense
        fused = bitsandbytes.functional.has_avx512bf16()  # else it decodes W whole
        if d.case.method == "quantize" or (d.enough(dense.numel() // 2) if fused else not d.whole):
            return None

        def make(table: str) -> torch.nn.Module:
            layer = bitsandbytes.nn.Linear4bit(
                d.case.I, d.case.O, bias=False, compute_dtype=x.dtype, quant_type=table, device="meta"
            )
            layer.weight = bitsandbytes.nn.Params4bit(dense.to(x.dtype), requires_grad=False, quant_type=table)
            return layer.to(d.device).eval()

        key = "bnb", x.dtype, d.case.T

        def choose() -> torch.nn.Module:
            layers = {table: make(table) for table in ("fp4", "nf4")}
            return layers[fastest({table: lambda layer=layer: layer(x) for table, layer in layers.items()})]

        layer = copy.deepcopy(d.layer.once(key, choose))
        bytes_of = layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
        return Call(lambda: d.low(layer(x) + bias), exact=False, reads=bytes_of)

    def int4pack(self, d: Data) -> Call | None:
        if d.device != "cpu" or d.case.method == "quantize" or "bwd" in d.case.passes:
            return None
        product = torch.ops.aten._weight_int4pack_mm_for_cpu

        def make() -> tuple[Tensor, Tensor]:
            groups = d.layer.dense.view(d.case.O, -1, 32)
            low, high = groups.aminmax(dim=-1)
            scale = (high - low) / 15
            codes = ((groups - low[..., None]) / scale[..., None]).round().int().clamp(0, 15).view(d.case.O, -1)
            # W = (code - 8) scale + zero; scales and zeros [groups of a row, O, 2]
            grid = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous()
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), grid

        packed, grid = (t.clone() for t in d.layer.once("int4pack", make))
        x, bias = d.inputs["x"], d.inputs["bias"]
        run = lambda dtype, grid: d.low(product(x.to(dtype), packed, 32, grid).to(x.dtype) + bias)
        grids = {dtype: grid.to(dtype) for dtype in {torch.bfloat16, x.dtype}}
        choose = lambda: fastest({dtype: lambda dtype=dtype: run(dtype, grids[dtype]) for dtype in grids})
        dtype = d.layer.once(("int4pack", x.dtype, d.case.T), choose)
        grid = grids[dtype]
        if d.enough(packed.nbytes + grid.nbytes):
            return None
        return Call(lambda: run(dtype, grid), exact=False, reads=packed.nbytes + grid.nbytes)

    def gnf4(self, d: Data) -> Call | None:
        if d.device != "cpu" or d.case.method == "quantize" or (d.case.T > 64 and d.seed):
            return None
        x, codes, scales, bias = (d.inputs[name] for name in ("x", "codes", "scales", "bias"))
        start_pool()
        packed = codes[None], scales[None], {0: d.case.T}
        return Call(lambda: d.low(grouped_product(x, *packed) + bias), reads=self._packed(d))

    def copy(self, d: Data) -> Call | None:
        if self.device != "cuda" or d.case.method == "quantize" or "bwd" in d.case.passes:
            return None
        source, target = (torch.empty(self._packed(d) // 2, dtype=torch.uint8, device=d.device) for _ in range(2))
        return Call(lambda: target.copy_(source), exact=False, reads=self._packed(d))

    def _peer(self, d: Data, make: Callable[..., Callable[[Tensor], Tensor]]) -> Call | None:
        if self.device != "cuda" or d.case.method == "quantize" or "bwd" in d.case.passes:
            return None
        x, codes, scales, bias = (d.inputs[name] for name in ("x", "codes", "scales", "bias"))
        layer = make(codes, scales, bias)
        return Call(lambda: d.low(layer(x)), reads=self._packed(d))

    def marlin(self, d: Data) -> Call | None:
        return self._peer(d, fp4.marlin)

    def humming(self, d: Data) -> Call | None:
        return self._peer(d, fp4.humming)

    def _packed(self, d: Data) -> int:
        return d.inputs["codes"].nbytes + d.inputs["scales"].nbytes

    def lrkern(self, d: Data) -> Call:
        if d.case.method == "quantize":
            return Call(lambda: ops.mx_quantize(d.inputs["x"])[0])
        alone = [d.inputs[name] for name in ("x", "codes", "scales", "bias")]
        if d.case.method == "linear":
            return by_path(Call(lambda: ops.mx_linear(*alone), reads=self._packed(d)), False)
        beside = "mx_linear", by_path(Call(lambda: ops.mx_linear(*alone)), False)
        call = Call(lambda: ops.mx_linear_expand(*d.inputs.values()), reads=self._packed(d), beside=beside)
        return by_path(call, False)

    def fused(self, d: Data) -> Call | None:
        if self.device != "cuda" or d.case.method == "quantize":
            return None
        return by_path(replace(self.lrkern(d), beside=None), True)
