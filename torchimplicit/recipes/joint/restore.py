"""``torchimplicit restore``: restores a degraded picture with a trained decoder as prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from torch import Tensor

from torchimplicit._resolve import resolve
from torchimplicit.models import EquilibriumDecoder
from torchimplicit.problems import JointInference
from torchimplicit.recipes.joint.decoder import Joint, fitted, found, joint_solver, squared_error
from torchimplicit.recipes.operators import USUAL, Blur, Downsample, Known, Matrix
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.execution import opened
from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.solution import Solution

# -- An image from what a linear operator makes of it ------------------------------------------------------------------


class Restored(NamedTuple):
    """The result of a restoration.

    Attributes:
        images: ``[batch, channels, height, width]`` in [0, 1], each at its exact equilibrium.
        measured: what the operator makes of them.
        solution: the joint solve.
    """

    images: Tensor
    measured: Tensor
    solution: Solution


def restored(
    decoder: EquilibriumDecoder, measured: Tensor, operator: Any, joint: Joint, pixels: tuple[int, int, int]
) -> Restored:
    """The images of a decoder whose measurements are nearest to the given ones; latent and equilibrium are found
    together.

    Args:
        decoder: the prior, as :func:`torchimplicit.models.conv_decoder` makes one, trained.
        measured: ``[batch, ...]``.
        operator: linear: a function of images, or an object with a method ``A`` (a linear operator of deepinv, say).
        joint: the solve's settings; the weight of the latent's prior is per pixel, as in training.
        pixels: pixels of an image: channels, height, width.

    Raises:
        UserError: an operator that gives something else than the measurements' shape.
    """
    measure = applied(operator)
    with torch.no_grad():
        seen = measure(torch.zeros(len(measured), *pixels, dtype=measured.dtype, device=measured.device))
        if seen.shape != measured.shape:
            raise UserError(
                f"the operator makes {list(seen.shape[1:])} of an image of {list(pixels)}, and what was measured is "
                f"{list(measured.shape[1:])}"
            )
        size = norm(measure, torch.zeros(1, *pixels, dtype=measured.dtype, device=measured.device))
    count = math.prod(pixels)

    # a sum over pixels, as published; and an operator whose norm is one, so that steps fit it
    def loss(generated: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
        misfit = ((measure(generated) - wanted) / size).square().flatten(1).sum(dim=1)
        return misfit + count * joint.prior * x.square().mean(dim=1)

    problem: JointInference = decoder.inference(loss, joint.step_size / count)
    with torch.no_grad():
        solution = found(decoder, problem, joint_solver(joint, joint.test_steps), measured)
        exact = resolve(problem, solution.value, measured, solver=decoder.equilibrium.solver, throw=False)
        images = decoder.head(exact.solution.value)
    return Restored(images.clamp(0, 1), measure(images), solution)


def applied(operator: Any) -> Callable[[Tensor], Tensor]:
    """An operator as a function of images: its method ``A``, or itself."""
    function = getattr(operator, "A", operator)
    if not callable(function):
        raise UserError(f"an operator is a function of images, or has a method A, and {operator!r} is neither")

    def measure(images: Tensor) -> Tensor:
        out: Tensor = function(images)
        return out

    return measure


def norm(measure: Callable[[Tensor], Tensor], like: Tensor, steps: int = 20) -> float:
    """The spectral norm of a linear operator, by power iteration."""
    pull = torch.func.vjp(measure, like)[1]
    image = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    size = 0.0
    for _ in range(steps):
        image = image / image.norm().clamp_min(torch.finfo(image.dtype).tiny)
        image = pull(measure(image))[0]
        size = float(image.norm())
    return math.sqrt(size) if size > 0 else 1.0


# -- The command -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restore:
    """Restore a picture with the decoder of a jiio-generation or jiio-inverse run that was trained on similar pictures
    (your own: torchimplicit train jiio-generation-images --images FOLDER)."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """Directory of a jiio-generation or jiio-inverse run."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The degraded picture: noisy, blurred, small, or with transparent pixels where nothing is known. With a matrix as
    --operator, a .npy file of measurements."""

    operator: str = "noise"
    """How the picture was degraded: blur, mask (transparent pixels are unknown), noise or downsample; or a picture that
    is white where pixels are known; or a .npy file with a matrix [measurements, channels * height * width]."""

    operator_size: float | None = None
    """Standard deviation of the blur in pixels (default 2), or factor of downsampling (default 4)."""

    prior: float | None = None
    """Weight of the latent's prior; larger for noisier pictures. Default: the run's."""

    steps: int = 200
    """Largest number of joint-solve steps."""

    simulate: bool = False
    """FILE is a clean picture: degrade it by the operator first, restore it, and report the error."""

    noise: float = 0.0
    """With --simulate, standard deviation of the noise added, for pixels between 0 and 1."""

    output: Path | None = None
    """File for the restored picture. Default: NAME-restored.png beside FILE."""

    def run(self, console: Console) -> int:
        target = self.output or self.file.with_name(f"{self.file.stem}-restored.png")
        if not target.parent.is_dir():
            raise UserError(f"{target.parent} is not a folder: the restored picture cannot be written to {target}")
        run, runner, settings = opened(self.path)
        task: Any = getattr(getattr(runner, "first", None), "best", lambda *_: None)(settings, run)
        decoder = getattr(task, "decoder", None)
        if not isinstance(decoder, EquilibriumDecoder):
            raise UserError(f"{run} has no decoder: restore takes a run of jiio-generation-... or jiio-inverse-...")
        decoder = decoder.cpu().eval().requires_grad_(False)
        pixels = task.data.pixels
        operator, measured, clean = self._measured(pixels)
        weight = float(getattr(task, "prior", settings.joint.prior)) if self.prior is None else self.prior
        joint = replace(settings.joint, test_steps=self.steps, prior=weight)
        result = restored(decoder, measured, operator, joint, pixels)
        misfit = float((result.measured - measured).square().mean().sqrt())
        array = (result.images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        with replacing(target) as draft:
            Image.fromarray(array[:, :, 0] if pixels[0] == 1 else array).save(draft, format="PNG")
        if clean is not None:
            error = float(squared_error(result.images, clean))
            console.print(f"PSNR to the clean picture: {-10 * math.log10(max(error, 1e-20)):.2f} dB")
        console.print(f"Root mean square misfit to what was measured: {misfit:.4f}; {result.solution.summary()}")
        console.print(f"Written to {target}", highlight=False, soft_wrap=True)
        return 0

    def _measured(self, pixels: tuple[int, int, int]) -> tuple[Any, Tensor, Tensor | None]:
        """The operator, the measurements, and the clean picture if there is one."""
        if self.steps < 1:
            raise UserError(f"--steps {self.steps} must be positive")
        if not 0 <= self.noise < math.inf or (self.noise and not self.simulate):
            raise UserError(f"--noise {self.noise:g} must be a standard deviation, and is for --simulate alone")
        size = USUAL.get(self.operator) if self.operator_size is None else self.operator_size  # type: ignore[call-overload]
        if size is not None and not 0 < size < math.inf:
            raise UserError(f"--operator-size {size} must be positive")
        channels, height, width = pixels
        operator: Any
        shape = (height, width)
        if self.operator == "noise":
            operator = _itself
        elif self.operator == "blur":
            operator = Blur(size)
        elif self.operator == "downsample":
            operator = Downsample(int(size))
            shape = (-(-height // operator.factor), -(-width // operator.factor))
        elif self.operator == "mask":
            operator = Known(_opaque(self.file, (height, width)))
        elif Path(self.operator).suffix == ".npy":
            operator = Matrix(torch.from_numpy(_array(Path(self.operator)).astype(np.float32)))
        elif Path(self.operator).is_file():
            operator = Known(_picture(Path(self.operator), 1, (height, width))[0] > 0.5)
        else:
            raise UserError(
                f"--operator {self.operator} is none of blur, mask, noise and downsample, and no file: a picture that "
                "is white where pixels are known, or a matrix in a .npy file"
            )
        if isinstance(operator, Known) and not bool(operator.known.any()):
            raise UserError("no pixel is known by the mask")
        if self.simulate:
            clean = _picture(self.file, channels, (height, width))[None]
            seen = operator(clean)
            return (
                operator,
                seen + self.noise * torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)),
                clean,
            )
        if self.file.suffix == ".npy":
            return operator, torch.from_numpy(_array(self.file).astype(np.float32).reshape(1, -1)), None
        seen = _picture(self.file, channels, shape)[None]
        return operator, operator(seen) if isinstance(operator, Known) else seen, None


def _itself(images: Tensor) -> Tensor:
    return images


def _opened(file: Path) -> Image.Image:
    from torchimplicit.recipes.representations.image import eight_bits

    try:
        with Image.open(file) as image:
            image.load()
            upright = ImageOps.exif_transpose(image) or image.copy()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file} is not a picture that Pillow can read ({error})") from None
    return eight_bits(upright, file.name) if upright.mode[0] in "IF" else upright


def _picture(file: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """Read a picture in [0, 1], ``[channels, height, width]``, in that size."""
    image = _opened(file).convert("L" if channels == 1 else "RGB")
    array = torch.from_numpy(np.asarray(image).copy())
    values = array[None] if channels == 1 else array.permute(2, 0, 1)
    if values.shape[1:] != size:
        if abs(values.shape[1] * size[1] - values.shape[2] * size[0]) > max(size):
            raise UserError(
                f"{file} has {values.shape[2]} × {values.shape[1]} pixels, and {size[1]} × {size[0]} are needed: the "
                "decoder makes pictures of one shape, and this one has other proportions"
            )
        values = fitted(values, size)
    return values.float() / 255


def _opaque(file: Path, size: tuple[int, int]) -> Tensor:
    """Mask of the opaque pixels of a picture, bool ``[height, width]``."""
    image = _opened(file)
    if "A" not in image.getbands() and "transparency" not in image.info:
        raise UserError(f"{file} has no transparent pixels: with --operator mask these are the unknown ones")
    alpha = torch.from_numpy(np.asarray(image.convert("RGBA"))[:, :, 3].copy())[None]
    return (alpha if alpha.shape[1:] == size else fitted(alpha, size))[0] > 127


def _array(file: Path) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is not an array that NumPy can read ({error})") from None
