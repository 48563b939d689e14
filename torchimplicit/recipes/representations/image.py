"""A picture as a field."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.operators import Operator, made
from torchimplicit.recipes.representations.fit import (
    FieldRunner,
    FieldTask,
    Grid,
    Parts,
    Representation,
    check_slopes,
    decibels,
    every_other,
    full_batch,
    noted,
    truncated,
    write_page,
)
from torchimplicit.recipes.representations.measured import MeasuredTask, Measurement, Target
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive
from torchimplicit.recipes.runtime.task import generator
from torchimplicit.recipes.runtime.trainer import Results

# -- settings ----------------------------------------------------------------------------------------------------------


LARGEST_PICTURE = 2048
LONGEST_EXPORT = 16 * LARGEST_PICTURE


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """A field fitted to a picture."""

    file: Path | None = None
    """Your own picture: PNG, JPEG, TIFF and others."""

    picture: str = "camera"
    """Built-in picture, if --file is not given: one of scikit-image (astronaut, camera, chelsea, coffee, moon, page,
    ...), or drawn text (text-0 to text-3)."""

    size: int = 128
    """Longest side in pixels; larger pictures are reduced to it."""

    held_out: Literal["none", "grid", "random"] = "none"
    """none: fit all pixels. grid, random: fit a quarter, validate on a quarter and test on a quarter, taken as every
    other pixel of every other row, or at random."""

    split_seed: int = 0
    """Random seed of the held-out pixels, of the pixels of --operator mask, and of the noise."""

    operator: Literal["none", "blur", "downsample", "mask", "radon"] = "none"
    """Operator between the picture and the data that are fitted: blur, average over squares (downsample), known pixels
    (mask), or line integrals (radon). Only the test sees the picture itself."""

    operator_size: float | None = None
    """Standard deviation of the blur in pixels (default 2), side of the squares (4), share of known pixels (0.25), or
    number of angles (30)."""

    noise: float = 0.0
    """Standard deviation of the noise added to the data, as a share of the data's."""

    target: Target = "values"
    """Data to fit: the picture's values; its gradient, which determines it up to a constant; or its Laplacian and its
    border values. The last two need exact derivatives: --gradient implicit --amortize solve."""

    export_size: int | None = None
    """Also sample the field into export.png, with this longest side in pixels."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "size", "export_size")
        not_negative(self, "split_seed", "noise")
        positive(self, "operator_size")
        if self.operator != "none" and self.target != "values":
            raise UserError("--operator and --target are two ways to know a picture: give one of them")
        if self.measures and self.held_out != "none":
            raise UserError("--operator and --target fit what is measured of all pixels: leave --held-out none")
        if self.size > LARGEST_PICTURE:
            raise UserError(
                f"--size {self.size} is more than {LARGEST_PICTURE}; a field of so many pixels is not practical"
            )
        if self.export_size is not None and self.export_size > LONGEST_EXPORT:
            raise UserError(f"--export-size {self.export_size} is more than {LONGEST_EXPORT}")

    @property
    def measures(self) -> bool:
        """Return whether the data differ from the field's values."""
        return self.operator != "none" or self.target != "values"


def image() -> PictureConfig:
    """A picture of 128 pixels, a few minutes on one core. The paper's: --size 512 --width 256 --steps 5000."""
    return PictureConfig(optimization=full_batch(600, 100), equilibria=truncated())


def generalization() -> PictureConfig:
    """A quarter of a picture's pixels, a minute on one core. The paper's: --size 512 --width 256 --steps 2000."""
    return PictureConfig(held_out="grid", optimization=full_batch(600, 50), equilibria=truncated())


TEXTS = (
    "A layer is implicit when its output is the solution of a problem rather than the end of a computation, and it can "
    "be differentiated all the same.",
    "Every point of the plane is asked for a state that its cell leaves where it is. What the state was a step ago is "
    "nearly what it is now.",
    "Letters are edges and little else. A network of slow waves cannot draw them, and one of fast waves fills the gaps "
    "between the samples with noise.",
    "Quartz, jasper and flint were weighed by hand; six of the boxes were lost in the mud, and nobody knew why the "
    "rest had kept so dry.",
)
"""Passages that are drawn as pictures of text."""


