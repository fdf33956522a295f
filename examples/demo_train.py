# SPDX-License-Identifier: Apache-2.0
"""The training runs of one side of the demo, in a process of its own: `python demo_train.py`, one line of input a job.

A line is the path of a job.json, which names the side (peft, lrkern or a method) and holds the text; the run leaves an adapter folder
and result.json in job["out"], and "done" in the output.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from demo_model import add_adapter, load_base, pearson, predict, progress, save_adapter, step, synchronize, tokenizer
from torch import Tensor, nn


def main(job: dict) -> dict:
    device, out = job["device"], Path(job["out"])
    torch.set_num_threads(job["threads"])
    model, tokenize = load_base(device, job["seed"]), tokenizer()
    memory = PeakMemory(device)  # from here on: above the loaded base

    model = add_adapter(model, job["side"], job["seed"])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=job["lr"], weight_decay=0.0)
    steps = job["epochs"] * (len(job["texts"]) // job["batch"])

    def load(rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        batch = tokenize([job["texts"][i] for i in rows])
        return {key: value.to(device) for key, value in batch.items()}, ratings[rows].to(device)

    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    ratings, order = torch.tensor(job["ratings"]), torch.Generator().manual_seed(job["seed"])

    model.train()
    with memory.exact():  # one step on the longest lines, not learnt from
        step(model, *load(sorted(range(len(ratings)), key=lambda i: len(job["texts"][i]))[-job["batch"] :]))
        peak = memory.peak()

    losses, start = [], time.perf_counter()
    bar = progress(total=steps, desc=f"{job['domain']:>8} {job['side']:<6}", position=job["row"])
    for _ in range(job["epochs"]):
        for rows in batches(job["texts"], job["batch"], order):
            batch, target = load(rows)
            loss = nn.functional.mse_loss(model(**batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    synchronize(device)
    seconds, process_peak = time.perf_counter() - start, memory.peak()
    bar.close()

    torch.set_num_threads(job["cores"])  # only this side scores all domains: the other is about to end
    model.eval()
    save_adapter(model, out)
    label = lambda name: f"{job['domain']:>8} {job['side']:<6} scores {name}"
    scores = {name: predict(model, tokenize, texts, device, label(name)) for name, texts in job["score"].items()}
    return dict(
        losses=losses,
        r=pearson(scores[job["domain"]], torch.tensor(job["held_ratings"])),
        scores={name: values.tolist() for name, values in scores.items()},
        train_seconds=seconds,
        peak_bytes=peak,
        process_peak_bytes=process_peak,
        trainable=sum(p.numel() for p in trainable),
        lrkern_layers=sum(type(m).__module__.startswith("lrkern") for m in model.modules()),
    )


def batches(texts: list[str], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """One epoch in random order. Groups of eight batches are sorted by length first: half the tokens were padding."""
    shuffled = torch.randperm(len(texts), generator=generator).tolist()
    for start in range(0, len(shuffled), 8 * size):
        group = sorted(shuffled[start : start + 8 * size], key=lambda i: len(texts[i]))
        rows = [group[i : i + size] for i in range(0, len(group) - size + 1, size)]
        yield from (rows[i] for i in torch.randperm(len(rows), generator=generator).tolist())


class PeakMemory:
    """Peak bytes above what is in use now: of the CUDA allocator on a GPU, of the process (Linux VmHWM) otherwise.

    glibc's heap keeps freed blocks, in amounts that depend on the order of allocations more than on need. Inside
    `exact` large blocks go back to the system at once, so that the peak is what the step needs.
    """

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # peak := now, or loading the base would be in it
        self.start = self.now()

    @contextmanager
    def exact(self) -> Iterator[None]:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc only
        trim, mmap, usual = -1, -3, 1 << 25  # its parameter numbers, and the threshold it grows to by itself
        mallopt(mmap, 1 << 16)
        yield
        mallopt(mmap, usual), mallopt(trim, 2 * usual)

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else self.status("VmRSS")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else self.status("VmHWM")) - self.start

    @staticmethod
    def status(key: str) -> int:
        rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(rows[key].split()[0])


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(Path(line.strip()).read_text())
        Path(job["out"], "result.json").write_text(json.dumps(main(job)))
        gc.collect()  # the model of this run is not in the peak of the next
        print("done", flush=True)
