"""The settings that every trained recipe has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.options import fraction, not_negative, option, positive, share

EstimatorName = Literal[
    "implicit",
    "unrolled-phantom",
    "neumann-phantom",
    "adaptive-phantom",
    "unbiased-neumann",
    "one-step",
    "unrolled",
]
"""The estimators that a recipe can be trained with; :mod:`.estimators` makes them."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How the weights move. A *segment* is the steps between two validations; a run resumes where one begins."""

    steps: int = 1000
    """Optimizer steps."""

    batch_size: int = 128
    """Samples a step, over all devices together."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Which rule moves the weights; sgd is Nesterov's where --momentum is positive."""

    learning_rate: float = 1e-3
    """The peak."""

    weight_decay: float = 0.0
    """Added to the gradient (adam, sgd), or decoupled (adamw)."""

    momentum: float = 0.9
    """Of sgd."""

    warmup_steps: int = 0
    """Steps of linear warm-up."""

    schedule: Literal["constant", "cosine", "milestones"] = "cosine"
    """What follows the warm-up."""

    final_share: float = 0.0
    """What a cosine leaves of the peak at the end."""

    milestones: tuple[int, ...] = ()
    """Steps at which the rate is multiplied by --decay."""

    decay: float = 0.5
    """See --milestones."""

    clip_norm: float | None = None
    """Shorten gradients that are longer than this."""

    validate_every: int = 100
    """Steps of a segment."""

    seed: int = 0
    """Of the initial weights, the order of the data, dropout and random projections."""

    def __post_init__(self) -> None:
        positive(self, "steps", "batch_size", "learning_rate", "validate_every", "clip_norm")
        not_negative(self, "weight_decay", "warmup_steps", "seed")
        share(self, "momentum", "final_share")
        fraction(self, "decay")
        if self.milestones and self.schedule != "milestones":
            raise UserError(f"--milestones go with --schedule milestones, and it is {self.schedule}")


@dataclass(frozen=True, kw_only=True)
class Equilibria:
    """How equilibria are solved and differentiated."""

    solver: Literal["anderson", "broyden", "fixed-point"] = "anderson"
    """Of the forward pass."""

    solver_steps: int = 30
    """The most steps of a forward solve."""

    tolerance: float = 1e-3
    """Relative, of the forward solve."""

    gradient: EstimatorName = "implicit"
    """How the equilibrium is differentiated."""

    phantom_steps: int = 5
    """k of the phantom gradients, and the terms that the unbiased series always takes."""

    phantom_damping: float = 0.5
    """λ of the phantom gradients, in (0, 1]."""

    backward_tolerance: float = 1e-3
    """Relative, of the exact gradient's linear solve (GMRES), and what the adaptive phantom gradient aims at."""

    backward_steps: int = 30
    """The most steps of that solve, and of the adaptive phantom gradient."""

    pretrain_steps: int = 0
    """First train so many steps with the solver replaced by a few weight-tied applications, differentiated through."""

    pretrain_depth: int = 10
    """How many applications."""

    jacobian_weight: float = 0.0
    """Of the penalty ‖vᵀJ‖²/dim on the Jacobian at the equilibrium (Bai et al. 2021)."""

    jacobian_probability: float = 1.0
    """With which a step has the penalty."""

    def __post_init__(self) -> None:
        positive(self, "solver_steps", "tolerance", "phantom_steps", "backward_tolerance", "backward_steps")
        positive(self, "pretrain_depth")
        not_negative(self, "pretrain_steps", "jacobian_weight")
        fraction(self, "phantom_damping")
        share(self, "jacobian_probability")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """On what to train."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    devices: int = 1
    """GPUs, or CPU processes, each with its share of every batch."""

    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Of the model; mixed: autocast, and a gradient scaler for 16."""

    threads: int = 1
    """CPU threads of a process; 0 leaves the number to PyTorch."""

    workers: int = 0
    """Processes that read data."""

    tensorboard: bool = True
    """Write TensorBoard's log beside the CSV log."""

    monitor_every: int = 0
    """After every so many steps log the gradient's cosine to the exact one and the spectral radius; 0: never."""

    def __post_init__(self) -> None:
        positive(self, "devices")
        not_negative(self, "threads", "workers", "monitor_every")


class Trained(Protocol):
    """A recipe's config that :class:`~.runner.Trainer` can run."""

    @property
    def optimization(self) -> Optimization:
        """How the weights move."""

    @property
    def equilibria(self) -> Equilibria:
        """How equilibria are solved and differentiated."""

    @property
    def machine(self) -> Machine:
        """On what to train."""


def check_batch(optimization: Optimization, machine: Machine) -> None:
    """Every device must get a sample."""
    if optimization.batch_size < machine.devices:
        raise UserError(
            f"{option('batch_size')} {optimization.batch_size} is less than {option('devices')} {machine.devices}; "
            "every device must get a sample"
        )
