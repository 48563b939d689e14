"""The mesh that is fitted, as read and as the field sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from torchimplicit.recipes.fields.shape.config import ShapeConfig
from torchimplicit.recipes.fields.shape.files import read_file
from torchimplicit.recipes.fields.shape.made import MadeName, made
from torchimplicit.recipes.fields.shape.mesh import Mesh, prepared
from torchimplicit.recipes.fields.shape.points import Frame
from torchimplicit.recipes.fields.shape.tree import MeshTree


@dataclass(frozen=True, eq=False)
class Subject:
    """A mesh.

    Attributes:
        name: for people.
        mesh: in the coordinates of the field.
        frame: where these lie in those of the file.
        notes: what was done to it.
    """

    name: str
    mesh: Mesh
    frame: Frame
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def tree(self) -> MeshTree:
        """Of the mesh."""
        return MeshTree(self.mesh)

    def describe(self) -> str:
        """In one sentence for people."""
        return f"{self.name}: {len(self.mesh.faces)} faces" + "".join(f", {note}" for note in self.notes) + "."


def subject(config: ShapeConfig) -> Subject:
    """What is fitted.

    Raises:
        UserError: if it cannot be read, or is no solid.
    """
    return _read(config.file, config.shape, config.most_faces)


@lru_cache(maxsize=1)
def _read(file: Path | None, shape: MadeName, most_faces: int) -> Subject:
    """Kept, for it is asked for when settings are checked, when points are drawn and when the fit is shown."""
    name = shape if file is None else file.name
    mesh, notes = prepared(made(shape) if file is None else read_file(file, most_faces), name)
    frame = Frame.of(mesh)
    return Subject(name, frame.inward(mesh), frame, notes)
