"""The settings of every fit of a field."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, Trained, not_negative, positive

# -- The settings that every fit of a field has ------------------------------------------------------------------------


FilterKind = Literal["siren", "fourier", "gabor"]
FILTERS: tuple[FilterKind, ...] = ("siren", "fourier", "gabor")

NAMES: dict[tuple[FilterKind, bool], str] = {
    ("siren", True): "iSIREN",
    ("siren", False): "SIREN",
    ("fourier", True): "Fourier-iMFN",
    ("fourier", False): "Fourier-MFN",
    ("gabor", True): "Gabor-iMFN",
    ("gabor", False): "Gabor-MFN",
}
"""Of a filter's implicit representation and of its explicit twin."""


@dataclass(frozen=True, kw_only=True)
class Representation:
    """The function that is fitted, and how much memory a step may take."""

    filter: FilterKind = "fourier"
    """siren: SIREN or iSIREN; fourier, gabor: multiplicative filter networks, or their implicit form."""

    implicit: bool = True
    """The fixed point of the cell. Otherwise its explicit twin of as many parameters, which applies the cell once."""

    width: int = 128
    """Of the state and the layers."""

    depth: int = 1
    """Layers of the cell."""

    frequencies: float | None = None
    """The scale of the frequencies; by default the recipe's, which grows with the signal's resolution."""

    window_alpha: float = 3.0
    """Of the Gabor filters' windows: a larger one makes them narrower."""

    amortize: Literal["refresh", "solve", "off"] = "refresh"
    """In training: carry the last state along by one evaluation a step; or solve from it; or solve from zero."""

    memory_mb: int = 1024
    """What the states, filters and gradients of a training step may take. Points beyond it go through in chunks, whose
    gradients are added up: the step stays the same."""

    def __post_init__(self) -> None:
        positive(self, "width", "depth", "frequencies", "window_alpha", "memory_mb")


class FieldSettings(Trained, Protocol):
    """The config of a recipe that fits a field."""

    @property
    def representation(self) -> Representation:
        """What is fitted."""


def truncated(terms: int = 2) -> Equilibria:
    """How amortized equilibria are trained (Huang et al. 2021): one evaluation a step from the last state, and the
    Neumann series after ``terms`` of its terms; 2 are one product with the Jacobian."""
    return Equilibria(
        solver="anderson",
        solver_steps=60,
        tolerance=1e-3,
        gradient="neumann-phantom",
        phantom_steps=terms,
        phantom_damping=1.0,
        backward_tolerance=1e-3,
        backward_steps=60,
    )


def full_batch(steps: int, validate_every: int, learning_rate: float = 1e-3) -> Optimization:
    """All points in every step, by Adam at a constant rate, as the paper trains."""
    return Optimization(
        steps=steps,
        batch_size=1 << 22,
        optimizer="adam",
        learning_rate=learning_rate,
        schedule="constant",
        validate_every=validate_every,
    )


def check_fit(config: FieldSettings) -> None:
    """Raise where settings of several groups do not go together."""
    chosen = config.representation
    if not chosen.implicit:
        return
    name = config.equilibria.gradient
    if chosen.amortize == "refresh" and name in ("unrolled-phantom", "unrolled"):
        raise UserError(
            f"--gradient {name} differentiates steps of a solve, and --amortize refresh takes none; use --amortize "
            "solve, or --gradient neumann-phantom"
        )
    if chosen.amortize != "off" and name == "unrolled":
        raise UserError("--gradient unrolled differentiates the steps of a solve from zero; add --amortize off")


def check_slopes(config: FieldSettings) -> None:
    """Raise where the settings cannot train by a loss that holds derivatives of the field: the weights' gradient is a
    second derivative then, which estimators of the adjoint do not have, nor states that were carried along."""
    chosen = config.representation
    if not chosen.implicit:
        return
    if config.equilibria.gradient not in ("implicit", "unrolled"):
        raise UserError(
            f"--gradient {config.equilibria.gradient} has no exact second derivative, and the loss holds slopes of the "
            "field; use --gradient implicit"
        )
    if chosen.amortize == "refresh":
        raise UserError(
            "--amortize refresh has no second derivative, and the loss holds slopes of the field; use --amortize solve"
        )


# -- The settings of the recipes that fit pictures ---------------------------------------------------------------------


