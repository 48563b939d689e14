"""The user's function made pure: every tensor that it depends on becomes an explicit argument.

A function may capture tensors (variables of a closure, parameters of a module). To differentiate a solution to any
order and under any transform, these must be arguments. One call of the function under a mode that intercepts every
tensor operation finds them; later calls run under a second mode that replaces them by substitutes. JAX calls this
closure conversion.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchimplicit._torch import (
    forward_level,
    function_mode_count,
    function_modes,
    functorch,
    functorch_config,
    outside_transforms,
    sequence_number,
    set_grad_enabled,
    without_function_modes,
    without_transforms,
)
from torchimplicit.compiler import compiler_loaded
from torchimplicit.members import compiled_module
from torchimplicit.records import changed
from torchimplicit.state import leaves_of


def is_transformed(t: Tensor) -> bool:
    """Return whether ``t`` belongs to a running ``torch.func`` transform or carries a forward-mode tangent."""
    return functorch.is_functorch_wrapped_tensor(t) or (forward_level() >= 0 and has_tangent(t))


def has_tangent(t: Tensor) -> bool:
    """Return whether ``t`` itself carries a forward-mode tangent, regardless of running ``torch.func`` transforms."""
    if forward_level() < 0:
        return False
    with without_transforms():  # vmap has no rule for unpack_dual, and other transforms would answer for their level
        return forward_ad.unpack_dual(t).tangent is not None


def is_vmapped(t: Tensor) -> bool:
    """Return whether ``t`` belongs to a running ``torch.func.vmap``, at any level."""
    while functorch.maybe_get_level(t) >= 0:
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def transforms_running() -> bool:
    """Return whether any transform is running, so that tensors may belong to one."""
    return functorch.maybe_current_level() is not None or forward_level() >= 0


def beside_transforms(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """A context outside all ``torch.func`` transforms, if none of the tensors belongs to one.

    A result of such tensors alone is a constant to every transform, and ordinary autograd, which a solver may need, is
    not allowed under a transform.
    """
    if functorch.maybe_current_level() is None or any(map(is_transformed, tensors)):
        return contextlib.nullcontext()
    return outside_transforms()


def carries_derivative(t: Tensor) -> bool:
    """Return whether a derivative with respect to ``t`` may be asked for, in any mode."""
    return t.requires_grad or is_transformed(t)


def through_modes(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Pass the tensors through the modes of enclosing equilibria, which record or replace them like those of any
    operation."""
    enclosing, seen = _watching()[::-1], tuple(tensors)
    for i, watcher in enumerate(enclosing):
        replaced = tuple(map(watcher.replaced, seen))
        for nearer in enclosing[:i]:  # a substitute of an outer mode is not a captured tensor to the inner ones
            nearer.keep(tuple(new for new, old in zip(replaced, seen, strict=True) if new is not old))
        seen = replaced
    return seen


def watched() -> bool:
    """Return whether this runs inside the map of an equilibrium, whose modes must see every operation."""
    return bool(_watching())


def register(tensors: Any) -> None:
    """Tell the modes of enclosing equilibria about tensors that an autograd node has computed hidden from them."""
    for watcher in _watching():
        watcher.keep(tensors)


def _watching() -> list[_Watcher]:
    """The modes active in this thread: more than one where an equilibrium is solved inside the map of another."""
    return [mode for mode in function_modes() if isinstance(mode, _Watcher)] if function_mode_count() else []


_QUESTIONS = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "_version")
) | {Tensor.is_inference, Tensor.is_contiguous}
"""Attributes that are the same for a captured tensor and its substitute, so that reading them is not a use."""

_CUTS = frozenset(
    (
        Tensor.detach,
        Tensor.detach_,
        Tensor.numpy,
        Tensor.item,
        Tensor.tolist,
        Tensor.__float__,
        Tensor.__array__,
        getattr(Tensor, "data").__get__,  # noqa: B009 (a property to Python, a tensor to mypy)
    )
)
"""Operations that return the numbers of a tensor without its graph."""


