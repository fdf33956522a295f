# SPDX-License-Identifier: Apache-2.0
"""`make demo ARGS="--method all"`: every method that lrkern.adapt knows, on the demo's four domains, as one table.

Each method and seed trains an adapter for each domain from the same base, on the same lines in the same order. A row is appended to
rows.jsonl as soon as it is there, so that a run may be stopped and goes on where it was; docs/methods.md and docs/methods.png are
written anew from all rows after each. The allocators and schedules of methods that have some are left out: ranks stay as they begin.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import demo_data
from demo_data import DOMAINS, DemoError, Split

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT = ROOT / "docs" / "methods.md", ROOT / "docs" / "methods.png"


@dataclass(frozen=True)
class Plan:
    steps: int = 32  # a domain
    batch: int = 32
    held: int = 100  # held-out lines of a domain
    lr: float = 2e-3
    seeds: int = 3
    seconds: float = 60.0  # that a method and seed may take; what is slower ends there, without a row


FULL, QUICK = Plan(), Plan(steps=4, batch=8, held=20, seeds=1)

# What a method is given beside its defaults: ranks near the parameters of LoRA of rank 16, but for methods that are made to need far fewer.
ATTENTION = r".*\.attention\.(self\.(query|key|value)|output\.dense)"
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"r": 16},
    "bone": {"r": 32},
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
            f"would run {count} methods with {plan.seeds} seeds each, at most {plan.seconds:.0f} s each: up to "
            f"{count * plan.seeds * plan.seconds / 60:.0f} min on 2 cores; may be stopped and goes on",
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
        self.of = {"plan": asdict(plan), "device": self.device, "machine": machine(m.torch, self.device),
                   "threads": m.torch.get_num_threads(), "torch": m.torch.__version__}  # fmt: skip
        demo_data.fetch()

    def run(self) -> None:
        methods, seeds = [*self.lrkern.methods()], range(self.seed, self.seed + self.plan.seeds)
        rows = self.rows()
        left = [(seed, method) for seed in seeds for method in methods if (method, seed) not in rows]
        limit = len(left) * self.plan.seconds / 60
        print(
            f"{len(rows)} rows are there, {len(left)} are left: at most {limit:.0f} min; ^C stops, the same command goes on",
            flush=True,
        )
        for seed, method in left:
            start = time.perf_counter()
            try:
                row = {"of": self.of, **alone(Run, self.plan, self.device, method, seed)}
            except TimeoutError as error:
                print(f"  {method:<12} seed {seed}: {error}", flush=True)
                continue
            rows[method, seed] = row
            with (self.folder / "rows.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
            mean = statistics.mean(row["r"].values())
            print(f"  {method:<12} seed {seed}: {row['trainable']:>9,} parameters, {row['step_ms']:.0f} ms a step, "
                  f"r={mean:.3f}, {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
            if not self.quick:
                write(rows, self.of)

    def rows(self) -> dict[tuple[str, int], dict]:
        """Of this plan, machine and torch: others are not beside them in one table."""
        path = self.folder / "rows.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]  # a run may have ended in the middle of one
        return {(row["method"], row["seed"]): row for row in found if row["of"] == self.of}


def alone(call: Callable, *args: Any) -> Any:
    """call(*args)() in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_called, call, *args).result()


def _called(call: Callable, *args: Any) -> Any:
    return call(*args)()


