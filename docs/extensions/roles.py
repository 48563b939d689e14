"""Griffe extension: what the house's docstrings say in their own way becomes what mkdocstrings understands.

The roles ``:math:`` and ``:class:`` become formulas and cross-references, and a line that describes several parameters
at once becomes one line for each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?P<role>math|class|func|meth|attr|mod|data|exc|doc|ref|eq):`(?P<text>[^`]+)`")
_GROUP = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<rest> .*(?:\n(?P=indent) .*)*)",
    re.MULTILINE,
)
_DOUBLE = re.compile(r"(?<!`)``(?!`)([^`]+)``(?!`)")


def _link(owner: griffe.Object, text: str) -> str:
    """A cross-reference to ``text`` as seen from ``owner``; plain code where no page documents it."""
    shown = text.rsplit(".", 1)[-1] if text.startswith("~") else text
    name = text.lstrip("~.")
    try:
        path = owner.resolve(name)
    except griffe.NameResolutionError:
        path = name if "." in name else ""
    if not path:
        return f"`{shown}`"
    return f'<autoref optional identifier="{path}"><code>{shown.lstrip("~.")}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by Griffe with the whole package."""
        self._visit(pkg)

    def _visit(self, owner: griffe.Object) -> None:
        if owner.docstring is not None:
            owner.docstring.value = self._rewrite(owner, owner.docstring.value)
        if isinstance(owner, griffe.Function):
            hidden = [p.name for p in owner.parameters if p.name.startswith("_")]  # a dataclass's private fields
            for name in hidden:
                del owner.parameters[name]
        for member in owner.members.values():
            if not member.is_alias:
                self._visit(member)  # type: ignore[arg-type]

    @staticmethod
    def _rewrite(owner: griffe.Object, text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            if match["role"] == "math":
                return f"${match['text'].strip()}$"
            return _link(owner, match["text"].strip())

        def split(match: re.Match[str]) -> str:
            return "\n".join(f"{match['indent']}{name}:{match['rest']}" for name in match["names"].split(", "))

        return _GROUP.sub(split, _DOUBLE.sub(r"`\1`", _ROLE.sub(replace, text)))