# -- Pictures from files, from scikit-image, and of text drawn on the spot: uint8 ``[height, width, channels]`` --------


MOST_PIXELS = 100_000_000
"""Largest number of pixels that a file may announce in its header, about ten thousand squared; others are not
decoded."""

LEAST_SIDE = 8
"""Smallest side worth fitting, in pixels."""

BundledName = Literal[
    "astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "moon", "phantom", "rocket", "page", "text"
]
BUNDLED: tuple[BundledName, ...] = get_args(BundledName)
"""Pictures in scikit-image's wheel; nothing is downloaded."""

FILES = {"hubble_deep_field": "hubble_deep_field.jpg", "rocket": "rocket.jpg"}


@dataclass(frozen=True)
class Picture:
    """A picture, with notes on how it was read.

    Attributes:
        name: name to display.
        pixels: uint8 ``[height, width, channels]`` with one channel (grey) or three.
        notes: what a person who gave the file should know.
    """

    name: str
    pixels: Tensor
    notes: tuple[str, ...] = ()


def read_file(path: Path, size: int | None) -> Picture:
    """Read a picture file, with at most ``size`` pixels on its longest side.

    Raises:
        UserError: if it cannot be read, or is too large or too small.
    """
    if path.is_dir():
        raise UserError(f"--file {path} is a folder; give a picture file, such as photo.png")
    if not path.is_file():
        raise UserError(f"--file {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            with Image.open(path) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise UserError(
                        f"{path} has {image.width} × {image.height} pixels, and at most {MOST_PIXELS // 10**6} million "
                        "are read; make it smaller first"
                    )
                image.load()
                cropped = prepared(image, path.name, size)
                count = getattr(image, "n_frames", 1)
                frames = (f"the first of {count} frames",) if count > 1 else ()
                return Picture(cropped.name, cropped.pixels, frames + cropped.notes)
    except Image.DecompressionBombError:
        raise UserError(f"{path} is too large a picture; make it smaller first") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path} is not a picture that Pillow can read; give a PNG, JPEG, TIFF, WebP or BMP file"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); the file may be damaged") from None


def bundled(name: str, size: int | None) -> Picture:
    """A picture of scikit-image, or a text drawn here (``text-0``, ``text-1``, ...).

    Raises:
        UserError: if there is none of this name, or scikit-image is missing.
    """
    if name.startswith("text-"):
        return Picture(name, written(int(name.removeprefix("text-")), size or 256))
    if name not in BUNDLED:
        raise UserError(f"there is no picture '{name}'; there are {', '.join(BUNDLED)}")
    try:
        import skimage.data
    except ImportError:
        raise UserError(
            "scikit-image, whose pictures are asked for, is not installed; pip install 'torchimplicit[recipes]', or "
            "give a picture of your own: --file photo.png"
        ) from None
    path = Path(skimage.data.__file__).parent / FILES.get(name, f"{name}.png")
    if not path.is_file():
        raise UserError(f"this version of scikit-image holds no {name}; give a picture of your own: --file photo.png")
    image = read_file(path, size)
    return Picture(name, image.pixels, image.notes)


def written(number: int, size: int) -> Tensor:
    """A square of black text on white: passage ``number``. It has at most eight lines of about thirty pixels or more,
    so that letters can be recognized from every other pixel; text beyond the border is cut off."""
    import matplotlib

    passage = TEXTS[number % len(TEXTS)]
    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    large = 4 * size  # drawn large and reduced, for smooth edges
    lines = min(8, max(2, size // 30))
    margin, pitch = large // 40, large // lines
    image = Image.new("L", (large, large), 255)
    font = ImageFont.truetype(str(font_file), round(0.8 * pitch))
    pen = ImageDraw.Draw(image)
    line, top = "", 0
    for word in passage.split():
        line = f"{line} {word}".strip()
        if pen.textlength(line, font=font) > large - 2 * margin:
            pen.text((margin, top), line, fill=0, font=font)
            line, top = "", top + pitch
    return torch.from_numpy(np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)).copy())[:, :, None]


def save(pixels: Tensor, path: Path) -> None:
    """Write a picture as PNG, atomically."""
    array = pixels.numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    with replacing(path) as draft:
        image.save(draft, format="PNG")


