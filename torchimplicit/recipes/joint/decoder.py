"""Joint inference and input optimization (Gurumurthy et al. 2021): decoders without encoders, and inverse problems.

The latent of an image is the input of an equilibrium decoder with the least reconstruction error; it and the
equilibrium are found by one fixed point, :class:`~torchimplicit.JointInference`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit._solve import solve
from torchimplicit.gradients import Gradient
from torchimplicit.models import EquilibriumDecoder, conv_decoder, mlp_decoder, multiscale_decoder
from torchimplicit.problems import JointInference
from torchimplicit.recipes.phantom.image_data import IMAGES, Selection, Splits, selected
from torchimplicit.recipes.phantom.image_files import Labelled, parted, set_apart
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import canvas
from torchimplicit.recipes.runtime.settings import Equilibria, not_negative, option, positive
from torchimplicit.recipes.runtime.task import Split, generator, gradient, permutation, solver
from torchimplicit.solution import Solution
from torchimplicit.solvers import Anderson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# -- settings ----------------------------------------------------------------------------------------------------------


DataName = Literal["digits", "mnist", "olivetti"]
Kind = Literal["mlp", "conv", "mdeq"]


@dataclass(frozen=True, kw_only=True)
class Images(Selection):
    """The images."""

    data: DataName = "digits"
    """Data set. The digits come with scikit-learn; MNIST and the Olivetti faces (32×32) are downloaded unless
    --data-dir has them."""

    images: Path | None = None
    """Folder of your own pictures, used instead of --data: PNG, JPEG and others, of any shape."""

    image_size: tuple[int, int] | None = None
    """Height and width to which all --images are centre-cropped and reduced. Default: they must all have the same
    shape."""

    validation_images: int = 200
    """Training images set aside to select the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is None and self.image_size is not None:
            raise UserError("--image-size is for pictures of your own: add --images FOLDER")
        if self.image_size is not None and min(self.image_size) < 1:
            raise UserError(f"--image-size {' '.join(map(str, self.image_size))} must be positive")
        if self.data == "digits" and self.data_dir is not None:
            raise UserError("the digits come with scikit-learn and are not read from elsewhere: omit --data-dir")

    @property
    def name(self) -> str:
        """Name of the data, for display."""
        return self.data if self.images is None else str(self.images)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The equilibrium decoder from a latent to its image."""

    kind: Kind = "mlp"
    """mlp: fully connected. Otherwise convolutional at half the images' resolution, or at that and coarser resolutions
    (multiscale)."""

    latent: int = 16
    """Size of the latent vector."""

    width: int = 96
    """Width of the fully connected equilibrium."""

    channels: int = 16
    """Channels of the convolutional equilibria."""

    scales: int = 2
    """Number of resolutions of the multiscale equilibrium."""

    bound: float = 0.6
    """Bound on the spectral norm of the map's linear part in the state."""

    def __post_init__(self) -> None:
        positive(self, "latent", "width", "channels", "scales")
        if not 0 < self.bound < 1:
            raise UserError(f"{option('bound')} must lie between 0 and 1, and it is {self.bound}")


@dataclass(frozen=True, kw_only=True)
class Joint:
    """The joint solve that finds latents."""

    joint_steps: int = 20
    """Largest number of joint-solve steps in training; --test-steps applies elsewhere."""

    test_steps: int = 60
    """Largest number of joint-solve steps in validation and test."""

    joint_memory: int = 20
    """Memory of the joint solve's Anderson acceleration, in iterates."""

    joint_regularization: float = 0.03
    """Regularization of the joint solve's Anderson acceleration. The map is far from linear over the first steps, so
    fitting their differences exactly misleads it: a little regularization reaches the same loss in fewer steps."""

    step_size: float = 10.0
    """Step size α of the latent, for a loss that is a mean over pixels."""

    joint_tolerance: float = 1e-3
    """Relative tolerance of the joint solve."""

    prior: float = 1e-3
    """Weight of the latent's mean square in its loss."""

    def __post_init__(self) -> None:
        positive(self, "joint_steps", "test_steps", "joint_memory", "step_size", "joint_tolerance", "prior")
        not_negative(self, "joint_regularization")


def equilibria() -> Equilibria:
    """The solver and gradient settings of a decoder's equilibria."""
    return Equilibria(solver="anderson", solver_steps=60, tolerance=1e-4, backward_tolerance=1e-2, backward_steps=30)


CELEBA = "a multiscale model of faces (CelebA at 64 pixels, a latent of 128), which no recipe here reads"
"""Data set of the published tables of decoders."""


def refuse_published(scale: str, what: str) -> None:
    """Raise if the published settings are requested of a table that has different ones."""
    if scale == "paper":
        raise UserError(f"--scale paper would be {what}; leave --scale cpu")


# -- The images of the recipes, as numbers between 0 and 1 -------------------------------------------------------------


class Part(NamedTuple):
    """Images ``[n, channels, height, width]`` in [0, 1], and their labels ``[n]``."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """The training, validation and test splits."""

    training: Part
    validation: Part
    test: Part

    def split(self, name: Split) -> Part:
        """A held-out one."""
        return self.validation if name == "validation" else self.test

    @property
    def pixels(self) -> tuple[int, int, int]:
        """An image's channels, height and width."""
        _, channels, height, width = self.training.images.shape
        return channels, height, width