class _Watcher(TorchFunctionMode):
    """Tracks the tensors that are computed inside a call, and passes every other one that carries a derivative to
    ``met``.

    The mode sees the result of every operation. A tensor that was computed hidden from it (by a transform inside the
    call, by compiled code) is told from a captured one by its origin: the level of the transform that it belongs to, or
    the sequence number of its autograd node.

    Attributes:
        table: the substitutes of captured tensors, by the ids of these.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.table: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {}
        for t in known:  # kept alive, so that no new tensor gets the same id
            self._known[id(t)] = t
            self.keep(t)

    def met(self, t: Tensor) -> Tensor:
        """Return the replacement of ``t``, which was computed outside the call."""
        raise AssertionError

    def __enter__(self) -> Any:
        self._enclosing = tuple(reversed(_watching()))
        self._level = _current_level()
        self._begin = sequence_number()
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return func(*args, **(kwargs or {}))
        if func is torch.autograd.grad and not self._all_known(args[0]):
            # a graph from before the call, as in a pullback of torch.func.vjp: its ends must not be replaced
            kwargs = {**(kwargs or {}), "grad_outputs": self._replace(kwargs["grad_outputs"])}
            out = func(*args, **kwargs)
            self.keep(out)
            return out
        args = [self._replace(arg) for arg in args]
        kwargs = {key: self._replace(value) for key, value in kwargs.items()} if kwargs else {}
        out = func(*args, **kwargs)
        self.keep(out)
        return out

    def keep(self, tree: Any) -> None:
        """Note tensors that were computed inside the call, by weak references, or else a call would keep all of its
        intermediates alive. Tensors of a transform are kept, since their wrappers are short-lived."""
        if isinstance(tree, Tensor):
            if functorch.maybe_get_level(tree) < 0:
                self._made[id(tree)] = weakref.ref(tree)
                return
            self._known[id(tree)] = tree
            while functorch.maybe_get_level(tree) >= 0:  # the tensors that remain when the transforms end
                tree = functorch.get_unwrapped(tree)
                self._known[id(tree)] = tree
        elif isinstance(tree, (tuple, list)):
            for item in tree:
                self.keep(item)

    def replaced(self, t: Tensor) -> Tensor:
        """The tensor that an operation inside the call would get in place of ``t``."""
        return self._replace(t)

    def _replace(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if self._knows(tree):
                return tree
            if self._substituted(tree):
                return self.met(tree)
            return self._unseen(tree) if _carries(tree) else tree
        if type(tree) in (tuple, list):
            return type(tree)([self._replace(item) for item in tree])
        return tree

    def _all_known(self, tensors: Tensor | Sequence[Tensor]) -> bool:
        return all(map(self._knows, (tensors,) if isinstance(tensors, Tensor) else tensors))

    def _knows(self, t: Tensor) -> bool:
        """Return whether ``t`` was passed to the call, or computed inside it."""
        key = id(t)
        return key in self._known or (key in self._made and self._made[key]() is t)

    def _substituted(self, t: Tensor) -> bool:
        """Return whether an enclosing equilibrium replaces ``t``. Then it is captured here as well, even without a
        derivative of its own, since this call may be repeated without the enclosing one."""
        return bool(self._enclosing) and any(id(t) in watcher.table for watcher in self._enclosing)

    def _unseen(self, t: Tensor) -> Tensor:
        """Return the replacement of ``t``, which carries a derivative and was not seen before."""
        level = functorch.maybe_get_level(t)
        if level > self._level:  # a transform inside the call has wrapped a tensor from outside
            inside = functorch.get_unwrapped(t)
            substitute = self._replace(inside)
            if substitute is inside and (self._knows(inside) or not _carries(inside)):
                self._known[id(t)] = t
                return t
            if not functorch.is_batchedtensor(t):
                raise RuntimeError(
                    f"the function differentiates, by torch.func, with respect to a captured tensor of shape "
                    f"{tuple(t.shape)}: pass that tensor to solve as an argument"
                )
            return functorch._add_batch_dim(substitute, functorch.maybe_get_bdim(t), level)
        if _made_since(t, self._begin):  # by compiled code, say, which the mode does not see
            self.keep(t)
            return t
        return self.met(t)


class _Recorder(_Watcher):
    """Records the captured tensors, and whether part of the graph is detached."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__(known)
        self.captured: dict[int, Tensor] = {}
        self.cuts = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return func(*args, **(kwargs or {}))
        if func in _CUTS:
            self.cuts = self.cuts or (args[0].is_floating_point() and self._knows(args[0]))
        elif func is set_grad_enabled and not args[0]:
            self.cuts = True
        return super().__torch_function__(func, types, args, kwargs)

    def met(self, t: Tensor) -> Tensor:
        self.captured[id(t)] = t
        return t


class _Replayer(_Watcher):
    """Replaces captured tensors by substitutes."""

    def __init__(self, known: Iterable[Tensor], captured: Sequence[Tensor], substitutes: Sequence[Tensor]):
        super().__init__((*known, *substitutes))
        self.table = {id(c): s for c, s in zip(captured, substitutes, strict=True)}
        self.used: set[int] = set()

    def _replace(self, tree: Any) -> Any:
        if isinstance(tree, Tensor) and id(tree) in self.table:
            self.used.add(id(tree))
            return self.table[id(tree)]
        return super()._replace(tree)

    def met(self, t: Tensor) -> Tensor:
        raise RuntimeError(
            f"the function used a captured tensor of shape {tuple(t.shape)} that requires grad and that it had not "
            "used when it was first called, so its gradient would be lost: pass the tensor to solve as an argument"
        )


