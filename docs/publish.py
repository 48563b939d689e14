"""Put the site into a folder of versions: ``python docs/publish.py PAGES VERSION``.

``PAGES/VERSION`` and ``PAGES/latest`` become the site, ``PAGES/versions.json`` is what
the menu of versions reads, and ``PAGES/index.html`` leads to the latest one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

SITE = Path(__file__).parents[1] / "site"
START = '<meta http-equiv="refresh" content="0; url=latest/index.html">\n'


def publish(pages: Path, version: str) -> None:
    """Add the site as ``version``, or replace that version; it is the latest then."""
    for name in (version, "latest"):
        shutil.rmtree(pages / name, ignore_errors=True)
        shutil.copytree(SITE, pages / name)
    file = pages / "versions.json"
    others = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    kept = [{**one, "aliases": []} for one in others if one["version"] != version]
    newest = {"version": version, "title": version, "aliases": ["latest"]}
    file.write_text(json.dumps([newest, *kept], indent=1) + "\n", encoding="utf-8")
    (pages / "index.html").write_text(START, encoding="utf-8")
    # GitHub Pages would otherwise leave out files whose names begin with an underscore.
    (pages / ".nojekyll").touch()


if __name__ == "__main__":
    publish(Path(sys.argv[1]), sys.argv[2])
