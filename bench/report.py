# SPDX-License-Identifier: Apache-2.0
"""Rows as a table of at most 120 columns and as a plot. Ratios are to one provider of the suite."""

import textwrap
from collections.abc import Callable
from itertools import groupby
from math import ceil
from pathlib import Path

Row = dict


def verdict(row: Row) -> str:
    return f"A/A {row['noise_ms']:.2g} ms" + (", NOISY: not to be cited" if row["noisy"] else "")


def table(rows: list[Row], against: str | None) -> str:
    """The rows of one case. Columns with nothing in them are left out, as is the ratio of what two providers add to the
    base where the A/A difference exceeds a fifth of either."""
    of = {r["provider"]: r for r in rows}

    def extra(row: Row) -> float | None:
        ms = row["p50_ms"] - of["base"]["p50_ms"] if "base" in of else 0.0
        return ms if ms > 5 * row["noise_ms"] else None

    def number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
        return lambda row: "" if row[key] is None else format(row[key] * scale, form)

    def ratio(figure: Callable[[Row], float | None]) -> Callable[[Row], str]:
        reference = figure(of[against]) if against in of else None
        return lambda row: f"{mine / reference:.2f}x" if reference and (mine := figure(row)) else ""

    def speed(row: Row) -> str:
        return "" if row["elements"] is None else format(row["elements"] * 1e-6 / row["p50_ms"], ".3g")

    share = f"/{against}"
    columns = [
        ("ms", number("p50_ms", ".4g"), 9),
        ("p20", number("p20_ms", ".4g"), 9),
        ("p80", number("p80_ms", ".4g"), 9),
        (share, ratio(lambda row: row["p50_ms"]), 7),
        ("extra", number("extra_over_base", "+.1%"), 9),
        (share, ratio(extra), 7),
        ("adapter", number("adapter_ms", ".4g"), 9),
        (share, ratio(lambda row: row["adapter_ms"]), 7),
        ("Gelem/s", speed, 9),
        ("saved kB", number("saved_bytes", ".1f", 1e-3), 9),
        ("peak MB", number("peak_bytes", ".2f", 1e-6), 9),
        ("basis MB", number("basis_bytes", ".1f", 1e-6), 9),
        ("of roof", number("of_roof", ".1%"), 8),
        ("error", number("error", ".1e"), 8),
    ]
    lines = [f"  {cell:9}" for cell in ("", *of)]
    for head, show, width in columns:
        if any(cells := [show(row) for row in rows]):
            lines = [line + cell.rjust(width) for line, cell in zip(lines, (head, *cells), strict=True)]
    return "\n".join([f"\n{rows[0]['case']} {rows[0]['dtype']}   {verdict(rows[0])}", *lines])


def plot(rows: list[Row], path: Path) -> None:
    """One panel a case: a bar per provider, the adapter alone where it was timed, else the whole."""
    from matplotlib.figure import Figure

    groups = [list(g) for _, g in groupby(rows, lambda r: (r["case"], r["dtype"]))]
    across = min(3, len(groups))
    down = ceil(len(groups) / across)
    figure = Figure(figsize=(5.2 * across, 2.3 * down + 0.4), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in panels[len(groups) :]:
        unused.set_visible(False)
    for axes, group in zip(panels, groups, strict=False):
        key = "adapter_ms" if any(r["adapter_ms"] is not None for r in group) else "p50_ms"
        bars = [(r["provider"], r[key]) for r in group if r[key] is not None][::-1]
        names, values = zip(*bars, strict=True)
        colours = ["tab:orange" if name == "lrkern" else "tab:gray" for name in names]
        drawn = axes.barh(names, values, color=colours, xerr=group[0]["noise_ms"], capsize=3)
        axes.bar_label(drawn, [f"{v:.3g}" for v in values], padding=4, fontsize=8)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        what = "adapter alone" if key == "adapter_ms" else "whole"
        colour = "tab:red" if group[0]["noisy"] else "black"
        axes.set_xlabel(f"ms, {what}   {verdict(group[0])}", fontsize=8, color=colour)
        axes.set_title("\n".join(textwrap.wrap(f"{group[0]['case']} {group[0]['dtype']}", 66)), fontsize=8)
        axes.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
