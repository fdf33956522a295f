# SPDX-License-Identifier: Apache-2.0
"""Suite `mora`: one linear layer with a MoRA adapter as large as LoRA of rank R; W frozen, x requires a gradient.

    base        the linear layer alone
    peft        stock PEFT's LoRA layer of rank R, as many parameters
    published   MoRA's formulas in torch's pads, views, sums and concatenations, as its authors have it; cos and sin are kept
    full        fine-tuning: the layer with the gradient of W
    lrkern      lrkern.nn.MoRALinear, called as a module

The adapter alone has the base GEMM replaced by a stored result, the same for all; for lrkern the ops around it are those that
mora_linear is made of, called one by one, with their Python (StoredMora).
"""

from types import SimpleNamespace
from typing import Any

import suite
import torch
import torch.nn.functional as F
from peers.families import mora_delta, mora_turn
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from stored import OPS, LayerSuite, StoredLinear, Trained, WithDw, frozen
from suite import Call, Case
from torch import Tensor

from lrkern import _host
from lrkern.nn import MoRALinear
from lrkern.ops.dispatch import use_library
from lrkern.reference import Draw, mora_linear


class StoredMora:
    """lrkern's ops with the base GEMM left out of mora_linear: the same kernels and products, of the same panels, adding into
    the stored y and dx in place. Never cheaper than the op without its GEMM: each call is one of its own."""

    def __init__(self, y: Tensor, dx: Tensor, rows: int):
        self.y, self.dx, self.rows = y, dx, rows
        self.mora_linear = SimpleNamespace(default=lambda *args: self.forward(*args)[0])
        self.mora_linear_fwd = SimpleNamespace(default=self.forward)
        self.mora_linear_bwd = SimpleNamespace(default=self.backward)

    def __getattr__(self, name: str) -> Any:
        return getattr(OPS, name)

    def panels(self, T: int, kind: int) -> list[slice]:
        rows = self.rows if kind == 6 else T
        return [slice(t, min(t + rows, T)) for t in range(0, T, rows)]

    def forward(self, x, weight, bias, m, kind, circular):
        r, O = m.shape[0], self.y.shape[1]
        n = min(-(-x.shape[1] // r), -(-O // r)) if kind == 6 else 0
        for at in self.panels(len(x), kind):
            h, y = OPS.mora_compress.default(x[at], r, kind, circular, n), self.y[at]
            if kind == 6 and n * r == O:
                y.view(-1, r).addmm_(h.view(-1, r), m.mT)
            else:
                OPS.mora_decompress_.default(y, (h.view(-1, r) @ m.mT).view_as(h), kind)
        return self.y.detach(), None if kind == 6 else h

    def backward(self, dy, x, weight, m, h, kind, circular, *_):
        r, O, dm = m.shape[0], dy.shape[1], torch.empty_like(m)
        n = min(-(-self.dx.shape[1] // r), -(-O // r)) if kind == 6 else 0
        for at in self.panels(len(dy), kind):
            mine = h if kind != 6 else OPS.mora_compress.default(x[at], r, kind, circular, n)
            shaped = kind == 6 and n * r == O
            g = dy[at].view_as(mine) if shaped else OPS.mora_compress.default(dy[at], r, kind, circular, n, True)
            g, mine_rows = g.view(-1, r), mine.view(-1, r)
            torch.addmm(dm, g.mT, mine_rows, beta=0 if at.start == 0 else 1, out=dm)
            dh = torch.mm(g, m, out=mine_rows) if kind == 6 else g @ m  # what is folded anew has served
            OPS.mora_decompress_.default(self.dx[at], dh.view_as(mine), kind, circular, True)
        return self.dx, None, None, dm


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw = Draw(device, case.dtype, seed)
        self.case, self.train = case, "bwd" in case.passes
        T, I, O, kind = case.T, case.I, case.O, int(case.type)
        x, weight, bias = draw(T, I), draw(O, I, std=I**-0.5), draw(O)
        self.linear = frozen(weight, bias)
        self.layer = MoRALinear.from_linear(self.linear, r=case.R, mora_type=kind, adapter_dtype=case.dtype)
        m, r = self.layer.lora_A.weight, self.layer.rank
        m.data = draw(r, r, std=I**-0.5)
        x.requires_grad_(self.train), m.requires_grad_(self.train)
        self.turn = mora_turn(r, I, x)
        truth = lambda x, weight, bias, m: mora_linear(x, weight, bias, m, kind)
        super().__init__({"x": x, "weight": weight, "bias": bias, "m": m}, draw(T, O), truth)
        with torch.no_grad():
            self.y, self.dx = self.linear(x), self.dy @ weight


class Suite(LayerSuite):
    data = Data
    against = "published"

    def cases(self, quick: bool) -> list[Case]:
        def case(kind, R, T=512, I=2048, O=2048, passes="fwd+bwd", dtype=torch.float32):
            return Case(type=str(kind), T=T, I=I, O=O, R=R, passes=passes, dtype=dtype)

        aim = [case(kind, 16) for kind in (6, 1)]
        if quick:
            return aim
        return [
            *aim,
            *(case(kind, 16, I=2048, O=1024) for kind in (6, 1)),
            *(case(kind, 16, I=1024, O=3000) for kind in (6, 1)),
            case(6, 16, T=1, passes="no_grad"),
            case(1, 128),
            case(6, 16, dtype=torch.bfloat16),
        ]

    def work(self, case: Case, d: Data) -> tuple[int, int]:
        """The base GEMM (twice with its dx), M's products of the chunks that live; W, x, y and M once, in backward dy and dx too."""
        T, I, O, r = case.T, case.I, case.O, d.layer.rank
        n, times = min(-(-I // r), -(-O // r)) if case.type == "6" else 1, 2 if d.train else 1
        moved = sum(t.nbytes for t in d.inputs.values()) + d.dy.nbytes
        return times * 2 * T * I * O + (3 if d.train else 1) * 2 * T * n * r * r, moved * times

    def peft(self, d: Data) -> Call:
        case = d.case

        def layer(base):
            config = LoraConfig(r=case.R, lora_alpha=case.R, init_lora_weights="gaussian")
            made = PeftLinear(base, "default", config=config, r=config.r, lora_alpha=config.lora_alpha)
            return made.to(case.dtype).train(d.train)

        # Its own parameters are no inputs of the case, and train all the same.
        x, whole, stored = d.inputs["x"], layer(d.linear), layer(StoredLinear(d.linear, d.y, d.dx))
        return Call(lambda: Trained.apply(whole, whole, x), Call(lambda: Trained.apply(stored, stored, x)), exact=False)

    def published(self, d: Data) -> Call:
        x, m, O, kind = d.inputs["x"], d.inputs["m"], d.case.O, int(d.case.type)
        return self.beside(d, lambda base: base + mora_delta(x, m, O, kind, *d.turn))

    def full(self, d: Data) -> Call:
        x, weight, bias = (d.inputs[name] for name in ("x", "weight", "bias"))
        truth = lambda x, weight, bias, m: F.linear(x, weight, bias)
        return Call(lambda: WithDw.apply(x, weight, bias), truth=truth)

    def lrkern(self, d: Data) -> Call:
        run, r = (lambda: d.layer(d.inputs["x"])), d.layer.rank
        slots = r * min(-(-d.case.I // r), -(-d.case.O // r))
        rows = _host.explain("mora_rows", T=d.case.T, P=slots, device=d.y.device.type)["rows"]
        stored = StoredMora(d.y.clone(), d.dx.clone(), rows)
        return Call(run, Call(run, around=lambda: use_library(stored)))
