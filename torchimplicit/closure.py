"""The user's function made pure: every tensor that it depends on becomes an explicit argument.

A function may capture tensors (a closure's variables, a module's parameters). To differentiate a solution to any
order, and under any transform, those must be arguments. One call of the function under a mode that sees every tensor
operation finds them; later calls run under a second mode that puts substitutes in their place. JAX calls this closure
conversion.
"""

from __future__ import annotations

import contextlib
import copy
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
from torchimplicit.state import leaves_of


def is_transformed(t: Tensor) -> bool:
    """Whether ``t`` belongs to a running ``torch.func`` transform or carries a forward-mode tangent."""
    return functorch.is_functorch_wrapped_tensor(t) or has_tangent(t)


def has_tangent(t: Tensor) -> bool:
    """Whether ``t`` itself carries a forward-mode tangent, whatever transforms of ``torch.func`` are running."""
    if forward_level() < 0:
        return False
    with without_transforms():  # vmap has no rule for the question, and the others would answer for their level
        return forward_ad.unpack_dual(t).tangent is not None


def is_vmapped(t: Tensor) -> bool:
    """Whether ``t`` belongs to a running ``torch.func.vmap``, at whatever level."""
    while functorch.maybe_get_level(t) >= 0:
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def transforms_running() -> bool:
    """Whether tensors that belong to a transform can be about, be they seen yet or not."""
    return functorch.maybe_current_level() is not None or forward_level() >= 0


def beside_transforms(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """The transforms of ``torch.func`` set aside, where none of the tensors belongs to one: what is computed of those
    alone is a constant to it, and ordinary autograd, which a solver may need, is refused under a transform."""
    if functorch.maybe_current_level() is None or any(map(is_transformed, tensors)):
        return contextlib.nullcontext()
    return outside_transforms()


def carries_derivative(t: Tensor) -> bool:
    """Whether a derivative may be asked with respect to ``t``, in any mode."""
    return t.requires_grad or is_transformed(t)


def through_modes(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors as the enclosing equilibria's modes see them, so that they find and replace them too."""
    enclosing, seen = _watching()[::-1], tuple(tensors)
    for i, watcher in enumerate(enclosing):
        replaced = tuple(map(watcher.replaced, seen))
        for nearer in enclosing[:i]:  # to those it is what they know already, by another name
            nearer.keep(tuple(new for new, old in zip(replaced, seen, strict=True) if new is not old))
        seen = replaced
    return seen


def watched() -> bool:
    """Whether this happens inside the map of an equilibrium, whose modes must see every operation."""
    return bool(_watching())


def register(made: Any) -> None:
    """Tell the modes of an enclosing equilibrium of tensors that were made out of their sight, by an autograd node."""
    for watcher in _watching():
        watcher.keep(made)


def _watching() -> list[_Watcher]:
    """The modes that are on in this thread: more than one where an equilibrium is solved inside another's map."""
    return [mode for mode in function_modes() if isinstance(mode, _Watcher)]


_QUESTIONS = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "_version")
)
"""What a tensor is asked that is no different for the one in its place."""

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
"""What gives the numbers of a tensor without its history."""