class Run:
    """One method and seed."""

    def __init__(self, plan: Plan, device: str, method: str, seed: int):
        import demo_model as m

        import lrkern

        self.start = time.perf_counter()
        self.plan, self.device, self.method, self.seed, self.m, self.lrkern = plan, device, method, seed, m, lrkern
        self.tokenize, lines = m.tokenizer(), demo_data.read(demo_data.fetch())
        self.lines = {d: demo_data.split(d, lines[d], plan.steps * plan.batch, plan.held, seed) for d in DOMAINS}

    def __call__(self) -> dict[str, Any]:
        from demo_train import PeakMemory

        r, times, peak = {}, [], None
        for domain, split in self.lines.items():
            model = self.m.load_base(self.device, self.seed)
            memory = PeakMemory(self.device)
            report = adapted(self.lrkern, model, self.method, self.seed)
            batches = [*self.batches(split)]
            if self.method == "lora_sb":  # its start is one step of full fine-tuning
                of = lambda model, batch: self.loss(model, *batch)
                self.lrkern.nn.variants.lora_sb_init(model, batches[:2], of, self.plan.lr)
            if peak is None:  # later ones find what this one left in the heap
                with memory.exact():
                    self.loss(model, *max(batches, key=lambda batch: batch[0]["input_ids"].numel())).backward()
                    peak = memory.peak()
            times += self.train(model, batches)
            scores = self.m.predict(model.eval(), self.tokenize, [x.text for x in split.held], self.device, domain)
            r[domain] = self.m.pearson(scores, self.m.torch.tensor([x.rating for x in split.held]))
        with tempfile.TemporaryDirectory() as folder:
            self.lrkern.save(model, Path(folder) / "a")
            size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {
            "method": self.method, "seed": self.seed, "layers": len(report.layers), "trainable": trainable, "file_bytes": size,
            "step_ms": statistics.median(times), "published_ms": self.published(batches), "peak_bytes": peak, "r": r,
        }  # fmt: skip

    def loss(self, model, batch, target):
        return self.m.torch.nn.functional.mse_loss(model.train()(**batch), target)

    def batches(self, split: Split) -> Iterator[tuple[dict, Any]]:
        from demo_train import batches

        torch, ratings = self.m.torch, self.m.torch.tensor([x.rating for x in split.train])
        texts = [x.text for x in split.train]
        for rows in batches(texts, self.plan.batch, torch.Generator().manual_seed(self.seed)):
            batch = self.tokenize([texts[i] for i in rows])
            yield {key: value.to(self.device) for key, value in batch.items()}, ratings[rows].to(self.device)

    def train(self, model, batches) -> list[float]:
        """ms of each step."""
        optim, times = self.m.torch.optim, []
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.plan.lr, weight_decay=0.0)
        schedule = optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
        for batch, target in batches:
            begin = time.perf_counter()
            if begin - self.start > self.plan.seconds:
                raise TimeoutError(f"took more than {self.plan.seconds:.0f} s; no row")
            optimizer.zero_grad()
            self.loss(model, batch, target).backward()
            optimizer.step()
            self.m.synchronize(self.device)
            schedule.step()
            times.append(1e3 * (time.perf_counter() - begin))
        return times

    def published(self, batches) -> float | None:
        """ms a step of the published formulation, on a few of the same batches, where it ends in time."""
        theirs = published(self.lrkern, self.m.load_base(self.device, self.seed), self.method, self.seed)
        try:
            return statistics.median(self.train(theirs, batches[:4])) if theirs else None
        except TimeoutError:
            return None


def adapted(lrkern, model, method: str, seed: int):
    """This is the part to copy: a model, a method, and what trains whole beside it."""
    import torch

    torch.manual_seed(seed)
    settings = {"target_modules": ALL} | SETTINGS.get(method, {})
    return lrkern.adapt(model, method, modules_to_save=["score"], **settings)


