# SPDX-License-Identifier: Apache-2.0
"""Measuring tools: milliseconds, ceilings, bytes."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

clock = time.perf_counter


class Step(NamedTuple):
    """What is timed: run(prepare()), without the time of prepare."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] | None = None

    def ready(self) -> Any:
        return self.prepare() if self.prepare else None


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = [int(p.read_text()[:-2]) << 10 for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 << 20)


def copies_beyond_cache(each: int, device: str, least: int = 0) -> int:
    """How many copies of `each` bytes, used in turn, are cold when their turn comes, and take `least` bytes. CUDA flushes its
    L2 instead. At most 64: what is so small measures host time."""
    return 1 if device == "cuda" else max(1, min(64, -(-max(2 * last_level_cache(), least) // each)))


def captured(step: Step) -> Step:
    """The step as CUDA graphs, those of prepare and run in one memory pool. Warmed up on the side stream they are captured
    on, since autograd runs a backward on its forward's stream."""
    side, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run(step.ready())
    torch.cuda.synchronize()

    def capture(work: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            out = work(*args)
        return out, graph.replay

    ready, prepare = capture(step.prepare) if step.prepare else (None, None)
    _, run = capture(step.run, ready)
    return Step(lambda _: run(), prepare)


def waits(step: Step) -> str:
    """Why the step cannot be captured, or "": it waits for the device, as indexing with a Python list does. Asked before a
    capture, since one that fails leaves torch's random generator as if it went on."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run(step.ready())
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


def as_graphs(steps: list[Step]) -> tuple[list[Step], str]:
    """The steps captured, or as they are and why not."""
    why = waits(steps[0])
    return (steps, why) if why else ([captured(step) for step in steps], "")


def once_cpu(step: Step) -> float:
    ready = step.ready()
    begin = clock()
    out = step.run(ready)
    seconds = clock() - begin
    del out, ready  # freed outside the time
    return seconds * 1e3


def once_cuda(step: Step, flush: Tensor) -> float:
    """After a read of ``flush``, which leaves the L2 full of it: what a write leaves there goes to DRAM inside the time."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    ready = step.ready()
    flush.sum()
    start.record()
    out = step.run(ready)
    stop.record()
    stop.synchronize()
    del out, ready
    return start.elapsed_time(stop)


def turns_of(
    steps: dict[Any, list[Step]], device: str, eager: dict[Any, str] | None = None
) -> tuple[dict[Any, list[Step]], Callable[[Step, Step], float]]:
    """The steps as they are timed, and a turn over two copies: milliseconds of the second, after an untimed first on the CPU."""
    if device != "cuda":
        return steps, lambda warm, timed: (once_cpu(warm), once_cpu(timed))[1]
    flush = torch.empty(64 << 20, device=device)  # 256 MiB, more than any L2
    graphs = {name: as_graphs(copies) for name, copies in steps.items()}
    if eager is not None:
        eager |= {name: why for name, (_, why) in graphs.items() if why}
    return {name: copies for name, (copies, _) in graphs.items()}, lambda warm, timed: once_cuda(timed, flush)


def interleaved(
    steps: dict[Any, list[Step]],
    rounds: int,
    device: str,
    tick: Callable[[float], Any] = lambda share: None,
    eager: dict[Any, str] | None = None,
    warm: bool = False,
) -> dict[Any, list[float]]:
    """{name: sorted milliseconds, one per round}. Each name's steps do the same over different copies of the data. In a
    round every name has a turn, in an order drawn anew, so that noise and what a predecessor leaves in the caches hit all
    alike. A turn on the CPU is an untimed call and a timed one over the next copy: code is warm and weights are cold, as
    in a model whose layers follow one another. On CUDA graphs are timed; what cannot be captured is timed as it is called,
    host time included, and ``eager`` is told why. ``warm`` says that on the CPU every step was run before: else each is once,
    for the pages and whatever else its first call makes."""
    steps, turn = turns_of(steps, device, eager)
    for step in () if warm or device == "cuda" else chain.from_iterable(steps.values()):
        once_cpu(step)
    order, shuffle = list(steps), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    turns = 0
    gc.collect()
    gc.disable()
    try:
        for done in range(1, rounds + 1):
            shuffle(order)
            for name in order:
                copies = steps[name]
                times[name].append(turn(copies[2 * turns % len(copies)], copies[(2 * turns + 1) % len(copies)]))
                turns += 1
            tick(done / rounds)
    finally:
        gc.enable()
    return {name: sorted(t) for name, t in times.items()}


PAIRS = (5, 400)


def paired(one: list[Step], other: list[Step], seconds: float, device: str) -> list[float]:
    """Sorted ratios of the time of one to that of the other, a turn of each in immediate succession, over the next copies; who
    goes first alternates. As many pairs as fit in so many seconds, within PAIRS."""
    steps, turn = turns_of({True: one, False: other}, device)
    ratios: list[float] = []
    begin, turns, (least, most) = clock(), 0, PAIRS
    while len(ratios) < least or (len(ratios) < most and clock() - begin < seconds):
        ms = {}
        for which in (True, False) if len(ratios) % 2 else (False, True):
            copies = steps[which]
            ms[which] = turn(copies[2 * turns % len(copies)], copies[(2 * turns + 1) % len(copies)])
            turns += 1
        ratios.append(ms[True] / ms[False])
    return sorted(ratios)


def percentiles(times: list[float]) -> dict[str, float]:
    at = lambda q: times[round(q * (len(times) - 1))]
    return {"p20_ms": at(0.2), "p50_ms": statistics.median(times), "p80_ms": at(0.8)}


def kernels_of(step: Step) -> set[str]:
    """The CUDA kernels that one run launches, by the names of torch's profiler; none where it may not look."""
    ready = step.ready()
    torch.cuda.synchronize()
    with quiet_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.run(ready)
        torch.cuda.synchronize()
    copies = "Memcpy", "Memset"
    device = torch.autograd.DeviceType.CUDA
    return {e.name for e in profile.events() if e.device_type == device and not e.name.startswith(copies)}


SIZES = {"cuda": (1 << 28, 8192), "cpu": (1 << 26, 2048)}  # bytes of a large copy, rows and columns of a large GEMM
QUICK = 1024  # rows and columns on the CPU with --quick: 2048 in 16 bits without instructions for them take seconds


def ceilings(device: str, dtype: torch.dtype, quick: bool = False) -> tuple[float, float]:
    """(flop/s of a large GEMM, bytes/s of a large copy, read plus written), measured here and now. The GEMM is x Wᵀ, a
    layer's forward: without it torch has only a plain loop for 16 bits on CPUs that lack instructions for them."""
    n, m = SIZES[device]
    m = min(m, QUICK) if quick and device == "cpu" else m
    source, target = (torch.empty(n, dtype=torch.int8, device=device) for _ in range(2))
    a, b = (torch.randn(m, m, device=device).to(dtype) for _ in range(2))
    steps = {"gemm": [Step(lambda _: a @ b.mT)], "copy": [Step(lambda _: target.copy_(source))]}
    best = {name: times[0] * 1e-3 for name, times in interleaved(steps, 3 if quick else 7, device).items()}
    return 2 * m**3 / best["gemm"], 2 * n / best["copy"]


READ = 512 << 20  # bytes


def read_bandwidth(device: str) -> float:
    """bytes/s of a plain read, a sum over READ bytes of float32, the best of seven here and now."""
    source = torch.ones(READ // 4, device=device)
    times = interleaved({"read": [Step(lambda _: source.sum())]}, 7, device)["read"]
    return source.nbytes / times[0] * 1e3


# ---------------------------------------------------------------------------------------------------- bytes


def saved_bytes(forward: Callable[[], Any], exclude: list[Tensor]) -> int:
    """Bytes autograd keeps for backward, by storage, beyond those of `exclude` (x and the parameters)."""
    own = {t.untyped_storage().data_ptr() for t in exclude}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            saved[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out
    return sum(saved.values())


@contextmanager
def quiet_stderr():
    """The profiler writes lines of its own to file descriptor 2, through the progress bar."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_bytes(step: Step, device: str) -> int:
    """Peak of the bytes that torch's allocator handed out during one run, beyond what was there before; results count.
    Scratch memory inside MKL and oneDNN does not pass through it."""
    ready = step.ready()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run(ready)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with quiet_stderr(), torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        out = step.run(ready)
    del out
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
