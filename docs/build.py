"""Build the documentation into the folder ``site``: ``python docs/build.py [--serve]``.

Warnings are errors, such as a link to a heading that does not exist. Python finds
the extensions in this folder because it is where the script lies that it runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zensical.main import cli

from extensions import notebooks
from links import broken

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write the examples' scripts and notebooks, then call the generator."""
    parser = argparse.ArgumentParser(description="Build the documentation.")
    shown = "show the site on localhost:8000, and build it anew on every change"
    parser.add_argument("--serve", action="store_true", help=shown)
    serve = parser.parse_args().serve
    notebooks.write(ROOT / "docs" / "examples")
    command = ["serve"] if serve else ["build", "--clean", "--strict"]
    config = str(ROOT / "mkdocs.yml")
    cli([*command, "--config-file", config], standalone_mode=False)
    if faults := broken(ROOT / "site"):
        sys.exit("These links and pictures lead nowhere:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