LARGEST_PICTURE = 2048
LONGEST_EXPORT = 16 * LARGEST_PICTURE


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """A field fitted to a picture."""

    file: Path | None = None
    """Your own picture: PNG, JPEG, TIFF and others."""

    picture: str = "camera"
    """Where --file is not given: a picture of scikit-image (astronaut, camera, chelsea, coffee, moon, page, ...), or a
    text that is drawn (text-0 to text-3)."""

    size: int = 128
    """Pixels of the longest side; a larger picture is reduced to it."""

    held_out: Literal["none", "grid", "random"] = "none"
    """none: all pixels are fitted. grid, random: a quarter is fitted, one is for validation and one for the test: every
    other pixel of every other row, or pixels drawn at random."""

    split_seed: int = 0
    """Which pixels are drawn."""

    export_size: int | None = None
    """Also sample the field so large, in pixels of the longest side: into export.png."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "size", "export_size")
        not_negative(self, "split_seed")
        if self.size > LARGEST_PICTURE:
            raise UserError(
                f"--size {self.size} is more than {LARGEST_PICTURE}; a field of so many pixels is not practical"
            )
        if self.export_size is not None and self.export_size > LONGEST_EXPORT:
            raise UserError(f"--export-size {self.export_size} is more than {LONGEST_EXPORT}")


def image() -> PictureConfig:
    """A picture of 128 pixels, a few minutes on one core. The paper's: --size 512 --width 256 --steps 5000."""
    return PictureConfig(optimization=full_batch(600, 100), equilibria=truncated())


def generalization() -> PictureConfig:
    """A quarter of a picture's pixels, a minute on one core. The paper's: --size 512 --width 256 --steps 2000."""
    return PictureConfig(held_out="grid", optimization=full_batch(600, 50), equilibria=truncated())


# -- The settings of the recipe that fits a sound ----------------------------------------------------------------------


SoundName = Literal["melody", "vowels"]

LOWEST_RATE = 100
HIGHEST_RATE = 384_000


