"""Settings shared by many recipes, checks of settings, and their conversion to plain values for JSON."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from torchimplicit.recipes.runtime.errors import UserError, meant

T = TypeVar("T")

# -- Checks of settings, in the words of the command line --------------------------------------------------------------


def option(name: str) -> str:
    """A setting's name on the command line: ``--learning-rate``."""
    return f"--{name.replace('_', '-')}"


def positive(settings: Any, *names: str) -> None:
    """Each must be positive; ``None`` passes."""
    _each(settings, names, lambda value: value > 0, "be positive")


def not_negative(settings: Any, *names: str) -> None:
    """Each must be zero or more; ``None`` passes."""
    _each(settings, names, lambda value: value >= 0, "not be negative")


def share(settings: Any, *names: str) -> None:
    """Each must lie in [0, 1]."""
    _each(settings, names, lambda value: 0 <= value <= 1, "lie in [0, 1]")


def fraction(settings: Any, *names: str) -> None:
    """Each must lie in (0, 1]."""
    _each(settings, names, lambda value: 0 < value <= 1, "lie in (0, 1]")


def numbers(settings: Any, *names: str) -> None:
    """Each must be a nonempty tuple of positive numbers."""
    for name in names:
        if not getattr(settings, name) or not all(value > 0 for value in getattr(settings, name)):
            raise UserError(f"{option(name)} must be positive numbers, at least one")


def different(settings: Any, *names: str) -> None:
    """Each must be a nonempty tuple without repetitions."""
    for name in names:
        chosen = getattr(settings, name)
        if not chosen or len(set(chosen)) < len(chosen):
            raise UserError(f"{option(name)} must be different names, at least one")


