"""The base classes of the problems: which point is a layer's output."""

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
    """A problem whose solution is a layer's output: defined once, and solved for many arguments by :func:`solve`."""

    batched: bool
    rowwise: bool
    has_aux: bool = False
    by_gradient: ClassVar[bool] = False
    """True if an evaluation needs the gradient of the function and not just its value."""
    announces_start: ClassVar[bool] = False
    """True if a start outside the constraint is worth a warning (:meth:`explain_start`)."""

    def explain(self, status: Status) -> str:
        """Say what about this problem may have caused a sample's ``status`` and what to do: sentences without the final
        full stop, to be added to the solver's message; empty where there is nothing to add."""
        return ""

    def explain_start(self, moved: int, rows: int) -> str:
        """The warning where the start of ``moved`` of ``rows`` samples had to be projected onto the constraint."""
        return f"the start lies outside the constraint in {moved} of {rows} samples, and was projected onto it"

    def start(self, z0: Any) -> Any:
        """The complete initial state, from what the caller passed as ``z0``."""
        return z0

    def layout(self, z0: Any) -> Layout:
        """The flat layout of the complete initial state, in the coordinates that the solver works in."""
        return Layout.of(z0, self.batched)

    def own_coordinates(self) -> Self:
        """Return the same problem, solved in the state's own coordinates instead of those of a metric."""
        return self

    def flattened(self, layout: Layout, flat: Tensor) -> Self:
        """Return the same problem with its constraint, if any, in flat coordinates; ``flat`` is the start."""
        return self

    @property
    @abstractmethod
    def function(self) -> Callable[..., Any]:
        """The user's function, called as ``function(z, *args)``."""

    def noting(self, note: Callable[[Any], None]) -> Callable[..., Any]:
        """:attr:`function`, except that it passes the auxiliary value that ``f`` returns beside the state to ``note``.

        Only for problems with ``has_aux``.
        """
        raise AssertionError

    @property
    def stated_by(self) -> Callable[..., Any]:
        """The callable that the user gave. It is the same object in every solve, so what is learned of the function is
        remembered for it."""
        return self.function

    def state(self, layout: Layout, flat: Any) -> Any:
        """The state that the function is called with, from the flat state, or from the parts that :meth:`seen`
        gives."""
        return layout.unflatten(flat)

    def seen(self, layout: Layout, flat: Tensor) -> Any:
        """The parts of the flat state that the function depends on, as :meth:`state` takes them."""
        return flat

    @abstractmethod
    def flat_output(self, layout: Layout, output: Any, rows: int, cast: bool) -> Tensor:
        """The function's output in flat form.

        Args:
            layout: layout of the state.
            output: the function's return value.
            rows: the batch size that it was called with.
            cast: whether another floating dtype is converted (under autocast) instead of refused.

        Raises:
            TypeError, ValueError: the output is not what the problem needs; the message says what it must be.
        """

    def flat_parts(self, layout: Layout, output: Any, rows: int, cast: bool) -> tuple[Tensor, ...]:
        """The output of a function that was called with parts of the state, each part in flat form; see
        :meth:`flat_output`."""
        raise AssertionError

    @abstractmethod
    def system(
        self, fn: Callable[..., Tensor], row_params: tuple[bool, ...] | None, constraint: slice, layout: Layout
    ) -> System:
        """The problem in flat coordinates.

        Args:
            fn: ``(z, *params) -> flat output``.
            row_params: see :class:`~torchimplicit.problems.system.System`.
            constraint: the places of :meth:`constraint_tensors` among the parameters.
            layout: layout of the state.
        """

    def constraint_tensors(self, layout: Layout, rows: int) -> tuple[Tensor, ...]:
        """The tensors of the problem itself, such as those of a constraint, in flat form."""
        return ()


def check_function(function: Any, what: str) -> None:
    """Raise ``TypeError`` unless ``function`` is callable."""
    if not callable(function):
        raise TypeError(f"{what} must be callable as {what}(z, *args), not {type(function).__name__}")


@dataclass(frozen=True)
class MapProblem(Problem):
    """A problem that is given by a map ``f(z, *args)`` whose result has the structure of the state."""

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
                "pass such tensors as arguments, so that they are indexed together with the state"
            )
        return flat


class _Plain:
    """The user's map as ``(z, *args) -> state``: unpacks the state for it, and takes its auxiliary value off."""

    def __init__(self, problem: MapProblem, note: Callable[[Any], None] | None):
        self.f, self.unpack, self.has_aux, self.note = problem.f, problem.unpack, problem.has_aux, note
        module = module_of(problem.f)
        if module is not None:
            self.module = module  # where the closure looks for parameters and buffers

    def __call__(self, z: Any, *args: Any) -> Any:
        if self.unpack and not isinstance(z, tuple | list):
            raise TypeError(
                "unpack=True calls f(*z, *args) with the entries of a tuple or list, and the state is a "
                f"{type(z).__name__}: give z0 as a tuple, or leave out unpack"
            )
        out = self.f(*z, *args) if self.unpack else self.f(z, *args)
        if self.has_aux:
            if not isinstance(out, tuple | list) or len(out) != 2:
                got = f"{len(out)} values" if isinstance(out, tuple | list) else f"a {type(out).__name__}"
                raise ValueError(f"has_aux=True says that f returns a pair (state, aux), but it returned {got}")
            out, aux = out
            if self.note is not None:
                self.note(aux)
        if self.unpack and isinstance(out, tuple | list):
            return type(z)(*out) if hasattr(z, "_fields") else type(z)(out)
        return out
