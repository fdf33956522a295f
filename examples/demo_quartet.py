# SPDX-License-Identifier: Apache-2.0
"""`make demo ARGS=--quartet`: the demo's model with all weights of its linears trained, once with products in bf16 and once in FP4.

Both sides are one model from one seed, see the same batches in the same order and differ in `LINEARS` alone: what stands in the place of
each nn.Linear. Losses of both go into one plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_data
from demo_data import DOMAINS, DemoError, Split

SIDES = ("bf16", "quartet")


@dataclass(frozen=True)
class Plan:
    steps: int
    batch: int
    held: int  # held-out lines per domain
    lr: float  # of the linears; the fresh head's is ten times that
    expected: int  # seconds on 2 cores


FULL = Plan(steps=300, batch=16, held=100, lr=1e-4, expected=720)
QUICK = Plan(steps=60, batch=8, held=25, lr=1e-4, expected=90)


def main(args: argparse.Namespace, missing: list[str], machine: Callable[..., str]) -> int:
    plan = QUICK if args.quick else FULL
    if args.dry_run:
        print(describe(plan, args, missing))
        return 0
    try:
        if missing:
            raise DemoError(f"not installed: {', '.join(missing)}. `make demo` sets everything up.")
        print(screen(run(plan, args.out / "quartet", args.seed, args.device, machine)))
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def describe(plan: Plan, args: argparse.Namespace, missing: list[str]) -> str:
    rows = [
        f"would run, {plan.expected / 60:.1f} min expected on 2 cores:",
        f"  {plan.steps} steps of {plan.batch} lines of {', '.join(DOMAINS)}, each once, of both sides in turn: {', '.join(SIDES)}",
        f"  all weights of the encoder's linears train; then {plan.held} held-out lines of each domain are scored",
        f"results in {args.out}/quartet/: summary.json, loss.png",
        *([f"not installed yet: {', '.join(missing)}"] if missing else []),
    ]
    return "\n".join(rows)


def run(plan: Plan, out: Path, seed: int, device: str, machine: Callable[..., str]) -> dict[str, Any]:
    import demo_model as m  # torch, transformers, peft: some seconds

    start = time.perf_counter()
    if device == "auto":
        device = "cuda" if m.torch.cuda.is_available() else "cpu"
    lines = demo_data.read(demo_data.fetch())
    each = -(-plan.steps * plan.batch // len(DOMAINS))
    splits = {domain: demo_data.split(domain, lines[domain], each, plan.held, seed) for domain in DOMAINS}
    base, tokenize = m.load_base(device, seed), m.tokenizer()
    models = {side: with_linears(copy.deepcopy(base), side) for side in SIDES}
    found = train(models, tokenize, splits, plan, seed, device)
    for side, model in models.items():
        found[side]["r"] = held_out(model.eval(), tokenize, splits, device)
    summary = dict(
        settings=dict(machine=machine(m.torch, device), threads=m.torch.get_num_threads(), device=device, seed=seed,
                      steps=plan.steps, batch=plan.batch, lr=plan.lr, torch=m.torch.__version__),
        sides=found, seconds=time.perf_counter() - start, out=str(out),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    plot({side: x["losses"] for side, x in found.items()}, out / "loss.png")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def with_linears(model, side: str):
    """Every linear of the encoder in the side's kind, trained, and a trained head. This is the part to copy."""
    import demo_linears
    import demo_methods

    demo_methods.replace(model, demo_linears.LINEARS[side])
    for module in model.modules():
        if isinstance(module, demo_linears.nn.Linear):
            module.requires_grad_(True)
    return model.train()


