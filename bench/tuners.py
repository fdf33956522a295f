# SPDX-License-Identifier: Apache-2.0
"""python bench/run.py tuners [TUNER...] [--quick] [--device cpu|cuda] [--json F]: PEFT's own comparison of its tuners, on the demo's task.

The columns are those of PEFT's method_comparison: seconds of training, peak memory, the size of the adapter's file, and what was learnt
(Pearson's r on held-out lines), for every tuner that lrkern.peft.patch fuses, stock and patched. MiniLM-L6 with adapters on all linears
of its encoder and a head of its own trains on four domains one after another, 64 steps of 32 lines in all (--quick: 8 of 8).

Both sides start from the same numbers and see the same batches; a step of one (forward, backward, optimizer, AdaLoRA's budget) follows one
of the other, by turns first, and seconds are the sum of a side's steps. "x" is the median of the ratios of these pairs, with the half
width of its 95 % interval as of a notched box plot. Peak memory is that of one step on the longest batch, in a process of its own, above the
loaded base. A side that learns something else (losses of the first eight steps 1e-3 apart, of dropout none are compared; r 0.02 apart) ends
the run with an error.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_all
from demo_all import ALL, Job, Plan, alone
from demo_data import DOMAINS
from peers.tuners import RATES, TUNERS, stock
from timing import clock

SIDES = ("peft", "lrkern")
FULL, QUICK = Plan(), demo_all.QUICK


class Tuner(Job):
    def __init__(self, plan: Plan, device: str, tuner: str):
        super().__init__(plan, device, tuner, 0)
        self.lr, self.steps = RATES.get(tuner, 2e-3), plan.steps

    def side(self, side: str):
        import lrkern.peft

        model = stock(self.base(), self.method, ALL, self.steps, self.seed)
        if side == "lrkern" and not (report := lrkern.peft.patch(model)):
            raise RuntimeError(f"not all of {self.method} is fused: {report}")
        return model

    def size(self, model) -> int:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size


class Peak(Tuner):
    def __init__(self, plan: Plan, device: str, tuner: str, side: str):
        super().__init__(plan, device, tuner)
        self.which = side

    def __call__(self) -> int:
        from demo_train import PeakMemory

        longest = max(self.batches(self.lines[DOMAINS[-1]]), key=lambda batch: batch[0]["input_ids"].numel())
        self.side(self.which)  # what a first model leaves behind is not of this one
        memory = PeakMemory(self.device)
        model = self.side(self.which)
        with memory.exact():
            self.loss(model, *longest).backward()
            return memory.peak()


class Train(Tuner):
    def __call__(self) -> dict[str, Any]:
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        losses: dict[str, list[float]] = {side: [] for side in SIDES}
        r: dict[str, list[float]] = {side: [] for side in SIDES}
        for split in self.lines.values():
            models = {side: self.side(side) for side in SIDES}
            steps = {side: self.stepper(model) for side, model in models.items()}
            batches = self.batches(split)
            for side in SIDES:  # a first step of other models, as the timed ones are to be warm
                self.loss(self.side(side), *batches[0]).backward()
            for i, batch in enumerate(batches):
                for side in SIDES[:: 1 if i % 2 else -1]:
                    start = clock()
                    losses[side].append(steps[side](i, batch))
                    self.m.synchronize(self.device)
                    times[side].append(clock() - start)
            ratings = self.m.torch.tensor([x.rating for x in split.held])
            for side, model in models.items():
                scores = self.m.predict(model.eval(), self.tokenize, [x.text for x in split.held], self.device)
                r[side].append(self.m.pearson(scores, ratings))
        model = models["lrkern"]
        return {
            "tuner": self.method, "layers": sum(hasattr(m, "base_layer") for m in model.modules()), "steps": len(times["peft"]), "lr": self.lr,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "file_bytes": {side: self.size(model) for side, model in models.items()},
            "seconds": {side: sum(of) for side, of in times.items()}, "step_seconds": times, "losses": losses,
            "r": {side: statistics.mean(of) for side, of in r.items()},
        }  # fmt: skip

    def stepper(self, model) -> Callable[[int, Any], float]:
        optimizer = self.optimizer(model, self.lr)
        schedule = self.m.torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        # AdaLoRA's budget, after the step and before zero_grad.
        allocate = getattr(model.base_model, "update_and_allocate", None)

        def step(i: int, batch) -> float:
            loss = self.loss(model, *batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            if allocate:
                allocate(i)
            optimizer.zero_grad()
            return loss.item()

        return step


def row(plan: Plan, device: str, tuner: str) -> dict[str, Any]:
    peaks = {side: alone(Peak, plan, device, tuner, side) for side in SIDES}
    return alone(Train, plan, device, tuner) | {"peak_bytes": peaks}


def check(row: dict[str, Any]) -> str | None:
    """Why the two sides do not learn the same."""
    if row["tuner"].endswith("dropout"):
        return None
    gaps = [abs(a - b) / abs(a) for a, b in zip(*(row["losses"][side][:8] for side in SIDES), strict=True)]
    apart, fine = abs(row["r"]["peft"] - row["r"]["lrkern"]), all(gap <= 1e-3 for gap in gaps)  # no nan is fine
    return None if fine and apart <= 0.02 else f"{row['tuner']}: losses {max(gaps):.1e} apart, r {apart:.3f}"


def ratio(row: dict[str, Any]) -> tuple[float, float]:
    """Median of lrkern / PEFT over pairs of steps, and the half width of its interval."""
    pairs = [ours / theirs for theirs, ours in zip(*(row["step_seconds"][side] for side in SIDES), strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return middle, 1.57 * (high - low) / len(pairs) ** 0.5


HEAD = (
    f"{'tuner':<13}{'trained':>9} {'file kB':>8}   {'seconds: PEFT':>13} {'lrkern':>7}  {'x':<12}  {'peak MB: PEFT':>13} {'lrkern':>7}   "
    f"{'r: PEFT':>8} {'lrkern':>7}"
)


def line(row: dict[str, Any]) -> str:
    (theirs, ours), (high, low), (r, s) = ([row[key][side] for side in SIDES] for key in ("seconds", "peak_bytes", "r"))
    x, half = ratio(row)
    return (
        f"{row['tuner']:<13}{row['trainable']:>9,} {row['file_bytes']['lrkern'] / 1e3:>8,.0f}   {theirs:>13.1f} {ours:>7.1f}  {x:.2f} ± {half:.2f}"
        f"   {high / 1e6:>13,.0f} {low / 1e6:>7,.0f}   {r:>8.3f} {s:>7.3f}"
    )


def main(argv: list[str], machine: Callable[[str], str], command: str) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/run.py tuners", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="TUNER", help=" ".join(TUNERS))
    parser.add_argument("--quick", action="store_true", help="few steps of few lines: what it prints says little")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="F", help="one row per line, written tuner by tuner")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in TUNERS]:
        parser.error(f"TUNER must be of {', '.join(TUNERS)}, got {', '.join(unknown)}")
    demo_all.demo_data.fetch()
    if args.json:
        args.json.write_text("")
    print(f"{machine(args.device)}\n{command}\n{HEAD}", flush=True)
    wrong = []
    for tuner in args.names or TUNERS:
        got = row(QUICK if args.quick else FULL, args.device, tuner)
        print(line(got), flush=True)
        if args.json:
            with args.json.open("a") as f:
                f.write(json.dumps(got | {"machine": machine(args.device), "command": command}) + "\n")
        if why := check(got):
            wrong.append(why)
    if wrong:
        print("the sides do not learn the same: " + "; ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0