def _each(settings: Any, names: Sequence[str], holds: Callable[[Any], bool], words: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise UserError(f"{option(name)} must {words}, and it is {value}")


def known_rows(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Each row named by ``--rows`` must be one of the table's."""
    unknown = [name for name in wanted if name not in known]
    if unknown:
        hint = meant(unknown[0], known)
        raise UserError(
            f"--rows: there is no row {', '.join(unknown)}; the rows are {', '.join(known)}{hint and '; ' + hint}"
        )


def own_first(kind: type[T]) -> type[T]:
    """Let a dataclass of keyword-only fields name its own before those it inherits, those of the nearest base first, as
    ``--help`` shows them."""
    every: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]

    def declared(name: str) -> int:
        return max(k for k, one in enumerate(kind.__mro__) if name in get_annotations(one))

    kind.__dataclass_fields__ = {name: every[name] for name in sorted(every, key=declared)}  # type: ignore[attr-defined]
    return kind


# -- Dataclasses to plain values that JSON holds, and back -------------------------------------------------------------


_NAMED = ("inf", "-inf", "nan")
"""Numbers that JSON cannot represent."""


def to_plain(value: Any, exact: bool = False) -> Any:
    """Dataclasses become dicts, tuples become lists, paths strings.

    A number that JSON does not know becomes None, as a figure that there is not; with ``exact``, as settings need it,
    its name: ``"inf"``, ``"-inf"`` or ``"nan"``.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name), exact) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item, exact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, exact) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if exact else None
    return value


def from_plain(kind: type[T], plain: Any) -> T:
    """The inverse of :func:`to_plain`, for a dataclass of scalars, tuples, lists, dicts and dataclasses.

    Raises:
        ValueError, TypeError, KeyError: if ``plain`` does not fit.
    """
    result: T = _value(kind, plain)
    return result


def _value(kind: Any, plain: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _value(hints[name], item) for name, item in plain.items()})  # type: ignore[operator]
    if origin is Literal:
        if plain not in arguments:
            raise ValueError(f"{plain!r} is none of {arguments}")
        return plain
    if origin in (Union, types.UnionType):
        if plain is None:
            return None
        return _value(next(one for one in arguments if one is not types.NoneType), plain)
    if origin is tuple:
        return tuple(_value(arguments[0], item) for item in plain)
    if origin is list:
        return [_value(arguments[0], item) for item in plain]
    if origin is dict:
        return {key: _value(arguments[1], item) for key, item in plain.items()}
    if kind is float:
        if isinstance(plain, bool) or (isinstance(plain, str) and plain not in _NAMED):
            raise TypeError(f"{plain!r} is not float")
        return math.nan if plain is None else float(plain)
    if kind in (int, bool, str) and type(plain) is not kind:
        raise TypeError(f"{plain!r} is not {kind.__name__}")
    return kind(plain)


def missing(plain: Any, whole: Any, at: str = "") -> list[str]:
    """The settings of ``whole`` that ``plain`` does not name, both as :func:`to_plain` gives them."""
    if not (isinstance(plain, dict) and isinstance(whole, dict)):
        return []
    names: list[str] = []
    for name, value in whole.items():
        names += missing(plain[name], value, f"{at}{name}.") if name in plain else [f"{at}{name}"]
    return names


# -- The settings that every trained recipe has ------------------------------------------------------------------------


EstimatorName = Literal[
    "implicit",
    "unrolled-phantom",
    "neumann-phantom",
    "adaptive-phantom",
    "unbiased-neumann",
    "one-step",
    "unrolled",
    "reversible",
]
"""The estimators that a recipe can be trained with; :mod:`.estimators` makes them."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Optimization of the weights."""

    steps: int = 1000
    """Number of optimizer steps."""

    batch_size: int = 128
    """Samples per optimizer step, summed over all devices."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""

    weight_decay: float = 0.0
    """Weight decay: added to the gradient (adam, sgd) or decoupled (adamw)."""

    momentum: float = 0.9
    """Momentum of sgd."""

    nesterov: bool = False
    """Use Nesterov momentum with sgd."""

    whole_passes: bool = False
    """End each pass over the data with a smaller batch. By default samples that do not fill a batch are left out."""

    accumulate: int = 1
    """Number of parts into which a batch is split to save memory. Their gradients are summed."""

    averaging: float = 0.0
    """Decay per step of the exponential moving average of the weights that is validated and tested; 0 disables
    averaging."""

    warmup_steps: int = 0
    """Optimizer steps of linear learning-rate warm-up."""

    schedule: Literal["constant", "cosine", "milestones"] = "cosine"
    """Learning-rate schedule after the warm-up."""

    final_share: float = 0.0
    """Final learning rate of the cosine schedule, as a share of the peak."""

    milestones: tuple[int, ...] = ()
    """Optimizer steps at which the learning rate is multiplied by --decay (--schedule milestones)."""

    decay: float = 0.5
    """Factor on the learning rate at each milestone."""

    clip_norm: float | None = None
    """Largest gradient norm; longer gradients are scaled down to it. Default: no clipping."""

    validate_every: int = 100
    """Optimizer steps between two validations. Checkpoints are written then, and a resumed run continues from there."""

    seed: int = 0
    """Random seed of the initial weights, data order, dropout and random projections."""

    def __post_init__(self) -> None:
        positive(self, "steps", "batch_size", "learning_rate", "validate_every", "clip_norm")
        not_negative(self, "weight_decay", "warmup_steps", "seed")
        positive(self, "accumulate")
        share(self, "momentum", "final_share")
        if not 0 <= self.averaging < 1:
            raise UserError(f"--averaging must lie in [0, 1), and it is {self.averaging}")
        if self.nesterov and not self.momentum:
            raise UserError("--nesterov needs a positive --momentum")
        fraction(self, "decay")
        if self.milestones and self.schedule != "milestones":
            raise UserError(f"--milestones go with --schedule milestones, and it is {self.schedule}")

    def of(self, seed: int, steps: int | None = None, times: int = 1) -> Optimization:
        """A copy with another seed, with these steps if given, then ``times`` as long."""
        steps = self.steps if steps is None else steps
        every = min(steps, self.validate_every)
        return replace(self, seed=seed, steps=times * steps, validate_every=times * every)


@dataclass(frozen=True, kw_only=True)
class Equilibria:
    """Solving and differentiating equilibria."""

    solver: Literal["anderson", "broyden", "fixed-point", "reversible"] = "anderson"
    """Solver of the forward pass."""

    solver_steps: int = 30
    """Largest number of steps of a forward solve."""

    tolerance: float = 1e-3
    """Relative tolerance of the forward solve."""

    gradient: EstimatorName = "implicit"
    """Gradient estimator of the equilibrium. implicit: exact, by a linear solve."""

    phantom_steps: int = 5
    """Number of steps k of the phantom gradients, or of terms that the unbiased Neumann series always includes."""

    phantom_damping: float = 0.5
    """Damping λ of the phantom gradients, in (0, 1]."""

    backward_tolerance: float = 1e-3
    """Relative tolerance of the exact gradient's linear solve (GMRES), or target error of the adaptive phantom
    gradient."""

    backward_steps: int = 30
    """Largest number of steps of the exact gradient's linear solve, or of the adaptive phantom gradient."""

    evaluation_steps: int | None = None
    """Largest number of steps of a forward solve in validation and test. Default: --solver-steps."""

    pretrain_steps: int = 0
    """Optimizer steps of pretraining, in which the solver is replaced by a few unrolled applications of the cell."""

    pretrain_depth: int = 10
    """Number of unrolled applications in pretraining."""

    jacobian_weight: float = 0.0
    """Weight of the Jacobian penalty ‖vᵀJ‖²/dim at the equilibrium (Bai et al. 2021)."""

    jacobian_probability: float = 1.0
    """Probability that an optimizer step includes the Jacobian penalty."""

    def __post_init__(self) -> None:
        positive(self, "solver_steps", "tolerance", "phantom_steps", "backward_tolerance", "backward_steps")
        positive(self, "pretrain_depth", "evaluation_steps")
        not_negative(self, "pretrain_steps", "jacobian_weight")
        fraction(self, "phantom_damping")
        share(self, "jacobian_probability")
        if self.gradient == "reversible" and self.solver != "reversible":
            raise UserError(f"--gradient reversible needs --solver reversible, and it is {self.solver}")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware, precision and logging."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto uses a GPU if there is one."""

    devices: int = 1
    """Number of GPUs, or of CPU processes, among which each batch is divided. torchrun and srun set it."""

    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Precision of the model. The mixed ones use autocast, and 16-mixed also a gradient scaler."""

    threads: int = 1
    """CPU threads per process; 0 leaves the number to PyTorch."""

    workers: int = 0
    """Number of processes that load and augment data."""

    tf32: bool = False
    """Let GPUs multiply float32 matrices in TF32, which has a 10-bit mantissa."""

    channels_last: bool = False
    """Store images and convolution weights in channels-last format, which is faster on tensor cores."""

    log_every: int = 1
    """Optimizer steps between two log entries. Steps in between transfer nothing from the device except what solvers
    need."""

    weights: Path | None = None
    """File of initial weights: a state dict from here, TorchDEQ or locuslab's repositories. With --evaluate-only they
    are only tested."""

    evaluate_only: bool = False
    """Skip training: validate and test the weights of --weights."""

    tensorboard: bool = True
    """Write a TensorBoard log in addition to the CSV log."""

    monitor_every: int = 0
    """Optimizer steps between two measurements of the gradient's cosine with the exact one and of the spectral radius;
    0 for never."""

    def __post_init__(self) -> None:
        positive(self, "devices", "log_every")
        not_negative(self, "threads", "workers", "monitor_every")
        if self.evaluate_only and self.weights is None:
            raise UserError("--evaluate-only needs --weights: the file whose weights are to be tested")


class Trained(Protocol):
    """A recipe's config that :class:`~.runner.Trainer` can run."""

    @property
    def optimization(self) -> Optimization:
        """The optimization settings."""

    @property
    def equilibria(self) -> Equilibria:
        """The equilibrium settings."""

    @property
    def machine(self) -> Machine:
        """The machine settings."""


def check_batch(optimization: Optimization, machine: Machine) -> None:
    """Every device must get a sample, and every part of a batch that is cut."""
    if optimization.accumulate > 1 and machine.devices > 1:
        raise UserError("--accumulate cuts the batch of one device: take --devices 1, or more devices without it")
    if optimization.batch_size < optimization.accumulate:
        raise UserError(
            f"--batch-size {optimization.batch_size} cannot be cut into --accumulate {optimization.accumulate} parts"
        )
    if optimization.batch_size < machine.devices:
        raise UserError(
            f"{option('batch_size')} {optimization.batch_size} is less than {option('devices')} {machine.devices}; "
            "every device must get a sample"
        )


# -- The optimizers by name --------------------------------------------------------------------------------------------


OptimizerName = Literal["least-squares", "l-bfgs", "adam"]
"""A trust-region Gauss-Newton method with exact Jacobians, L-BFGS (both SciPy's), or Adam with a cosine."""
