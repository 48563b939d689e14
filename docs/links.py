"""Links and pictures of the finished site that lead nowhere.

The generator checks links that are written in Markdown. Pictures, and what records and
docstrings bring along, are seen in the finished pages alone.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The targets that a page names, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


def broken(site: Path) -> list[str]:
    """Each target within the site that does not exist, as ``PAGE: TARGET``."""
    files = (path for path in site.rglob("*.html") if path != site / "404.html")
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in files}
    faults = []
    for path, page in pages.items():
        for target in sorted(set(page.targets)):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = path
            if parts.path:
                there = (path.parent / unquote(parts.path)).resolve()
            found = there.exists()
            if found and parts.fragment and there in pages:
                found = unquote(parts.fragment) in pages[there].anchors
            if not found:
                faults.append(f"{path.relative_to(site)}: {target}")
    return faults
