"""A video as a field of time and position."""

from __future__ import annotations

import math
import re
import struct
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from math import prod
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.representations.fit import (
    FieldRunner,
    FieldTask,
    Grid,
    Parts,
    Representation,
    chunk_points,
    decibels,
    full_batch,
    noted,
    truncated,
    write_page,
)
from torchimplicit.recipes.representations.image import (
    MOST_PIXELS,
    bundled,
    error_map,
    export_sizes,
    prepared,
    quantized,
    read_file,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.page import axes, canvas, save_figure, style, styled
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive
from torchimplicit.recipes.runtime.trainer import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# -- settings ----------------------------------------------------------------------------------------------------------


ClipName = Literal["shapes", "flight"]

LARGEST_VIDEO = 2048


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """A field fitted to a video."""

    file: Path | None = None
    """Your own video: a folder of pictures in the order of their names, an animated GIF, PNG or WebP, or, with
    'torchimplicit[video]', what FFmpeg reads (MP4, MOV, MKV, WebM, AVI)."""

    clip: ClipName = "shapes"
    """Built-in video, if --file is not given: moving shapes, or a flight over a picture of scikit-image."""

    first: int = 0
    """First frame of the file to use, counted from 0."""

    every: int = 1
    """Use one in this many frames."""

    frames: int | None = 12
    """Largest number of frames; None takes all."""

    size: int = 48
    """Longest side in pixels; larger frames are reduced to it."""

    export_size: tuple[int, ...] = ()
    """Also sample the field at this resolution: frames, height and width; or the longest side in pixels."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "every", "frames", "size")
        not_negative(self, "first")
        if self.size > LARGEST_VIDEO:
            raise UserError(
                f"--size {self.size} is more than {LARGEST_VIDEO}; a field of so many pixels is not practical"
            )
        if self.frames is not None and self.frames < 2:
            raise UserError("--frames 1 is a picture; fit it with implicit-image")
        if self.frames is None and self.file is None:
            raise UserError("--frames None takes all of a file, and there is none; add --file video.gif")
        check_export(self.export_size)


def check_export(sizes: tuple[int, ...]) -> None:
    """Raise for an export resolution that makes no sense."""
    if len(sizes) > 3:
        raise UserError("--export-size takes frames, height and width; or a height and a width; or the longest side")
    if any(not 1 <= size <= 4 * LARGEST_VIDEO for size in sizes):
        raise UserError(f"--export-size {' '.join(map(str, sizes))} must lie in [1, {4 * LARGEST_VIDEO}]")


def video() -> VideoConfig:
    """Twelve frames of 48 pixels, minutes on one core, and at most 65,536 points a step. The paper's: --size 512
    --frames None --width 1024 --steps 10000 --frequencies 128 --amortize off, for a GPU."""
    optimization = replace(full_batch(600, 100), batch_size=65536)
    return VideoConfig(optimization=optimization, equilibria=truncated())


# -- Videos made on the spot: uint8 ``[frames, height, width, 3]`` -----------------------------------------------------


RATE = 25.0
"""Frames per second, if the source does not define them."""

Values = np.ndarray[Any, np.dtype[np.float64]]


def synthesized(name: ClipName, frames: int, size: int) -> Tensor:
    """The synthesized clip, ``size`` pixels square.

    Raises:
        UserError: if scikit-image, whose picture is asked for, is missing.
    """
    return _shapes(frames, size) if name == "shapes" else _flight(frames, size)


def _shapes(frames: int, size: int) -> Tensor:
    """A bouncing disk, a rotating square and a growing ring in front of a slow wave."""
    y, x = (np.mgrid[:size, :size] + 0.5) * (2 / size) - 1
    soft = 2 / size  # edges are a pixel wide
    shown = []
    for number in range(frames):
        t = number / max(1, frames - 1)
        wave = 0.5 + 0.3 * np.sin(3 * x + 2 * y + 2 * math.pi * t)
        picture = np.stack([0.2 + 0.3 * wave, 0.35 + 0.3 * wave, 0.6 - 0.2 * wave], -1)
        turn = 0.5 * math.pi * t
        u, v = x + 0.45, y - 0.4 + 0.2 * t
        u, v = math.cos(turn) * u + math.sin(turn) * v, math.cos(turn) * v - math.sin(turn) * u
        away = np.hypot(x - 0.4, y - 0.35)
        for distance, colour in (
            (np.hypot(x + 0.7 - 1.3 * t, y + 0.1 + 0.5 * abs(math.sin(1.5 * math.pi * t))) - 0.28, (0.95, 0.75, 0.2)),
            (np.maximum(np.abs(u), np.abs(v)) - 0.3, (0.85, 0.25, 0.3)),
            (np.abs(away - 0.2 - 0.25 * t) - 0.08, (0.92, 0.95, 0.9)),
        ):
            inside: Values = np.clip(0.5 - distance / soft, 0, 1)[..., None]
            picture = (1 - inside) * picture + inside * np.array(colour)
        shown.append((255 * picture).round().astype(np.uint8))
    return torch.from_numpy(np.stack(shown))


def _flight(frames: int, size: int) -> Tensor:
    """A window that zooms into a picture and slides over it."""
    picture = Image.fromarray(bundled("chelsea", None).pixels.numpy())
    shown = []
    for number in range(frames):
        t = number / max(1, frames - 1)
        side = (1 - 0.35 * t) * min(picture.size)
        left = (0.15 + 0.35 * t) * (picture.width - side)
        top = (0.1 + 0.3 * t) * (picture.height - side)
        box = (left, top, left + side, top + side)
        shown.append(np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=box)))
    return torch.from_numpy(np.stack(shown))


# -- Videos from folders of pictures, from animated pictures, and, with PyAV, from video files -------------------------


PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

MOST_POINTS = 1 << 27
"""Largest number of pixels of all frames together."""

DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, Image.DecompressionBombError)
"""Exceptions that Pillow raises for files that are truncated, broken or oversized."""


@dataclass(frozen=True)
class Clip:
    """A video, with notes on how it was read.

    Attributes:
        name: name to display.
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
    """State of a file while its frames are read."""

    rate: float
    notes: list[str]


def clip(config: VideoConfig) -> Clip:
    """Read or make the video that the settings ask for.

    Raises:
        UserError: if it cannot be read, or there is nothing in it to fit.
    """
    return _clip(config.file, config.clip, config.first, config.every, config.frames, config.size)


@lru_cache(maxsize=1)
def _clip(path: Path | None, name: ClipName, first: int, every: int, count: int | None, size: int) -> Clip:
    """Cached, as the check, the model and the display need it."""
    if path is None:
        assert count is not None
        return Clip(f"made-up {name}", synthesized(name, count, size), RATE)
    if not path.exists():
        raise UserError(f"--file {path} does not exist")
    known = _Reading(rate=RATE, notes=[])
    source = _folder if path.is_dir() else _animated if _is_picture(path) else _decoded
    with closing(source(path, size, known)) as frames:
        wanted = islice(frames, first, None, every)
        pixels = _together(path, islice(wanted, count))
    if len(pixels) < 2:
        raise UserError(
            f"{path} has {'no frame' if len(pixels) == 0 else 'one frame'} from --first {first} on, with "
            f"--every {every}; a video needs two (and implicit-image fits a picture)"
        )
    if first or every > 1:
        known.notes.append(f"{f'every {every}' if every > 1 else 'all'} frames from number {first} on")
    return Clip(path.name, pixels, known.rate / every, tuple(dict.fromkeys(known.notes)))


def _together(path: Path, frames: Iterator[Tensor]) -> Tensor:
    """All frames ``[frames, height, width, channels]``, in one size; in colour if any of them is."""
    parts: list[Tensor] = []
    for number, frame in enumerate(frames):
        if parts and frame.shape[:2] != parts[0].shape[:2]:
            raise UserError(
                f"the frames of {path} differ in size: number {number} would be {frame.shape[1]} × {frame.shape[0]} "
                f"pixels, and the first {parts[0].shape[1]} × {parts[0].shape[0]}"
            )
        parts.append(frame)
        if len(parts) * frame.shape[0] * frame.shape[1] > MOST_POINTS:
            raise UserError(f"{path} has too many frames for --size; give fewer --frames, or a smaller --size")
    channels = max((frame.shape[2] for frame in parts), default=3)
    return torch.stack([frame.expand(-1, -1, channels) for frame in parts]) if parts else torch.empty(0)


def _folder(path: Path, size: int, known: _Reading) -> Generator[Tensor]:
    """The pictures of a folder in natural order: frame2 before frame10."""
    files = [one for one in path.iterdir() if one.suffix.lower() in PICTURES and one.is_file()]
    if not files:
        raise UserError(f"--file {path} is a folder without pictures ({', '.join(PICTURES)})")
    for file in sorted(files, key=lambda one: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", one.name)]):
        picture = read_file(file, size)
        known.notes += picture.notes
        yield picture.pixels


def _is_picture(path: Path) -> bool:
    """Return whether Pillow knows the file."""
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
            f"{path} is not an animated picture, and to read video files PyAV is needed: pip install "
            "'torchimplicit[video]'; or give a folder of pictures, or a GIF"
        ) from None
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a video that FFmpeg can read ({_reason(error)})") from None
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
    """The frames up to the first that cannot be decoded."""
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


# -- Frames side by side, and how well each is fitted ------------------------------------------------------------------


SHOWN = 6
"""Frames in the figure, spread evenly over the video."""


def chosen(count: int) -> list[int]:
    """The indices of the frames shown."""
    shown = min(SHOWN, count)
    return sorted({round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)})


