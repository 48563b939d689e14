"""A loop whose every step is one call of compiled code, its condition included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def while_loop(going: Callable[[Any], Tensor], body: Callable[[Any, Any], Any], carried: Any, constants: Any) -> Any:
    """``while going(carried): carried = body(carried, constants)``, as one operation of the graph that is being traced.

    Autograd must not see it: where the start does not require grad, it would give the derivative of one step alone, and
    say nothing. What calls it runs without grad; the derivative is that of the solution.

    Args:
        going: of the carried tensors, a bool scalar.
        body: may use no tensors but those that it is given.
        carried, constants: pytrees of tensors; the constants may hold integers, too.
    """
    from torch._higher_order_ops.while_loop import while_loop_op

    leaves, spec = pytree.tree_flatten(carried)
    fixed, fixed_spec = pytree.tree_flatten(constants)
    count = len(leaves)
    seen = {id(t) for t in fixed}
    for i, leaf in enumerate(leaves):  # no two inputs may share memory
        leaves[i] = leaf.clone() if id(leaf) in seen else leaf
        seen.add(id(leaf))

    def flat_going(*flat: Any) -> Tensor:
        return going(pytree.tree_unflatten(list(flat[:count]), spec))

    def flat_body(*flat: Any) -> tuple[Tensor, ...]:
        given = pytree.tree_unflatten(list(flat[:count]), spec)
        after = body(given, pytree.tree_unflatten(list(flat[count:]), fixed_spec))
        return tuple(pytree.tree_leaves(after))

    assert not torch.is_grad_enabled()
    found = while_loop_op(flat_going, flat_body, tuple(leaves), tuple(fixed))
    return pytree.tree_unflatten(list(found), spec)
