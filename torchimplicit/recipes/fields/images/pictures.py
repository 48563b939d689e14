"""Pictures from files, from scikit-image, and of text drawn on the spot: uint8 ``[height, width, channels]``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from torchimplicit.recipes.fields.images.text import TEXTS
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import replacing

MOST_PIXELS = 100_000_000
"""A file whose header promises more is not decoded: some ten thousand pixels square."""

LEAST_SIDE = 8
"""Below it there is nothing to fit."""

BundledName = Literal["astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "moon", "rocket", "page", "text"]
BUNDLED: tuple[BundledName, ...] = get_args(BundledName)
"""Pictures that come with scikit-image's wheel; nothing is downloaded."""

FILES = {"hubble_deep_field": "hubble_deep_field.jpg", "rocket": "rocket.jpg"}


@dataclass(frozen=True)
class Picture:
    """A picture, and what was done to it on the way.

    Attributes:
        name: for people.
        pixels: uint8 ``[height, width, channels]`` with one channel (grey) or three.
        notes: what a person who gave the file should know.
    """

    name: str
    pixels: Tensor
    notes: tuple[str, ...] = ()


def read_file(path: Path, size: int | None) -> Picture:
    """A picture file, no longer than ``size`` pixels on its longest side.

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
                found = prepared(image, path.name, size)
                count = getattr(image, "n_frames", 1)
                frames = (f"the first of {count} frames",) if count > 1 else ()
                return Picture(found.name, found.pixels, frames + found.notes)
    except Image.DecompressionBombError:
        raise UserError(f"{path} is too large a picture; make it smaller first") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path} is no picture that Pillow can read; give a PNG, JPEG, TIFF, WebP or BMP file"
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
    found = read_file(path, size)
    return Picture(name, found.pixels, found.notes)


def written(number: int, size: int) -> Tensor:
    """A square of text, black on white: a passage of our own, which ``number`` picks. Lines are some thirty pixels
    high at least, so that letters can be told from every other pixel, and at most eight; what goes over the border is
    cut off."""
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
    """Write a picture as PNG, in one move."""
    array = pixels.numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    with replacing(path) as draft:
        image.save(draft, format="PNG")


def quantized(values: Tensor) -> Tensor:
    """Values from -1 to 1 as a picture."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def prepared(image: Image.Image, name: str, size: int | None) -> Picture:
    """What Pillow has read, in grey or in colour, no longer than ``size`` pixels on its longest side.

    Raises:
        UserError: if its values are not those of a picture, or it is too small.
    """
    notes: list[str] = []
    image = ImageOps.exif_transpose(image) or image
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, name)
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


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
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
