"""Products with the Jacobian of a map at one point, all over one recorded evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torchimplicit._torch import function_mode_count, run_backward
from torchimplicit.closure import check_graph, eagerly
from torchimplicit.records import changed
from torchimplicit.saved import Saved
from torchimplicit.state import Leaves

Map = Callable[..., Tensor]
_NODE = itemgetter(0)
"""The node of an edge in autograd's graph."""

Products = TypeVar("Products", Tensor, list[Tensor | None])


class Linearization:
    """``core(z, *params)``, evaluated once and recorded by autograd; every product below runs over that tape.

    For plain tensors only, inside autograd nodes and solvers. Derivatives of these products are taken elsewhere: by
    composable transforms, or by :func:`recorded_gradients` with ``create_graph``.

    Args:
        core: ``(z [batch, dim], *params) -> [batch, dim]``.
        z: where to linearize.
        params: the parameters there.
        needs_grad: for each parameter, whether :meth:`vjp_params` may be asked for it; ``None``: for none.
        leaves: leaves of the value, to name them in errors; ``None`` where they have no names.

    Attributes:
        out: the recorded value.
        saved: see :func:`~torchimplicit.saved.kept`.
    """

    def __init__(
        self,
        core: Map,
        z: Tensor,
        params: Sequence[Tensor],
        needs_grad: Sequence[bool] | None = None,
        leaves: Leaves | None = None,
    ):
        self.core = core
        self._leaves = leaves
        self.z = z.detach().requires_grad_()
        self.needs_grad = tuple(needs_grad) if needs_grad is not None else (False,) * len(params)
        self.params = _cut(params, self.needs_grad)
        with torch.enable_grad():
            self.out = core(self.z, *self.params)
        self._forward: tuple[Tensor, Tensor] | None = None
        self._looked = False
        self.saved: Saved = ()

    @classmethod
    def recorded(
        cls,
        core: Map,
        z: Tensor,
        params: Sequence[Tensor],
        needs_grad: Sequence[bool],
        leaves: Leaves | None,
        out: Tensor,
    ) -> Linearization:
        """The tape of an evaluation that has been recorded already, with the leaves ``z`` and ``params`` and the value
        ``out``."""
        tape = cls.__new__(cls)
        tape.core, tape._leaves, tape.z, tape.params, tape.out = core, leaves, z, tuple(params), out
        tape.needs_grad, tape.saved, tape._forward, tape._looked = tuple(needs_grad), (), None, False
        return tape

    def parted(self) -> tuple[Linearization, Tensor]:
        """The tape without its graph, and the recorded value, which holds the graph. A node keeps the two apart, so
        that autograd can free the graph."""
        parted = changed(self, _forward=None)
        del parted.out
        return parted, self.out

    def joined(self, out: Tensor) -> Linearization:
        """The tape with its graph: the inverse of :meth:`parted`."""
        return changed(self, out=out)

    def check(self) -> None:
        """Raise where the recorded value depends on a tensor that requires grad, but not through ``z`` or ``params``:
        it would silently get no gradient."""
        check_graph(self.out, (self.z, *self.params))

    def look(self) -> None:
        """Raise for a map that is hidden from autograd, wholly or in part, before any product is taken."""
        if not self._looked:
            self._look(self.out is not self.z and not _reaches(self.out.grad_fn, self.z, set()))

    def make_differentiable(self) -> None:
        """Replace the graph of compiled code, which has no second derivative, by an eager one."""
        if _is_compiled(self.out):
            self._evaluate_eagerly()

    def vjp(self, v: Tensor) -> Tensor:
        """:math:`J^T v`, ``[batch, dim]``."""
        return self._retried(lambda: self._grad(self.out, self.z, v))

    def vjp_block(self, vs: Tensor) -> Tensor:
        """:math:`J^T v` for a block ``[k, batch, dim]``."""
        return self._block(self.vjp, self.out, self.z, vs)

    def jvp(self, v: Tensor) -> Tensor:
        """:math:`J v`, ``[batch, dim]``."""
        pulled, w = self._twice()
        return self._grad(pulled, w, v)

    def jvp_block(self, vs: Tensor) -> Tensor:
        """:math:`J v` for a block ``[k, batch, dim]``."""
        pulled, w = self._twice()
        return self._block(self.jvp, pulled, w, vs)

    def vjp_params(self, v: Tensor, out: Tensor | None = None) -> list[Tensor | None]:
        """:math:`(\\partial\\,out/\\partial p)^T v` for each parameter that needs a gradient, ``None`` for the others.

        Args:
            v: the cotangent, shaped like ``out``.
            out: any tensor on the tape; ``None``: the core's value.
        """
        self.check()
        if not self.out.requires_grad and any(self.needs_grad):
            self._look(True)
        if out is None:
            return self._retried(lambda: self._vjp_params(self.out, v))
        return self._vjp_params(out, v)

    def _vjp_params(self, out: Tensor, v: Tensor) -> list[Tensor | None]:
        grads = recorded_gradients((out,), self.params, (v,), self.needs_grad, create_graph=False)
        return [
            _or_zero(grad, p) if w else None for grad, p, w in zip(grads, self.params, self.needs_grad, strict=True)
        ]

    def _twice(self) -> tuple[Tensor, Tensor]:
        """:math:`J^T w` recorded as a function of w, and w.

        It is linear in w, and its derivative there is :math:`J`: a forward product over the same tape, made of two
        reverse passes. Forward mode would need another evaluation, and cannot be nested under dual tensors.
        """
        if self._forward is None:
            self.make_differentiable()
            with torch.enable_grad():
                w = torch.zeros_like(self.out).requires_grad_()
                grad = None
                if self.out.requires_grad:
                    (grad,) = torch.autograd.grad(self.out, self.z, w, create_graph=True, allow_unused=True)
                self._look(grad is None)
            self._forward = _or_zero(grad, self.z), w
        return self._forward

    def _retried(self, product: Callable[[], Products]) -> Products:
        """The product; where compiled code refuses to run backward again, over an eager tape of the same map."""
        try:
            return product()
        except RuntimeError:
            if not _is_compiled(self.out):
                raise
        self._evaluate_eagerly()
        return product()

    def _evaluate_eagerly(self) -> None:
        before = self.out
        with torch.enable_grad(), eagerly():
            self.out = self.core(self.z, *self.params)
        check_unmoved(before, self.out)

    def _look(self, blind: bool) -> None:
        """Raise, once, for a map that is hidden from autograd wholly or in part: its Jacobian would count as zero.

        No graph may also mean no dependence. So the map is evaluated at two states: if the hidden part of its output
        changes, it depends on the state in a way that autograd does not see.

        Args:
            blind: whether no path leads from the value to the state in autograd's graph.
        """
        if self._looked:
            return
        self._looked = True
        columns = None if blind else _seen_columns(self.out, self.z)
        if columns is None and not blind:
            return
        seen = torch.zeros(self.out.shape[1], dtype=torch.bool, device=self.z.device) if columns is None else columns
        # where autograd sees nothing at all, it does not see the parameters either: they are moved, too
        moving = (True, *(w and not self.out.requires_grad for w in self.needs_grad))
        values = []
        for share in (0.0, torch.finfo(self.z.dtype).eps ** 0.25):
            z, *params = (
                (t.detach() + share * (1 + t.detach().abs())).requires_grad_() if moves else t
                for t, moves in zip((self.z, *self.params), moving, strict=True)
            )
            with torch.enable_grad():
                values.append(self.core(z, *params).detach())
        here, there = values
        changed = ((here != there) & ~(here.isnan() & there.isnan())).any(dim=0) & ~seen
        if bool(changed.any()):
            count = int(changed.sum())
            where = "the output" if count == len(seen) else f"{count} of the {len(seen)} numbers of the output"
            if self._leaves is not None and (names := self._leaves.holding(changed)):
                where += f" (in {', '.join(names)})"
            raise ValueError(
                f"autograd does not see how {where} of the problem's function depends on its inputs, although it does "
                "depend on them (NumPy or other foreign code, detach(), .data, no_grad): the derivative would be taken "
                "for zero. Compute it by differentiable operations, or wrap the foreign code in a "
                "torch.autograd.Function with a backward; if the state is detached on purpose, take an estimator "
                "without the Jacobian, gradient=OneStep()"
            )

    def _grad(self, out: Tensor, at: Tensor, v: Tensor) -> Tensor:
        grad = None
        if out.requires_grad:
            (grad,) = _gradients((out,), (at,), (v,))
        if not self._looked:
            self._look(grad is None)
        return _or_zero(grad, at)

    def _block(self, product: Callable[[Tensor], Tensor], out: Tensor, at: Tensor, vs: Tensor) -> Tensor:
        grad = None
        if out.requires_grad and vs.numel():
            try:
                (grad,) = torch.autograd.grad(out, at, vs, retain_graph=True, allow_unused=True, is_grads_batched=True)
            except RuntimeError:  # an operation in the map without a batching rule
                return torch.stack([product(v) for v in vs])
        if not self._looked:
            self._look(grad is None)
        return vs.new_zeros(len(vs), *at.shape) if grad is None else grad


