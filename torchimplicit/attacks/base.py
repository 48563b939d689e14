"""The base class of attacks: the set of allowed changes, the mode of the model, and the call."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.attacks.replaced import Replaced
from torchimplicit.constraints import Box, L2Ball
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.members import compiled_module
from torchimplicit.problems.sets import FlatBox, FlatCut
from torchimplicit.solution import Solution
from torchimplicit.validation import at_least

Norm = Literal["l2", "linf"]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Found(NamedTuple):
    """The result of an attack.

    Attributes:
        images: the adversarial images, within the ball and the range of the pixels.
        change: their difference from the given images.
        states: approximate states of the model's equilibria, in the order of its calls: good starts for exact solves.
        evaluations: the number of evaluations of the equilibria's maps and of products with their Jacobians, in
            whole-batch equivalents. A step of :class:`JIIO` is one of each.
        solves: the figures of every solve: one for :class:`JIIO`, one per step for :class:`PGD`.
    """

    images: Tensor
    change: Tensor
    states: tuple[Any, ...]
    evaluations: float
    solves: tuple[Solution, ...]


Parts = tuple[Tensor, tuple[Any, ...], float, tuple[Solution, ...]]


@dataclass(frozen=True, eq=False)
class Attack(ABC):
    """An attack on a classifier with an equilibrium inside, called as ``adversarial = attack(images, labels)``.

    The model is any module from images to scores that calls an :class:`~torchimplicit.nn.Equilibrium`; its code before
    and after the layer runs unchanged. It is attacked in eval mode and put back into its mode afterwards; no weight
    gets a gradient.

    Args:
        model: a module from images ``[batch, ...]`` to scores ``[batch, classes]``.
        radius: the radius of the ball around each image, in the norm ``norm`` over all its pixels, such as 0.5 for
            ``"l2"`` or 8 / 255 for ``"linf"``.
        norm: ``"l2"`` or ``"linf"``.
        steps: the number of steps.
        step_size: the length of a step of the image, as a fraction of the radius.
        last_step_size: the step size at the last step, which ``step_size`` approaches geometrically; ``None``: it is
            constant.
        targeted: whether the labels are the classes that the attack aims at, rather than the true classes.
        low, high: the range of the pixels, numbers or tensors like an image; the adversarial images lie in it as well
            as in the ball.

    Raises:
        TypeError: the model is not a module.
        ValueError: a number is out of range.
    """

    model: nn.Module
    _: KW_ONLY
    radius: float
    norm: Norm = "l2"
    steps: int = 20
    step_size: float = 0.5
    last_step_size: float | None = None
    targeted: bool = False
    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"{name} attacks an nn.Module, not a {type(self.model).__name__}")
        for field in ("radius", "step_size", "last_step_size"):
            value = getattr(self, field)
            if value is None and field == "last_step_size":
                continue
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}.{field} is {value}, but must be positive and finite")
        if self.norm not in ("l2", "linf"):
            raise ValueError(f'{name}.norm is {self.norm!r}, but must be "l2" or "linf"')
        at_least(name, "steps", self.steps, 1)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images near the given ones.

        Args:
            images: floating-point, ``[batch, ...]``, in the range of the pixels.
            labels: int64 ``[batch]``.

        Returns:
            a tensor like ``images``. The attack need not have succeeded: compare the model's classes.

        Raises:
            ValueError: the images are outside the range of the pixels, the labels do not fit, or the model contains no
                equilibrium.
        """
        return self.find(images, labels).images

    def find(self, images: Tensor, labels: Tensor) -> Found:
        """The adversarial images with the states of the equilibria and the cost of the attack."""
        self._check(images, labels)
        with _evaluating(self.model), warnings.catch_warnings():
            # an attack runs a number of steps, and need not converge
            warnings.simplefilter("ignore", ConvergenceWarning)
            images = images.detach()
            change, states, evaluations, solves = self._found(Replaced(self.model), images, labels)
            low, high = (torch.as_tensor(bound).to(images) for bound in (self.low, self.high))
            changed = torch.clamp(images + change, low, high)  # the sum may leave the range by a rounding error
        return Found(changed, changed - images, states, evaluations, solves)

    @abstractmethod
    def _found(self, model: Replaced, images: Tensor, labels: Tensor) -> Parts:
        """Run the attack: the change, the states, the evaluations, and the figures of the solves."""

    def _size(self, step: int) -> float:
        """The length of step number ``step``, counted from one."""
        last = self.step_size if self.last_step_size is None else self.last_step_size
        share = min(max(step - 1, 0) / max(self.steps - 1, 1), 1.0)
        return self.radius * self.step_size * (last / self.step_size) ** share

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss that the attack minimizes, ``[batch]``."""
        loss = functional.cross_entropy(scores, labels, reduction="none")
        return loss if self.targeted else -loss

    def _room(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds of the change of every pixel, like the images: the range, and in the maximum norm the ball too."""
        low, high = self.low - images, self.high - images
        return (low.clamp_min(-self.radius), high.clamp_max(self.radius)) if self.norm == "linf" else (low, high)

    def _set(self, images: Tensor) -> Box | tuple[L2Ball, Box]:
        """The set of allowed changes."""
        box = Box(*self._room(images))
        return box if self.norm == "linf" else (L2Ball(self.radius), box)

    def _onto(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """The projection of changes onto the set of allowed ones."""
        low, high = self._room(images)
        if self.norm == "linf":
            return lambda change: torch.clamp(change, low, high)
        box = FlatBox((low.flatten(1), high.flatten(1)))
        tensors = (*box.tensors, low.new_full((1, 1), self.radius), torch.zeros_like(box.tensors[0][:1]))
        both = FlatCut(box, tensors)
        return lambda change: both.project(change.flatten(1), tensors[2], *tensors).view_as(change)

    def _check(self, images: Tensor, labels: Tensor) -> None:
        name = type(self).__name__
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
            raise ValueError(f"{name} needs images as a floating-point tensor [batch, ...], in the range of the pixels")
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"{name} needs one class for each of the {len(images)} images, int64 [{len(images)}], but got "
                f"{labels.dtype} {list(labels.shape)}"
            )
        low, high = self.low - images, self.high - images
        slack = 1e-6 * float((high - low).max()) if images.numel() else 0.0
        if bool(((low > slack) | (high < -slack)).any()):
            raise ValueError(
                f"{name} was made for pixels in its range, low to high, but the images reach from "
                f"{float(images.min()):g} to {float(images.max()):g}: give low= and high= as the images have them (for "
                "standardized ones, (0 - mean) / deviation and (1 - mean) / deviation)"
            )


