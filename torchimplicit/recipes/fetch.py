"""Public files, downloaded once."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from torchimplicit.recipes.errors import DamagedFileError, StorageError, UserError
from torchimplicit.recipes.files import replacing, write_text

TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Download:
    """A public file.

    Attributes:
        name: under which it is kept.
        url: where it is.
        sha256: of its content, in hexadecimal digits.
        md5: likewise, for a file of which its publisher gives this sum only.
    """

    name: str
    url: str
    sha256: str = ""
    md5: str = ""

    def __post_init__(self) -> None:
        if bool(self.sha256) == bool(self.md5):
            raise ValueError(f"{self.name} needs its SHA-256 or its MD5 sum, and one of the two")


def cache_folder(data_set: str) -> Path:
    """Where downloads of ``data_set`` are kept: below ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "torchimplicit" / data_set


def fetch(download: Download, folder: Path, instead: str = "with --data-dir") -> Path:
    """The file in ``folder``, downloaded if it is not there yet; it is what was published, which is verified each time.

    Args:
        download: which.
        folder: where it is kept.
        instead: how a person would give a copy of their own, for errors.

    Raises:
        UserError: it cannot be downloaded or written, or is not the file that was published.
    """
    target = folder / download.name
    kind, published = ("sha256", download.sha256) if download.sha256 else ("md5", download.md5)
    told = {"sha256": "SHA-256", "md5": "MD5"}[kind]
    if target.is_file():
        if (found := _sum(target, kind)) != published:
            raise DamagedFileError(
                f"{target} is damaged: it has the {told} sum {found}, and {published} was published; delete it, and it "
                f"is downloaded again, or give a copy of your own {instead}"
            )
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            with part.open("wb") as file:
                found = _copy(download.url, file, kind)
            if found != published:
                raise UserError(
                    f"{download.url} has the {told} sum {found}, and {published} was published: the download was cut "
                    f"short or the file has changed; try again, or give a copy of your own {instead}"
                )
    except (urllib.error.URLError, HTTPException, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{download.url} cannot be downloaded ({reason}); if this machine has no network, fetch it elsewhere and "
            f"give its folder {instead}"
        ) from None
    except OSError as error:
        reason = str(error) if isinstance(error, StorageError) else f"{target} cannot be written ({error.strerror})"
        raise UserError(f"{reason}; or set XDG_CACHE_HOME to another folder") from None
    return target


SUMS = "SHA256SUMS"


def unchanged(folder: Path, names: Sequence[str]) -> None:
    """Raise where files of a cache are not what they were when this was first called for them.

    The sums are in ``SHA256SUMS`` beside them, in the form that ``sha256sum -c`` reads. It is for files that were
    published without a sum, or unpacked here.

    Raises:
        DamagedFileError: one is damaged or gone, or the sums are.
        UserError: one cannot be read, or the sums cannot be written.
    """
    noted: dict[str, str] = {}
    place = folder / SUMS
    again = f"delete the folder {folder}, and it is made again"
    try:
        if place.is_file():
            for line in place.read_text(encoding="utf-8", errors="replace").splitlines():
                if not (match := re.fullmatch(r"([0-9a-f]{64})  (.+)", line)):
                    raise DamagedFileError(f"{place} is damaged, in the line {line[:100]!r}; {again}")
                noted[match[2]] = match[1]
        found = {name: _sum(folder / name, "sha256") for name in names}
        for name in noted.keys() & found.keys():
            if found[name] != noted[name]:
                raise DamagedFileError(
                    f"{folder / name} has changed since it was put there: its sum is not that in {SUMS}; {again}"
                )
        if noted and not found.keys() <= noted.keys():
            raise DamagedFileError(f"{place} is damaged: it says nothing of {min(found.keys() - noted)}; {again}")
        if not noted:
            write_text(place, "".join(f"{found[name]}  {name}\n" for name in sorted(found)))
    except OSError as error:
        raise UserError(f"{folder} cannot be verified ({error.strerror or error}); {again}") from None


def _sum(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _copy(url: str, file: BinaryIO, sum_kind: str) -> str:
    """Write what is at ``url`` into ``file``; its sum of this kind."""
    digest = hashlib.new(sum_kind, usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