def recorded_gradients(
    outs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    needs_grad: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients of recorded ``outs`` with respect to the ``leaves`` of their tape. Hooks that users have put on the
    leaves do not run.

    Args:
        outs: tensors on the tape.
        leaves: leaves of the tape.
        cotangents: one per tensor of ``outs``.
        needs_grad: for each leaf, whether to differentiate it.
        create_graph: whether the gradients are recorded themselves.

    Returns:
        One gradient per leaf; ``None`` where none is needed, or where nothing depends on the leaf.
    """
    ends = [(out, v) for out, v in zip(outs, cotangents, strict=True) if out.requires_grad]
    # a parameter that has been frozen since the forward pass takes no gradient, as in plain autograd
    inputs = [p for p, w in zip(leaves, needs_grad, strict=True) if w and p.requires_grad]
    if not inputs or not ends:
        return [None] * len(leaves)
    tensors, vs = zip(*ends, strict=True)
    with _without_hooks(inputs):
        grads = iter(_gradients(tensors, inputs, vs, create_graph))
    return [next(grads) if w and p.requires_grad else None for p, w in zip(leaves, needs_grad, strict=True)]


def _gradients(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool = False
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` that retains the graph and allows unused inputs.

    The engine is called directly where nothing of what ``torch.autograd.grad`` prepares is needed: on small systems its
    checks take as long as the product. A torch function mode must see the public call, though.
    """
    if create_graph or outs[0].device.type != "cpu" or function_mode_count():
        return torch.autograd.grad(
            outs, inputs, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    grads: Sequence[Tensor | None] = run_backward(
        tuple(outs), tuple(cotangents), True, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )
    return grads


def _without_hooks(leaves: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Remove the hooks of the leaves for a while. A hook that was set after the tape was recorded would run twice:
    here, and in the outer backward pass that it is meant for."""
    hooked = [(p, p._backward_hooks) for p in leaves if p._backward_hooks]
    return _unhooked(hooked) if hooked else contextlib.nullcontext()


@contextlib.contextmanager
def _unhooked(hooked: Sequence[tuple[Tensor, Any]]) -> Iterator[None]:
    for p, _ in hooked:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in hooked:
            p._backward_hooks = hooks


def check_unmoved(before: Tensor, now: Tensor, also: str = "") -> None:
    """Compare what a function gave in the forward pass with a second evaluation at the same point.

    Args:
        before, now: the two values.
        also: another possible cause, for the message.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    before, now = before.detach(), now.detach()
    size = torch.linalg.vector_norm(torch.nan_to_num(before))
    gap = torch.linalg.vector_norm(torch.nan_to_num(now) - torch.nan_to_num(before))
    # values in single precision may have been computed in half precision under autocast
    tolerance = torch.finfo(now.dtype).eps ** 0.5 if now.dtype == torch.float64 else 0.02
    if bool(gap > tolerance * size):
        changed_since(also)


def changed_since(also: str = "") -> NoReturn:
    """Raise the error of a function that gives another value than in the forward pass."""
    raise RuntimeError(
        "the problem's function had to be evaluated again for a derivative, and it does not give what it gave "
        "before at the same point: something that it reads has been changed since (a buffer, a captured tensor, "
        f"the training mode, a default dtype), or it is random{also}. Change such things after the backward pass, or "
        "pass them to solve as arguments"
    )


def _seen_columns(out: Tensor, z: Tensor) -> Tensor | None:
    """For a value that is a concatenation of parts, bool ``[dim]``: the columns of the parts that depend on ``z`` in
    autograd's graph. ``None``: all of them, or it is no concatenation, whose columns cannot be told apart."""
    node: Any = out.grad_fn
    if type(node).__name__ != "CatBackward0" or out.ndim != 2 or out.shape[1] != z.shape[1]:
        return None
    dead: set[Any] = set()
    behind = [_reaches(parent, z, dead) for parent, _ in node.next_functions]
    if all(behind):
        return None
    seen = torch.zeros(out.shape[1], dtype=torch.bool, device=out.device)
    edges = [GradientEdge(*edge) for edge, lies in zip(node.next_functions, behind, strict=True) if lies]
    if not edges or not len(out):
        return seen
    # Which columns a part holds: the graph is sent the column numbers as cotangents, and the backward of the
    # concatenation hands each part its own. In digits, since half precision does not hold large integers exactly.
    base, left = int(1 / torch.finfo(out.dtype).eps), torch.arange(out.shape[1], device=out.device)
    numbers, unit = [torch.zeros((), dtype=torch.int64, device=out.device) for _ in edges], 1
    while unit <= out.shape[1]:
        digit = (left // unit % base).to(out.dtype).expand_as(out)
        parts = torch.autograd.grad(out, edges, digit, retain_graph=True)
        numbers = [known + unit * part[0].long() for known, part in zip(numbers, parts, strict=True)]
        unit *= base
    for columns in numbers:
        seen[columns] = True
    return seen


def _reaches(root: Any, leaf: Tensor, dead: set[Any]) -> bool:
    """Return whether ``root`` depends on ``leaf`` in autograd's graph; ``dead`` collects nodes that do not."""
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in dead:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        stack.extend(map(_NODE, node.next_functions))
    dead |= seen
    return False


def _cut(params: Sequence[Tensor], needs_grad: Sequence[bool]) -> tuple[Tensor, ...]:
    """The parameters as leaves of a graph of its own. One that is a leaf already is taken as it is, so that the map
    sees its own tensors.

    A tensor that stands in several places is itself in the first one only: each place has its own gradient.
    """
    kept: dict[int, Tensor] = {}
    cut = []
    for p, w in zip(params, needs_grad, strict=True):
        itself = p.is_leaf and (not w or (p.requires_grad and not p._backward_hooks)) and id(p) not in kept
        cut.append(kept.setdefault(id(p), p) if itself else p.detach().requires_grad_(w))
    return tuple(cut)


def _is_compiled(out: Tensor) -> bool:
    """Return whether ``out`` comes from code under torch.compile, whose backward has no derivative and may run only
    once."""
    stack: list[Any] = [out.grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CompiledFunctionBackward":
            return True
        seen.add(node)
        stack.extend(map(_NODE, node.next_functions))
    return False


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
