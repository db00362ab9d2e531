"""HTML by jinja2: page.html is the frame of report.html and compare.html, whose sections are made of blocks.html.

Every text is escaped on its way into the page, but for :class:`markupsafe.Markup`, which only our own literals are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from wpn_ds.evaluate.report.figures import CONTROL, bounds, minus, number, points, share

Block = tuple[str, dict[str, Any]]
"""The name of a macro in blocks.html, and its arguments."""

_UNSAFE = re.compile("[<>&\u2028\u2029]")


def render(template: str, title: str, *, data: Any = None, **values: Any) -> str:
    """A whole page, in one file that asks the network for nothing.

    Args:
        data: what the script of the answers' table reads; a page without has no script at all.
        values: what the template shows.
    """
    code = resources.files("wpn_ds.evaluate.report").joinpath("script.js").read_text(encoding="utf-8")
    # Only this very script may run, should text of a model ever slip through unescaped.
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return _ENVIRONMENT.get_template(template).render(
        title=title,
        links=[],  # the sections that are shown, each of which adds itself
        data=None if data is None else _json(data),
        code=Markup(code),
        allowed=Markup("'none'" if data is None else f"'sha256-{digest}'"),
        **values,
    )


def _json(data: Any) -> Markup:
    """JSON that can't end the script element around it."""
    plain = json.dumps(_clean(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", plain))


def _clean(value: Any) -> Any:
    """``value`` with control characters as a sign that something was there; what was safe stays safe."""
    if isinstance(value, str):
        return type(value)(CONTROL.sub("\ufffd", value))
    if isinstance(value, dict):
        return {_clean(key): _clean(inner) for key, inner in value.items()}
    return [_clean(inner) for inner in value] if isinstance(value, list) else value


_ENVIRONMENT = Environment(
    loader=PackageLoader("wpn_ds.evaluate.report", "."),
    autoescape=True,
    finalize=_clean,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"share": share, "bounds": bounds, "points": points, "minus": minus, "number": number}
_ENVIRONMENT.filters |= {"thousands": "{:,}".format, "place": lambda value: f"{100 * value:.2f}%"}
