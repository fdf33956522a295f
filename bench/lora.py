# SPDX-License-Identifier: Apache-2.0
"""Suite `lora`: one linear layer with a LoRA adapter, base frozen, x requiring a gradient.

Providers: base (the linear alone), eager (the same maths in PyTorch), peft (stock PEFT's layer), lrkern.
adapter_ms times the adapter alone: for every provider alike the base GEMM (forward, and dx in backward) is replaced by
a stored result.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timing import LAST_LEVEL_CACHE, Call
from torch import Tensor, nn

from lrkern import ops
from lrkern.reference import lora_linear as expression

PROVIDERS = ("base", "eager", "peft", "lrkern")


@dataclass(frozen=True)
class Case:
    T: int
    I: int
    O: int
    R: int
    dtype: torch.dtype
    factor_dtype: torch.dtype
    passes: str  # fwd+bwd | no_grad
    dropout: float = 0.0

    def __str__(self) -> str:
        extra = f"p={self.dropout} " if self.dropout else ""
        factors = "fp32_AB " if self.factor_dtype != self.dtype else ""
        return f"method=lora T={self.T} I={self.I} O={self.O} R={self.R} {factors}{extra}pass={self.passes}"


def cases(quick: bool) -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    head = [
        Case(512, 2048, 2048, 16, f32, f32, "fwd+bwd"),
        Case(512, 2048, 2048, 16, bf16, f32, "fwd+bwd"),
        Case(1, 2048, 2048, 16, f32, f32, "no_grad"),
    ]
    if quick:
        return head
    return [
        *head,
        Case(512, 2048, 2048, 16, f32, f32, "fwd+bwd", 0.1),
        Case(512, 2048, 2048, 64, f32, f32, "fwd+bwd"),
        Case(4, 2048, 2048, 16, f32, f32, "no_grad"),
        Case(16, 2048, 2048, 16, f32, f32, "no_grad"),
        Case(512, 1024, 1024, 16, bf16, f32, "fwd+bwd", 0.1),
        Case(8, 64, 64, 8, f32, f32, "fwd+bwd"),
        Case(8, 64, 64, 8, f32, f32, "no_grad"),
    ]


class Stored(torch.autograd.Function):
    """A base layer that costs nothing: y and dx are there already."""

    @staticmethod
    def forward(ctx, x, y, dx):
        ctx.dx = dx
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return ctx.dx, None, None


class StoredBase(nn.Module):
    def __init__(self, y: Tensor, dx: Tensor):
        super().__init__()
        self.y, self.dx = y, dx

    def forward(self, x: Tensor) -> Tensor:
        return Stored.apply(x, self.y, self.dx)


class AdapterOnly(torch.autograd.Function):
    """lrkern's lora_linear with the base GEMMs left out: the same kernels, adding into stored results."""

    @staticmethod
    def forward(ctx, x, a, b, y, dx, scale, p, seed):
        with torch._C._AutoDispatchBelowAutograd():
            s = torch.ops.lrkern.lora_shrink.default(x, a, scale, p, seed)
            torch.ops.lrkern.lora_expand_.default(y, s, b)
        ctx.save_for_backward(x, a, b, s, seed)
        ctx.rest = dx, scale, p
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        x, a, b, s, seed = ctx.saved_tensors
        dx, scale, p = ctx.rest
        with torch._C._AutoDispatchBelowAutograd():
            *_, ds, db = torch.ops.lrkern.linear_expand_bwd.default(
                dy, None, None, s, b, scale, *[False] * 3, True, True
            )
            # lora_shrink_bwd's dx starts from zeros where the fused op starts from dy W: one write of dx more.
            if p:
                dx, da = torch.ops.lrkern.lora_shrink_bwd.default(ds, x, a, 1.0, p, seed, True, True)
            else:
                _, da = torch.ops.lrkern.lora_shrink_bwd.default(ds, x, a, 1.0, p, seed, False, True)
                torch.ops.lrkern.lora_expand_.default(dx, ds, a.mT)
        return dx, da, db, None, None, None, None, None


