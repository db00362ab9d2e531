"""The HTML that pages are made of: escaped text, tables, cards, and the frame with its style and script.

The frame is template.html; every text that isn't ours goes through :func:`text`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from wpn_ds.evaluate.report.figures import CONTROL, percent, points
from wpn_ds.judging.statistics import Estimate, Rate

_UNSAFE = re.compile("[<>&\u2028\u2029]")


def page(title: str, body: str, data: Any = None) -> str:
    """A whole page, in one file that asks the network for nothing.

    Args:
        title: plain text.
        body: HTML.
        data: what the script of the answers' table reads; a page without has no script at all.
    """
    files = resources.files("wpn_ds.evaluate.report")
    script, allowed = "", "'none'"
    if data is not None:
        code = files.joinpath("script.js").read_text(encoding="utf-8")
        script = f'<script type="application/json" id="data">{_json(data)}</script>\n<script>{code}</script>'
        # Only this very script may run, should text of a model ever slip through unescaped.
        allowed = f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
    template = Template(files.joinpath("template.html").read_text(encoding="utf-8"))
    return template.substitute(title=text(title), body=body, script=script, allowed=allowed)


def text(value: object) -> str:
    """Any text as HTML that shows it; control characters as a sign that something was there."""
    return html.escape(CONTROL.sub("\ufffd", str(value)))


def title(plain: str) -> str:
    """A headline, which doesn't break at a hyphen."""
    return text(plain.replace("-", "\u2011"))


def _json(data: Any) -> str:
    """JSON that can't end the script element around it; control characters as in :func:`text`."""
    plain = json.dumps(_clean(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", plain)


def _clean(data: Any) -> Any:
    if isinstance(data, str):
        return CONTROL.sub("\ufffd", data)
    if isinstance(data, dict):
        return {_clean(key): _clean(value) for key, value in data.items()}
    return [_clean(value) for value in data] if isinstance(data, list) else data


def section(key: str, title: str, body: str, note: str = "") -> str:
    """A part of the page under a heading that can be linked to; nothing without a body."""
    about = f'<p class="note">{note}</p>' if note else ""
    return f'<section id="{text(key)}"><h2>{text(title)}</h2>{about}{body}</section>' if body else ""


def contents(sections: Sequence[tuple[str, str]]) -> str:
    """Links to the sections (key, title)."""
    links = "".join(f'<a href="#{text(key)}">{text(title)}</a>' for key, title in sections)
    return f"<nav>{links}</nav>"


def card(title: str, value: str, unit: str, lines: Sequence[str]) -> str:
    """A figure that is read first, with what belongs to it; all are plain text."""
    body = "<br>".join(text(line) for line in lines)
    return (
        f'<div class="card"><h3>{text(title)}</h3><div class="big">{text(value)}<small>{text(unit)}</small></div>'
        f"<p>{body}</p></div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, strong: Sequence[int] = ()) -> str:
    """A table of HTML cells under plain heads; it scrolls by itself where the page is narrow. ``strong``: rows that sum
    others up."""
    titles = "".join(f"<th>{text(title)}</th>" for title in head)
    lines = ""
    for at, row in enumerate(rows):
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        lines += f'<tr class="strong">{cells}</tr>' if at in strong else f"<tr>{cells}</tr>"
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def definitions(settings: Mapping[str, Any]) -> str:
    """Settings by name; nested ones as "outer.inner". Nothing without any."""
    entries = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in flat(settings))
    return f"<dl>{entries}</dl>" if entries else ""


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every setting in plain text, lists with a line an entry."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value.replace("\n", "\\n")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", "\n".join(map(str, value))
        else:
            yield f"{prefix}{name}", json.dumps(value, default=str)


def share(value: float) -> str:
    """A proportion whose unit never stands on a line of its own."""
    return percent(value).replace(" ", "\u00a0")


def bounds(rate: Rate | Estimate) -> str:
    """The 95 % interval in percent: "81.5 - 93.8"."""
    return f"{100 * rate.low:.1f}\u00a0\u2013\u00a0{100 * rate.high:.1f}"


def change(estimate: Estimate) -> str:
    """A difference in percentage points with its interval, with a real minus sign."""
    return points(estimate).replace("-", "\u2212")


def number(value: float) -> str:
    """Three significant digits, with an exponent only where there is no other way."""
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}"