def published(lrkern, model, method: str, seed: int):
    """The model with the method's layers as others compute them: of PEFT where it has the method, else of bench/peers; None for others."""
    import peft
    import torch

    config = {
        "lora": lambda: peft.LoraConfig(r=16, lora_alpha=32, target_modules=ALL),
        "dora": lambda: peft.LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=ALL),
        "adalora": lambda: peft.AdaLoraConfig(init_r=16, target_r=16, total_step=100, target_modules=ALL),
        "vera": lambda: peft.VeraConfig(r=256, target_modules=ALL),
        "randlora": lambda: peft.RandLoraConfig(r=32, target_modules=ALL),
        "miss": lambda: peft.MissConfig(r=32, target_modules=ALL),
        "bone": lambda: peft.MissConfig(r=32, init_weights="bat", target_modules=ALL),
    }.get(method)
    torch.manual_seed(seed)
    if config:
        model = peft.get_peft_model(model, config())
        model.base_model.model.score.requires_grad_(True)
        return model
    sys.path.insert(0, str(ROOT / "bench"))
    from peers.variants import PUBLISHED

    if method not in PUBLISHED or method == "reslora":  # whose layers know of one another
        return None
    adapted(lrkern, model, method, seed)
    run = PUBLISHED[method]
    for layer in [m for m in model.modules() if isinstance(m, lrkern.nn.linear.AdapterLinear)]:
        c, s, base = layer.coefficients(), layer.settings, layer.base_layer
        layer.forward = lambda x, c=c, s=s, base=base: run(lambda: base(x), base, x, c, s)
    return model


# ---- the page


def write(rows: dict[tuple[str, int], dict], of: dict) -> None:
    by_method: dict[str, list[dict]] = {}
    for (method, _), row in sorted(rows.items()):
        by_method.setdefault(method, []).append(row)
    plan = of["plan"]
    lines = []
    for method, each in by_method.items():
        means = [statistics.mean(row["r"].values()) for row in each]
        spread = f"{min(means):.3f} to {max(means):.3f}" if len(means) > 1 else "one seed"
        ms = statistics.median(row["step_ms"] for row in each)
        theirs = [row["published_ms"] for row in each if row["published_ms"]]
        published = f"{statistics.median(theirs):.0f}" if theirs else ""
        peak = statistics.median(row["peak_bytes"] for row in each) / 1e6
        lines.append(
            f"| `{method}` | {each[0]['trainable']:,} | {each[0]['file_bytes'] / 1e3:,.0f} | {ms:.0f} | {published} | {peak:.0f} "
            f"| {statistics.mean(means):.3f} | {spread} |"
        )
    PAGE.write_text(
        "\n".join(
            [
                "# Every method on one task",
                "",
                'What `make demo ARGS="--method all"` saw: MiniLM-L6 with an adapter on every linear of its encoder (LoRTA: of the attention) and a '
                "head of its own,",
                f"trained on rated sentences of four domains, {plan['steps']} steps of {plan['batch']} lines each at one learning rate, "
                f"{plan['lr']:g}; r is Pearson's, the mean over the",
                f"domains' {plan['held']} held-out lines each, its spread that of the means of {plan['seeds']} seeds. {of['machine']}, {of['threads']} threads, "
                f"torch {of['torch']}.",
                "",
                "So few steps tell how methods begin, at a rate that suits LoRA, and not how they end: no method was tuned. Allocators and schedules are left",
                "out. The published formulation is stock PEFT's layer where PEFT has the method, else the authors' order of products in torch's calls",
                "(bench/peers/variants.py), timed on four of the same batches. Settings: examples/demo_all.py. The plot is methods.png.",
                "",
                "| method | trainable parameters | file, kB | ms a step | published, ms | peak, MB | r | spread |",
                "|---|---|---|---|---|---|---|---|",
                *lines,
                "",
            ]
        )
    )
    plot(by_method)


def plot(by_method: dict[str, list[dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(14, 6), constrained_layout=True)
    for axis, key, label in zip(axes, ("trainable", "step_ms"), ("trainable parameters", "ms a step"), strict=True):
        for method, each in by_method.items():
            x = statistics.median(row[key] for row in each)
            means = [statistics.mean(row["r"].values()) for row in each]
            axis.plot([x, x], [min(means), max(means)], color="0.6", linewidth=1)
            axis.plot(x, statistics.mean(means), "o", markersize=4)
            axis.annotate(method, (x, statistics.mean(means)), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(xlabel=label, ylabel="Pearson r, mean of four domains")
    axes[0].set_xscale("log")
    figure.savefig(PLOT, dpi=110)
