"""Videos from folders of pictures, from animated pictures, and, with PyAV, from video files."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from torchimplicit.recipes.fields.images.pictures import MOST_PIXELS, prepared, read_file
from torchimplicit.recipes.fields.video.config import VideoConfig
from torchimplicit.recipes.fields.video.synthesis import RATE, synthesized
from torchimplicit.recipes.runtime.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

MOST_POINTS = 1 << 27
"""Pixels of all frames together."""

DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are cut short, or broken, or would be huge."""


@dataclass(frozen=True)
class Clip:
    """A video, and what was done to it on the way.

    Attributes:
        name: for people.
        pixels: uint8 ``[frames, height, width, channels]`` with one channel (grey) or three.
        rate: frames a second.
        notes: what a person who gave the file should know.
    """

    name: str
    pixels: Tensor
    rate: float
    notes: tuple[str, ...] = ()


@dataclass
class _Reading:
    """What is known of a file while its frames are read."""

    rate: float
    notes: list[str]


def clip_of(config: VideoConfig) -> Clip:
    """The video that the settings ask for.

    Raises:
        UserError: if it cannot be read, or there is nothing in it to fit.
    """
    if config.file is None:
        assert config.frames is not None
        return Clip(f"made-up {config.clip}", synthesized(config.clip, config.frames, config.size), RATE)
    path = config.file
    if not path.exists():
        raise UserError(f"--file {path} does not exist")
    known = _Reading(rate=RATE, notes=[])
    source = _folder if path.is_dir() else _animated if _is_picture(path) else _decoded
    with closing(source(path, config.size, known)) as frames:
        wanted = islice(frames, config.first, None, config.every)
        pixels = _together(path, wanted if config.frames is None else islice(wanted, config.frames))
    if len(pixels) < 2:
        raise UserError(
            f"{path} has {'no frame' if len(pixels) == 0 else 'one frame'} from --first {config.first} on, with "
            f"--every {config.every}; a video needs two (and implicit-image fits a picture)"
        )
    if config.first or config.every > 1:
        each = f"every {config.every} frames" if config.every > 1 else "all frames"
        known.notes.append(f"{each} from number {config.first} on")
    return Clip(path.name, pixels, known.rate / config.every, tuple(dict.fromkeys(known.notes)))


def _together(path: Path, frames: Iterator[Tensor]) -> Tensor:
    """All frames ``[frames, height, width, channels]``, of one size, in colour if one of them is."""
    found: list[Tensor] = []
    for number, frame in enumerate(frames):
        if found and frame.shape[:2] != found[0].shape[:2]:
            raise UserError(
                f"the frames of {path} differ in size: number {number} would be {frame.shape[1]} × {frame.shape[0]} "
                f"pixels, and the first {found[0].shape[1]} × {found[0].shape[0]}"
            )
        found.append(frame)
        if len(found) * frame.shape[0] * frame.shape[1] > MOST_POINTS:
            raise UserError(f"{path} has too many frames for --size; give fewer --frames, or a smaller --size")
    channels = max((frame.shape[2] for frame in found), default=3)
    return torch.stack([frame.expand(-1, -1, channels) for frame in found]) if found else torch.empty(0)


def _folder(path: Path, size: int, known: _Reading) -> Generator[Tensor]:
    """The pictures of a folder: frame2 before frame10."""
    files = [one for one in path.iterdir() if one.suffix.lower() in PICTURES and one.is_file()]
    if not files:
        raise UserError(f"--file {path} is a folder without pictures ({', '.join(PICTURES)})")
    for file in sorted(files, key=lambda one: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", one.name)]):
        picture = read_file(file, size)
        known.notes += picture.notes
        yield picture.pixels


def _is_picture(path: Path) -> bool:
    """Whether Pillow knows the file."""
    try:
        with Image.open(path) as image:
            return image.format != "MPEG"  # whose size Pillow knows, and no more
    except UnidentifiedImageError:
        return False
    except Image.DecompressionBombError:
        raise UserError(f"{path} has frames that are too large; make them smaller first") from None
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read ({error}); the file may be damaged") from None


def _animated(path: Path, size: int, known: _Reading) -> Generator[Tensor]:
    """The frames of a GIF, PNG or WebP file."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
        if image.width * image.height > MOST_PIXELS:
            raise UserError(f"{path} has frames of {image.width} × {image.height} pixels; make them smaller first")
        for frame in _until_damaged((one.copy() for one in ImageSequence.Iterator(image)), known, DAMAGED):
            duration = frame.info.get("duration")
            if duration:
                known.rate = 1000 / float(duration)
            picture = prepared(frame, path.name, size)
            known.notes += picture.notes
            yield picture.pixels


def _decoded(path: Path, size: int, known: _Reading) -> Generator[Tensor]:
    """The frames of a video file."""
    try:
        import av
    except ImportError:
        raise UserError(
            f"{path} is no animated picture, and to read video files PyAV is needed: pip install "
            "'torchimplicit[video]'; or give a folder of pictures, or a GIF"
        ) from None
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError, OSError) as error:
        raise UserError(f"{path} is no video that FFmpeg can read ({_reason(error)})") from None
    with container:
        if not container.streams.video:
            raise UserError(f"{path} holds no video")
        stream = container.streams.video[0]
        if stream.average_rate:
            known.rate = float(stream.average_rate)
        for frame in _until_damaged(container.decode(stream), known, (av.FFmpegError,)):
            if frame.width * frame.height > MOST_PIXELS:
                raise UserError(f"{path} has frames of {frame.width} × {frame.height} pixels; make them smaller first")
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            if frame.rotation % 360:  # a telephone that was held upright
                image = image.rotate(frame.rotation, expand=True)
            picture = prepared(image, path.name, size)
            known.notes += picture.notes
            yield picture.pixels


def _until_damaged(frames: Iterator[Any], known: _Reading, errors: tuple[type[Exception], ...]) -> Iterator[Any]:
    """The frames that can be decoded, up to the first that cannot."""
    number = 0
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except errors as error:
            known.notes.append(f"only {number} frames of it, for the file is damaged there ({_reason(error)})")
            return
        number += 1
        yield frame


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".")