class _Watcher(TorchFunctionMode):
    """Follows which tensors are made inside a call, and hands every other one that carries a derivative to ``met``.

    An operation shows its result to the mode. What is made out of its sight (by a transform inside the call, by
    compiled code) is told from a captured tensor by its history: the level of the transform that it belongs to, or its
    place in the sequence of autograd's nodes.

    Attributes:
        table: by the ids of captured tensors, what is put in their places.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.table: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {}
        for t in known:  # whoever gives them need not hold them on
            self._known[id(t)] = t
            self.keep(t)

    def met(self, t: Tensor) -> Tensor:
        raise AssertionError

    def __enter__(self) -> Any:
        self._enclosing = tuple(reversed(_watching()))
        self._level = _current_level()
        self._begin = sequence_number()
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return func(*args)
        if func is torch.autograd.grad and not self._all_known(args[0]):
            # a graph from before the call, as behind a pullback of torch.func.vjp: its ends stand for themselves
            kwargs = {**(kwargs or {}), "grad_outputs": self._replace(kwargs["grad_outputs"])}
            out = func(*args, **kwargs)
            self.keep(out)
            return out
        args = self._replace(args)
        kwargs = {key: self._replace(value) for key, value in kwargs.items()} if kwargs else {}
        out = func(*args, **kwargs)
        self.keep(out)
        return out

    def keep(self, tree: Any) -> None:
        """Note tensors made inside the call, without keeping them: a call would hold all that it computes. But those
        of a transform are kept, since what wraps them is made anew."""
        if isinstance(tree, Tensor):
            if functorch.maybe_get_level(tree) < 0:
                self._made[id(tree)] = weakref.ref(tree)
                return
            self._known[id(tree)] = tree
            while functorch.maybe_get_level(tree) >= 0:  # what is left of it outside of a transform
                tree = functorch.get_unwrapped(tree)
                self._known[id(tree)] = tree
        elif isinstance(tree, (tuple, list)):
            for item in tree:
                self.keep(item)

    def replaced(self, t: Tensor) -> Tensor:
        """The tensor as an operation in the call would get it."""
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
        """Whether ``t`` was given, or noted."""
        if id(t) in self._known:
            return True
        made = self._made.get(id(t))
        return made is not None and made() is t

    def _substituted(self, t: Tensor) -> bool:
        """Whether an enclosing equilibrium puts another tensor in the place of ``t``: it is captured here as well,
        whatever it is itself, for the call may be made again without the enclosing one."""
        return any(id(t) in watcher.table for watcher in self._enclosing)

    def _unseen(self, t: Tensor) -> Tensor:
        level = functorch.maybe_get_level(t)
        if level > self._level:  # an inner transform has wrapped a tensor from outside it
            inside = functorch.get_unwrapped(t)
            found = self._replace(inside)
            if found is inside and (self._knows(inside) or not _carries(inside)):
                self._known[id(t)] = t
                return t
            if not functorch.is_batchedtensor(t):
                raise RuntimeError(
                    f"the function differentiates, by torch.func, in a captured tensor of shape {tuple(t.shape)}: pass "
                    "that tensor to solve as an argument"
                )
            return functorch._add_batch_dim(found, functorch.maybe_get_bdim(t), level)
        if _made_since(t, self._begin):
            self.keep(t)
            return t
        return self.met(t)


class _Recorder(_Watcher):
    """Notes the captured tensors, and whether part of the graph is cut off."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__(known)
        self.captured: dict[int, Tensor] = {}
        self.cuts = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CUTS:
            self.cuts = self.cuts or (args[0].is_floating_point() and self._knows(args[0]))
        elif func is set_grad_enabled and not args[0]:
            self.cuts = True
        return super().__torch_function__(func, types, args, kwargs)

    def met(self, t: Tensor) -> Tensor:
        self.captured[id(t)] = t
        return t


class _Replayer(_Watcher):
    """Puts substitutes in the place of captured tensors."""

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
            "used when it was first called, so its derivative is not known: pass the tensor to solve as an argument"
        )


