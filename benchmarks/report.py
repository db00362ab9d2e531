"""Figures of a run: ratios with their spread, the printed table, the plot, the tables of docs/performance.md."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks.rows import RATIOS
from wpn_ds.system.tables import markdown

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

#: What each ratio shall be: at least (True) or at most (False) this.
TARGETS = {
    "throughput_vs_plain_pku": (True, 3.0),
    "throughput_vs_plain_hh": (True, 4.0),
    "memory_vs_plain_pku": (False, 0.4),
    "throughput_vs_trl": (True, 2.0),
    "memory_vs_trl": (False, 0.5),
    "attention_time_vs_eager_2048_opt": (False, 0.45),
    "attention_time_vs_eager_2048_gpt_neo": (False, 0.45),
    "prefix_sharing_hh": (True, 1.4),
    "prefix_sharing_tofu": (True, 1.25),
    "memory_n1024_vs_n16": (False, 1.1),
    "time_per_example_n1024_vs_n16": (False, 1.15),
}

#: What a step's operators are, by their names.
SHARES = {
    "products": r"::(mm|addmm_?|bmm|baddbmm_?)$",
    "attention": r"scaled_dot_product|flex_attention|varlen",
    "copies": r"::(copy_|cat|fill_|index_select|gather|index)$",
}

Kind = Literal["throughput", "time", "memory"]


def per_example(turns: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds an example of every turn."""
    return [turn["seconds"] / turn["examples"] for turn in turns]


def ratio(one: Mapping[str, Any], other: Mapping[str, Any], kind: Kind) -> tuple[float, float, float]:
    """(median, lowest, highest) of the measured way ``one`` against ``other``.

    Turns are compared round by round, so that a machine that slows down slows both; ways with different numbers of
    turns are compared each with each.
    """
    if kind == "memory":
        value = one["peak_mib"] / other["peak_mib"]
        return value, value, value
    ours, others = per_example(one["turns"]), per_example(other["turns"])
    pairs = list(zip(ours, others, strict=True) if len(ours) == len(others) else product(ours, others))
    values = [a / b if kind == "time" else b / a for a, b in pairs]
    return median(values), min(values), max(values)


