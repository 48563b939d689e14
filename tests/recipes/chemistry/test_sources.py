"""Molecules from xyz files, folders and archives, and what is said of bad ones."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from torchimplicit.recipes.density import sources
from torchimplicit.recipes.density.chemistry import BOHR, MANY_ATOMS, Geometry
from torchimplicit.recipes.density.sources import Refused, gathered, parse, read
from torchimplicit.recipes.runtime.errors import UserError

WATER = "3\nwater\nO 0 0 0\nH 0.7572 0.5865 0\nH -0.7572 0.5865 0\n"
# As QM9 has it: tabs, partial charges, exponents with a star, and three lines after the atoms.
QM9 = (
    "2\ngdb 1\t2.0\t1.5*^-6\t\nH\t 0.0\t 1.5*^-6\t 0.0\t 0.1\nH\t 0.0\t 0.0\t 7.4*^-1\t-2.0*^-5\n"
    "1341.3\t1341.3\n[HH]\t[HH]\t\nInChI=1S/H2/h1H\tInChI=1S/H2/h1H\n"
)


def test_a_plain_file():
    water = parse(WATER, "w.xyz", "w")
    assert (water.name, water.charges, water.charge) == ("w", (8, 1, 1), 0)
    assert water.positions[1][0] * BOHR == pytest.approx(0.7572)


def test_a_file_of_qm9():
    found = parse(QM9, "q.xyz", "q")
    assert found.charges == (1, 1)
    assert np.allclose(np.array(found.positions) * BOHR, [[0, 1.5e-6, 0], [0, 0, 0.74]])


def test_numbers_and_small_letters_name_elements_too():
    assert parse("2\n\nh 0 0 0 extra\n17 0 0 1.27", "f.xyz", "f").charges == (1, 17)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "f.xyz is empty"),
        (" \n\n", "f.xyz is empty"),
        ("three\n\n", "line 1: 'three' is not a number of atoms"),
        ("0\n\n", "line 1: a molecule of 0 atoms is none"),
        ("-2\n\n", "line 1: a molecule of -2 atoms"),
        ("3\n\nO 0 0 0\nH 0 0 1\n", "announces 3 atoms in line 1 and ends after line 4: it is cut short"),
        ("2\n\nH 0 0 0\nH 0 0\n", "line 4: 'H 0 0' must be an element and three coordinates"),
        ("2\n\nH 0 0 0\nQ 0 0 1\n", "line 4: there is no element 'Q'"),
        ("2\n\nH 0 0 0\n0 0 0 1\n", "line 4: there is no element '0'"),
        ("2\n\nH 0 0 0\nH 0 0 one\n", "line 4: 'one' is not a coordinate"),
        ("2\n\nH 0 0 0\nH 0 0 nan\n", "line 4: the coordinate nan is not finite"),
        ("2\n\nH 0 0 0\nH 0 0 inf\n", "line 4: the coordinate inf is not finite"),
        ("2\n\nH 0 0 0\nH 0 0 1e999\n", "line 4: the coordinate 1e999 is not finite"),
        ("2\n\nH 0 0 0\nH 0 0 .7\n2\n\nH 0 0 0\nH 0 0 .8\n", "line 5: there is more after the 2 atoms"),
        ("2\n\nH 0 0 0\nH 0 0 .2\n", r"f.xyz: f: atoms 1 \(H\) and 2 \(H\) are 0.200 angstrom apart"),
        ("2\n\nO 0 0 0\nH 0 0 1\n", "f.xyz: f has 9 electrons.* open shell"),
    ],
)
def test_bad_files_are_refused_with_the_line(text, said):
    with pytest.raises(UserError, match=said):
        parse(text, "f.xyz", "f")


def test_what_can_be_a_source(tmp_path):
    file = tmp_path / "b.xyz"
    file.write_text(WATER)
    (tmp_path / "a.xyz").write_text(QM9)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.xyz").write_text("1\n\nH 0 0 0\n")
    (tmp_path / "notes.txt").write_text("notes")
    [water] = read(str(file), charge=0)
    assert (water.name, water.charges) == ("b", (8, 1, 1))
    assert [one.name for one in read("H2O")] == ["H2O"]
    two, three, refused = read(str(tmp_path))
    assert [two.name, three.name] == ["a", "b"]
    assert isinstance(refused, Refused)
    assert refused.name == "c"
    assert "open shell" in refused.reason
    assert len(read(str(tmp_path), limit=2)) == 2
    assert isinstance(read(str(tmp_path / "sub"), charge=-1)[0], Geometry)


def test_sources_are_gathered(tmp_path):
    """Each molecule once; what is too large or has the name of another is told, alone by an error."""
    for folder, distance in (("a", 0.7), ("b", 0.8)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.xyz").write_text(f"2\n\nH 0 0 0\nH 0 0 {distance}\n")
    chain = f"{MANY_ATOMS + 1}\n\n" + "".join(f"He 0 0 {3 * i}\n" for i in range(MANY_ATOMS + 1))
    (tmp_path / "b" / "chain.xyz").write_text(chain)
    asked = ["H2O", str(tmp_path / "a"), str(tmp_path / "a" / "same.xyz"), str(tmp_path / "b")]
    found, refused = gathered(asked)
    assert [one.name for one in found] == ["H2O", "same"]
    assert {one.name: one.reason for one in refused} == {
        "chain": "41 atoms; more than 40 take hours and gigabytes",
        "same": "another molecule has this name; rename its file",
    }
    found, _ = gathered(asked, allow_large=True, by_name=False, limit=1, smallest=True)
    assert [len(one.charges) for one in found] == [3, 2, 2]
    with pytest.raises(UserError, match=r"chain: 41 atoms.*--allow-large"):
        gathered([str(tmp_path / "b" / "chain.xyz")], allow_large=False)


@pytest.mark.parametrize("kind", ["gz", "bz2", ""])
def test_archives(tmp_path, kind):
    path = tmp_path / ("set.tar" + (f".{kind}" if kind else ""))
    with tarfile.open(path, f"w:{kind}") as archive:
        archive.add(tmp_path, "folder", recursive=False)
        for name, text in (("folder/x1.xyz", WATER), ("folder/readme", "?"), ("folder/x2.xyz", "?")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    water, refused = read(str(path))
    assert water.name == "x1"
    assert refused.reason == f"{path.name}: folder/x2.xyz, line 1: '?' is not a number of atoms"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    if kind:  # half a plain archive may still hold a whole file
        with pytest.raises(UserError, match="cannot be unpacked"):
            read(str(path))
    path.write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match="cannot be unpacked"):
        read(str(path))


def test_bad_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdb").write_text("ATOM")
    (tmp_path / "a.xyz").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.xyz").write_text("2" + " " * sources.LARGEST_FILE)
    for name, said in (
        ("empty", "holds no .xyz file"),
        ("a.pdb", "must be an .xyz file, a folder"),
        ("a.xyz", "is not text"),
        ("b.xyz", "more than 1048576 bytes"),
        ("c.xyz", "there is no file or folder"),
    ):
        with pytest.raises(UserError, match=said):
            read(str(tmp_path / name))


def test_qm9_is_downloaded(tmp_path, monkeypatch):
    from torchimplicit.recipes.runtime.files import Download

    path = tmp_path / "published.tar.bz2"
    with tarfile.open(path, "w:bz2") as archive:
        member = tarfile.TarInfo("dsgdb9nsd_000001.xyz")
        member.size = len(QM9)
        archive.addfile(member, io.BytesIO(QM9.encode()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "QM9", Download(name="q.tar.bz2", url=path.as_uri(), md5="0" * 32))
    with pytest.raises(UserError, match=r"has the MD5 sum .*give a copy of your own as the source"):
        read("qm9")
    import hashlib

    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(sources, "QM9", Download(name="q.tar.bz2", url=path.as_uri(), md5=md5))
    assert [one.name for one in read("qm9")] == ["dsgdb9nsd_000001"]
    assert (tmp_path / "torchimplicit" / "qm9" / "q.tar.bz2").is_file()
    with pytest.raises(ValueError, match="one of the two"):
        Download(name="x", url="y")
