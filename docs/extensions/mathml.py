"""Markdown extension that turns the formulas that arithmatex has marked into MathML.

Browsers show MathML by themselves, so that the site needs no script and no network for its mathematics.
"""

from __future__ import annotations

import html
import re
from functools import cache

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor

from extensions.lines import PageError, no_options

_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]\s*</(?P=tag)>',
    re.DOTALL,
)
# Operators that MathML would set apart from their operands.
_TIGHT = re.compile(r"<mo>(/|&#x0002F;|&#x02207;)</mo>")
# Bars that open and close, in TeX and, with their side forgotten, in what latex2mathml makes of them.
_BARS_TEX = re.compile(r"(?<!\\left)(?<!\\right)\\([lr])[Vv]ert")
_BARS = re.compile(r"<mo>(&#x02016;|&#x0007C;)</mo>")
# The sign of the transpose is a letter to MathML, not an operator between two terms.
_TRANSPOSE = re.compile(r"<mo>&#x022A4;</mo>")
# What latex2mathml passes through when it does not know a command or an environment.
_FAILED = re.compile(r"<mi>(\\[A-Za-z]+|&)</mi>|\\begin|\\end")


@cache
def mathml(tex: str, display: bool) -> str:
    """The MathML of one formula; raises where latex2mathml does not know a part of it."""
    result = convert(tex, display="block" if display else "inline")
    failed = _FAILED.search(result)
    if failed:
        raise PageError(f"latex2mathml cannot set {failed.group(0)!r} in the formula {tex!r}: write it another way")
    sides = iter(_BARS_TEX.findall(tex))
    result = _BARS.sub(lambda bar: _bar(bar[1], next(sides, "")), result)
    result = _TRANSPOSE.sub('<mi mathvariant="normal">&#x022A4;</mi>', result)
    return _TIGHT.sub(r'<mo lspace="0" rspace="0">\1</mo>', result)


def _bar(sign: str, side: str) -> str:
    form = {"l": ' form="prefix"', "r": ' form="postfix"', "": ""}[side]
    return f'<mo stretchy="false" lspace="0" rspace="0"{form}>{sign}</mo>'


class Formulas(Extension):
    """Replaces every marked formula of the page, once its HTML is whole."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Called by Python-Markdown."""
        md.postprocessors.register(_Replacing(md), "formulas", priority=-1)  # after raw HTML has been put back


class _Replacing(Postprocessor):
    def run(self, text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            display = match["open"] == "["
            formula = mathml(html.unescape(match["tex"]).strip(), display)
            return f'<div class="formula">{formula}</div>' if display else formula

        return _MARKED.sub(replace, text)


makeExtension = no_options(Formulas)
