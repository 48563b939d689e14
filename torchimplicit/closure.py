"""The user's function made pure: every tensor that it depends on becomes an explicit argument.

A function may capture tensors (a closure's variables, a module's parameters). To differentiate a solution to any
order, and under any transform, those must be arguments. One call of the function under a mode that sees every tensor
operation finds them; later calls run under a second mode that puts substitutes in their place. JAX calls this closure
conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_depth = 0
"""How many of the two modes are active: more than none where an equilibrium is solved inside another's map."""


def is_transformed(t: Tensor) -> bool:
    """Whether ``t`` belongs to a running ``torch.func`` transform or carries a forward-mode tangent."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or (
        forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None
    )


def carries_derivative(t: Tensor) -> bool:
    """Whether a derivative may be asked with respect to ``t``, in any mode."""
    return t.requires_grad or is_transformed(t)


def relayed(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors as an enclosing equilibrium's modes see them, so that it finds and replaces them too."""
    return tuple(t.view_as(t) for t in tensors) if _depth else tuple(tensors)


class _Watcher(TorchFunctionMode):
    """Follows which tensors are made inside a call, and hands every other one that carries a derivative to ``met``."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self._known = {id(t): t for t in known}

    def met(self, t: Tensor) -> Tensor:
        raise AssertionError

    def __enter__(self) -> Any:
        global _depth
        _depth += 1
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        global _depth
        _depth -= 1
        super().__exit__(*exc)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = self._replace(args)
        kwargs = {key: self._replace(value) for key, value in kwargs.items()} if kwargs else {}
        out = func(*args, **kwargs)
        self._keep(out)
        return out

    def _replace(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if id(tree) in self._known or not carries_derivative(tree):
                return tree
            return self.met(tree)
        if type(tree) in (tuple, list):
            return type(tree)([self._replace(item) for item in tree])
        return tree

    def _keep(self, tree: Any) -> None:
        if isinstance(tree, Tensor):
            self._known[id(tree)] = tree  # kept alive, so that its id is not given to another tensor
        elif isinstance(tree, (tuple, list)):
            for item in tree:
                self._keep(item)


class _Recorder(_Watcher):
    """Notes the captured tensors."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__(known)
        self.captured: dict[int, Tensor] = {}

    def met(self, t: Tensor) -> Tensor:
        self.captured[id(t)] = t
        return t


class _Replayer(_Watcher):
    """Puts substitutes in the place of captured tensors."""

    def __init__(self, known: Iterable[Tensor], captured: Sequence[Tensor], substitutes: Sequence[Tensor]):
        super().__init__((*known, *substitutes))
        self._table = {id(c): s for c, s in zip(captured, substitutes, strict=True)}

    def _replace(self, tree: Any) -> Any:
        if isinstance(tree, Tensor) and id(tree) in self._table:
            return self._table[id(tree)]
        return super()._replace(tree)

    def met(self, t: Tensor) -> Tensor:
        raise RuntimeError(
            f"the function used a captured tensor of shape {tuple(t.shape)} that requires grad and that it had not "
            "used when it was first called, so its derivative is not known: pass the tensor to solve as an argument"
        )


class Closure:
    """``function(z, *args)`` as a function of ``(z, *tensors)``, where the tensors are those of the arguments, then
    ``extra`` ones that the function does not see, then the captured ones.

    Attributes:
        function: takes the flat state and the arguments; gives the output in flat form.
        args: the arguments, from which the tensors were taken.
        tensors: the tensors among the arguments.
        captured: the tensors that ``function`` captures; empty until they have been recorded.
    """

    def __init__(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], extra: int, captured: tuple[Tensor, ...] = ()
    ):
        self.function = function
        self.args = args
        self.extra = extra
        self.captured = captured
        self._leaves, self._spec = pytree.tree_flatten(args)
        self.tensors = tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def record(self, z: Tensor) -> tuple[Closure, Tensor]:
        """The closure with what ``function`` captures at ``z``, and its value there."""
        module = compiled_module(self.function)
        if module is not None:
            known = {id(t) for t in self.tensors}
            found = tuple(p for p in module.parameters() if carries_derivative(p) and id(p) not in known)
            return Closure(self.function, self.args, self.extra, found), self.function(z, *self.args)
        with _Recorder((z, *self.tensors)) as recorder:
            value = self.function(z, *self.args)
        return Closure(self.function, self.args, self.extra, tuple(recorder.captured.values())), value

    def __call__(self, z: Tensor, *tensors: Tensor) -> Tensor:
        own = len(self.tensors)
        args = self.args
        if any(map(is_not, tensors, self.tensors)):
            given = iter(tensors)
            leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
            args = pytree.tree_unflatten(leaves, self._spec)
        substitutes = tensors[own + self.extra :]
        if not any(map(is_not, substitutes, self.captured)):
            return self.function(z, *args)
        with _Replayer((z, *tensors[:own]), self.captured, substitutes):
            return self.function(z, *args)


def compiled_module(function: Any) -> nn.Module | None:
    """``function``'s module, where it holds compiled code, which should not run under the recording mode."""
    module = function if isinstance(function, nn.Module) else getattr(function, "module", None)
    if isinstance(module, nn.Module) and any(
        isinstance(m, torch._dynamo.OptimizedModule) or getattr(m, "_compiled_call_impl", None) is not None
        for m in module.modules()
    ):
        return module
    return None
