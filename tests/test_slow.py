"""The list of slow tests names tests that exist."""

from pathlib import Path

HERE = Path(__file__).parent


def test_every_slow_test_exists():
    for name in (HERE / "slow.txt").read_text(encoding="utf-8").split():
        file, *_, function = name.split("::")
        assert f"def {function}(" in (HERE.parent / file).read_text(encoding="utf-8"), name
