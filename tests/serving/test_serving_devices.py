# SPDX-License-Identifier: Apache-2.0
"""The pool and the served model on CUDA, and over its kernels emulated; who waits for whom when adapters come and go."""

import contextlib

import pytest
import torch
from layer_kinds import shake
from torch import nn

pytest.importorskip("peft")  # as on a bare machine with a GPU

from lrkern.files import save
from lrkern.nn import FusedLoRALinear, RandLoRALinear, VeRALinear
from lrkern.serving import AdapterPool, MultiLoraModel

ON_KERNELS = pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
ON_CUDA = pytest.mark.parametrize("device", ["cuda"], indirect=True)
KINDS = pytest.mark.parametrize(("cls", "settings"), [
    (FusedLoRALinear, {"r": 5}), (FusedLoRALinear, {"r": 16, "use_dora": True}), (VeRALinear, {"r": 8, "seed": 3}),
    (RandLoRALinear, {"r": 7, "seed": 3}),
])  # fmt: skip
I, H, O, T = 24, 40, 32, 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(I, H), nn.Linear(H, O, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


def adapted(net, cls, settings, seed):
    """The net with layers of a kind of its own, which share its base."""
    other = Net()
    for name in ("up", "down"):
        layer = cls.from_linear(getattr(net, name), **settings)
        setattr(other, name, shake(layer, seed))
    return other.requires_grad_(False).eval()


def served(device, tmp_path, cls, settings, names="abc", **room):
    """(the served model, each adapter's own model, on the CPU)"""
    net = Net().requires_grad_(False).eval()
    ones = {name: adapted(net, cls, settings, seed) for seed, name in enumerate(names)}
    model = Net().requires_grad_(False).eval()
    model.load_state_dict(net.state_dict())
    pool = AdapterPool(model.to(device), **({"pages": 8} | room))
    for name, one in ones.items():
        save(one, tmp_path / name)
        pool.load(name, tmp_path / name)
    return MultiLoraModel(model, pool), pool, ones | {None: net}


@torch.no_grad()
def assert_own(y, x, who, ones):
    for row, name in enumerate(who):
        torch.testing.assert_close(y[row].cpu(), ones[name](x[row]), atol=2e-5, rtol=1e-4)


@KINDS
@ON_KERNELS
def test_a_mixed_batch_on_the_kernels(cls, settings, device, tmp_path):
    model, pool, ones = served(device, tmp_path, cls, settings)
    x, who = torch.randn(T, 7, I), ["a", None, "c", "b", "a", None]
    with model, torch.no_grad():
        assert_own(model(x.to(device), adapters=who), x, who, ones)
        one = model(x[:, :1].to(device), adapters=["b"] * T)
    assert_own(one, x[:, :1], ["b"] * T, ones)
    assert {t.device.type for layer in pool._layers.values() for t in (layer.a, layer.b)} == {torch.device(device).type}


class Stream:
    """Of a GPU in name: it writes down what it does and what it waits for."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def record_event(self):
        self.events += 1
        self.log.append(f"{self.name} {self.events}")
        return self.log[-1]

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_who_waits_for_whom(tmp_path, monkeypatch):
    """Forwards wait for their uploads; an upload waits for the forwards that still read its pages, and for no other."""
    model, pool, _ = served("cpu", tmp_path, FusedLoRALinear, {"r": 5}, pages=2)
    pool.grow()
    log = []
    compute, other, pool._upload_stream = (Stream(name, log) for name in ("compute", "other", "upload"))
    now = [compute]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    enter, x = pool._enter, torch.randn(1, I)
    monkeypatch.setattr(pool, "_enter", lambda adapter: (log.append("to the device"), enter(adapter)))

    def forward(name, stream=compute):
        log.clear()
        now[0] = stream
        model(x, adapters=[name])
        return log

    first = ["to the device", "upload 1", "compute waits for upload 1", "compute 1"]
    with model, torch.no_grad():
        assert forward("a") == first
        assert forward("a", other) == ["other waits for upload 1", "other 1"], "it is there, for this stream too"
        assert forward("b") == ["to the device", "upload 2", "compute waits for upload 2", "compute 2"], "a free page"
        waits = ["upload waits for compute 1", "upload waits for other 1"]
        assert forward("c") == [*waits, "to the device", "upload 3", "compute waits for upload 3", "compute 3"]
        log.clear()
        pool.remove("b")
        assert log == ["upload waits for compute 2"], "its page is free after its forward"
        assert forward("a") == ["to the device", "upload 4", "compute waits for upload 4", "compute 4"]


def test_who_waits_for_pools_that_grow(tmp_path, monkeypatch):
    """Forwards of all streams, those under way too, wait for the copies, one by one before the copy is what they read. The
    old tensors are kept by whoever has read them."""
    model, pool, _ = served("cpu", tmp_path, FusedLoRALinear, {"r": 5}, pages=4)
    log, x = [], torch.randn(1, I)
    compute, pool._upload_stream = Stream("compute", log), Stream("upload", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    seen = lambda stream, tensors: log.extend(f"{stream.name} reads {list(t.shape)}" for t in tensors)
    monkeypatch.setattr("lrkern.serving.memory.read_on", seen)
    monkeypatch.setattr("lrkern.serving.pool.read_on", seen)
    with model, torch.no_grad():
        model(x, adapters=["a"])
        copies = [f"upload {i}" for i in range(1, 6)]  # of A and B of two layers; and the event after all
        assert log[:5] == copies and log[-2:] == ["compute waits for upload 6", "compute 1"]
        first = [f"compute reads {[16, n]}" for n in (I, H, H, O)]
        assert log[5:-2] == ["upload 6", *first], "a stream that is new"
        log.clear()
        with pool._lease(["a"]):
            pool.grow(2)
            kept = [layer.a for layer in pool._layers.values()]
        grown = []
        for event, n in zip(range(7, 11), (I, H, H, O), strict=True):
            grown += [f"upload {event}", f"compute waits for upload {event}", f"compute reads {[32, n]}"]
        assert log == ["compute waits for upload 6", *grown, "upload 11", "compute 2"]
        assert all(layer.a is a for layer, a in zip(pool._layers.values(), kept, strict=True))
        log.clear()
        model(x, adapters=["a"])
        assert log == ["compute waits for upload 11", "compute 3"], "it was uploaded before, and copied since"


@ON_CUDA
def test_pools_grow_and_shrink_under_forwards(device, tmp_path):
    """While every forward sleeps first, their pools move away below them."""
    model, pool, ones = served(device, tmp_path, FusedLoRALinear, {"r": 5}, names="abcdefgh", pages=8)
    x, streams = torch.randn(T, I), [torch.cuda.Stream(), torch.cuda.Stream()]
    on_device, results = x.to(device), []
    with model, torch.no_grad():
        model(on_device, adapters=["a"] * T)
        torch.cuda.synchronize()
        for i, name in enumerate("abcdefghab"):
            with torch.cuda.stream(streams[i % 2]):
                torch.cuda._sleep(10_000_000)
                results.append((name, model(on_device, adapters=[name] * T)))
            if i == 8:
                pool.shrink(2)
        torch.cuda.synchronize()
    for name, y in results:
        assert_own(y, x, [name] * T, ones)


@ON_CUDA
def test_an_upload_waits_for_forwards_under_way_and_nobody_for_the_upload(device, tmp_path):
    """Two adapters take turns in one page while every forward sleeps first: its page must not be the next one's before."""
    model, _, ones = served(device, tmp_path, FusedLoRALinear, {"r": 5}, names="ab", pages=1)
    x, streams, who = torch.randn(T, I), [torch.cuda.Stream(), torch.cuda.Stream()], "abab"
    on_device = x.to(device)
    with model, torch.no_grad():
        for name in "ab":  # what a first forward does once
            model(on_device, adapters=[name] * T)
        torch.cuda.synchronize()
        results, done = [], torch.cuda.Event()
        for i, name in enumerate(who):
            with torch.cuda.stream(streams[i % 2]):
                torch.cuda._sleep(40_000_000)  # cycles, some 20 ms
                results.append(model(on_device, adapters=[name] * T))
                if not i:
                    done.record()
        assert not done.query(), "the host has queued all forwards before the first has ended"
        torch.cuda.synchronize()
    for name, y in zip(who, results, strict=True):
        assert_own(y, x, [name] * T, ones)


@ON_CUDA
def test_more_adapters_than_pages_come_and_go(device, tmp_path):
    model, pool, ones = served(device, tmp_path, FusedLoRALinear, {"r": 5}, names="abcdefgh", pages=3)
    with model, torch.no_grad():
        for turn in range(40):
            x, who = torch.randn(T, I), [None, *("abcdefgh"[(turn * k) % 8] for k in (1, 3, 5)), None, None]
            y = model(x.to(device), adapters=who)
            if turn % 8 == 7:
                pool.load("a", tmp_path / "a", replace=True)
            assert_own(y, x, who, ones)