def quantized(values: Tensor) -> Tensor:
    """Values from -1 to 1 as a picture."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def prepared(image: Image.Image, name: str, size: int | None) -> Picture:
    """A picture from Pillow in grey or colour, with at most ``size`` pixels on its longest side.

    Raises:
        UserError: if its values are not those of a picture, or it is too small.
    """
    notes: list[str] = []
    image = ImageOps.exif_transpose(image) or image
    if image.mode.startswith("I") or image.mode == "F":
        image = eight_bits(image, name)
        notes.append("reduced to 8 bits")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("LA", "La")
        over = Image.new("RGBA", image.size, "white")
        over.alpha_composite(image.convert("RGBA"))
        image = over.convert("L" if grey else "RGB")
        notes.append("its transparent parts on white")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if min(image.size) < LEAST_SIDE:
        raise UserError(f"{name} has {image.width} × {image.height} pixels; a side must have {LEAST_SIDE} at least")
    if size is not None and max(image.size) > size:
        ratio = size / max(image.size)
        smaller = (max(LEAST_SIDE, round(image.width * ratio)), max(LEAST_SIDE, round(image.height * ratio)))
        notes.append(f"reduced from {image.width} × {image.height} pixels")
        image = image.resize(smaller, Image.Resampling.LANCZOS)
    array = np.asarray(image).copy()
    pixels = torch.from_numpy(array[:, :, None] if array.ndim == 2 else array)
    return Picture(name, pixels, tuple(notes))


def eight_bits(image: Image.Image, name: str) -> Image.Image:
    """A grey picture of 16 or 32 bits, or of floating-point numbers from 0 to 1."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds NaN or infinity")
    high = 1.0 if image.mode == "F" else 65535.0
    if values.min() < 0 or values.max() > high:
        raise UserError(
            f"{name} has grey values from {values.min():g} to {values.max():g}, and 0 to {high:g} is what can be read; "
            "save it as an 8- or 16-bit PNG"
        )
    return Image.fromarray((values * (255 / high)).round().astype(np.uint8))


# -- What there is to see of a picture's fit ---------------------------------------------------------------------------


def show(config: PictureConfig, task: FieldTask, results: Results, run: Run) -> None:
    """Write the reconstruction, the error map, the export if asked for, and the page."""
    grid = task.points
    assert isinstance(grid, Grid)
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    _, truth = grid.at(torch.arange(len(grid)))
    truth = truth.reshape(*grid.sizes, -1).cpu()
    values = task.on_grid(grid.sizes)
    pictures = [
        (folder / "original.png", "The picture."),
        (folder / "reconstruction.png", "The fitted field at the pixels of the picture."),
        (
            folder / "error.png",
            "Absolute error, mean over the channels: dark is none, bright is a quarter of the range.",
        ),
    ]
    save(quantized(truth), pictures[0][0])
    save(quantized(values), pictures[1][0])
    save(error_map(values, truth), pictures[2][0])
    error = float((values.clamp(-1, 1) - truth).square().mean())
    notes = [f"The PSNR over all pixels is {decibels(error, 2.0):.2f} dB."]
    if isinstance(task, MeasuredTask):
        notes = [
            f"Known: {task.operator}. The test is on the picture; measurements that were held back select the "
            f"weights. Tikhonov's solution, at the weight that is best for this picture, has {task.baseline():.2f} dB."
        ]
        if config.operator == "downsample":
            notes.append(f"Bicubic interpolation has {bicubic(task):.2f} dB.")
    elif config.held_out == "none":
        notes.append("All pixels were fitted: the validation and the test are on the same ones.")
    else:
        pictures.append((folder / "given.png", "The pixels that were fitted; the others are white."))
        save(_given(task, truth), pictures[-1][0])
    if config.export_size is not None:
        height, width = export_sizes(grid.sizes, config.export_size)
        written = export(config, task, (height, width), run)
        pictures.append((written, f"The field at {width} × {height} points (export.png)."))
    write_page("A picture as a field", task, results, run, pictures, notes)


def bicubic(task: MeasuredTask) -> float:
    """The PSNR of bicubic interpolation of the measured averages."""
    truth = task.truth()
    large = functional.interpolate(task.measured, truth.shape[-2:], mode="bicubic").clamp(-1, 1)
    return decibels(float((large - truth).square().mean()), 2.0)


