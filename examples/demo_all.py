# SPDX-License-Identifier: Apache-2.0
"""`make demo ARGS="--method all"`: every method that lrkern.adapt knows, on the demo's four domains, as one table.

A method's learning rate is looked for first, by the training loss on one domain. Then each method and seed trains an adapter for each
domain from the same base, on the same lines in the same order. A row is appended to rows.jsonl as soon as it is there, so that a run
may be stopped and goes on where it was; docs/methods.md and docs/methods.png are written anew from all rows after each. The allocators
and schedules of methods that have some are left out: ranks stay as they begin.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import demo_data
from demo_data import DOMAINS, DemoError, Split

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT = ROOT / "docs" / "methods.md", ROOT / "docs" / "methods.png"


@dataclass(frozen=True)
class Plan:
    steps: int = 16  # a domain
    batch: int = 32
    held: int = 100  # held-out lines of a domain
    lr: float = 2e-3  # where a method's rate is looked for first, in steps of `factor`
    factor: float = 4.0
    seeds: int = 3
    seconds: float = 60.0  # that a method and seed may take; what is slower ends there, without a row


FULL, QUICK = Plan(), Plan(steps=4, batch=8, held=20, seeds=1)

# What a method is given beside its defaults: ranks near the parameters of LoRA of rank 16, but for methods that are made to need far fewer.
ATTENTION = r".*\.attention\.(self\.(query|key|value)|output\.dense)"
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"r": 16},
    "bone": {"r": 32},
    # As published the starts of these two are added to W, and they learn nothing here; nor does nlora from the paper's pseudo-inverse.
    "inttune": {"subtract": True},
    "nlora": {"subtract": True, "init": "slice"},
    "lora2": {"r": 16, "k": 16},
    "lora_mini": {"r": 16, "a": 64, "b": 64},
    "lorta": {"r": 64, "target_modules": ATTENTION},
    "melora": {"r": 16, "n": 2},
    "miss": {"r": 32},
    "mora": {"r": 16},
    "nola": {"r": 16, "k": 256, "l": 256},
    "prilora": {"r_start": 12, "r_end": 20},
    "randlora": {"r": 32},
    "s2ft": {"index": "0-31"},
    "vera": {"r": 256},
}
ALL = r"bert\..*(query|key|value|dense)"


def main(args: argparse.Namespace, missing: list[str], machine: Callable[..., str]) -> int:
    plan = QUICK if args.quick else FULL
    if args.dry_run:
        print(describe(plan, args, missing))
        return 0
    try:
        if missing:
            raise DemoError(f"not installed: {', '.join(missing)}. `make demo` sets everything up.")
        Everything(plan, args, machine).run()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        return 130
    return 0


def describe(plan: Plan, args: argparse.Namespace, missing: list[str]) -> str:
    import lrkern

    count = len(lrkern.methods())
    return "\n".join(
        [
            f"would look for the learning rates of {count} methods, run each with {plan.seeds} seeds and time its steps, at most "
            f"{plan.seconds:.0f} s each time: up to {count * (2 + plan.seeds) * plan.seconds / 60:.0f} min on 2 cores; may be stopped and goes on",
            f"  {plan.steps} steps of {plan.batch} lines of each of {', '.join(DOMAINS)}; then {plan.held} held-out lines of each are scored",
            f"results in {args.out}/methods/rows.jsonl"
            + ("" if args.quick else f", {PAGE.name} and {PLOT.name} in docs/"),
            *([f"not installed yet: {', '.join(missing)}"] if missing else []),
        ]
    )


class Everything:
    """The rows, each made by a process of its own, in which nobody has used memory before."""

    def __init__(self, plan: Plan, args: argparse.Namespace, machine: Callable[..., str]):
        import demo_model as m  # torch, transformers, peft: some seconds

        import lrkern

        self.plan, self.lrkern, self.quick, self.seed = plan, lrkern, args.quick, args.seed
        self.device = args.device if args.device != "auto" else "cuda" if m.torch.cuda.is_available() else "cpu"
        self.folder = args.out / "methods"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "rows.jsonl"
        # A run may have ended in the middle of a row.
        self.cut_off = path.exists() and not path.read_text().endswith("\n")
        self.of = {"plan": asdict(plan), "device": self.device, "machine": machine(m.torch, self.device),
                   "threads": m.torch.get_num_threads(), "torch": m.torch.__version__}  # fmt: skip
        demo_data.fetch()

    def run(self) -> None:
        methods, seeds = [*self.lrkern.methods()], range(self.seed, self.seed + self.plan.seeds)
        rates, rows, times = (self.rows(kind) for kind in ("rates", "r", "step_ms"))
        left = [(method, seed) for seed in seeds for method in methods if (method, seed) not in rows]
        untimed = [method for method in methods if (method, None) not in times]
        jobs = len(left) + len(untimed) + len({method for method, _ in left} - {method for method, _ in rates})
        print(
            f"{len(rows)} rows are there, {len(left)} are left, and {len(untimed)} methods to be timed: at most "
            f"{jobs * self.plan.seconds / 60:.0f} min; ^C stops, the same command goes on",
            flush=True,
        )
        for method, seed in left:
            start = time.perf_counter()
            if (method, None) not in rates:
                rates[method, None] = self.made(Rate, method, self.seed)
            lr = rates[method, None]["lr"]
            if (row := self.made(Run, method, seed, lr)) is None:
                continue
            rows[method, seed] = row
            print(f"  {method:<12} seed {seed}: {row['trainable']:>9,} parameters, rate {lr:.1e}, "
                  f"r={statistics.mean(row['r'].values()):.3f}, {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
            self.write(rows, times)
        for method in untimed:  # all in a row, as the machine is
            if row := self.made(Time, method, self.seed):
                times[method, None] = row
                print(f"  {method:<12} {row['step_ms']:.0f} ms a step, published {row['published_ms']:.0f}", flush=True)
                self.write(rows, times)

    def made(self, job: type[Job], method: str, *given: Any) -> dict | None:
        try:
            row = {"of": self.of, **alone(job, self.plan, self.device, method, *given)}
        except TimeoutError as error:
            print(f"  {method:<12} {error}", flush=True)
            return None
        with (self.folder / "rows.jsonl").open("a") as f:
            f.write("\n" * self.cut_off + json.dumps(row) + "\n")
        self.cut_off = False
        return row

    def write(self, rows: dict[tuple[str, int], dict], times: dict[tuple[str, int | None], dict]) -> None:
        if not self.quick:
            write(rows, {method: row for (method, _), row in times.items()}, self.of)

    def rows(self, kind: str) -> dict[tuple[str, int | None], dict]:
        """Those with this key by method and seed, of this plan, machine and torch: others are not beside them in one table."""
        path = self.folder / "rows.jsonl"
        found = [*map(parsed, path.read_text().splitlines())] if path.exists() else []
        return {(row["method"], row.get("seed")): row for row in found if row.get("of") == self.of and kind in row}


def parsed(line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def alone(call: Callable, *args: Any) -> Any:
    """call(*args)() in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_called, call, *args).result()


