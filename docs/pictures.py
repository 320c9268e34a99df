"""Draws the pictures of docs/principles/ from tables of other pages: `python docs/pictures.py`.

Needs the extra `report`.
"""

import json
import math
from pathlib import Path

DOCS = Path(__file__).parent
COLOURS = ["#2f8fd8", "#e69f00", "#009e73", "#cc79a7", "#d55e00"]
GREY = {"labelColor": "#888", "titleColor": "#888"}  # Read on white and on black.
CONFIG = {
    "axis": {**GREY, "gridColor": "#8884", "domainColor": "#888", "tickColor": "#888"},
    "legend": {**GREY, "orient": "top", "title": None},
    "view": {"stroke": None},
    "range": {"category": COLOURS},
}


def table(page, *header):
    """The rows of a table, as lists of cells; its first line begins with the header."""
    lines = iter((DOCS / page).read_text().splitlines())
    for line in lines:
        if line.startswith("|") and _cells(line)[: len(header)] == list(header):
            break
    else:
        raise ValueError(f"{page} has no table that begins with {header}")
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(_cells(line))
    return rows


def pruning():
    """SmolLM2 with half of its weights left."""
    rows = [
        {"kept by": method, "perplexity": _number(half)}
        for method, half, *_ in table("sparsity.md", "", "50%", "error")
        if not method.startswith("float32")
    ]
    x = {
        **_field("perplexity"),
        "scale": {"type": "log", "domain": [40, 600]},
        "axis": {"values": [50, 100, 200, 400]},
    }
    text = {"type": "text", "align": "left", "dx": 9, "color": "#888"}
    return {
        "data": {"values": rows},
        "encoding": {"y": {"field": "kept by", "type": "nominal", "sort": None}, "x": x},
        "layer": [
            {"mark": {"type": "point", "filled": True, "size": 110, "color": COLOURS[0]}},
            {"mark": text, "encoding": {"text": {"field": "perplexity", "format": ".1f"}}},
        ],
        "width": 420,
        "height": 150,
    }


def quantization():
    """Formats of g2p_en: signed integers as lines, other formats as points."""
    rows = []
    for name, error, _, grouped, _ in table("quantization.md", "format", "error %, per channel"):
        bits = (
            name[3:] if name.startswith("int") else {"nf4": "4", "float6_e2m3fn": "6"}.get(name, "")
        )
        if bits in [*"2345678"]:
            for kind, value in [("one scale per channel", error), ("groups of 32", grouped)]:
                if _number(value) < 50 and (name.startswith("int") or value == error):
                    label = "" if name.startswith("int") else name
                    rows.append(
                        {
                            "bits": int(bits),
                            "phoneme error, %": _number(value),
                            "scales": kind,
                            "format": label,
                        }
                    )
    integers, others = "datum.format == ''", "datum.format != ''"
    text = {"type": "text", "align": "left", "dx": 7, "dy": 9, "fontSize": 10, "color": "#888"}
    colour = {"color": {"field": "scales", "type": "nominal", "sort": None}}
    points = {"type": "point", "shape": "diamond", "filled": True, "size": 70}
    return {
        "data": {"values": rows},
        "encoding": {
            "x": {**_field("bits"), "scale": {"domain": [1.5, 8.5]}, "axis": {"tickCount": 7}},
            "y": {**_field("phoneme error, %"), "scale": {"type": "log", "domain": [9, 45]}},
        },
        "layer": [
            {
                "transform": [{"filter": integers}],
                "mark": {"type": "line", "point": True},
                "encoding": colour,
            },
            {"transform": [{"filter": others}], "mark": points, "encoding": colour},
            {
                "transform": [{"filter": others}],
                "mark": text,
                "encoding": {"text": {"field": "format"}},
            },
        ],
        "width": 420,
        "height": 240,
    }


def low_rank():
    """MiniLM at several shares of its kernels' bytes."""
    page, first = "low_rank.md", "share of the kernels' bytes"
    header = next(
        line for line in (DOCS / page).read_text().splitlines() if line.startswith(f"| {first}")
    )
    shares = [_number(cell) for cell in _cells(header)[1:]]
    rows = [
        {
            "factors": method.replace("`", ""),
            "bytes left, %": share,
            "rank correlation": _number(value),
        }
        for method, *values in table(page, first)
        if "budget" not in method
        for share, value in zip(shares, values, strict=True)
    ]
    return {
        "data": {"values": rows},
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {**_field("bytes left, %"), "scale": {"reverse": True, "domain": [15, 95]}},
            "y": {**_field("rank correlation"), "scale": {"zero": False}},
            "color": {"field": "factors", "type": "nominal", "sort": None},
        },
        "width": 420,
        "height": 220,
    }


def distillation():
    """Probabilities of the same five logits at three temperatures."""
    logits = {"shirt": 6.0, "T-shirt": 4.0, "pullover": 3.0, "coat": 2.0, "bag": -1.0}
    rows = []
    for temperature in (1, 2, 4):
        total = sum(math.exp(z / temperature) for z in logits.values())
        for name, z in logits.items():
            share = math.exp(z / temperature) / total
            rows.append({"class": name, "temperature": f"T = {temperature}", "probability": share})
    return {
        "data": {"values": rows},
        "mark": "bar",
        "encoding": {
            "x": {"field": "class", "type": "nominal", "sort": None, "axis": {"labelAngle": 0}},
            "xOffset": {"field": "temperature", "type": "nominal"},
            "y": _field("probability"),
            "color": {"field": "temperature", "type": "nominal"},
        },
        "width": 420,
        "height": 200,
    }


def search():
    """What `auto` tried for LeNet-300-100."""
    rows = [
        {
            "tried": name,
            "bytes": _number(size),
            "accuracy, %": _number(accuracy),
            "kind": "misses the bound" if within == "no" else "keeps the bound",
        }
        for name, size, accuracy, within in table(
            "worked_cases.md", "tried", "bytes", "accuracy %", "within"
        )
        if name != "dense"
    ]
    return _scatter(rows, "bytes", "accuracy, %", "kind", "tried")


def _scatter(rows, x, y, colour, label):
    text = {"type": "text", "align": "left", "dx": 6, "dy": -6, "fontSize": 9, "color": "#888"}
    return {
        "data": {"values": rows},
        "encoding": {
            "x": {
                **_field(x),
                "scale": {"type": "log", "nice": False, "padding": 30},
                "axis": {"format": "~s"},
            },
            "y": {**_field(y), "scale": {"zero": False, "padding": 10}},
        },
        "layer": [
            {
                "mark": {"type": "point", "filled": True, "size": 60},
                "encoding": {"color": {"field": colour, "type": "nominal", "sort": None}},
            },
            {"mark": text, "encoding": {"text": {"field": label, "type": "nominal"}}},
        ],
        "width": 480,
        "height": 260,
    }


def _field(name):
    return {"field": name, "type": "quantitative", "title": name}


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def _number(text):
    return float(text.replace(",", "").rstrip("%"))


def draw(picture):
    """The SVG of one of the functions above."""
    import vl_convert

    spec = {"background": None, "config": CONFIG, "description": picture.__doc__, **picture()}
    return vl_convert.vegalite_to_svg(json.loads(json.dumps(spec)), vl_version="5.20")


PICTURES = [pruning, quantization, low_rank, distillation, search]

if __name__ == "__main__":
    for picture in PICTURES:
        (DOCS / "pictures" / f"{picture.__name__}.svg").write_text(draw(picture))
