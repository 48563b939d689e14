"""The modules that a function calls, and the tensors that they hold at a given moment."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torchimplicit.compiler import compiler_loaded


class Members:
    """The tensors that modules hold at this moment, to be put back when they are called later.

    ``torch.func.functional_call`` replaces a module's tensors only while it runs, but the backward pass comes later.
    """

    def __init__(self, roots: Iterable[nn.Module]):
        self._parameters: list[tuple[dict[str, Any], str, Tensor]] = []
        self._buffers: list[tuple[dict[str, Any], str, Tensor]] = []
        self._statistics: list[tuple[_NormBase, str, Tensor]] = []
        for root in roots:
            for m in root.modules():
                if isinstance(m, torch.jit.ScriptModule):  # its tensors cannot be replaced
                    continue
                self._parameters += [(m._parameters, name, p) for name, p in m._parameters.items() if p is not None]
                buffers = [(m._buffers, name, t) for name, t in m._buffers.items() if t is not None]
                self._buffers += buffers
                if isinstance(m, _NormBase):
                    self._statistics += [(m, name, t) for _, name, t in buffers if name in _STATISTICS]

    @contextlib.contextmanager
    def with_copied_statistics(self) -> Iterator[None]:
        """A context in which normalizations in evaluation mode use copies of their running statistics.

        The kernels update these in place, unnoticed by autograd. A later pass in training mode would silently change
        numbers that the backward pass of this one needs.
        """
        places = [(m._buffers, name, t) for m, name, t in self._statistics if not m.training]
        for owner, name, t in places:
            owner[name] = t.clone()
        try:
            yield
        finally:
            for owner, name, t in places:  # the original, since another thread may have put a copy of its own here
                owner[name] = t

    @property
    def normalize(self) -> bool:
        """True if there are normalizations with running statistics."""
        return bool(self._statistics)

    def restored(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the modules hold those tensors."""
        if all(owner.get(name) is t for owner, name, t in self._parameters):
            return contextlib.nullcontext()
        return self._restored()

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        places = self._parameters + self._buffers
        now = [owner.get(name) for owner, name, _ in places]
        for owner, name, t in places:
            owner[name] = t
        try:
            yield
        finally:
            for (owner, name, _), held in zip(places, now, strict=True):
                owner[name] = held


_STATISTICS = ("running_mean", "running_var")

_PLAIN = frozenset(
    (Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size, str, bytes, int, float, bool, complex, type(None))
)
"""Types of objects that hold no module."""


def modules_behind(function: Any) -> tuple[nn.Module, ...]:
    """The modules that ``function`` may call: its own, or those reachable through a closure, a partial, the object of a
    method, a callable object, or the globals that its code names."""
    module = module_of(function)
    if module is not None:
        return (module,)
    modules: dict[int, nn.Module] = {}
    stack, seen = [(function, 0)], set()
    while stack:
        item, depth = stack.pop()
        if id(item) in seen or isinstance(item, (Tensor, type, types.ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            modules[id(item)] = item
        elif depth < _DEEPEST and len(seen) < _MOST:
            stack += [(inner, depth + 1) for inner in _held(item) if type(inner) not in _PLAIN]
    return tuple(modules.values())


_DEEPEST = 6
"""The depth to which closures, objects and containers are searched for modules."""

_MOST = 1000
"""The most objects that are searched."""


def _held(item: Any) -> Iterator[Any]:
    """The objects that ``item`` refers to and may call."""
    if isinstance(item, types.FunctionType):
        for cell in item.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a cell that is still empty
                continue
        yield from item.__defaults__ or ()
        yield from (item.__kwdefaults__ or {}).values()
        for name in _names(item.__code__):
            value = item.__globals__.get(name)
            if isinstance(value, (nn.Module, functools.partial, types.MethodType)) or (
                isinstance(value, types.FunctionType) and value.__globals__ is item.__globals__
            ):
                yield value
    elif isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from item
    elif isinstance(item, dict):
        yield from item.values()
    elif hasattr(item, "__dict__"):
        yield from (type(item).__call__, *vars(item).values()) if callable(item) else vars(item).values()


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The global names that ``code`` uses, and the functions that are made inside it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return tuple(dict.fromkeys((*code.co_names, *(name for names in inner for name in names))))


def module_of(function: Any) -> nn.Module | None:
    """The module of ``function``: itself, the one whose method it is, or its attribute ``module``; else ``None``."""
    for candidate in (function, getattr(function, "__self__", None), getattr(function, "module", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    return None


def _inside(function: Any) -> Any:
    """The function that a partial, a bound method or a wrapper calls; ``None`` for others."""
    for name in ("func", "__func__", "__wrapped__"):
        if callable(inner := getattr(function, name, None)):
            return inner
    return None


def known_by(function: Any) -> Any:
    """The object by which ``function`` is recognized in later solves, to be remembered by weak reference.

    It is the module of the function if it has one, else its code, since a lambda is made anew for every solve; and the
    type of any other callable object. A partial, a bound method or a wrapper (``func``, ``__wrapped__``) is recognized
    by the function that it calls.
    """
    module = module_of(function)
    while module is None and (inner := _inside(function)) is not None:
        function, module = inner, module_of(inner)
    if module is not None:
        return module
    return getattr(function, "__code__", None) or type(function)


def compiled_module(function: Any) -> nn.Module | None:
    """The module of ``function`` if it contains compiled code, which should not run under the recording mode."""
    module = module_of(function)
    if module is not None and any(
        (compiler_loaded() and isinstance(m, torch._dynamo.OptimizedModule))
        or getattr(m, "_compiled_call_impl", None) is not None
        for m in module.modules()
    ):
        return module
    return None
