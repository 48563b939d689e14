"""Files: written whole with a checksum, checked when read; public files downloaded once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import torch

from torchimplicit.recipes.runtime.errors import DamagedFileError, StorageError, UserError

# -- files -------------------------------------------------------------------------------------------------------------
#
# Files of ours: written whole or not at all, with the SHA-256 sum of their content inside, verified on reading.
#
# JSON holds the sum as its last entry, ``"checksum"``, over what the others say rather than how they are laid out. A
# file of ``torch.save`` is a zip archive and holds it in the archive's comment, where neither torch nor Lightning
# minds it. The sum tells damage and changes; it does not tell who wrote the file. Files of earlier versions carry
# none: of these JSON is taken as it is, which is said, and archives have at least their own CRC-32 sums.


CHECKSUM = "checksum"
_KIND = "sha256:"
_MARK = b"torchimplicit sha256:"
_END = 22
"""Bytes of a zip archive's end record; its last two give the length of the comment that follows."""

_TAIL = len(_MARK) + 64
_CHUNK = 1 << 20
_LARGEST_JSON = 1 << 30
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error codes of a full disk, quota or file."""

_DISK = FULL | {errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG}

_said: set[str] = set()


def say_once(line: str, about: str = "") -> None:
    """Print a note on standard error, once per process for each ``about``."""
    if (about or line) not in _said:
        _said.add(about or line)
        with suppress(OSError):
            print(f"torchimplicit: note: {line}", file=sys.stderr)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft in the same folder that replaces ``path`` atomically when the block succeeds.

    Raises:
        StorageError: it cannot be written, for one because the disk is full; ``path`` is then what it was.
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}.draft{path.suffix}")
    try:
        with writing(path):
            yield draft
            with draft.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Attribute disk errors within the block to ``path``.

    Raises:
        StorageError: see :func:`replacing`.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer answers an OSError with a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or isinstance(cause, StorageError) or cause.errno not in _DISK:
            raise
        remedy = "make room" if cause.errno in FULL else "mend that"
        raise StorageError(
            cause.errno, f"{path} cannot be written ({cause.strerror}): {remedy}, and try again; what was there is kept"
        ) from None


def no_larger(path: Path, limit: int) -> None:
    """Raise if a file that is read as a whole has more than ``limit`` bytes; a missing file passes.

    Raises:
        UserError: it has.
    """
    with suppress(OSError):
        if (size := path.stat().st_size) > limit:
            raise UserError(f"{path} has {size} bytes, and {limit} at most are read of such a file: it is another one")


def inside(archive: Path, name: str) -> None:
    """Raise if an archive member's path leads out of the folder it would be unpacked to.

    Raises:
        UserError: it has.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise UserError(
            f"{archive} names {name[:100]!r}, which lies outside of its folder: it is no archive to trust; get it from "
            "where it was published"
        )


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text.

    Raises:
        StorageError: see :func:`replacing`.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write strict JSON with its checksum.

    Raises:
        StorageError: see :func:`replacing`.
    """
    assert CHECKSUM not in value
    sealed = {**value, CHECKSUM: sum_of(value)}
    write_text(path, json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, quiet: bool = False) -> dict[str, Any]:
    """Read a file of :func:`write_json`, without the checksum.

    Args:
        path: the file.
        quiet: whether to say nothing of a file without a checksum.

    Raises:
        DamagedFileError: it is none, or does not have its checksum.
        OSError: it is not there, or may not be read.
    """
    no_larger(path, _LARGEST_JSON)
    try:
        plain = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read, for it is no JSON ({reason(error)}); {_AGAIN}") from None
    if not isinstance(plain, dict):
        raise DamagedFileError(f"{path} cannot be read, for it holds no JSON object; {_AGAIN}")
    seal = plain.pop(CHECKSUM, None)
    if seal is None and not any(map(_like_a_checksum, plain.values())):
        if not quiet:
            say_once(f"{path} is of an earlier version, without a checksum, and is taken as it is", "unsealed JSON")
        return plain
    try:
        checksum = sum_of(plain)
    except (ValueError, RecursionError):
        checksum = ""
    if seal != checksum:
        raise DamagedFileError(
            f"{path} does not have the checksum that it was written with: it is damaged, or was changed; {_AGAIN} "
            f'(or, if the change is meant, take its line "{CHECKSUM}" out)'
        )
    return plain


_AGAIN = "restore it from a copy, or make it again"


def save(value: Any, path: Path) -> None:
    """Save tensors and plain values by ``torch.save``, with their checksum.

    Raises:
        StorageError: see :func:`replacing`.
    """
    with replacing(path) as draft:
        with draft.open("wb") as file:  # torch would not tell why a path of its own cannot be written
            torch.save(value, file)
        _seal(draft)


def load(path: Path) -> Any:
    """Load a file of :func:`save` on the CPU, without running any code in it.

    Raises:
        DamagedFileError: it is none, or does not have its checksum.
        UserError: it may not be read.
    """
    verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # whatever a damaged file leads an unpickler into
        raise DamagedFileError(f"{path} cannot be read ({reason(error)})") from None


def verify(path: Path) -> None:
    """Raise if a file of :func:`save` is not what was written; see :func:`load`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END - _TAIL))
            tail = file.read()
            mark = tail[_END:]
            if mark.startswith(_MARK):
                if mark != _MARK + _digest(file, size - _TAIL).encode():
                    raise DamagedFileError(f"{path} is damaged: it does not have the checksum that it was written with")
            elif tail[-_END : -_END + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":  # whose comment is cut off
                raise DamagedFileError(f"{path} is damaged: it is cut short, or no file of torch")
        _check_archive(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None


def _check_archive(path: Path) -> None:
    """Verify the archive's own checksums, and that nothing in it would grow when read."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [one.filename for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED]
            broken = packed[0] if packed else archive.testzip()
    except OSError:
        raise
    except Exception as error:  # BadZipFile, and whatever else a damaged directory leads to
        raise DamagedFileError(f"{path} is damaged ({reason(error)})") from None
    if broken is not None:
        raise DamagedFileError(f"{path} is damaged, in its part {broken!r}")


def _seal(path: Path) -> None:
    """Append the checksum of all preceding bytes."""
    with path.open("r+b") as file:
        size = file.seek(-_END, os.SEEK_END) + _END
        last = file.read(_END)
        assert last[:4] == b"PK\5\6"
        assert last[-2:] == b"\0\0"
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _TAIL))
        file.write(_MARK + _digest(file, size).encode())


def _digest(file: BinaryIO, size: int) -> str:
    """Checksum of the first ``size`` bytes; the file position is then after them."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (chunk := file.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def sum_of(value: dict[str, Any]) -> str:
    """Checksum of a value's content, independent of layout and order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _KIND + hashlib.sha256(text.encode("ascii")).hexdigest()


def _like_a_checksum(value: Any) -> bool:
    """Return whether it looks like a checksum, under any name: damage may have hit the name."""
    if not isinstance(value, str) or len(value) != len(_KIND) + 64:
        return False
    return value.startswith(_KIND) or sum(digit in "0123456789abcdef" for digit in value[-64:]) > 56


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# -- Public files, downloaded once -------------------------------------------------------------------------------------


TIMEOUT = 60.0
"""Seconds without an answer after which a download is abandoned."""

_CHUNK_FETCH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Download:
    """A public file.

    Attributes:
        name: under which it is kept.
        url: where it is.
        sha256: SHA-256 sum of its content, in hexadecimal digits.
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
    """Folder for downloads of ``data_set``: below ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "torchimplicit" / data_set


def fetch(download: Download, folder: Path, instead: str = "with --data-dir") -> Path:
    """The file in ``folder``, downloaded if missing and verified each time.

    Args:
        download: the download.
        folder: where it is kept.
        instead: how a person would give a copy of their own, for errors.

    Raises:
        UserError: it cannot be downloaded or written, or is not the file that was published.
    """
    target = folder / download.name
    kind, published = ("sha256", download.sha256) if download.sha256 else ("md5", download.md5)
    algorithm = {"sha256": "SHA-256", "md5": "MD5"}[kind]
    if target.is_file():
        if (checksum := _sum(target, kind)) != published:
            raise DamagedFileError(
                f"{target} is damaged: it has the {algorithm} sum {checksum}, and {published} was published; delete "
                f"it, and it is downloaded again, or give a copy of your own {instead}"
            )
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            with part.open("wb") as file:
                checksum = _copy(download.url, file, kind)
            if checksum != published:
                raise UserError(
                    f"{download.url} has the {algorithm} sum {checksum}, and {published} was published: the download "
                    f"was cut short or the file has changed; try again, or give a copy of your own {instead}"
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
    """Raise if files of a cache have changed since this was first called for them.

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
        sums = {name: _sum(folder / name, "sha256") for name in names}
        for name in noted.keys() & sums.keys():
            if sums[name] != noted[name]:
                raise DamagedFileError(
                    f"{folder / name} has changed since it was put there: its sum is not that in {SUMS}; {again}"
                )
        if noted and not sums.keys() <= noted.keys():
            raise DamagedFileError(f"{place} is damaged: it says nothing of {min(sums.keys() - noted)}; {again}")
        if not noted:
            write_text(place, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    except OSError as error:
        raise UserError(f"{folder} cannot be verified ({error.strerror or error}); {again}") from None


def _sum(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _copy(url: str, file: BinaryIO, sum_kind: str) -> str:
    """Download ``url`` into ``file`` and return its checksum of this kind."""
    digest = hashlib.new(sum_kind, usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as source:
        while chunk := source.read(_CHUNK_FETCH):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
