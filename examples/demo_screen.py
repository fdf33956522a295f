# SPDX-License-Identifier: Apache-2.0
"""The demo's last screen. One function per line: it takes the summary and returns text, or nothing when the summary
has no figures for it. A new feature adds its figures to the summary and its function to LINES."""

from __future__ import annotations

from collections.abc import Callable


def screen(summary: dict) -> str:
    """Lines that measure something are numbered, those that are there without gaps."""
    texts, number = [], 0
    for line in LINES:
        if text := line(summary):
            number += line in NUMBERED
            texts.append(f"{number} {text}" if line in NUMBERED else text)
    return "\n".join(texts)


def verdict(ok: bool, bound: str) -> str:
    return f"{'OK' if ok else 'FAIL'} ({bound})"


def header(s: dict) -> str:
    at = s["settings"]
    place = f"{at['machine']}, {at['cores']} cores" if at["device"] == "cpu" else at["machine"]
    guard = s["guard"]
    cut = f" · cut to {guard['lines']} training lines to save time" if guard["lines"] < guard["planned_lines"] else ""
    minutes, seconds = divmod(round(s["seconds"]), 60)
    return (
        f"lrkern demo · MiniLM-L6 · 4 rated-text domains · r={at['rank']} · {place} · seed {at['seed']} · "
        f"{minutes}:{seconds:02d} min{cut}"
    )


def same_learning(s: dict) -> str | None:
    if x := s.get("same_learning"):
        r = x["mean_r"]
        return (
            f"same learning   PEFT r={r['peft']:.3f}  lrkern r={r['lrkern']:.3f}  frozen base {r['base']:.3f}   "
            f"max relative loss gap ({x['steps_compared']} steps) {x['loss_gap']:.1e}   "
            + verdict(x["ok"], "<= 1e-3, r within 0.01")
        )


def cost_per_step(s: dict) -> str | None:
    if x := s.get("cost_per_step"):
        noise = " (no difference within noise)" if x["within_noise"] else ""
        times = (
            f"base {x['base_ms']:.0f} ms | PEFT +{x['peft_ms']:.1f} ± {x['peft_noise_ms']:.1f} | "
            f"lrkern +{x['lrkern_ms']:.1f} ± {x['lrkern_noise_ms']:.1f}{noise}"
        )
        return (
            f"cost per step   {times}     "
            f"saved for backward beyond x: PEFT {mb(x['peft_saved_bytes'])} | ours {mb(x['lrkern_saved_bytes'])}     "
            f"peak PEFT {mb(x['peft_peak_bytes'], 0)} | ours {mb(x['lrkern_peak_bytes'], 0)} "
            f"(process, with what malloc keeps: {mb(x['peft_process_peak_bytes'], 0)} | "
            f"{mb(x['lrkern_process_peak_bytes'], 0)})\n"
            f"                  with dropout 0.1: PEFT saves {mb(x['peft_saved_bytes_dropout'])} | "
            f"ours {mb(x['lrkern_saved_bytes_dropout'])}: what stock PEFT cannot do is drop out without storing it"
        )


def right_adapter(s: dict) -> str | None:
    if x := s.get("right_adapter"):
        domains = list(x["table"])
        rows = ["right adapter   adapter \\ on" + "".join(f"{d:>9}" for d in domains) + "     (* best per column)"]
        for adapter, row in x["table"].items():
            cells = (f"{row[d]:>8.3f}{'*' if x['best'][d] == adapter else ' '}" for d in domains)
            rows.append(f"{'':18}{adapter:<12}" + "".join(cells))
        frozen = "".join(f"{x['frozen_base'][d]:>8.3f} " for d in domains)
        return "\n".join([*rows, f"{'':18}{'no adapter':<12}{frozen}    (frozen base, a ridge head per column)"])


def mixed_batch(s: dict) -> str | None:
    if x := s.get("mixed_batch"):
        bound = f"<= {x['bound']:.0e}"
        return (
            f"mixed batch     {x['requests']} requests, {x['adapters']} adapters, {x['base_rows']} rows without: "
            f"one by one {x['alone_ms']:.0f} ms | base {x['base_ms']:.0f} | PEFT adapter_names +{x['peft_ms']:.0f} | "
            f"lrkern.serving +{x['lrkern_ms']:.0f} ({x['ratio']:.2f}x, {x['target']}x {'met' if x['met'] else 'missed'})\n"
            f"                  adapter part bit-equal alone and mixed: {'yes' if x['bit_equal'] else 'no'}     "
            f"max |dy| to one at a time {x['gap']:.1e}   {verdict(x['ok'], bound)}"
        )


def round_trip(s: dict) -> str | None:
    if x := s.get("round_trip"):
        ok = verdict(x["ok"], f"<= {x['bound']:.0e}")
        return f"round trip      stock PEFT loads all {len(x['gaps'])} folders: max |dy| {x['max_gap']:.1e}   {ok}"


def try_it(s: dict) -> str | None:
    rows = []
    for x in s.get("try_it", ()):
        human = "" if x["human"] is None else f"   human {x['human']:+.1f}"
        adapters = "".join(f"  {d} {value:+.1f}" for d, value in x["adapters"].items())
        rows.append(f'"{x["text"]}"  base {x["base"]:+.1f}{adapters}{human}')
    return "try it   " + "\n         ".join(rows) if rows else None


def files(s: dict) -> str:
    return (
        f"files    {s['out']}/{{summary.json, loss.png, adapters/ (4)}}     "
        "your model: import lrkern.peft; lrkern.peft.patch(model)"
    )


def mb(size: float, digits: int = 2) -> str:
    return f"{size / 1e6:.{digits}f} MB"


NUMBERED = same_learning, cost_per_step, right_adapter, mixed_batch, round_trip
LINES: list[Callable[[dict], str | None]] = [
    header,
    same_learning,
    cost_per_step,
    right_adapter,
    mixed_batch,
    round_trip,
    try_it,
    files,
]