def strip(rows: dict[str, Sequence[Tensor]]) -> Figure:
    """Frames of videos, one named row each: pictures uint8 ``[height, width, channels]``."""
    first, *_ = rows.values()
    numbers = chosen(len(first))
    height, width = first[0].shape[:2]
    across = 9.0 / len(numbers)
    with styled():
        figure = canvas(9.0, len(rows) * across * height / width + 0.35)
        grid = figure.subplots(len(rows), len(numbers), squeeze=False)
        for line, (name, pictures) in zip(grid, rows.items(), strict=True):
            for ax, number in zip(line, numbers, strict=True):
                shown = pictures[number].numpy()
                ax.imshow(shown[:, :, 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=255)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if pictures is first:
                    ax.set_title(f"frame {number}", fontsize=8)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def over_frames(decibels: Sequence[float]) -> Figure:
    """The PSNR of every frame."""
    with styled():
        figure, (ax,) = axes(1, width=6.0, height=3.0)
        ax.plot(range(len(decibels)), decibels, **style(0))
        ax.set(xlabel="frame", ylabel="PSNR (dB)")
    return figure


# -- Videos into files: GIF by Pillow, and MP4 where PyAV is there -----------------------------------------------------


SHORTEST = 20
"""Shortest duration of a GIF's frame, in milliseconds: browsers slow down shorter ones."""


def can_write_mp4() -> bool:
    """Return whether PyAV is installed."""
    return find_spec("av") is not None


def save(frames: Iterator[Tensor], rate: float, path: Path) -> None:
    """Write frames, uint8 ``[height, width, channels]`` each, atomically, with one frame in memory at a time.

    Args:
        frames: one at least, all of one size.
        rate: frames a second.
        path: ``.gif``, which has 256 colours a frame, or ``.mp4``, whose sides are even: a last row or column is
            repeated where that is needed.
    """
    with replacing(path) as draft:
        if path.suffix == ".gif":
            images = (Image.fromarray(_three_channels(frame).numpy()) for frame in frames)
            shown: dict[str, Any] = {"duration": max(SHORTEST, round(1000 / rate)), "loop": 0}
            next(images).save(draft, format="GIF", save_all=True, append_images=images, **shown)
        else:
            _encode(frames, rate, draft)


def _encode(frames: Iterator[Tensor], rate: float, path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            image = _even(_three_channels(frame))
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "14"}
            array = np.ascontiguousarray(image.numpy())
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        assert stream is not None
        container.mux(stream.encode())


def _three_channels(frame: Tensor) -> Tensor:
    return frame.expand(-1, -1, 3).contiguous()


def _even(image: Tensor) -> Tensor:
    height, width = image.shape[:2]
    if height % 2 == width % 2 == 0:
        return image
    planes = image.permute(2, 0, 1)[None].float()
    padded = functional.pad(planes, (0, width % 2, 0, height % 2), mode="replicate")
    return padded[0].permute(1, 2, 0).to(image.dtype)


# -- What there is to see of a video's fit -----------------------------------------------------------------------------


def show(config: VideoConfig, task: FieldTask, results: Results, run: Run) -> None:
    """Write the reconstruction, both videos with the error, the frames, the export if asked for, and the page."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    known = clip(config)
    pixels, rate = known.pixels, known.rate
    fitted: list[Tensor] = []
    misfits: list[Tensor] = []
    errors: list[float] = []
    for number, values in enumerate(sampled_frames(task, tuple(pixels.shape[:3]))):
        truth = pixels[number].float() / 127.5 - 1
        errors.append(float((values.clamp(-1, 1) - truth).double().square().mean()))
        misfits.append(error_map(values, truth))
        fitted.append(quantized(values))
    several = (
        torch.cat([one.expand(-1, -1, 3) for one in together], 1)
        for together in zip(pixels, fitted, misfits, strict=True)
    )
    save(several, rate, folder / "comparison.gif")
    save(iter(fitted), rate, run.product("reconstruction.gif"))
    if can_write_mp4():
        save(iter(fitted), rate, run.product("reconstruction.mp4"))
    of_frames = [decibels(error, 2.0) for error in errors]
    drawn = strip({"video": list(pixels), "field": fitted, "error": misfits})
    save_figure(drawn, folder / "frames.png", 110)
    save_figure(over_frames(of_frames), folder / "frames-psnr.png", 110)
    shown = [
        (
            folder / "comparison.gif",
            "The video, the field, and the error's size: dark is none, bright a quarter of the "
            "range. A GIF has 256 colours; the figures are those of the field itself.",
        ),
        (folder / "frames.png", "Frames of the video, the field at its pixels, and the error's size."),
        (folder / "frames-psnr.png", "The PSNR of every frame."),
    ]
    notes = [
        f"The PSNR over all pixels is {decibels(fmean(errors), 2.0):.2f} dB; by frame it is from {min(of_frames):.2f} "
        f"dB (frame {of_frames.index(min(of_frames))}) to {max(of_frames):.2f} dB (frame "
        f"{of_frames.index(max(of_frames))}). All pixels were fitted: the validation and the test are on the same ones."
    ]
    if config.export_size:
        written = export(config, task, config.export_size, run)
        notes.append(f"The field sampled at another size is in {written.name}.")
    write_page("A video as a field", task, results, run, shown, notes)


def export(config: VideoConfig, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    """Write ``export.mp4``, or ``export.gif`` without PyAV: the field at this number of frames, height and width."""
    check_export(sizes)
    known = clip(config)
    frames, height, width = known.pixels.shape[:3]
    if len(sizes) == 1:
        height, width = export_sizes((height, width), sizes[0])
    elif len(sizes) == 2:
        height, width = sizes
    else:
        frames, height, width = sizes
    path = run.product("export.mp4" if can_write_mp4() else "export.gif")
    images = (quantized(values) for values in sampled_frames(task, (frames, height, width)))
    save(images, known.rate * frames / len(known.pixels), path)
    return path


def sampled_frames(task: FieldTask, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """The field on a grid, a frame ``[height, width, channels]`` at a time."""
    pixels = prod(sizes[1:])
    for number in range(sizes[0]):
        yield task.cells(sizes, range(number * pixels, (number + 1) * pixels)).reshape(*sizes[1:], -1)


# -- The recipe that fits a video --------------------------------------------------------------------------------------


def build(config: VideoConfig) -> FieldTask:
    """The task. Grid cells are cubes: a pixel's side equals a frame's duration. The scale of the frequencies is that of
    pictures: half the longest side."""
    moving = clip(config)
    grid = Grid(moving.pixels)
    frames, height, width, channels = moving.pixels.shape
    kind = "grey" if channels == 1 else "colour"
    about = noted(f"{moving.name}: {frames} frames of {width} × {height} pixels in {kind}", moving.notes)
    return FieldTask(config, grid, Parts.same(grid), max(height, width) / 2, about=about, held="neither")


def ready(config: VideoConfig) -> None:
    """Raise if the video cannot be read, or its states do not fit in memory."""
    chunk_points(config, clip(config).pixels[..., 0].numel())


RUNNER = FieldRunner(build, show, ready, export)
