# SPDX-License-Identifier: Apache-2.0
"""Inputs, hashes and single steps for ../unchanged.py."""

import hashlib
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import lrkern.ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))
import build as emulator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "emulated")


@contextmanager
def device(kind: str):
    """The wrappers of lrkern.ops call the emulated library's ops inside; gives the namespace of the ops."""
    if kind == "cpu":
        yield torch.ops.lrkern
        return
    ops = emulator.ops()
    dispatch = getattr(lrkern.ops, "dispatch", None)
    with dispatch.use_library(ops) if dispatch else mock.patch.object(lrkern.ops, "_ops", ops):
        yield ops


def attempt(fn, *args, **kwargs):
    """The result, or the text of the error."""
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def text_of(value) -> str:
    """Of a tensor dtype, shape and hash, one NaN as good as another; of a string what does not change by itself."""
    if not isinstance(value, Tensor):
        text = re.sub(r"(/\S*)?/unchanged-\w+", "TMP", str(value))
        return re.sub(r"\b0x[0-9a-f]+|registered at \S+", "", text)[:600]
    t = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
    what = f"{value.device.type} {str(t.dtype)[6:]}{list(t.shape)}"
    if t.device.type == "meta":
        return what
    nan = t.isnan() if t.dtype.is_floating_point else torch.zeros(())
    t = torch.where(nan, 0.0, t) if nan.any() else t
    return (
        f"{what} {digest(b''.join(bytes(a.contiguous().flatten().view(torch.uint8).numpy()) for a in (t, nan.bool())))}"
    )


def flat(name: str, value):
    """(name, text) of everything in nested dicts and tuples."""
    if isinstance(value, dict):
        for key, v in value.items():
            yield from flat(f"{name}/{key}", v)
    elif isinstance(value, tuple | list):
        yield from flat(name, dict(enumerate(value)))
    else:
        yield name, text_of(value)


def rand(*shape: int, seed: int = 0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def train(fn, leaves: dict, cast: bool = False, **rest) -> dict:
    """The result, under autocast or not, and the gradient of every leaf."""
    torch.manual_seed(3)  # of dropout
    leaves = {k: t.detach().requires_grad_() for k, t in leaves.items() if t is not None}
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        y = fn(**leaves, **rest)
    grads = torch.autograd.grad(y, list(leaves.values()), rand(*y.shape, seed=1, dtype=y.dtype), allow_unused=True)
    return {"y": y} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def files_in(path: Path) -> dict:
    """Of a file, or of every file of a folder, its size and the hash of its bytes; target_modules is a set to PEFT."""

    def content(p: Path) -> bytes:
        if p.suffix != ".json":
            return p.read_bytes()
        config = json.loads(p.read_text())
        return json.dumps(
            {k: sorted(v) if k == "target_modules" and isinstance(v, list) else v for k, v in config.items()}
        ).encode()

    found = sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
    return {str(p.relative_to(path)): f"{p.stat().st_size} bytes {digest(content(p))}" for p in found}


def shaken(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Every parameter that trains gets numbers of its own."""
    with torch.no_grad():
        for i, p in enumerate(p for p in module.parameters() if p.requires_grad):
            p.copy_(rand(*p.shape, seed=50 + i, std=std))
    return module


def step(module: nn.Module, x: Tensor, cast: bool = False) -> dict:
    """Output, under autocast or not, and all gradients."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        y = module(x)
    y.backward(rand(*y.shape, seed=1, dtype=y.dtype))
    grads = {f"d{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {"y": y, "dx": x.grad} | grads
