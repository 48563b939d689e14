"""Where WikiText is found: in a folder that the user names, or in the cache, where it is downloaded once."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from torchimplicit.recipes.language.data import SPLITS, file_name
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, replacing, unchanged

_PLACE = "https://s3.amazonaws.com/research.metamind.io/wikitext"

WIKITEXT2 = Download(
    name="wikitext-2-v1.zip",
    url=f"{_PLACE}/wikitext-2-v1.zip",
    sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
)
WIKITEXT103 = Download(
    name="wikitext-103-v1.zip",
    url=f"{_PLACE}/wikitext-103-v1.zip",
    sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
)
"""Word-level, as Merity et al. (2016, arXiv 1609.07843) published them."""


def folder_of(archive: Download, data_dir: Path | None) -> Path:
    """The folder with the three files: ``data_dir``, or the cache, into which the archive is fetched and unpacked.

    Raises:
        UserError: the archive cannot be downloaded, or is not what was published.
    """
    if data_dir is not None:
        return data_dir
    folder = cache_folder(archive.name.removesuffix("-v1.zip"))
    if not all((folder / file_name(split)).is_file() for split in SPLITS):
        _unpack(fetch(archive, folder), folder)
    unchanged(folder, [file_name(split) for split in SPLITS])
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    again = "delete it, and it is downloaded again; or give a folder of your own with --data-dir"
    try:
        with zipfile.ZipFile(archive) as unpacked:
            for split in SPLITS:
                name = file_name(split)
                member = next((m for m in unpacked.namelist() if m.rsplit("/", 1)[-1] == name), None)
                if member is None:
                    raise UserError(f"{archive} holds no {name}: it is another archive; {again}")
                with replacing(folder / name) as part, unpacked.open(member) as inside, part.open("wb") as file:
                    shutil.copyfileobj(inside, file)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive} is no zip file, or is damaged ({error}): {again}") from None
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked to {folder} ({error.strerror})") from None
