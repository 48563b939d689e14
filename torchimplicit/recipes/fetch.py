"""Public files, downloaded once."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from torchimplicit.recipes.errors import UserError

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
    """The file in ``folder``, downloaded if it is not there yet.

    Args:
        download: which.
        folder: where it is kept.
        instead: how a person would give a copy of their own, for errors.

    Raises:
        UserError: it cannot be downloaded or written, or is not the file that was published.
    """
    target = folder / download.name
    if target.is_file():
        return target
    part = folder / f"{download.name}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            found = _copy(download.url, file, "sha256" if download.sha256 else "md5")
        if found != (published := download.sha256 or download.md5):
            raise UserError(
                f"{download.url} has the {'SHA-256' if download.sha256 else 'MD5'} sum {found}, and {published} was "
                "published: the download was cut short or the file has changed; try again, or give a copy of your own "
                f"{instead}"
            )
        part.replace(target)
    except (urllib.error.URLError, HTTPException, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{download.url} cannot be downloaded ({reason}); if this machine has no network, fetch it elsewhere and "
            f"give its folder {instead}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return target


def _copy(url: str, file: BinaryIO, sum_kind: str) -> str:
    """Write what is at ``url`` into ``file``; its sum of this kind."""
    digest = hashlib.new(sum_kind, usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