class Closure:
    """``function(z, *args)`` as a function of ``(z, *tensors)``, where the tensors are those of the arguments, then
    ``extra`` ones that the function does not see, then the captured ones. The state may be a tuple of parts.

    Attributes:
        function: takes the flat state and the arguments; gives the output in flat form.
        args: the arguments, from which the tensors were taken.
        tensors: the tensors among the arguments.
        captured: the tensors that ``function`` captures; empty until they have been recorded.
        recorded: the value of the call that recorded them, with its history, and the tensors that it was called with,
            the state first; ``None`` where there is none to be had.
        cuts: whether that call cut part of its graph off (``detach()``, ``no_grad``), which need not depend on the
            state.
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
        self.tensors = tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def record(self, z: Tensor) -> tuple[Closure, Tensor]:
        """The closure with what ``function`` captures at ``z``, and its value there; with the history of that
        (:attr:`recorded`), where ``z`` requires grad."""
        if self._compiled is not None:
            known = {id(t) for t in self.tensors}
            inner = tuple(p for p in self._compiled.parameters() if carries_derivative(p) and id(p) not in known)
            if not any(map(is_transformed, (z, *self.tensors, *inner))):
                with self._retained():
                    return self.capturing(inner), _untouched(self.function, z, *self.args)
        # Aliases of the arguments tell a tensor that is passed from one that is captured as well.
        with eagerly(), torch.enable_grad():
            own = tuple(map(_alias, self.tensors))
            with _Recorder((z, *own)) as recorder:
                value = _untouched(self.function, z, *self._given(own))
        captured = tuple((recorder.captured | self._scripted()).values())
        if not _watching():  # or else there may be substitutes behind the value, which the enclosing one checks
            check_graph(value, (z, *through_modes((*own, *captured))))
        found = self.capturing(captured)
        found.cuts = recorder.cuts
        if z.requires_grad and all(t.is_leaf and not t._backward_hooks for t in captured):
            found.recorded = value, (z, *own, *captured)
        return found, value.detach()

    def __call__(self, z: Tensor | tuple[Tensor, ...], *tensors: Tensor) -> Any:
        parts = z if isinstance(z, tuple) else (z,)
        count = len(self.tensors)
        own, substitutes = tensors[:count], tensors[count + self.extra :]
        if any(map(is_not, substitutes, self.captured)):
            captured = {id(t) for t in self.captured}
            own = tuple(_alias(t) if id(t) in captured else t for t in own)
            with eagerly(), _Replayer((*parts, *own), self.captured, substitutes) as replayer:
                out = _untouched(self.function, z, *self._given(own))
            self._compare(replayer.used)
            return out
        if self._compiled is None:
            return _untouched(self.function, z, *self._given(own))
        with eagerly() if any(map(is_transformed, (*parts, *tensors))) else self._retained():
            return _untouched(self.function, z, *self._given(own))

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments, with their tensors replaced by the first of ``tensors``, which are as for a call."""
        return tuple(self._given(tensors[: len(self.tensors)]))

    def _given(self, own: Sequence[Tensor]) -> Any:
        """The arguments, with their tensors replaced by ``own``."""
        if not any(map(is_not, own, self.tensors)):
            return self.args
        given = iter(own)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        if self._spec is None:
            self._spec = pytree.tree_structure(self.args)
        return pytree.tree_unflatten(leaves, self._spec)

    def _compare(self, used: set[int]) -> None:
        """What the solver's last evaluation used, an evaluation for a derivative must use too."""
        if not torch.is_grad_enabled():
            self._used = used
        elif self._used is not None and not self._used <= used:
            lost = next(t for t in self.captured if id(t) in self._used - used)
            raise RuntimeError(
                f"the function no longer uses a captured tensor of shape {tuple(lost.shape)} that it used when the "
                "problem was solved, so that its gradient would be lost: torch.func.functional_call, or whatever had "
                "put it there, has put another in its place. Pass the module's tensors to solve as an argument, or "
                "give the problem a method of the module"
            )

    def _scripted(self) -> dict[int, Tensor]:
        """The parameters of TorchScript modules, into which no mode sees."""
        passed = {id(t) for t in self.tensors}
        modules = (m for root in getattr(self.function, "modules", ()) for m in root.modules())
        scripted = (m for m in modules if isinstance(m, torch.jit.ScriptModule))
        return {id(p): p for m in scripted for p in m.parameters() if p.requires_grad and id(p) not in passed}

    def capturing(self, captured: tuple[Tensor, ...]) -> Closure:
        """The closure with what ``function`` is known to capture."""
        found = copy.copy(self)
        found.captured = captured
        return found

    def _retained(self) -> contextlib.AbstractContextManager[Any]:
        """Code that is compiled here keeps its buffers: an adjoint solve runs its backward many times."""
        return functorch_config.patch(donated_buffer=False)


def _alias(t: Tensor) -> Tensor:
    """Another tensor object of the same value, through which derivatives run."""
    return t.view_as(t) if t.layout is torch.strided else t.clone()


def check_graph(out: Tensor, known: Sequence[Tensor]) -> None:
    """Whatever ``out`` comes from must come through ``known``: a tensor that slipped in unseen would get no gradient.

    Raises:
        RuntimeError: another tensor that requires grad lies behind ``out``.
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
                    "recording does not see (compiled or foreign code, or a graph from before the call, as behind a "
                    "pullback of torch.func.vjp), so its gradient would be lost: pass the tensor to solve as an "
                    "argument"
                )
        stack.extend(node.next_functions)


def _accumulator(leaf: Tensor) -> Any:
    """The node that stands for ``leaf``. Where saved tensors go through hooks (activation checkpointing), a parameter
    comes back as another tensor with the same node."""
    with without_function_modes(), torch.enable_grad():
        seen = _alias(leaf).grad_fn
    return None if seen is None else seen.next_functions[0][0]


def _untouched(function: Callable[..., Any], z: Tensor | tuple[Tensor, ...], *args: Any) -> Any:
    """``function(z, *args)``, which must leave ``z`` as it is."""
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
    return [None if part.is_inference() else part._version for part in parts]


def _carries(t: Tensor) -> bool:
    with without_function_modes():  # an enclosing mode would answer for its substitute
        return carries_derivative(t)


def _current_level() -> int:
    level = functorch.maybe_current_level()
    return -1 if level is None else level


def _made_since(t: Tensor, begin: int) -> bool:
    """Whether autograd saw ``t`` being computed after its sequence number ``begin``, in this thread."""
    now = sequence_number()
    with without_function_modes():  # what is looked at here is not used by the function
        while True:
            if t.grad_fn is not None and begin <= t.grad_fn._sequence_nr() < now:
                return True
            if functorch.maybe_get_level(t) < 0:
                return False
            t = functorch.get_unwrapped(t)


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code runs as it was written: it sees neither the modes nor the transforms, and must not run where they
    act. Which code is compiled cannot always be told from outside.

    The compiler's stance is that of the whole process: the first of several threads sets it, the last sets it back.
    """
    global _eager, _stance
    if not compiler_loaded():
        yield
        return
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