class Closure:
    """``function(z, *args)`` as a pure function of ``(z, *tensors)``.

    The tensors are those of the arguments, then ``extra`` ones that the function does not use (those of a constraint),
    then the captured ones. The state may be a tuple of parts.

    Attributes:
        function: takes the flat state and the arguments; returns the output in flat form.
        args: the arguments.
        tensors: the tensors among the arguments.
        captured: the tensors that ``function`` captures; empty until they have been recorded.
        recorded: the value of the call that recorded them with its graph, and the leaves of that graph, the state
            first; ``None`` if it was not recorded for differentiation.
        cuts: whether that call detached part of its graph (``detach()``, ``no_grad``), whether or not the part depends
            on the state.
    """

    recorded: tuple[Tensor, Sequence[Tensor]] | None = None
    cuts: bool = False

    def __init__(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], extra: int, captured: tuple[Tensor, ...] = ()
    ):
        self.function = function
        self.args = args
        self.extra = extra
        self.captured = captured
        self._compiled = compiled_module(function)
        self._used: set[int] | None = None
        self._leaves = leaves_of(args)
        self._spec: pytree.TreeSpec | None = None
        self.tensors = tuple([leaf for leaf in self._leaves if isinstance(leaf, Tensor)])

    def record(self, z: Tensor) -> tuple[Closure, Tensor]:
        """Find the tensors that ``function`` captures when it is called at ``z``; returns the closure with these, and
        the value. Where ``z`` requires grad, the value's graph is kept (:attr:`recorded`)."""
        if self._compiled is not None:
            known = {id(t) for t in self.tensors}
            inner = tuple(p for p in self._compiled.parameters() if carries_derivative(p) and id(p) not in known)
            if not any(map(is_transformed, (z, *self.tensors, *inner))):
                with torch.no_grad(), self._retained():
                    return self.capturing(inner), _untouched(self.function, z, *self.args)
        # the function gets aliases of the arguments, so that a tensor that is passed and also captured is seen as both
        with eagerly(), torch.enable_grad():
            aliases = tuple(map(_alias, self.tensors))
            with _Recorder((z, *aliases)) as recorder:
                value = _untouched(self.function, z, *self._given(aliases))
        captured = tuple((recorder.captured | self._scripted()).values())
        if not _watching():  # inside another equilibrium the graph may hold substitutes, and that one checks it
            check_graph(value, (z, *through_modes((*aliases, *captured))))
        closure = self.capturing(captured)
        closure.cuts = recorder.cuts
        if z.requires_grad and all(t.is_leaf and not t._backward_hooks for t in captured):
            closure.recorded = value, (z, *aliases, *captured)
        return closure, value.detach()

    def __call__(self, z: Tensor | tuple[Tensor, ...], *tensors: Tensor) -> Any:
        parts = z if isinstance(z, tuple) else (z,)
        count = len(self.tensors)
        seen, substitutes = tensors[:count], tensors[count + self.extra :]
        if any(map(is_not, substitutes, self.captured)):
            captured = {id(t) for t in self.captured}
            seen = tuple(_alias(t) if id(t) in captured else t for t in seen)
            with eagerly(), _Replayer((*parts, *seen), self.captured, substitutes) as replayer:
                out = _untouched(self.function, z, *self._given(seen))
            self._compare(replayer.used)
            return out
        if self._compiled is None:
            return _untouched(self.function, z, *self._given(seen))
        with eagerly() if any(map(is_transformed, (*parts, *tensors))) else self._retained():
            return _untouched(self.function, z, *self._given(seen))

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments, with their tensors replaced by those of ``tensors``, which are as for a call."""
        return tuple(self._given(tensors[: len(self.tensors)]))

    def _given(self, own: Sequence[Tensor]) -> Any:
        """The arguments, with their tensors replaced by ``own``."""
        if not any(map(is_not, own, self.tensors)):
            return self.args
        if len(own) == len(self.args) and not any(map(is_not, self.tensors, self.args)):  # each argument is a tensor
            return own
        rest = iter(own)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        if self._spec is None:
            self._spec = pytree.tree_structure(self.args)
        return pytree.tree_unflatten(leaves, self._spec)

    def _compare(self, used: set[int]) -> None:
        """Raise where an evaluation for a derivative no longer uses a tensor that the solver's last evaluation used."""
        if not torch.is_grad_enabled():
            self._used = used
        elif self._used is not None and not self._used <= used:
            lost = next(t for t in self.captured if id(t) in self._used - used)
            raise RuntimeError(
                f"the function no longer uses a captured tensor of shape {tuple(lost.shape)} that it used when the "
                "problem was solved, so that its gradient would be lost: it was replaced since then, as "
                "torch.func.functional_call does. Pass the module's tensors to solve as arguments, or give the problem "
                "a method of the module"
            )

    def _scripted(self) -> dict[int, Tensor]:
        """The parameters of TorchScript modules, whose operations no mode sees."""
        passed = {id(t) for t in self.tensors}
        modules = (m for root in getattr(self.function, "modules", ()) for m in root.modules())
        scripted = (m for m in modules if isinstance(m, torch.jit.ScriptModule))
        return {id(p): p for m in scripted for p in m.parameters() if p.requires_grad and id(p) not in passed}

    def capturing(self, captured: tuple[Tensor, ...]) -> Closure:
        """The closure with known captured tensors."""
        return changed(self, captured=captured)

    def _retained(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which compiled code keeps its buffers, since an adjoint solve runs its backward many times."""
        return functorch_config.patch(donated_buffer=False)


def _alias(t: Tensor) -> Tensor:
    """Another tensor object with the same value and derivative."""
    return t.view_as(t) if t.layout is torch.strided else t.clone()


def check_graph(out: Tensor, known: Sequence[Tensor]) -> None:
    """Check that every path in the graph of ``out`` to a tensor that requires grad leads through ``known``: any other
    such tensor would silently get no gradient.

    Raises:
        RuntimeError: there is another one.
    """
    ends, nodes = {id(t) for t in known}, None
    borders = {(t.grad_fn, t.output_nr) for t in known if t.grad_fn is not None}
    stack, seen = [(out.grad_fn, out.output_nr)], set()
    while stack:
        place = stack.pop()
        node = place[0]
        if node is None or place in seen or place in borders:
            continue
        seen.add(place)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in ends:
            if nodes is None:
                nodes = {_accumulator(t) for t in known if t.is_leaf and t.requires_grad}
            if node not in nodes:
                raise RuntimeError(
                    f"the function depends on a captured tensor of shape {tuple(variable.shape)} in a way that the "
                    "recording does not see (compiled or foreign code, or a graph from before the call, as in a "
                    "pullback of torch.func.vjp), so its gradient would be lost: pass the tensor to solve as an "
                    "argument"
                )
        stack.extend(node.next_functions)


def _accumulator(leaf: Tensor) -> Any:
    """The node that accumulates the gradient of ``leaf``. With hooks on saved tensors (activation checkpointing), a
    parameter comes back as another tensor object, but with the same node."""
    with without_function_modes(), torch.enable_grad():
        seen = _alias(leaf).grad_fn
    return None if seen is None else seen.next_functions[0][0]


def _untouched(function: Callable[..., Any], z: Tensor | tuple[Tensor, ...], *args: Any) -> Any:
    """``function(z, *args)``; raises where that writes to ``z`` in place."""
    if isinstance(z, tuple):
        before: Any = _versions(z)
        out = function(z, *args)
        changed = _versions(z) != before
    else:
        before = None if z.is_inference() else z._version
        out = function(z, *args)
        changed = before is not None and z._version != before
    if changed:
        raise RuntimeError(
            "the function changed its state in place, which is the solver's own iterate: work on a copy (z.clone()) or "
            "use the operation that returns a new tensor"
        )
    return out


def _versions(parts: tuple[Tensor, ...]) -> list[int | None]:
    """Autograd's counts of in-place writes; inference tensors have none."""
    return [None if part.is_inference() else part._version for part in parts]


def _carries(t: Tensor) -> bool:
    with without_function_modes():  # an enclosing mode would answer for its substitute
        return carries_derivative(t)


def _current_level() -> int:
    level = functorch.maybe_current_level()
    return -1 if level is None else level


def _made_since(t: Tensor, begin: int) -> bool:
    """Return whether autograd recorded ``t`` after its sequence number ``begin``, in this thread."""
    now = sequence_number()
    with without_function_modes():  # looking at a tensor is not a use of it by the function
        while True:
            if t.grad_fn is not None and begin <= t.grad_fn._sequence_nr() < now:
                return True
            if functorch.maybe_get_level(t) < 0:
                return False
            t = functorch.get_unwrapped(t)


def eagerly() -> contextlib.AbstractContextManager[None]:
    """A context in which compiled code runs eagerly. Compiled code ignores modes and transforms, so it must not run
    where these are active; and which code is compiled cannot always be told from outside.

    The compiler's stance belongs to the whole process: the first of several threads sets it, the last one resets it.
    """
    return _eagerly() if compiler_loaded() else contextlib.nullcontext()


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    global _eager, _stance
    with _eager_lock:
        _eager += 1
        if _eager == 1:
            _stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _eager_lock:
            _eager -= 1
            if _eager == 0:
                _stance.__exit__(None, None, None)


_eager = 0
_eager_lock = threading.Lock()
_stance: Any = None
