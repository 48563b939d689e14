"""Markdown extensions that replace lines of a page before it is converted."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

BEFORE_ALL = 1000
"""A priority above those of Python-Markdown's own preprocessors: what is put in is Markdown itself."""


class LineExtension(Extension):
    """An extension that rewrites the source of each page."""

    @abstractmethod
    def rewritten(self, text: str) -> str:
        """The page's source, with its lines replaced."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Called by Python-Markdown."""
        md.preprocessors.register(_Rewriting(self), type(self).__name__, BEFORE_ALL)


class _Rewriting(Preprocessor):
    def __init__(self, extension: LineExtension):
        super().__init__()
        self.extension = extension

    def run(self, lines: list[str]) -> list[str]:
        return self.extension.rewritten("\n".join(lines)).split("\n")


class PageError(Exception):
    """A page asks for what is not there."""


def no_options(extension: type[Extension]) -> Any:
    """The function by which Python-Markdown makes an extension that has no options."""
    return lambda **_: extension()
