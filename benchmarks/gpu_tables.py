"""What ``benchmarks.gpu`` found, as tables, and held against what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: (tokens a second, MFU) of pretraining on H100s at 2,048 tokens, by what llm-foundry publishes of its own trainer. Its
#: flops count every position's logits and attention to the whole text; ours leave out what packed rows don't compute.
PUBLISHED = {"opt-6.7b": (10_600, 0.464), "opt-2.7b": (24_100, 0.437), "opt-1.3b": (45_500, 0.418)}
SPEED_UP, SAME, ESTIMATE, AS_PLAIN = 3.0, 0.05, 0.05, 1.5
"""At least so many times the plain way's examples a second, at losses that differ by no more than bf16 makes them; the
estimate within this share of the peak; a packed route at most so many times as far from fp64 as plain sequences are."""
LARGEST = 10
"""Operators of a profile that are named."""

_HEAD = [
    *(
        "model",
        "micro-batch",
        "recomputes",
        "attention",
        "tokens a step",
        "examples/s",
        "tokens/s",
        "MFU",
        "TFLOP/s of 1",
    ),
    *("peak GiB", "estimate GiB", "plain examples/s", "plain micro-batch", "plain peak GiB", "times plain"),
]


def tables(found: Mapping[str, Any]) -> list[list[list[str]]]:
    """A table a part, each with its head."""
    made = []
    if rows := found.get("exact"):
        made.append([["route", "states", "gradient", "as plain"], *(_exact_line(name, rows) for name in rows)])
    steps, plain = found.get("steps", {}), found.get("plain", {})
    lines = [_step_line(name, steps.get(name, {}), plain.get(name.partition(",")[0], {})) for name in steps | plain]
    lines += [_step_line(f"by {name}", row, {}) for name, row in found.get("kernels", {}).items()]
    lines += [_step_line(f"{name}, offloaded", row, {}) for name, row in found.get("offload", {}).items()]
    if lines:
        made.append([_HEAD, *lines])
    for name, row in steps.items():
        if operators := row.get("operators"):
            largest = [[o["name"], str(o["calls"]), f"{o['ms']:.1f}", f"{o['share']:.0%}"] for o in operators[:LARGEST]]
            busy = f"operators of {name} (device busy {row['device_busy']:.0%})"
            made.append([[busy, "calls", "ms", "share"], *largest])
    return made


def _exact_line(name: str, rows: Mapping[str, Any]) -> list[str]:
    row = rows[name]
    if "reason" in row:
        return [name, row["reason"][:60], "", ""]
    return [name, f"{row['states']:.1e}", f"{row['gradient']:.1e}", "yes" if _as_plain(row, rows) else "NO"]


def _as_plain(row: Mapping[str, Any], rows: Mapping[str, Any]) -> bool:
    """No further from fp64 than :data:`AS_PLAIN` times plain sequences of the same type."""
    plain = rows[f"{row['model']} {row['dtype']} plain"]
    return all(row[of] <= AS_PLAIN * plain[of] for of in ("states", "gradient"))


def _step_line(name: str, row: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    line = [name, *[""] * (len(_HEAD) - 1)]
    if "setting" in row:
        setting = row["setting"]
        line[1:3] = str(setting["tokens_per_micro_batch"]), "yes" if setting["gradient_checkpointing"] else "no"
    if "reason" in row:
        line[3] = row["reason"][:60]
    elif row:
        line[3:6] = row["attention"].removeprefix("wpn_"), f"{row['tokens']:,}", f"{row['examples_per_second']:.1f}"
        line[6:9] = f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}", f"{row['matrix_product_tflops']:.3g}"
        line[9:11] = (
            f"{row['peak_gib']:.2f}",
            f"{row['estimate_gib']:.2f} ({row['estimate_gib'] / row['peak_gib'] - 1:+.1%})",
        )
    if "reason" in plain:
        line[11] = plain["reason"][:40]
    elif plain:
        line[11:14] = f"{plain['examples_per_second']:.2f}", str(plain["micro_batch"]), f"{plain['peak_gib']:.2f}"
        if "examples_per_second" in row:
            line[14] = f"{row['examples_per_second'] / plain['examples_per_second']:.2f}"
    return line


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """A line for everything that was asked and measured: the figure, the bound, whether it is reached."""
    lines = []
    exact = {
        name: row for name, row in found.get("exact", {}).items() if "reason" not in row and row["route"] != "plain"
    }
    if exact:
        far = [name for name, row in exact.items() if not _as_plain(row, found["exact"])]
        said = f"{len(exact) - len(far)} of {len(exact)}" + (f", not {', '.join(far)}" if far else "")
        without = [name for name, row in found["exact"].items() if "reason" in row]
        said += f" (no figure: {', '.join(without)})" if without else ""
        lines.append(_verdict("packed routes as close to fp64 as plain sequences", said, "all", not far))
    for name, row in found.get("steps", {}).items():
        if "mfu" not in row:
            continue
        model = name.partition(",")[0]
        if model in PUBLISHED:
            speed, mfu = PUBLISHED[model]
            said, reached = f"{row['tokens_per_second']:,.0f}", row["tokens_per_second"] >= speed
            lines.append(_verdict(f"tokens/s of {name}", said, f">= {speed:,}", reached))
            lines.append(_verdict(f"MFU of {name}", f"{row['mfu']:.1%}", f">= {mfu:.1%}", row["mfu"] >= mfu))
        if found["device"] != "CPU":  # whose peak is the whole process, libraries and all
            off = row["estimate_gib"] / row["peak_gib"] - 1
            lines.append(_verdict(f"estimate of {name}", f"{off:+.1%}", f"within {ESTIMATE:.0%}", abs(off) <= ESTIMATE))
        plain = found.get("plain", {}).get(model, {})
        if "examples_per_second" in plain:
            times = row["examples_per_second"] / plain["examples_per_second"]
            lines.append(_verdict(f"times plain, {name}", f"{times:.2f}", f">= {SPEED_UP:g}", times >= SPEED_UP))
            apart = _apart(row["first_losses"], plain["first_losses"])
            lines.append(_verdict(f"losses against plain, {name}", f"{apart:.1%}", f"<= {SAME:.0%}", apart <= SAME))
    for row in found.get("gradient", {}).values():
        lines.append(f"gradient test, one rank: {row.get('result') or row['reason']}")
    return lines


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The largest relative difference of two ways' losses; KL left out, which is 0 at the start and so all rounding."""
    return max(abs(one[name] - other[name]) / abs(other[name]) for name in ("npair", "nll"))


def _verdict(what: str, figure: str, asked: str, reached: bool) -> str:
    return f"{what}: {figure}, asked {asked}: {'reached' if reached else 'MISSED'}"