def export(config: PictureConfig, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    """Write ``export.png``: the field at this height and width, or with this longest side."""
    grid = task.points
    assert isinstance(grid, Grid)
    if len(sizes) not in (1, 2):
        raise UserError("--export-size takes the longest side's pixels, or a height and a width")
    if len(sizes) == 1:
        sizes = export_sizes((grid.sizes[0], grid.sizes[1]), sizes[0])
    if max(sizes) > LONGEST_EXPORT:
        raise UserError(f"--export-size {max(sizes)} is more than {LONGEST_EXPORT}")
    path = run.product("export.png")
    save(task.on_grid(sizes, quantized), path)
    return path


def export_sizes(sizes: tuple[int, ...], longest: int) -> tuple[int, int]:
    """Height and width in the same proportions, with the given longest side."""
    height, width = sizes
    ratio = longest / max(sizes)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def error_map(values: Tensor, truth: Tensor) -> Tensor:
    """The absolute error as colours, from 0 to a quarter of the range: uint8 ``[height, width, 3]``."""
    size = ((values.clamp(-1, 1) - truth).abs().mean(-1) / 0.5).clamp(0, 1)
    import matplotlib

    colours = matplotlib.colormaps["magma"](size.numpy())[:, :, :3]
    return torch.from_numpy((colours * 255).round()).to(torch.uint8)


def _given(task: FieldTask, truth: Tensor) -> Tensor:
    shown = torch.ones_like(truth).flatten(0, 1)
    known = task.parts.training
    shown[known] = truth.flatten(0, 1)[known]
    return quantized(shown.reshape(truth.shape))


# -- The recipes that fit pictures -------------------------------------------------------------------------------------


def frequencies(config: PictureConfig, longest: int) -> float:
    """The scale of the frequencies: the paper's 256 for a picture of 512 pixels; 128 if a quarter of the pixels, or a
    similarly small number of measurements, is given; in proportion for other sizes."""
    part = config.held_out != "none" or config.operator in ("downsample", "mask", "radon")
    return longest / (4 if part else 2)


def build(config: PictureConfig) -> FieldTask:
    """The task."""
    image = picture(config)
    grid = Grid(image.pixels)
    height, width, channels = image.pixels.shape
    kind = "grey" if channels == 1 else "colour"
    about = noted(f"{image.name}: {width} × {height} pixels in {kind}", image.notes)
    scale = frequencies(config, max(height, width))
    if not config.measures:
        return FieldTask(config, grid, parts(config, grid), scale, about=about)
    known: Operator
    if config.target != "values":
        check_slopes(config)
        spacing = (2 * grid.corner[0] / height, 2 * grid.corner[1] / width)
        known = Measurement(target=config.target, spacing=spacing)
    else:
        assert config.operator != "none"
        known = made(config.operator, config.operator_size, height, width, config.split_seed)
    return MeasuredTask(config, grid, known, scale, noise=config.noise, seed=config.split_seed, about=about)


def parts(config: PictureConfig, grid: Grid) -> Parts:
    """Split the pixels."""
    if config.held_out == "none":
        return Parts.same(grid)
    if config.held_out == "grid":
        return Parts(*(every_other(grid.sizes, offset) for offset in ((0, 0), (0, 1), (1, 1))))
    order = torch.randperm(len(grid), generator=generator(config.split_seed, -7))
    quarter = len(grid) // 4
    return Parts(*(order[i * quarter : (i + 1) * quarter].sort().values for i in range(3)))


def picture(config: PictureConfig) -> Picture:
    """Read the picture that the settings ask for."""
    return _read(config.file, config.picture, config.size)


@lru_cache(maxsize=1)
def _read(file: Path | None, name: str, size: int) -> Picture:
    """Cached, as the check, the model and the display need it."""
    return bundled(name, size) if file is None else read_file(file, size)


def ready(config: PictureConfig) -> None:
    """Raise if the picture cannot be read, or has too few pixels for its splits."""
    image = picture(config)
    if config.target != "values":
        check_slopes(config)
    if config.held_out != "none" and image.pixels.shape[0] * image.pixels.shape[1] < 256:
        raise UserError(f"{image.name} has too few pixels to hold some out; use --held-out none")


RUNNER = FieldRunner(build, show, ready, export)