class Copy:
    """One set of tensors and the layers over it."""

    def __init__(self, case: Case, device: str, seed: int):
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear as PeftLinear

        g = torch.Generator().manual_seed(seed)
        draw = lambda *s, dtype=case.dtype: torch.randn(*s, generator=g).to(device, dtype)
        grad = case.passes != "no_grad"
        self.x = draw(case.T, case.I).requires_grad_(grad)
        self.dy, self.y, self.dx = draw(case.T, case.O), draw(case.T, case.O), draw(case.T, case.I)
        self.linear = nn.Linear(case.I, case.O, device=device, dtype=case.dtype).requires_grad_(False)
        config = LoraConfig(r=case.R, lora_alpha=2 * case.R, lora_dropout=case.dropout, init_lora_weights="gaussian")
        make = lambda base: PeftLinear(base, "default", config=config, r=case.R, lora_alpha=2 * case.R)
        self.peft = make(self.linear).to(device)
        for m in (self.peft.lora_A, self.peft.lora_B):
            m.to(case.factor_dtype)
        self.a, self.b = self.peft.lora_A["default"].weight, self.peft.lora_B["default"].weight
        nn.init.normal_(self.b)
        self.peft_stored = make(nn.Linear(case.I, case.O, device="meta"))
        self.peft_stored.base_layer = StoredBase(self.y, self.dx)
        self.peft_stored.lora_A, self.peft_stored.lora_B = self.peft.lora_A, self.peft.lora_B
        self.peft_stored.scaling, self.peft_stored.lora_dropout = self.peft.scaling, self.peft.lora_dropout


def forward(case: Case, c: Copy, provider: str, adapter_only: bool) -> Tensor:
    w, bias, p = c.linear.weight, c.linear.bias, case.dropout
    if provider == "base":
        return c.linear(c.x)
    if provider == "peft":
        return (c.peft_stored if adapter_only else c.peft)(c.x)
    if provider == "eager":
        base = Stored.apply(c.x, c.y, c.dx) if adapter_only else F.linear(c.x, w, bias)
        delta = F.dropout(c.x.to(c.a.dtype), p) @ c.a.mT @ c.b.mT * 2.0
        return (base + delta).to(base.dtype)
    seed = torch.randint(2**63 - 1, (1,), device=c.x.device) if p else None
    if not adapter_only:
        return ops.lora_linear(c.x, w, bias, c.a, c.b, 2.0, p, seed)
    if torch.is_grad_enabled():
        return AdapterOnly.apply(c.x, c.a, c.b, c.y, c.dx, 2.0, p, seed)
    ops.lora_expand_(c.y, ops.lora_shrink(c.x, c.a, 2.0), c.b)
    return c.y


def calls(case: Case, copies: list[Copy], adapter_only: bool) -> dict[str, Call]:
    def make(provider: str) -> Call:
        def train(i: int) -> None:
            c = copies[i % len(copies)]
            c.x.grad = c.a.grad = c.b.grad = None
            forward(case, c, provider, adapter_only).backward(c.dy)

        def infer(i: int) -> None:
            with torch.no_grad():
                forward(case, copies[i % len(copies)], provider, adapter_only)

        return infer if case.passes == "no_grad" else train

    names = [n for n in PROVIDERS if not (adapter_only and n == "base")]
    return {n: make(n) for n in names} | ({} if adapter_only else {"base again": make("base")})


def copies_of(case: Case, device: str) -> list[Copy]:
    size = torch.empty(0, dtype=case.dtype).element_size()
    each = size * (case.I * case.O + 2 * case.T * (case.I + case.O))
    count = 1 if device == "cuda" else max(1, min(64, -(-LAST_LEVEL_CACHE // each)))
    return [Copy(case, device, seed) for seed in range(count)]


def errors(case: Case, c: Copy) -> dict[str, float]:
    """Relative Frobenius error of y against float64, dropout off."""
    quiet = Case(**{**case.__dict__, "dropout": 0.0})
    c.peft.eval()
    with torch.no_grad():
        d = lambda t: t.double()
        args = (d(c.x), d(c.linear.weight), d(c.linear.bias))
        truth = expression(*args, d(c.a), d(c.b), 2.0)
        base = F.linear(*args)
        out = {n: forward(quiet, c, n, False).double() for n in PROVIDERS}
    c.peft.train()
    return {n: ((y - (base if n == "base" else truth)).norm() / truth.norm()).item() for n, y in out.items()}


def work(case: Case) -> tuple[float, float]:
    """(flop, bytes that must move) of the whole layer."""
    size, fsize = (torch.empty(0, dtype=t).element_size() for t in (case.dtype, case.factor_dtype))
    train = case.passes != "no_grad"
    base, low = 2 * case.T * case.I * case.O, 2 * case.T * case.R * (case.I + case.O)
    flop = base * (2 if train else 1) + low * (3 if train else 1)
    w, acts = case.I * case.O * size, case.T * (case.I + case.O) * size
    factors = case.R * (case.I + case.O) * fsize
    moved = w + acts + factors + (w + acts + case.T * case.I * size + 2 * factors if train else 0)
    return flop, moved


def saved(case: Case, c: Copy, measure: Callable[..., int]) -> dict[str, int | None]:
    if case.passes == "no_grad":
        return dict.fromkeys(PROVIDERS)
    params = [c.x, c.linear.weight, c.linear.bias, c.a, c.b]
    return {n: measure(lambda n=n: forward(case, c, n, False), params) for n in PROVIDERS}