class _Affine:
    """A batch normalization in eval mode as one multiplication and addition, whose backward pass is several times as
    fast as that of PyTorch's, which also makes the sums for the weights' gradients."""

    def __init__(self, norm: Any):
        self.usual = norm.forward
        with torch.no_grad():
            scale = (norm.running_var + norm.eps).rsqrt()
            self.scale = scale if norm.weight is None else scale * norm.weight
            self.shift = -norm.running_mean * self.scale + (0 if norm.bias is None else norm.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.scale.dtype or x.ndim < 2 or x.shape[1] != len(self.scale):
            return self.usual(x)
        shape = (-1, *(1,) * (x.ndim - 2))
        return torch.addcmul(self.shift.view(shape), self.scale.view(shape), x)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode and freeze all weights while the context lasts."""
    modes = {module: module.training for module in model.modules()}
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight.is_leaf]
    model.eval()
    for weight in weights:
        weight.requires_grad_(False)
    affine = [m for m in modes if type(m) in BATCH_NORMS and m.running_mean is not None]
    norms = [] if compiled_module(model) else affine
    for norm in norms:
        norm.__dict__["forward"] = _Affine(norm)  # hides the method of the class
    try:
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)
        for module, mode in modes.items():
            module.training = mode
        for weight in weights:
            weight.requires_grad_(True)
