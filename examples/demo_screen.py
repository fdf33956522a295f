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


def method_learning(s: dict) -> str | None:
    if x := s.get("method"):
        name, r, files = x["name"], x["mean_r"], x["file_bytes"]
        count = {side: f"{n / 1e6:.3f} M" for side, n in x["trainable"].items()}
        rows = [
            f"learning        {name} r={r[name]:.3f}  LoRA r={r['lora']:.3f}  frozen base {r['base']:.3f}     "
            f"trained {name} {count[name]} | LoRA {count['lora']}     a file {mb(files[name])} | LoRA {mb(files['lora'])}"
        ]
        for domain in x["r"][name]:
            values = "  ".join(f"{side} {x['r'][side][domain]:.3f}" for side in ("base", "lora", name))
            rows.append(f"{'':18}{domain:<9}{values}")
        return "\n".join(rows)


def method_cost(s: dict) -> str | None:
    if (m := s.get("method")) and (x := s.get("cost_per_step")):
        name, noise = m["name"], " (no difference within noise)" if x["within_noise"] else ""
        return (
            f"cost per step   base {x['base_ms']:.0f} ms | LoRA +{x['lora_ms']:.1f} ± {x['lora_noise_ms']:.1f} | "
            f"{name} +{x[f'{name}_ms']:.1f} ± {x[f'{name}_noise_ms']:.1f}{noise}     saved for backward beyond x: "
            f"LoRA {mb(x['lora_saved_bytes'])} | {name} {mb(x[f'{name}_saved_bytes'])}     "
            f"peak LoRA {mb(x['lora_peak_bytes'], 0)} | {name} {mb(x[f'{name}_peak_bytes'], 0)}"
        )


def method_round_trip(s: dict) -> str | None:
    if x := s.get("method_round_trip"):
        ok = verdict(x["ok"], f"<= {x['bound']:.0e}")
        return f"round trip      the base loads all {len(x['gaps'])} files: max |dy| {x['max_gap']:.1e}   {ok}"


def method_files(s: dict) -> str | None:
    if x := s.get("method"):
        return f"files    {s['out']}/{{summary.json, loss.png, {x['name']}/ (4)}}     the part to copy: examples/demo_methods.py"


def cost_per_step(s: dict) -> str | None:
    if (x := s.get("cost_per_step")) and "method" not in s:
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


def random_bases(s: dict) -> str | None:
    if x := s.get("random_bases"):
        name, r, n, size = x["name"], x["mean_r"], x["trainable"], x["file_bytes"]
        ok = verdict(x["ok"], f"<= {x['bound']:.0e}")
        return (
            f"random bases    {name.upper()} r={r[name]:.3f}  LoRA r={r['lora']:.3f}     trained {n[name]:,} | {n['lora']:,}     "
            f"a file {size[name] / 1e3:,.0f} kB | {size['lora'] / 1e3:,.0f} kB: the bases are drawn from its seed\n"
            f"                  the base loads all {len(x['gaps'])} files: max |dy| {x['max_gap']:.1e}   {ok}"
        )


def round_trip(s: dict) -> str | None:
    if x := s.get("round_trip"):
        ok = verdict(x["ok"], f"<= {x['bound']:.0e}")
        return f"round trip      stock PEFT loads all {len(x['gaps'])} folders: max |dy| {x['max_gap']:.1e}   {ok}"


def packed_base(s: dict) -> str | None:
    if x := s.get("packed_base"):
        r, ms, ok = x["mean_r"], x["step_ms"], verdict(x["ok"], f"<= {x['bound']:.0e}")
        return (
            f"base in MXFP4   {x['layers']} linears {mb(x['bytes'], 1)} | fp32 {mb(x['fp32_bytes'], 1)} "
            f"({x['bytes'] / x['fp32_bytes']:.2f}x)     r={r['mxfp4']:.3f} | {r['lrkern']:.3f}     "
            f"a step {ms['mxfp4']:.0f} ms | {ms['lrkern']:.0f}\n"
            f"                  served: {x['requests']} requests over 4 adapters in one batch, max |dy| to one at a time "
            f"{x['gap']:.1e}   {ok}"
        )


def try_it(s: dict) -> str | None:
    rows = []
    for x in s.get("try_it", ()):
        human = "" if x["human"] is None else f"   human {x['human']:+.1f}"
        adapters = "".join(f"  {d} {value:+.1f}" for d, value in x["adapters"].items())
        rows.append(f'"{x["text"]}"  base {x["base"]:+.1f}{adapters}{human}')
    return "try it   " + "\n         ".join(rows) if rows else None


def files(s: dict) -> str | None:
    return (
        None
        if "method" in s
        else (
            f"files    {s['out']}/{{summary.json, loss.png, adapters/ (4)}}     "
            "your model: import lrkern.peft; lrkern.peft.patch(model)"
        )
    )


def mb(size: float, digits: int = 2) -> str:
    return f"{size / 1e6:.{digits}f} MB"


NUMBERED = (
    same_learning,
    method_learning,
    method_cost,
    cost_per_step,
    right_adapter,
    mixed_batch,
    random_bases,
    round_trip,
    method_round_trip,
    packed_base,
)
LINES: list[Callable[[dict], str | None]] = [
    header,
    method_learning,
    method_cost,
    method_round_trip,
    method_files,
    same_learning,
    cost_per_step,
    right_adapter,
    mixed_batch,
    random_bases,
    round_trip,
    packed_base,
    try_it,
    files,
]
