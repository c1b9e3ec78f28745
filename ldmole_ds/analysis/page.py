"""One HTML file with everything in it: no request leaves the page, and it prints, dark or light."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any


def render_page(data: dict[str, Any], facts: dict[str, str], title: str) -> str:
    """The page.

    Args:
        data: What `summarise` returns.
        facts: What was measured on what, shown under the title.
        title: Plain text.
    """
    assets = files("ldmole_ds.analysis") / "assets"
    # "</script>" in a prompt would end the element that holds the data.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    rows = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    parts = {
        "TITLE": html.escape(title),
        "FACTS": rows,
        "STYLE": (assets / "report.css").read_text(encoding="utf-8"),
        "DATA": text,
        "SCRIPT": "\n".join((assets / name).read_text(encoding="utf-8") for name in ("charts.js", "report.js")),
    }
    page = (assets / "report.html").read_text(encoding="utf-8")
    # One pass over the template: what is filled in is never searched for further places.
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))
