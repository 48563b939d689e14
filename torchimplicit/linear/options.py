"""The checks of right-hand sides that all linear solvers share."""

from __future__ import annotations

from torch import Tensor

from torchimplicit.linear.operator import LinearOperator


def check_block(operator: LinearOperator, b: Tensor) -> None:
    """Raise ``ValueError`` unless ``b`` is a block of right-hand sides that fit the operator."""
    if b.ndim != 3 or not len(b):
        raise ValueError(
            f"b has shape {tuple(b.shape)}, but a block of right-hand sides is [k, batch, dim] with k > 0; for a "
            "single right-hand side call solve."
        )
    check_vectors(operator, b[0], None)


def check_vectors(operator: LinearOperator, b: Tensor, x0: Tensor | None) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless ``b`` and ``x0`` fit the operator's shape, dtype and device."""
    if not operator.dtype.is_floating_point:
        raise TypeError(f"The operator's dtype is {operator.dtype}; linear solvers take real floating-point systems.")
    for name, v in (("b", b), ("x0", x0)):
        if v is None:
            continue
        if v.shape != (operator.batch, operator.dim):
            raise ValueError(
                f"{name} has shape {tuple(v.shape)}, but the operator acts on [batch, dim] = "
                f"[{operator.batch}, {operator.dim}]; reshape {name} to it."
            )
        if v.dtype != operator.dtype or v.device.type != operator.device.type:
            raise ValueError(
                f"{name} is {v.dtype} on {v.device}, but the operator acts on {operator.dtype} on {operator.device}; "
                f"convert {name} with .to(...)."
            )