def train(
    models: dict[str, Any], tokenize: Callable, splits: dict[str, Split], plan: Plan, seed: int, device: str
) -> dict[str, dict]:
    """One step of each side in turn, on the same lines, so that both see the same clocks."""
    import demo_model as m
    from demo_train import batches

    torch, lines = m.torch, [line for split in splits.values() for line in split.train]
    torch.manual_seed(seed)
    ratings, optimizers, schedules = torch.tensor([line.rating for line in lines]), {}, {}
    for side, model in models.items():
        head = [*model.score.parameters()]
        rest = [p for p in model.bert.parameters() if p.requires_grad]
        groups = [{"params": rest, "lr": plan.lr}, {"params": head, "lr": 10 * plan.lr}]
        optimizers[side] = torch.optim.AdamW(groups, weight_decay=0.0)
        schedules[side] = torch.optim.lr_scheduler.LinearLR(optimizers[side], 1.0, 0.0, total_iters=plan.steps)
    found = {side: dict(losses=[], ms=[]) for side in models}
    order = batches([line.text for line in lines], plan.batch, torch.Generator().manual_seed(seed))
    bar = m.progress(total=plan.steps, desc="training")
    for rows in order:
        batch = {key: value.to(device) for key, value in tokenize([lines[i].text for i in rows]).items()}
        target = ratings[rows].to(device)
        for side, model in models.items():
            m.synchronize(device)
            begin = time.perf_counter()
            loss = torch.nn.functional.mse_loss(model(**batch), target)
            optimizers[side].zero_grad()
            loss.backward()
            optimizers[side].step()
            schedules[side].step()
            found[side]["losses"].append(loss.item())
            found[side]["ms"].append(1e3 * (time.perf_counter() - begin))
        bar.update()
    bar.close()
    return found


def held_out(model, tokenize: Callable, splits: dict[str, Split], device: str) -> dict[str, float]:
    """Pearson's r of scores and ratings, of each domain."""
    import demo_model as m

    r = {}
    for domain, split in splits.items():
        scores = m.predict(model, tokenize, [line.text for line in split.held], device, domain)
        r[domain] = m.pearson(scores, m.torch.tensor([line.rating for line in split.held]))
    return r


def last(losses: list[float]) -> float:
    """The mean of the last thirty steps, since a batch is noisy."""
    return statistics.mean(losses[-30:])


def screen(summary: dict) -> str:
    at, sides = summary["settings"], summary["sides"]
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    count = len(sides["bf16"]["losses"])
    loss = "  ".join(
        f"{side} {statistics.mean(x['losses'][:30]):.3f} -> {last(x['losses']):.3f}" for side, x in sides.items()
    )
    mean = "  ".join(f"{side} r={statistics.mean(x['r'].values()):.3f}" for side, x in sides.items())
    cost = "  ".join(f"{side} {statistics.median(x['ms']):.0f} ms" for side, x in sides.items())
    rows = [
        f"lrkern demo · Quartet · MiniLM-L6, all linears trained · {at['machine']}, {at['threads']} threads · seed {at['seed']} · "
        f"{minutes}:{seconds:02d} min",
        f"1 training loss   {loss}   (mean of the first and of the last 30 of {count} steps of {at['batch']} lines)",
        f"2 held-out lines  {mean}",
        *(f"{'':18}{d:<9}" + "  ".join(f"{s} {x['r'][d]:.3f}" for s, x in sides.items()) for d in sides["bf16"]["r"]),
        f"3 a step          {cost}   (FP4 is emulated where there are no FP4 units, bf16 where a CPU has none)",
        f"files             {summary['out']}/: loss.png, summary.json",
    ]
    return "\n".join(rows)


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Each step, and the running mean of twenty."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), constrained_layout=True)
    for side, values in losses.items():
        smooth = [statistics.mean(values[max(0, i - 19) : i + 1]) for i in range(len(values))]
        (line,) = axis.plot(smooth, label=side, linewidth=2)
        axis.plot(values, color=line.get_color(), linewidth=0.6, alpha=0.35)
    axis.set(xlabel="step", ylabel="training loss", ylim=(0, None), title="MiniLM-L6, all linears trained")
    axis.legend()
    figure.savefig(path, dpi=110)