@lru_cache(maxsize=2)
def read(images: Images) -> Data:
    """Read the images of the settings. Cached, as they are needed more than once.

    Raises:
        UserError: they are missing or of the wrong kind.
    """
    value: Any
    if images.images is not None:
        every = in_folder(images.images, images.image_size)
        tested, trained = set_apart(every.labels, max(1, len(every.labels) // 5), images.split_seed, "the folder")
        numbers = (images.validation_images, images.train_images, images.test_images, images.split_seed)
        where = f"{images.images}, less a fifth for the test,"
        train, validation, test = parted(every.take(trained), every.take(tested), *numbers, (where, "its test"))
        value = Splits(train, validation, test, (), ())
    else:
        value = selected(images.data, images)
    return Data(*(Part(one.images.float() / 255, one.labels) for one in (value.train, value.validation, value.test)))


MOST_NUMBERS = 1 << 30
"""Largest number of values of all pictures in a folder, which are held in memory."""


def in_folder(folder: Path, size: tuple[int, int] | None) -> Labelled:
    """The pictures of a folder in the order of their names, in grey if all are grey; labels are zeros.

    Args:
        folder: folder of PNG, JPEG, BMP, TIFF, WebP or GIF files.
        size: the height and width to which they are cut in the middle and reduced.

    Raises:
        UserError: there are none, one cannot be read, or their shapes differ and no size is given.
    """
    from torchimplicit.recipes.representations.image import read_file

    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder")
    names = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in names and path.is_file())
    if len(files) < 3:
        raise UserError(f"--images {folder} holds {len(files)} pictures, and training needs more")
    pictures: list[Tensor] = []
    held = 0
    for file in files:
        pixels = read_file(file, None).pixels.permute(2, 0, 1)
        pictures.append(pixels if size is None else fitted(pixels, size))
        if size is None and pictures[-1].shape[1:] != pictures[0].shape[1:]:
            shapes = " and ".join("×".join(map(str, one.shape[:0:-1])) for one in (pictures[0], pictures[-1]))
            raise UserError(
                f"the pictures in {folder} have different shapes ({shapes}): give --image-size HEIGHT WIDTH"
            )
        held += pictures[-1].numel()
        if held > MOST_NUMBERS:
            raise UserError(
                f"the pictures in {folder} are too many or too large to be held in memory: smaller --image-size"
            )
    channels = max(len(one) for one in pictures)
    images = torch.stack([one.expand(channels, -1, -1) for one in pictures])
    return Labelled(images, torch.zeros(len(images), dtype=torch.int64))


def fitted(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture, uint8 ``[channels, height, width]``, cut in the middle to the proportions of ``size`` and brought to
    it."""
    height, width = pixels.shape[1:]
    scale = min(height / size[0], width / size[1])
    rows, columns = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    top, left = (height - rows) // 2, (width - columns) // 2
    part = pixels[None, :, top : top + rows, left : left + columns].float()
    if (rows, columns) != size:
        part = functional.interpolate(part, size, mode="bilinear", antialias=True)
    return part[0].round().clamp(0, 255).to(torch.uint8)


# -- The decoder that the settings describe, and how it finds latents --------------------------------------------------


def make_decoder(config: Decoder, pixels: tuple[int, int, int], equilibria: Equilibria) -> EquilibriumDecoder:
    """The decoder, to images ``[channels, height, width]``."""
    chosen: dict[str, Any] = {"solver": solver(equilibria), "gradient": gradient(equilibria)}
    if config.kind == "mlp":
        return mlp_decoder(pixels, latent=config.latent, width=config.width, bound=config.bound, **chosen)
    chosen |= {"latent": config.latent, "channels": config.channels, "bound": config.bound}
    try:
        if config.kind == "conv":
            return conv_decoder(pixels, **chosen)
        return multiscale_decoder(pixels, scales=config.scales, **chosen)
    except ValueError as error:
        raise UserError(f"--kind {config.kind}: {error}") from None


def squared_error(generated: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error over the pixels of each image, ``[batch]``."""
    return (generated - wanted).square().flatten(1).mean(dim=1)


def reconstruction(decoder: EquilibriumDecoder, prior: float, step_size: float, pixels: int) -> JointInference:
    """The latent whose image is nearest to a given one.

    Its loss is a sum over pixels, as published.

    Args:
        decoder: to images.
        prior, step_size: for a loss that is a mean over pixels.
        pixels: pixels of an image.
    """

    def loss(generated: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
        return pixels * (squared_error(generated, wanted) + prior * x.square().mean(dim=1))

    return decoder.inference(loss, step_size / pixels)


def joint_solver(joint: Joint, steps: int, keep_trajectory: bool = False) -> Anderson:
    """Return the solver that finds the latents."""
    return Anderson(
        memory=joint.joint_memory,
        regularization=joint.joint_regularization,
        rtol=joint.joint_tolerance,
        max_steps=steps,
        keep_trajectory=keep_trajectory,
    )


def found(
    decoder: EquilibriumDecoder,
    problem: JointInference,
    solver: Anderson,
    *args: Tensor,
    gradient: Gradient | None = None,
) -> Solution:
    """The joint solve from zero for a batch of images, the first of ``args``."""
    return solve(problem, decoder.start(len(args[0])), *args, solver=solver, gradient=gradient, throw=False)


@torch.no_grad()
def latents(decoder: EquilibriumDecoder, joint: Joint, images: Tensor, batch: int = 256) -> Tensor:
    """Find the latents of many images, ``[n, latent]``, at test settings."""
    problem = reconstruction(decoder, joint.prior, joint.step_size, images[0].numel())
    chosen = joint_solver(joint, joint.test_steps)
    return torch.cat([found(decoder, problem, chosen, part).value.x for part in images.split(batch)])


@torch.no_grad()
def generated(decoder: EquilibriumDecoder, x: Tensor, batch: int = 256) -> Tensor:
    """The images of latents, each at its exact equilibrium, in [0, 1]."""
    return torch.cat([decoder(part) for part in x.split(batch)]).clamp(0, 1)


# -- Grids of images ---------------------------------------------------------------------------------------------------


def mosaic(rows: Sequence[Tensor], gap: int = 1) -> Tensor:
    """Arrange images ``[n, channels, height, width]``, one row of the mosaic each, into one image ``[height, width]``
    with white gaps and averaged channels."""
    longest = max(len(row) for row in rows)
    strips = []
    for row in rows:
        grey = row.mean(dim=1).clamp(0, 1)
        grey = torch.cat((grey, grey.new_ones(longest - len(grey), *grey.shape[1:])))
        strips.append(torch.cat([functional.pad(tile, (gap, gap, gap, gap), value=1.0) for tile in grey], dim=1))
    return torch.cat(strips, dim=0)


def grid(named: Mapping[str, Sequence[Tensor]], width: float = 7.0) -> Figure:
    """Mosaics one above the other, each with its title."""
    pictures = {name: mosaic(rows) for name, rows in named.items()}
    heights = [width * picture.shape[0] / picture.shape[1] + 0.3 for picture in pictures.values()]
    figure = canvas(width, sum(heights))
    panels = figure.subplots(len(pictures), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, picture) in zip(panels, pictures.items(), strict=True):
        panel.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(name, loc="left", fontsize=9)
        panel.set_axis_off()
    return figure


# -- A Fréchet distance between images, in the features of a small classifier that is trained here ---------------------
#
# It is computed as FID is (Heusel et al. 2017), from means and covariances of features; but the features are those of a
# small network trained on the same images, so that its numbers compare with each other alone, and not with any FID.


FEATURES = 32
STEPS = 400
BATCH = 64


class Features(nn.Module):
    """A small classifier: convolutions down to 4×4, ``FEATURES`` features, and class scores."""

    def __init__(self, channels: int, size: int, count: int):
        super().__init__()
        layers: list[nn.Module] = []
        width = 16
        while size > 4:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()]
            channels, width, size = width, min(2 * width, 32), (size + 1) // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, FEATURES), nn.Tanh())
        self.head = nn.Linear(FEATURES, count)

    def forward(self, images: Tensor) -> Tensor:
        """The features, ``[batch, FEATURES]``."""
        return self.body(images)


@lru_cache(maxsize=2)
def features(images: Images) -> tuple[Features, float]:
    """The network trained on the settings' training images (deterministically), and its accuracy on the test images."""
    data = read(images)
    channels, height, _ = data.pixels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(0, -1).initial_seed())
        network = Features(channels, height, IMAGES[images.data].classes)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    batch = min(BATCH, len(data.training.labels))
    per_pass = len(data.training.labels) // batch
    for step in range(STEPS):
        turn, place = divmod(step, per_pass)
        chosen = permutation(len(data.training.labels), 0, turn)[place * batch : (place + 1) * batch]
        scores = network.head(network(data.training.images[chosen]))
        optimizer.zero_grad()
        functional.cross_entropy(scores, data.training.labels[chosen]).backward()
        optimizer.step()
    network.eval().requires_grad_(False)
    right = network.head(network(data.test.images)).argmax(dim=1) == data.test.labels
    return network, float(right.double().mean())


@torch.no_grad()
def distance(network: Features, one: Tensor, other: Tensor) -> float:
    """Fréchet distance between two sets of images, in the network's features."""
    return between(*(moments(network(images).double()) for images in (one, other)))


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``[n, dim]``."""
    return rows.mean(dim=0), torch.cov(rows.mT)


def between(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """:math:`\\lVert m_1 - m_2\\rVert^2 + \\mathrm{tr}(C_1 + C_2 - 2(C_1^{1/2}C_2C_1^{1/2})^{1/2})` of two Gaussians
    (Dowson and Landau 1982)."""
    values, vectors = torch.linalg.eigh(one[1])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ other[1] @ root).clamp_min(0).sqrt().sum()
    gap = (one[0] - other[0]).square().sum()
    return float(gap + one[1].trace() + other[1].trace() - 2 * cross)