def _called(call: Callable, *args: Any) -> Any:
    return call(*args)()


class Job:
    """Of one method and seed: the data, and how a model trains."""

    def __init__(self, plan: Plan, device: str, method: str, seed: int):
        import demo_model as m

        import lrkern

        self.start = time.perf_counter()
        self.plan, self.device, self.method, self.seed, self.m, self.lrkern = plan, device, method, seed, m, lrkern
        self.tokenize, lines = m.tokenizer(), demo_data.read(demo_data.fetch())
        self.lines = {d: demo_data.split(d, lines[d], plan.steps * plan.batch, plan.held, seed) for d in DOMAINS}

    def base(self):
        return self.m.load_base(self.device, self.seed)

    def adapt(self, model, batches: list, lr: float):
        """lrkern's report."""
        report = adapted(self.lrkern, model, self.method, self.seed)
        if self.method == "lora_sb":  # its start is one step of full fine-tuning
            of = lambda model, batch: self.loss(model, *batch)
            self.lrkern.nn.variants.lora_sb_init(model, batches[:2], of, lr)
        return report

    def loss(self, model, batch, target):
        return self.m.torch.nn.functional.mse_loss(model.train()(**batch), target)

    def batches(self, split: Split) -> list[tuple[dict, Any]]:
        from demo_train import batches

        torch, ratings = self.m.torch, self.m.torch.tensor([x.rating for x in split.train])
        texts, made = [x.text for x in split.train], []
        for rows in batches(texts, self.plan.batch, torch.Generator().manual_seed(self.seed)):
            batch = self.tokenize([texts[i] for i in rows])
            made.append(({key: value.to(self.device) for key, value in batch.items()}, ratings[rows].to(self.device)))
        return made

    def optimizer(self, model, lr: float):
        return self.m.torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    def step(self, model, optimizer, batch, target) -> float:
        """The loss before it."""
        optimizer.zero_grad()
        loss = self.loss(model, batch, target)
        loss.backward()
        optimizer.step()
        return loss.item()

    def train(self, model, batches, lr: float) -> list[float]:
        """The loss of each step; the rate falls to zero."""
        optimizer, losses = self.optimizer(model, lr), []
        schedule = self.m.torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
        for batch, target in batches:
            if time.perf_counter() - self.start > self.plan.seconds:
                raise TimeoutError(f"took more than {self.plan.seconds:.0f} s; no row")
            losses.append(self.step(model, optimizer, batch, target))
            schedule.step()
        return losses