def ratios(rows: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """The named ratios whose rows were all measured."""
    found = {}
    for name, (names, kind, one, other) in RATIOS.items():
        if all(row in rows and {one, other} <= rows[row]["ways"].keys() for row in names):
            # By the time against ours, which took turns with it: the rows' seconds are of different moments.
            ways = [rows[row]["ways"] for row in names]
            fastest = min(ways, key=lambda w: ratio(w[other], w[one], "time")[0])
            found[name] = ratio(fastest[one], fastest[other], kind)  # type: ignore[arg-type]
    return found


def reached(name: str, value: float) -> bool:
    at_least, target = TARGETS[name]
    return value >= target if at_least else value <= target


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """The named ratios: name, median, spread, target, whether it is reached."""
    lines = [["ratio", "median", "lowest..highest", "asked", ""]]
    for name, value in results["ratios"].items():
        low, high = results["spread"][name]
        at_least, target = TARGETS[name]
        verdict = "reached" if reached(name, value) else "MISSED"
        bound = f"{'>=' if at_least else '<='} {target:g}"
        lines.append([name, f"{value:.2f}", f"{low:.2f}..{high:.2f}", bound, verdict])
    return lines


def details(rows: Mapping[str, Any]) -> list[list[str]]:
    """Every way of every row: examples a second, against the row's first way, MFU, peak memory, one-time cost."""
    lines = [["row", "way", "examples/s", "time (first = 1)", "MFU, %", "peak MiB", "once, s"]]
    for name, row in rows.items():
        first = next(iter(row["ways"].values()))
        for label, way in row["ways"].items():
            speed = 1 / median(per_example(way["turns"]))
            middle, low, high = ratio(way, first, "time")
            compared = f"{middle:.2f} ({low:.2f}..{high:.2f})" if way is not first else "1"
            once = f"{way['one_time_seconds']:.1f}" if "one_time_seconds" in way else ""
            used = mfu(row, way)
            share = f"{used:.0%}"[:-1] if used else ""
            lines.append([name, label, f"{speed:.3g}", compared, share, f"{way['peak_mib']:.0f}", once])
    return lines


def mfu(row: Mapping[str, Any], way: Mapping[str, Any]) -> float | None:
    """The share of the device's matrix rate that the model flops of ``way`` reach: those of the tokens that count,
    without recomputation, padding and reference, which ours counts. None in a row without ours."""
    ours = way if "peak_flops" in way else next((one for one in row["ways"].values() if "peak_flops" in one), None)
    if ours is None:
        return None
    flops = median(turn["flops"] / turn["examples"] for turn in ours["turns"])
    return flops / median(per_example(way["turns"])) / ours["peak_flops"]


def costs(rows: Mapping[str, Any]) -> list[list[str]]:
    """Where one step of every way of ours went, in percent of its time, by the costliest operators."""
    lines = [["row", "way", *(f"{kind}, %" for kind in SHARES), "other operators, %", "Python and waiting, %"]]
    for name, row in rows.items():
        for label, way in row["ways"].items():
            if "operators" in way:
                busy = way["device_busy"]
                shares = [
                    busy * sum(one["share"] for one in way["operators"] if re.search(pattern, one["name"]))
                    for pattern in SHARES.values()
                ]
                lines.append(
                    [name, label, *(f"{100 * share:.1f}" for share in [*shares, busy - sum(shares), 1 - busy])]
                )
    return lines


def section(results: Mapping[str, Any]) -> str:
    """The generated part of docs/performance.md, markers included."""
    machine, rows = results["machine"], results["rows"]
    where = (
        f"Measured on {machine['cores']} CPU cores, {machine['memory_gib']} GiB of memory, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + "; data: "
        + ", ".join(sorted({row["data"] for row in rows.values()}))
        + "."
    )
    full = ["<details><summary>Every row</summary>", "", markdown(details(rows)), "", "</details>"]
    if len(spent := costs(rows)) > 1:
        full += ["", "<details><summary>Where a step goes</summary>", "", markdown(spent), "", "</details>"]
    measured = textwrap.wrap(where, 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([BEGIN, "", *measured, "", markdown(table(results)), "", *full, "", END])


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Speed and memory of the compared ways, attention by row length, growth with N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4))
    compared = [(name, row["ways"]) for name, row in rows.items() if row["group"] in ("plain", "trl")]
    compared = [(name, ways) for name, ways in compared if "ours" in ways]
    for axis, kind, title in (
        (axes[0], "time", "time an example, ours = 1"),
        (axes[1], "memory", "peak memory, ours = 1"),
    ):
        bars = [
            (f"{name}: {label}", ratio(way, ways["ours"], kind))  # type: ignore[arg-type]
            for name, ways in compared
            for label, way in ways.items()
            if label != "ours"
        ][::-1]
        middle = [value for _, (value, _, _) in bars]
        errors = [[v - low for _, (v, low, _) in bars], [high - v for _, (v, _, high) in bars]]
        axis.barh([label for label, _ in bars], middle, xerr=errors, color="tab:orange")
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(title)
        axis.tick_params("y", labelsize=7)
    axes[1].set_yticks([])
    for family, style in (("opt", "-"), ("gpt_neo", "--")):
        points: dict[str, list[tuple[int, float]]] = {}
        for length in (512, 1024, 2048):
            for label, way in rows.get(f"attention_{family}_{length}", {"ways": {}})["ways"].items():
                points.setdefault(label, []).append((length, 1000 * median(per_example(way["turns"]))))
        for label, line in points.items():
            axes[2].plot(*zip(*line, strict=True), style, marker="o", label=f"{family} {label}")
    axes[2].set_title("backbone: ms a segment, by row length")
    for name, color in (("growth_live", "tab:blue"), ("growth_reference", "tab:green")):
        ways = rows.get(name, {"ways": {}})["ways"]
        sizes = [int(n) for n in ways]
        for kind, style in (("time", "-"), ("memory", ":")):
            values = [ratio(way, ways["16"], kind)[0] for way in ways.values()]  # type: ignore[arg-type]
            axes[3].plot(sizes, values, style, marker="o", color=color, label=f"{name[7:]}, {kind}")
    axes[3].set_xscale("log", base=2)
    axes[3].set_ylim(bottom=0)
    axes[3].set_title("by N, N=16 is 1")
    for axis in axes[2:]:
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Put the tables of ``results.json`` into docs/performance.md, between its two markers."""
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER.parent / "docs/performance.md"
    text, results = page.read_text(), json.loads(RESULTS.read_text())
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{page}: the markers {BEGIN} and {END} are not there once each")
    before, rest = text.split(BEGIN)
    page.write_text(before + section(results) + rest.split(END)[1])


if __name__ == "__main__":
    main()