@dataclass(frozen=True, kw_only=True)
class SoundConfig:
    """A field fitted to a sound."""

    file: Path | None = None
    """Your own sound: WAV, of integers or floating-point numbers, of up to eight channels."""

    sound: SoundName = "melody"
    """Where --file is not given: a sound that is synthesized on the spot, of plucked notes or of sung vowels."""

    start: float = 0.0
    """Where in a file the excerpt begins, in seconds."""

    seconds: float | None = 3.0
    """Of the excerpt; None takes all that follows."""

    rate: int = 8000
    """Samples a second; a file of a higher rate is reduced to it."""

    mono: bool = False
    """Average the channels. Otherwise the field has a value for each."""

    export_size: int | None = None
    """Also sample the field so many times a second: into export.wav."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "seconds", "rate", "export_size")
        not_negative(self, "start")
        if self.file is None and self.seconds is None:
            raise UserError("--seconds None takes all of a file, and there is none; add --file sound.wav")
        for name, value in (("--rate", self.rate), ("--export-size", self.export_size)):
            if value is not None and not LOWEST_RATE <= value <= HIGHEST_RATE:
                raise UserError(f"{name} {value} must lie in [{LOWEST_RATE}, {HIGHEST_RATE}] samples a second")


def audio() -> SoundConfig:
    """Three seconds at 8 kHz, a few minutes on one core. The paper's: --seconds None --rate 44100 --width 256
    --steps 3000, on the seven seconds of its file."""
    return SoundConfig(optimization=full_batch(1000, 100), equilibria=truncated())


# -- The settings of the recipe that fits a video ----------------------------------------------------------------------


ClipName = Literal["shapes", "flight"]

LARGEST_VIDEO = 2048


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """A field fitted to a video."""

    file: Path | None = None
    """Your own video: a folder of pictures in the order of their names, an animated GIF, PNG or WebP, or, with
    'torchimplicit[video]', what FFmpeg reads (MP4, MOV, MKV, WebM, AVI)."""

    clip: ClipName = "shapes"
    """Where --file is not given: moving shapes, drawn on the spot, or a flight over a picture of scikit-image."""

    first: int = 0
    """The first frame of a file that is taken, counted from 0."""

    every: int = 1
    """Take every so many frames of a file."""

    frames: int | None = 12
    """At most so many; None takes all."""

    size: int = 48
    """Pixels of the longest side; larger frames are reduced to it."""

    export_size: tuple[int, ...] = ()
    """Also sample the field so finely: frames, height and width; or pixels of the longest side."""

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
    """Raise where a size to export makes no sense."""
    if len(sizes) > 3:
        raise UserError("--export-size takes frames, height and width; or a height and a width; or the longest side")
    if any(not 1 <= size <= 4 * LARGEST_VIDEO for size in sizes):
        raise UserError(f"--export-size {' '.join(map(str, sizes))} must lie in [1, {4 * LARGEST_VIDEO}]")


def video() -> VideoConfig:
    """Twelve frames of 48 pixels, minutes on one core, and at most 65,536 points a step. The paper's: --size 512
    --frames None --width 1024 --steps 10000 --frequencies 128 --amortize off, for a GPU."""
    optimization = replace(full_batch(600, 100), batch_size=65536)
    return VideoConfig(optimization=optimization, equilibria=truncated())


# -- The settings of the recipes that fit shapes -----------------------------------------------------------------------


LARGEST_GRID = 1024


LONGEST = 1.8
"""The mesh's longest side in the field's coordinates."""


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """A field fitted to a mesh."""

    file: Path | None = None
    """Your own mesh: OBJ, PLY, STL or OFF."""

    shape: Literal["knot", "gyroid"] = "knot"
    """Where --file is not given: a tube around a torus knot, or a ball of gyroid walls."""

    most_faces: int = 1_000_000
    """A file of more faces is refused."""

    task: Literal["occupancy", "sdf"] = "occupancy"
    """occupancy: the field is the logit of being inside. sdf: it is the signed distance, trained with its slopes, which
    takes exact second derivatives: --gradient neumann-phantom and --amortize refresh, with which occupancy begins,
    become implicit and solve."""

    supervision: Literal["distance", "surface"] = "distance"
    """Of sdf. distance: the mesh's distances are given. surface: only points on it and their normals."""

    distance_weight: float = 10.0
    """Of sdf's misfit of values."""

    normal_weight: float = 1.0
    """Of sdf's misfit of normals on the surface."""

    eikonal_weight: float = 0.1
    """Of sdf's slopes whose length is not 1."""

    samples: int = 60_000
    """Points to train on: half of them near the surface, half anywhere."""

    held_out_samples: int = 20_000
    """Points to validate on, and as many to test on."""

    sample_seed: int = 0
    """Which points are drawn."""

    resolution: int = 96
    """Grid points of the longest side, for the surface by marching cubes."""

    up: Literal["y", "z"] = "y"
    """The mesh's axis that points up in the pictures."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "most_faces", "distance_weight", "samples", "held_out_samples", "resolution")
        not_negative(self, "normal_weight", "eikonal_weight", "sample_seed")
        check_grid("--resolution", self.resolution)
        if min(self.samples, self.held_out_samples) < 100:
            raise UserError("--samples and --held-out-samples must be 100 at least")
        if self.task == "sdf":
            self._become_exact()

    def _become_exact(self) -> None:
        """What occupancy begins with has no second derivative."""
        solve, chosen = self.equilibria, self.representation
        if solve == truncated():
            object.__setattr__(self, "equilibria", exact())
        elif solve.gradient == truncated().gradient:
            object.__setattr__(self, "equilibria", replace(solve, gradient="implicit"))
        if chosen.amortize == "refresh":
            object.__setattr__(self, "representation", replace(chosen, amortize="solve"))


def check_grid(option: str, longest: int) -> None:
    """Raise where a grid is too coarse for a surface, or not practical."""
    if not 8 <= longest <= LARGEST_GRID:
        raise UserError(f"{option} {longest} must lie between 8 and {LARGEST_GRID}")


def exact() -> Equilibria:
    """How equilibria are trained whose slopes are in the loss."""
    return Equilibria(
        solver="anderson",
        solver_steps=60,
        tolerance=1e-4,
        gradient="implicit",
        backward_tolerance=1e-3,
        backward_steps=60,
    )


def adam(steps: int, validate_every: int, learning_rate: float = 3e-3) -> Optimization:
    """Part of the points in every step."""
    return Optimization(
        steps=steps,
        batch_size=6000,
        optimizer="adam",
        learning_rate=learning_rate,
        schedule="cosine",
        validate_every=validate_every,
    )


def shape() -> ShapeConfig:
    """A shape of 60 000 points, some minutes on one core. The paper's occupancy: --samples 500000 --batch-size 50000
    --width 256 --steps 10000 --learning-rate 5e-4 --frequencies 256."""
    return ShapeConfig(optimization=adam(1000, 100), equilibria=truncated())
