"""Makes sections and formulas of docstrings readable to the site."""

import re
import textwrap

import griffe
from latex2mathml.converter import convert

_FORMULA = re.compile(r"^( *)\.\. math::((?:.*\n)\n?(?:\1 +\S.*\n)*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")


class Docstrings(griffe.Extension):
    """Reads `Example:` as a section of doctests, and draws formulas as MathML, without scripts."""

    def on_object(self, *, obj, loader, **kwargs):
        """Rewrites the docstring of one object."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            text = _FORMULA.sub(_drawn, text + "\n")
            obj.docstring.value = _INLINE.sub(lambda match: _inline(match[1]), text)


def _inline(formula: str) -> str:
    return convert(" ".join(formula.split()))


def _drawn(match: re.Match[str]) -> str:
    formula = " ".join(match[2].split())
    drawn = f"<div>{convert(formula, display='block')}</div>\n\n"
    return textwrap.indent(drawn, match[1])
