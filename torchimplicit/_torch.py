"""The private interfaces of torch that the library uses, gathered here so that a new release breaks one file only.

Exceptions: compiled solves import theirs in ``captured``, which is loaded on demand, and private attributes of tensors,
such as ``_version``, are used in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
from torch._C import _autograd, _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, Variable, forward_ad

functorch = _functorch
"""The tensor wrappers of ``torch.func``'s transforms: their levels, and the tensors inside."""

functorch_config: Any = torch._functorch.config

outside_transforms = temporarily_clear_interpreter_stack
"""A context in which no transform of ``torch.func`` runs."""

without_transforms: Any = torch._C._DisableFuncTorch
"""A context in which operations bypass the transforms and act on the wrapped tensors."""

without_function_modes: Any = torch._C.DisableTorchFunction
"""A context in which no ``TorchFunctionMode`` intercepts operations."""

function_modes: Any = torch.overrides._get_current_function_mode_stack
"""Returns the modes that are active in this thread, the innermost last."""

function_mode_count: Any = torch._C._len_torch_function_stack

set_grad_enabled: Any = torch._C._set_grad_enabled
"""The function that a mode sees where ``torch.no_grad`` or ``torch.enable_grad`` is entered."""

sequence_number: Any = torch._C._autograd._get_sequence_nr
"""Returns the sequence number that autograd's next node will get."""

backward_task: Any = torch._C._current_graph_task_id
"""Returns the number of the backward pass that runs in this thread; negative for none."""

run_backward: Any = Variable._execution_engine.run_backward
"""The engine's entry point, which ``torch.autograd.grad`` calls after preparing its arguments."""

when_backward_ends: Any = Variable._execution_engine.queue_callback

set_forward_mode: Any = forward_ad._set_fwd_grad_enabled
"""A context with forward mode on or off."""

top_saved_tensor_hooks: Any = _autograd._top_saved_tensors_default_hooks
push_saved_tensor_hooks: Any = _autograd._push_saved_tensors_default_hooks
pop_saved_tensor_hooks: Any = _autograd._pop_saved_tensors_default_hooks


def forward_level() -> int:
    """The level of forward mode; negative for none."""
    return forward_ad._current_level


class Node(Function):
    """A node of autograd whose arguments are given by position.

    Outside of ``torch.func`` transforms :meth:`apply` does not bind them to the signature of ``forward``, which would
    take as long as the rest of the call.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The outputs of ``forward``, with their derivatives."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]
