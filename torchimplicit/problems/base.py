"""What a user states: which point is the output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from torchimplicit.members import module_of
from torchimplicit.problems.system import System
from torchimplicit.solution import Status
from torchimplicit.state import Layout


class Problem(ABC):
    """A problem whose solution is a layer's output. Stated once, solved for many arguments by :func:`solve`."""

    batched: bool
    rowwise: bool
    has_aux: bool = False
    by_gradient: ClassVar[bool] = False
    """Whether an evaluation takes a gradient of the function: its value alone is none."""
    announces_start: ClassVar[bool] = False
    """Whether :meth:`explain_start` is to be told where the constraint does not allow the start."""

    def explain(self, status: Status) -> str:
        """What else may have led to a sample's ``status``, and what to do about it, in sentences without a full stop
        at the end; empty where the solver says all there is to say."""
        return ""

    def explain_start(self, moved: int, rows: int) -> str:
        """What to say where the start had to be moved onto the constraint, in ``moved`` of ``rows`` samples."""
        return f"the start lies outside the constraint in {moved} of {rows} samples, and was projected onto it"

    def start(self, z0: Any) -> Any:
        """The whole initial state, of what the caller gave."""
        return z0

    def layout(self, z0: Any) -> Layout:
        """How the whole initial state lies in flat form, in the coordinates that are to be solved in."""
        return Layout.of(z0, self.batched)

    def own_coordinates(self) -> Self:
        """The same problem, to be solved in the state's own coordinates."""
        return self

    def flattened(self, layout: Layout, flat: Tensor) -> Self:
        """The same problem, with its constraint in flat coordinates, those of the start, where it has one."""
        return self

    @property
    @abstractmethod
    def function(self) -> Callable[..., Any]:
        """The user's function, called as ``function(z, *args)``."""

    def noting(self, note: Callable[[Any], None]) -> Callable[..., Any]:
        """:attr:`function`, which hands what the user's returns beside the state to ``note``."""
        raise AssertionError

    @property
    def stated_by(self) -> Callable[..., Any]:
        """What the user gave for it, the same in every solve."""
        return self.function

    def state(self, layout: Layout, flat: Any) -> Any:
        """The state that the function is called with, of its flat form; or of the flat parts of it that the function
        depends on, where the problem's system takes them apart."""
        return layout.unflatten(flat)

    def seen(self, layout: Layout, flat: Tensor) -> Any:
        """What of the flat state the function depends on, as :meth:`state` takes it."""
        return flat

    @abstractmethod
    def flat_output(self, layout: Layout, output: Any, rows: int, cast: bool) -> Tensor:
        """The function's output, checked, in flat form."""

    def flat_parts(self, layout: Layout, output: Any, rows: int, cast: bool) -> tuple[Tensor, ...]:
        """Likewise, part for part, of a function that was called with parts of the state."""
        raise AssertionError

    @abstractmethod
    def system(
        self, fn: Callable[..., Tensor], row_params: tuple[bool, ...] | None, constraint: slice, layout: Layout
    ) -> System:
        """The problem in flat coordinates.

        Args:
            fn: ``(z, *params) -> flat output``.
            row_params: see :class:`~torchimplicit.problems.system.System`.
            constraint: which of the parameters are those that :meth:`constraint_tensors` gave.
            layout: of the state.
        """

    def constraint_tensors(self, layout: Layout, rows: int) -> tuple[Tensor, ...]:
        """The problem's own tensors in flat form, a constraint's above all; none where there are none."""
        return ()


def check_function(function: Any, what: str) -> None:
    """``function`` must be callable."""
    if not callable(function):
        raise TypeError(f"{what} must be callable as {what}(z, *args), and it is {type(function).__name__}")


@dataclass(frozen=True)
class MapProblem(Problem):
    """A problem stated by a map ``f(z, *args)`` whose result looks like the state."""

    f: Callable[..., Any]
    batched: bool = True
    rowwise: bool = False
    has_aux: bool = field(default=False, kw_only=True)
    unpack: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_function(self.f, "f")

    @property
    def function(self) -> Callable[..., Any]:
        return _Plain(self, None) if self.has_aux or self.unpack else self.f

    def noting(self, note: Callable[[Any], None]) -> Callable[..., Any]:
        return _Plain(self, note)

    @property
    def stated_by(self) -> Callable[..., Any]:
        return self.f

    def flat_output(self, layout: Layout, output: Any, rows: int, cast: bool) -> Tensor:
        flat = layout.flatten(output, "the result of f", cast)
        if flat.shape[0] != rows:
            raise ValueError(
                f"f was given {rows} samples and returned {flat.shape[0]}: the map must keep the batch. If the problem "
                "says rowwise=True, f must treat every row on its own and capture no tensor that carries the batch: "
                "pass such tensors as arguments, so that they are indexed along with the state"
            )
        return flat


class _Plain:
    """The user's map as ``(z, *args) -> state``, however it takes the state and whatever else it returns."""

    def __init__(self, problem: MapProblem, note: Callable[[Any], None] | None):
        self.f, self.unpack, self.has_aux, self.note = problem.f, problem.unpack, problem.has_aux, note
        module = module_of(problem.f)
        if module is not None:
            self.module = module

    def __call__(self, z: Any, *args: Any) -> Any:
        if self.unpack and not isinstance(z, tuple | list):
            raise TypeError(
                "unpack=True calls f(*z, *args) with the entries of a tuple or list, and the state is a "
                f"{type(z).__name__}: give z0 as a tuple, or leave out unpack"
            )
        out = self.f(*z, *args) if self.unpack else self.f(z, *args)
        if self.has_aux:
            if not isinstance(out, tuple | list) or len(out) != 2:
                told = f"{len(out)} values" if isinstance(out, tuple | list) else f"a {type(out).__name__}"
                raise ValueError(f"has_aux=True says that f returns a pair (state, aux), and it returned {told}")
            out, aux = out
            if self.note is not None:
                self.note(aux)
        if self.unpack and isinstance(out, tuple | list):
            return type(z)(*out) if hasattr(z, "_fields") else type(z)(out)
        return out
