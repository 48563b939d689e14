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
    """

    name: str
    url: str
    sha256: str


def cache_folder(data_set: str) -> Path:
    """Where downloads of ``data_set`` are kept: below ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "torchimplicit" / data_set


def fetch(download: Download, folder: Path) -> Path:
    """The file in ``folder``, downloaded if it is not there yet.

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
            found = _copy(download.url, file)
        if found != download.sha256:
            raise UserError(
                f"{download.url} has the SHA-256 sum {found}, and {download.sha256} was published: the download was "
                "cut short or the file has changed; try again, or give a copy of your own with --data-dir"
            )
        part.replace(target)
    except (urllib.error.URLError, HTTPException, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{download.url} cannot be downloaded ({reason}); if this machine has no network, fetch it elsewhere and "
            "give its folder with --data-dir"
        ) from None
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return target


def _copy(url: str, file: BinaryIO) -> str:
    """Write what is at ``url`` into ``file``; its SHA-256 sum."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
