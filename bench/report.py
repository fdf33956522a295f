# SPDX-License-Identifier: Apache-2.0
"""Rows as a table of at most 120 columns and as a plot. Ratios are to one provider of the suite."""

import textwrap
from collections.abc import Callable
from itertools import groupby
from math import ceil
from pathlib import Path
from statistics import geometric_mean

Row = dict
ABOVE = (
    "  * faster than a large GEMM and a large copy were here: some of its bytes came from a cache, or the machine was busy "
    "then"
)


def verdict(row: Row) -> str:
    said = f"A/A {row['noise_ms']:.2g} ms, {row['rounds']} rounds"
    return said + ", NOISY: not to be cited" if row["noisy"] else said


def means(rows: list[Row]) -> str:
    """Of each provider and pass the geometric mean, over its cases, of its time over the base's, as percent beyond it. Noisy cases
    count: noise is judged by what comes close to the base, so that those left would be the slow ones."""
    of_pass = lambda row: row["case"].rpartition("pass=")[2]
    rows = [row for row in rows if row["extra_over_base"] is not None and row["provider"] != "again"]
    passes = list(dict.fromkeys(map(of_pass, rows)))
    lines = [f"\n{'geometric mean over base':<28}" + "".join(f"{name:>28}" for name in passes)]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        line = f"  {provider:<26}"
        for name in passes:
            mine = [row for row in rows if row["provider"] == provider and of_pass(row) == name]
            mean = geometric_mean(1 + row["extra_over_base"] for row in mine) - 1 if mine else 0
            text = f"{mean:+.1%} of {len(mine)} cases" if mine else "-"
            line += f"{text + ', noisy' * any(row['noisy'] for row in mine):>28}"
        lines.append(line)
    return "\n".join(lines)


def table(rows: list[Row], against: str | None, headline: str = "ms") -> str:
    """The rows of one case, the headline's column first. Columns with nothing in them are left out, as is the ratio of what two
    providers add to the base where the A/A difference exceeds a fifth of either."""
    of = {r["provider"]: r for r in rows}

    def extra(row: Row) -> float | None:
        ms = row["p50_ms"] - of["base"]["p50_ms"] if "base" in of else 0.0
        return ms if ms > 5 * row["noise_ms"] else None

    def number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
        return lambda row: "" if row[key] is None else format(row[key] * scale, form)

    def ratio(figure: Callable[[Row], float | None]) -> Callable[[Row], str]:
        reference = figure(of[against]) if against in of else None

        def show(row: Row) -> str:
            if not reference or (mine := figure(row)) is None:
                return ""
            return format(mine / reference, ".2f" if mine < 100 * reference else ".0f") + "x"

        return show

    def extra_share(row: Row) -> str:
        share = row["extra_over_base"]
        return "" if share is None else format(share, "+.1%" if share < 10 else "+.0%")

    def speed(row: Row) -> str:
        return "" if row["elements"] is None else format(row["elements"] * 1e-6 / row["p50_ms"], ".3g")

    def share_of_roof(row: Row) -> str:
        return "" if row["of_roof"] is None else f"{row['of_roof']:.1%}" + "*" * (row["of_roof"] > 1)

    share = f"/{against}"
    columns = [
        ("ms", number("p50_ms", ".4g"), 9),
        ("p20", number("p20_ms", ".4g"), 9),
        ("p80", number("p80_ms", ".4g"), 9),
        (share, ratio(lambda row: row["p50_ms"]), 7),
        ("extra", extra_share, 9),
        (share, ratio(extra), 7),
        ("adapter", number("adapter_ms", ".4g"), 9),
        (share, ratio(lambda row: row["adapter_ms"]), 7),
        ("Gelem/s", speed, 9),
        ("saved kB", number("saved_bytes", ".1f", 1e-3), 9),
        ("peak MB", number("peak_bytes", ".2f", 1e-6), 9),
        ("basis MB", number("basis_bytes", ".1f", 1e-6), 9),
        ("of roof", share_of_roof, 8),
        ("of read", number("of_read", ".1%"), 8),
        ("of copy", number("of_copy", ".1%"), 8),
        ("error", number("error", ".1e"), 8),
    ]
    columns.sort(key=lambda column: column[0] != headline)
    lines = [f"  {cell:9}" for cell in ("", *of)]
    for head, show, width in columns:
        if any(cells := [show(row) for row in rows]):
            lines = [line + cell.rjust(width) for line, cell in zip(lines, (head, *cells), strict=True)]
    if any(row["of_roof"] and row["of_roof"] > 1 for row in rows):
        lines.append(ABOVE)
    lines += [
        f"  {row['provider']} takes {row['paired']:.3f}x of {row['beside']}, the median of {row['pairs']} pairs of calls"
        for row in rows
        if row["beside"]
    ]
    lines += textwrap.wrap(
        "; ".join(f"{row['provider']} without a graph, host time included: {row['eager']}" for row in rows if row["eager"]),
        118, initial_indent="  ", subsequent_indent="  ",
    )  # fmt: skip
    return "\n".join([f"\n{rows[0]['case']} {rows[0]['dtype']}   {verdict(rows[0])}", *lines])


def plot(rows: list[Row], path: Path, machine: str = "") -> None:
    """One panel a case: a bar per provider, the adapter alone where it was timed, else the whole. Error bars are the 20th and
    80th percentile, or for the adapter alone the A/A difference. Bars that differ tenfold are on a log scale."""
    from matplotlib.figure import Figure

    groups = [list(g) for _, g in groupby(rows, lambda r: (r["case"], r["dtype"]))]
    across = min(3, len(groups))
    down = ceil(len(groups) / across)
    figure = Figure(figsize=(5.2 * across, 2.3 * down + 1.0), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in panels[len(groups) :]:
        unused.remove()
    for axes, group in zip(panels, groups, strict=False):
        key = "adapter_ms" if any(r["adapter_ms"] is not None for r in group) else "p50_ms"
        shown = [r for r in group if r[key] is not None][::-1]
        names, values = [r["provider"] for r in shown], [r[key] for r in shown]
        spread = group[0]["noise_ms"]
        if key == "p50_ms":
            spread = [[r[key] - r["p20_ms"] for r in shown], [r["p80_ms"] - r[key] for r in shown]]
        colours = ["tab:orange" if name == "lrkern" else "tab:gray" for name in names]
        drawn = axes.barh(names, values, color=colours, xerr=spread, capsize=3)
        axes.bar_label(drawn, [f"{v:.3g}" for v in values], padding=4, fontsize=8)
        wide = max(values) > 10 * min(values) > 0
        if wide:
            axes.set_xscale("log")
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        what = ("adapter alone" if key == "adapter_ms" else "whole") + (", log scale" if wide else "")
        colour = "tab:red" if group[0]["noisy"] else "black"
        axes.set_xlabel(f"ms, {what}   {verdict(group[0])}", fontsize=8, color=colour)
        axes.set_title("\n".join(textwrap.wrap(f"{group[0]['case']} {group[0]['dtype']}", 66)), fontsize=8)
        axes.tick_params(labelsize=8)
    about = "medians; error bars: 20th to 80th percentile of the whole, A/A difference of the adapter alone"
    width = int(40 + 78 * (across - 0.5))
    text = [line for part in (rows[0]["command"], machine, about) for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(text), fontsize=8, ha="left", x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
