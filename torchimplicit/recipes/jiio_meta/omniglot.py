"""Omniglot's small background set: 136 characters of five alphabets, each drawn by 20 people (Lake et al. 2015)."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchimplicit.recipes.jiio_meta.tasks import Tasks
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, inside

FILE = Download(
    name="images_background_small1.zip",
    url="https://raw.githubusercontent.com/brendenlake/omniglot/master/python/images_background_small1.zip",
    sha256="f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
)
SIZE = 28
DRAWINGS = 20
LARGEST_DRAWING = 1 << 20
HELD_OUT = 24
"""Characters of the validation and of the test, each."""


def load(folder: Path | None) -> dict[str, Tensor]:
    """The characters of each split, uint8 ``[characters, 20, 1, 28, 28]``, ink being 255.

    No split was published for this set: characters are drawn for validation and test, always the same.

    Raises:
        UserError: the file is missing or another.
    """
    if folder is not None and not (folder / FILE.name).is_file():
        raise UserError(f"{folder} has no {FILE.name}: --data-dir must be the folder that holds it")
    path = fetch(FILE, cache_folder("omniglot")) if folder is None else folder / FILE.name
    characters = _read(path)
    order = torch.randperm(len(characters), generator=torch.Generator().manual_seed(0))
    if len(characters) < 3 * HELD_OUT:
        raise UserError(f"{path} has {len(characters)} characters, and {3 * HELD_OUT} are the fewest to be split")
    parts = order.split([HELD_OUT, HELD_OUT, len(characters) - 2 * HELD_OUT])
    return {name: characters[part] for name, part in zip(("validation", "test", "training"), parts, strict=True)}


def turned(characters: Tensor) -> Tensor:
    """Each character four times, turned by right angles: new characters to learn from."""
    return torch.cat([characters.rot90(turns, (-2, -1)) for turns in range(4)])


def draw(characters: Tensor, count: int, ways: int, shots: int, queries: int, generator: torch.Generator) -> Tasks:
    """Tasks of ``ways`` characters in random order, the drawings of each in support and query without overlap."""
    chosen = torch.rand(count, len(characters), generator=generator).topk(ways, dim=1).indices
    drawn = torch.rand(count, ways, DRAWINGS, generator=generator).topk(shots + queries, dim=2).indices
    images = characters[chosen[:, :, None], drawn].float() / 255  # [tasks, ways, drawings, 1, 28, 28]
    labels = torch.arange(ways).expand(count, ways)[:, :, None].expand(count, ways, shots + queries)
    parts = []
    for part in (slice(shots), slice(shots, None)):
        parts += [images[:, :, part].flatten(1, 2), labels[:, :, part].flatten(1, 2)]
    return Tasks(*parts)


def _read(path: Path) -> Tensor:
    found: dict[str, list[Tensor]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                inside(path, name)
                if name.endswith(".png"):
                    if archive.getinfo(name).file_size > LARGEST_DRAWING:
                        raise ValueError(f"{name} has more than {LARGEST_DRAWING} bytes")
                    image = (
                        Image.open(io.BytesIO(archive.read(name)))
                        .convert("L")
                        .resize((SIZE, SIZE), Image.Resampling.BOX)
                    )
                    ink = 255 - torch.from_numpy(np.array(image))
                    found.setdefault(name.rsplit("/", 1)[0], []).append(ink)
    except UserError:
        raise
    except Exception as error:  # a damaged archive, or a damaged image in it, raises nearly everything
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from None
    wrong = [name for name, images in found.items() if len(images) != DRAWINGS]
    if wrong or not found:
        raise UserError(f"{path} is not Omniglot's: {wrong[0] if wrong else 'it'} has not {DRAWINGS} drawings")
    return torch.stack([torch.stack(images)[:, None] for images in found.values()])