class Rate(Job):
    """A learning rate: the one of least training loss in the last quarter of the steps on the first domain, from plan.lr upwards by
    factors while that helps, else downwards. What is held out is not looked at. A loss that is no number counts as the worst; where
    the time is up, the best so far is it."""

    def __call__(self) -> dict[str, Any]:
        rates: dict[float, float] = {}
        with suppress(TimeoutError):
            self.climb(rates, self.plan.factor)
            if best(rates) == self.plan.lr:
                self.climb(rates, 1 / self.plan.factor)
        rates = rates or {self.plan.lr: math.inf}
        return {"method": self.method, "rates": {f"{lr:g}": loss for lr, loss in rates.items()}, "lr": best(rates)}

    def climb(self, rates: dict[float, float], factor: float) -> None:
        lr = self.plan.lr
        while True:
            if lr not in rates:
                rates[lr] = self.at(lr)
            if best(rates) != lr:
                return
            lr *= factor

    def at(self, lr: float) -> float:
        model, batches = self.base(), self.batches(self.lines[DOMAINS[0]])
        self.adapt(model, batches, lr)
        losses = self.train(model, batches, lr)
        last = statistics.mean(losses[-(len(losses) // 4 or 1) :])
        return last if math.isfinite(last) else math.inf


def best(rates: dict[float, float]) -> float:
    return min(rates, key=rates.__getitem__)


class Run(Job):
    """A row of the table."""

    def __init__(self, plan: Plan, device: str, method: str, seed: int, lr: float):
        super().__init__(plan, device, method, seed)
        self.lr = lr

    def __call__(self) -> dict[str, Any]:
        from demo_train import PeakMemory

        r, peak = {}, None
        for domain, split in self.lines.items():
            batches = self.batches(split)
            model = self.base()
            memory = PeakMemory(self.device)
            report = self.adapt(model, batches, self.lr)
            if peak is None:  # later ones find what this one left in the heap
                with memory.exact():
                    self.loss(model, *max(batches, key=lambda batch: batch[0]["input_ids"].numel())).backward()
                    peak = memory.peak()
            self.train(model, batches, self.lr)
            scores = self.m.predict(model.eval(), self.tokenize, [x.text for x in split.held], self.device, domain)
            r[domain] = self.m.pearson(scores, self.m.torch.tensor([x.rating for x in split.held]))
        with tempfile.TemporaryDirectory() as folder:
            self.lrkern.save(model, Path(folder) / "a")
            size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {
            "method": self.method, "seed": self.seed, "lr": self.lr, "layers": len(report.layers), "trainable": trainable,
            "file_bytes": size, "peak_bytes": peak, "r": r,
        }  # fmt: skip


class Time(Job):
    """ms a step of the method here and in its published formulation: the same steps in turn, after one each to warm up, of a batch of
    usual length, fifteen each or for some seconds."""

    def __call__(self) -> dict[str, Any]:
        batches = sorted(self.batches(self.lines[DOMAINS[-1]]), key=lambda batch: batch[0]["input_ids"].numel())
        batch, model = batches[len(batches) // 2], self.base()
        self.adapt(model, batches, self.plan.lr)
        models = model, published(self.lrkern, self.base(), self.method, self.seed)
        optimizers = [self.optimizer(m, self.plan.lr) for m in models]
        times: list[list[float]] = [[], []]
        begin = time.perf_counter()
        for i in range(16):
            for m, optimizer, of in zip(models, optimizers, times, strict=True):
                start = time.perf_counter()
                self.step(m, optimizer, *batch)
                self.m.synchronize(self.device)
                of.append(1e3 * (time.perf_counter() - start))
            if i and time.perf_counter() - begin > 10.0:
                break
        ours, theirs = (statistics.median(of[1:]) for of in times)
        return {"method": self.method, "step_ms": ours, "published_ms": theirs, "rounds": i}


def adapted(lrkern, model, method: str, seed: int):
    """This is the part to copy: a model, a method, and what trains whole beside it."""
    import torch

    torch.manual_seed(seed)
    settings = {"target_modules": ALL} | SETTINGS.get(method, {})
    return lrkern.adapt(model, method, modules_to_save=["score"], **settings)


def published(lrkern, model, method: str, seed: int):
    """The model with the method's layers as others compute them: of PEFT where it has the method, else of bench/peers."""
    import torch

    sys.path.insert(0, str(ROOT / "bench"))
    from peers.families import FORWARDS
    from peers.tuners import TUNERS, stock
    from peers.variants import PUBLISHED

    tuner = {"bone": "miss_bat"}.get(method, method)
    if tuner in TUNERS:
        return stock(model, tuner, ALL, 10**6, seed)  # steps before AdaLoRA's budget falls
    torch.manual_seed(seed)
    adapted(lrkern, model, method, seed)
    for layer in [m for m in model.modules() if isinstance(m, lrkern.nn.linear.AdapterLinear)]:
        layer.forward = FORWARDS[method](layer) if method in FORWARDS else of_variant(layer, PUBLISHED[method])
    return model


def of_variant(layer, run: Callable) -> Callable:
    import torch

    c, s, base = dict(layer.coefficients()), layer.settings, layer.base_layer
    if s.get("subtract"):  # theirs adds its start to W, from which it is taken here
        base, start = copy.deepcopy(base), c["lora_B"] @ c["lora_N"] @ c["lora_A"] * layer.scaling
        base.weight = torch.nn.Parameter(base.weight - start, requires_grad=False)
    for earlier in getattr(layer, "_earlier", ()):  # ResLoRA's, of which there is one
        c |= {"before_A": earlier.lora_A, "before_B": earlier.lora_B}
    return lambda x: run(lambda: base(x), base, x, c, s)


# ---- the page


def write(rows: dict[tuple[str, int], dict], times: dict[str, dict], of: dict) -> None:
    by_method: dict[str, list[dict]] = {}
    for (method, _), row in sorted(rows.items()):
        by_method.setdefault(method, []).append(row)
    plan = of["plan"]
    lines = []
    for method, each in by_method.items():
        means = [statistics.mean(row["r"].values()) for row in each]
        spread = f"{min(means):.3f} to {max(means):.3f}" if len(means) > 1 else "one seed"
        ms, theirs = (f"{times[method][key]:.0f}" if method in times else "" for key in ("step_ms", "published_ms"))
        peak = statistics.median(row["peak_bytes"] for row in each) / 1e6
        lines.append(
            f"| `{method}` | {each[0]['trainable']:,} | {each[0]['file_bytes'] / 1e3:,.0f} | {ms} | {theirs} | {peak:.0f} "
            f"| {each[0]['lr']:g} | {statistics.mean(means):.3f} | {spread} |"
        )
    PAGE.write_text(
        "\n".join(
            [
                "# Every method on one task",
                "",
                'What `make demo ARGS="--method all"` saw: MiniLM-L6 with an adapter on every linear of its encoder (LoRTA: of the attention) and a '
                "head of its own,",
                f"trained on rated sentences of four domains, {plan['steps']} steps of {plan['batch']} lines each; r is Pearson's, the mean over the domains' "
                f"{plan['held']} held-out lines",
                f"each, its spread that of the means of {plan['seeds']} seeds. {of['machine']}, {of['threads']} threads, torch {of['torch']}.",
                "",
                f"The learning rate is a method's own: from {plan['lr']:g} in factors of {plan['factor']:g} the one of least training loss on the first domain "
                "alone; nothing else was",
                "tuned, and allocators and schedules are left out. So few steps tell how methods begin, not how they end. The published formulation is stock",
                "PEFT's layer where PEFT has the method, else the authors' order of products in torch's calls (bench/peers); its steps, optimizer included, are",
                "timed in turn with ours on one batch of usual length. Peak memory is that of one step on the longest batch above the loaded base. Settings:",
                "examples/demo_all.py; NLoRA and IntTune take their start out of W again, without which they learnt nothing here. The plot is methods.png.",
                "",
                "| method | trainable parameters | file, kB | ms a step | published, ms | peak, MB | rate | r | spread |",
                "|---|---|---|---|---|---|---|---|---|",
                *lines,
                "",
            ]
        )
    )
    plot(by_method, times)


def plot(by_method: dict[str, list[dict]], times: dict[str, dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 8), constrained_layout=True)
    axes[0].set_xscale("log")
    for axis, key, label in zip(axes, ("trainable", "step_ms"), ("trainable parameters", "ms a step"), strict=True):
        points: dict[str, tuple[float, float]] = {}
        for method, each in by_method.items():
            if (x := (times.get(method, {}) if key == "step_ms" else each[0]).get(key)) is None:
                continue
            means = [statistics.mean(row["r"].values()) for row in each]
            points[method] = x, statistics.mean(means)
            axis.plot([x, x], [min(means), max(means)], color="0.8", linewidth=1)
            axis.plot(*points[method], "o", markersize=4)
        axis.set(xlabel=label, ylabel="Pearson r, mean of four domains")
        axis.margins(x=0.15)
        name_points(axis, points)
    figure.savefig(PLOT, dpi=110)
    pyplot.close(figure)


def name_points(axis, points: dict[str, tuple[float, float]]) -> None:
    """Names beside them, from the highest down, each below those that it would lie on."""
    width, height, taken = 75, 11, []  # of a name, in pixels
    axis.figure.canvas.draw()
    for method, at in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = axis.transData.transform(at)
        low = y
        while any(abs(x - u) < width and abs(low - v) < height for u, v in taken):
            low -= 1
        taken.append((x, low))
        line = {"arrowstyle": "-", "color": "0.8", "linewidth": 0.5} if low < y else None
        axis.annotate(
            method,
            at,
            (6, (low - y) * 72 / axis.figure.dpi),
            fontsize=7,
            textcoords="offset points",
            va="center",
            arrowprops=line,
        )
