"""Charts of reports, as SVG: drawn once, without scripts, in the colours of the page around them.

Specifications of Vega-Lite, which vl-convert draws. Marks carry descriptions for screen readers.
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxopt_compress.extras import require

_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
# Told apart by those who see few colours, on white and on black, after Okabe and Ito (2008).
_COLOURS = ["#2f8fd8", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"]
_TEXT = {"labelColor": "currentColor", "titleColor": "currentColor"}
_LINES = {"gridColor": "#8884", "domainColor": "#888", "tickColor": "#888"}
_CONFIG = {
    "axis": {**_TEXT, **_LINES, "labelLimit": 260, "titlePadding": 14},
    "legend": {**_TEXT, "orient": "top", "title": None},
    "header": _TEXT,
    "view": {"stroke": None},
    "range": {"category": _COLOURS},
    "text": {"color": "currentColor"},
}
_MOST = 100  # leaves in one chart


def figure(caption: str, spec: Mapping[str, object]) -> str:
    """A chart with its caption, as HTML.

    Raises:
        ModuleNotFoundError: vl-convert is missing.
    """
    draw = require("vl_convert", extra="report").vegalite_to_svg
    whole = {"$schema": _SCHEMA, "background": None, "config": _CONFIG, "description": caption}
    # Not all numbers are in JSON.
    svg = draw(json.loads(json.dumps({**whole, **spec})))
    label = html.escape(caption, quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f'<figure><figcaption>{label}</figcaption><div class="scroll">{svg}</div></figure>'


def bars(
    rows: Sequence[Mapping[str, Any]], label: str, value: str, colour: str | None
) -> dict[str, object]:
    """Horizontal bars, the longest ones if there are many; ``rows`` have the named fields."""
    largest: dict[str, float] = {}
    for row in rows:
        largest[row[label]] = max(largest.get(row[label], 0.0), row[value])
    kept = sorted(largest, key=lambda k: -largest[k])[:_MOST]
    encoding: dict[str, object] = {
        "y": {**_field(label, "nominal"), "sort": [k for k in largest if k in kept]},
        "x": _field(value, "quantitative"),
    }
    if colour is not None:
        encoding |= {"color": _field(colour, "nominal"), "yOffset": _field(colour, "nominal")}
    shown = [dict(row) for row in rows if row[label] in kept]
    return {"data": {"values": shown}, "mark": "bar", "width": 360, "encoding": encoding}


def scatter(rows: Sequence[Mapping[str, Any]], x: str, y: str, label: str) -> dict[str, object]:
    """Named points; bytes on a logarithmic axis."""
    axes = {
        "x": {
            **_field(x, "quantitative"),
            "scale": {"type": "log", "nice": True},
            "axis": {"format": "~s", "tickCount": 4},
        },
        "y": {**_field(y, "quantitative"), "scale": {"zero": False}},
    }
    name = {"type": "text", "align": "left", "dx": 8, "dy": -4}
    return {
        "data": {"values": [dict(row) for row in rows]},
        "width": 360,
        "height": 240,
        "encoding": axes,
        "layer": [
            {"mark": {"type": "point", "filled": True, "size": 80, "color": _COLOURS[0]}},
            {"mark": name, "encoding": {"text": _field(label, "nominal")}},
        ],
    }


def heat(rows: Sequence[Mapping[str, Any]], label: str, value: str) -> dict[str, object]:
    """One coloured cell per row, with its number."""
    shown = [dict(row) for row in rows[:_MOST]]
    colour = {**_field(value, "quantitative"), "scale": {"scheme": "blues"}, "legend": None}
    place = {"y": {**_field(label, "nominal"), "sort": None}}
    number = {"type": "text", "align": "left", "dx": 34, "format": ".3~g"}
    return {
        "data": {"values": shown},
        "width": 60,
        "encoding": place,
        "layer": [
            {"mark": {"type": "rect", "stroke": "#888"}, "encoding": {"color": colour}},
            {"mark": number, "encoding": {"text": {**_field(value, "quantitative")}}},
        ],
    }


def lines(rows: Sequence[Mapping[str, Any]], x: str, y: str, colour: str) -> dict[str, object]:
    """Lines over steps."""
    encoding = {
        "x": _field(x, "quantitative"),
        "y": _field(y, "quantitative"),
        "color": _field(colour, "nominal"),
    }
    data = {"values": [dict(row) for row in rows]}
    return {"data": data, "mark": "line", "width": 360, "height": 200, "encoding": encoding}


def histograms(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Small charts of weights before and after; rows have leaf, tree, weight and entries."""
    first = list(dict.fromkeys(row["leaf"] for row in rows))[:_MOST]
    encoding = {
        "x": _field("weight", "quantitative"),
        "y": {**_field("entries", "quantitative"), "axis": {"tickCount": 3}},
        "color": _field("tree", "nominal"),
    }
    mark = {"type": "line", "interpolate": "step", "strokeWidth": 1.5}
    return {
        "data": {"values": [dict(row) for row in rows if row["leaf"] in first]},
        "facet": {**_field("leaf", "nominal"), "sort": None},
        "columns": 2,
        "spec": {"mark": mark, "width": 200, "height": 90, "encoding": encoding},
        "resolve": {"scale": {"x": "independent", "y": "independent"}},
    }


def _field(name: str, kind: str) -> dict[str, object]:
    # Dots and brackets of a name would be read as a path.
    escaped = name.replace("\\", "\\\\")
    for sign in ".[]":
        escaped = escaped.replace(sign, f"\\{sign}")
    return {"field": escaped, "type": kind, "title": name}
