"""Every recorded table remakes itself: its sheets, claims and notes are those that its own runs and settings make."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("submitit")

from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime.markdown import record_readme
from torchimplicit.recipes.runtime.settings import from_plain, to_plain
from torchimplicit.recipes.runtime.table import Published, Record

RECORDS = {path.parent.name: path for path in sorted(Path("docs/records").resolve().glob("*/record.json"))}


def record_of(name):
    plain = json.loads(RECORDS[name].read_text(encoding="utf-8"))
    plain.pop("checksum", None)  # those of earlier versions have none
    record = from_plain(Record, {**plain, "settings": {}, "runs": {}})
    return replace(record, settings=plain["settings"], runs=plain["runs"])


# What a record's runs did not hold when it was made: parts of the titles of sheets and columns, of claims and notes.
LACKING = {
    "jiio-inverse": ("gradients at the trained weights", "The exact gradient as in training"),
    "jiio-generation": ("by joint inference", "rae-"),
    "phantom-graphs": ("Cost of a step", "a step with a phantom gradient"),
    # it was rounded to five digits, and is rounded again
    "phantom-precision": ("k = 2", "k = 10", "the adaptive phantom gradient on", "Backpropagation", "Test accuracy"),
    "ofdft-molecules": ("Training L", "molecule by molecule", "training molecules' L falls", "L and L1 per electron"),
}


def kept(items, lacking):
    """Sheets, claims or notes without what is lacking."""

    def whole(text):
        return not any(part in text for part in lacking)

    for one in items:
        if isinstance(one, str):
            if whole(one):
                yield one
        elif "table" not in one:
            if whole(one["statement"]):
                yield one
        elif whole(one["title"]):
            places = [place for place, column in enumerate(one["table"]["columns"]) if whole(column["title"])]
            lines = (one["table"]["columns"], *one["table"]["rows"])
            yield one["title"], [[line[place] for place in places] for line in lines]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_can_be_read_where_it_lies(name):
    assert (RECORDS[name].parent / "README.md").read_text(encoding="utf-8") == record_readme(record_of(name))


def test_the_readme_counts_the_claims_that_hold():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"\(docs/records/([\w-]+)/README\.md\) (\d+ of \d+)", text))
    claims = {name: record_of(name).claims for name in RECORDS}
    assert told == {name: f"{sum(c.holds is True for c in own)} of {len(own)}" for name, own in claims.items()}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_remakes_itself(name):
    record = record_of(name)
    table = registry.runner(record.name)
    assert isinstance(table, Published)
    lacking = next((parts for start, parts in LACKING.items() if name.startswith(start)), ())
    made = table.remade(type(registry.settings(record.name)), record)
    for own, recorded in zip(made, (record.sheets, record.claims, record.notes), strict=True):
        assert list(kept(to_plain(own), lacking)) == list(kept(to_plain(recorded), lacking))


def test_settings_bring_nothing_heavy():
    """The command line makes settings only to show their help."""
    code = (
        "import sys\nfrom torchimplicit.recipes import registry\n"
        "for name in (*registry.RECIPES, *registry.TABLES):\n"
        "    registry.settings(name)\n"
        "heavy = {'lightning', 'matplotlib', 'submitit', 'torch_geometric', 'scipy', 'skimage'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
