"""Files of molecules: what is written is read, and what is damaged or foreign is told."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from torchimplicit.recipes.density import storage
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import UserError


@pytest.fixture
def file(tmp_path, record):
    path = tmp_path / "folder" / "h2.npz"
    storage.write(path, record)
    return path


def rewritten(path, **changes):
    """The file with other arrays, and its checksum as it was."""
    with np.load(path) as held:
        arrays = {name: held[name] for name in held.files}
    np.savez(path, **{**arrays, **{k: v for k, v in changes.items() if v is not None}})
    return path


def about(path, **changes):
    with np.load(path) as held:
        text = json.loads(held["about"].tobytes())
    return rewritten(path, about=np.frombuffer(json.dumps(text | changes).encode(), dtype=np.uint8))


def refusal(path):
    with pytest.raises(UserError) as error:
        storage.load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_what_is_written_is_read(file, record, h2):
    again = storage.read(file)
    assert (again.geometry, again.settings, again.software) == (record.geometry, record.settings, record.software)
    for name, tensor in record.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    for name, tensor in storage.load(file).tensors().items():
        assert torch.equal(tensor, h2.tensors()[name])
    assert [path.name for path in file.parent.iterdir()] == ["h2.npz"]  # no part is left


def test_the_shipped_file_says_how_it_was_made(record):
    assert record.settings == ChemistrySettings(grid=1)
    assert record.software == "PySCF 2.14.0"


def test_a_file_cut_short_or_altered_is_damaged(file):
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "is damaged" in refusal(file)
        assert "delete it and compute it again with torchimplicit molecules" in refusal(file)
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "is damaged" in refusal(file)


def test_other_numbers_do_not_have_the_checksum(file, record):
    rewritten(file, reference=record.reference.numpy() * 1.001)
    assert "its content does not have the checksum inside" in refusal(file)


def test_foreign_files_are_told(tmp_path, file):
    path = tmp_path / "foreign.npz"
    np.savez(path, x=np.zeros(3))
    assert "is no molecule's data file (it holds x.npy)" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "is damaged" in refusal(path)
    with zipfile.ZipFile(path, "w"):
        pass
    assert "it holds nothing" in refusal(path)
    assert "'another format'" in refusal(about(file, format="another format"))
    assert "is no file" in refusal(tmp_path / "absent.npz")
    assert "is no file" in refusal(tmp_path)


def test_pickles_inside_are_not_opened(file):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    with zipfile.ZipFile(file, "a") as archive:
        held = io.BytesIO()
        np.lib.format.write_array(held, np.array([Trap()], dtype=object), allow_pickle=True)
        archive.writestr("trap.npy", held.getvalue())
    assert "is damaged" in refusal(file)


def test_another_version_is_told(file):
    assert "has version 99 of the format, and this program reads version 2; compute it again" in refusal(
        about(file, version=99)
    )


def test_the_name_tells_calculations_apart(record):
    geometry, settings = record.geometry, record.settings
    name = storage.file_name(geometry, settings)
    assert name.startswith("H2-")
    assert name == storage.file_name(replace(geometry), replace(settings))
    others = [
        storage.file_name(geometry, replace(settings, grid=0)),
        storage.file_name(geometry, replace(settings, beta=2.0)),
        storage.file_name(replace(geometry, charge=-2), settings),
        storage.file_name(replace(geometry, positions=((0.0, 0.0, 0.0), (0.0, 0.0, 1.5))), settings),
    ]
    assert len({name, *others}) == 5
    # the same calculation, under a name that may not leave the folder
    odd = storage.file_name(replace(geometry, name="../a b"), settings)
    assert odd == name.replace("H2", ".._a_b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid": 10}, "--grid must lie in 0 to 9"),
        ({"scf_grid": -1}, "--scf-grid must lie in 0 to 9"),
        ({"beta": 1.0}, "--beta must lie in"),
        ({"scf_tolerance": 0.0}, "--scf-tolerance must be positive"),
        ({"scf_cycles": 0}, "--scf-cycles must be positive"),
        ({"functional": " "}, "--functional must name one"),
        ({"orbital_basis": ""}, "--orbital-basis must name one"),
    ],
)
def test_settings_are_checked(change, said):
    with pytest.raises(UserError, match=said):
        ChemistrySettings(**change)
