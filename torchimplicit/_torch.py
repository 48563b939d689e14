"""What the library takes from torch beyond its documented interface: a release that moves any of it is met here.

Compiled solves have theirs beside them, in ``captured``, which is loaded where it is asked for; so have attributes of
tensors, such as ``_version``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
from torch._C import _autograd, _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import Variable, forward_ad

functorch = _functorch
"""The wrappers of ``torch.func``'s transforms: their levels, and what they wrap."""

functorch_config: Any = torch._functorch.config

outside_transforms = temporarily_clear_interpreter_stack
"""A context in which no transform of ``torch.func`` runs."""

without_transforms: Any = torch._C._DisableFuncTorch
"""A context in which operations go past the transforms to what these have wrapped."""

without_function_modes: Any = torch._C.DisableTorchFunction
"""A context in which no ``TorchFunctionMode`` sees an operation."""

function_modes: Any = torch.overrides._get_current_function_mode_stack
"""The modes that are on in this thread, the innermost last."""

function_mode_count: Any = torch._C._len_torch_function_stack

set_grad_enabled: Any = torch._C._set_grad_enabled
"""What ``torch.no_grad`` and ``torch.enable_grad`` show to a mode."""

sequence_number: Any = torch._C._autograd._get_sequence_nr
"""The place in the sequence of autograd's nodes that the next one will have."""

backward_task: Any = torch._C._current_graph_task_id
"""The number of the backward pass that runs in this thread; negative for none."""

run_backward: Any = Variable._execution_engine.run_backward
"""What ``torch.autograd.grad`` calls once it has prepared its arguments."""

when_backward_ends: Any = Variable._execution_engine.queue_callback

set_forward_mode: Any = forward_ad._set_fwd_grad_enabled
"""A context with forward mode on or off."""

top_saved_tensor_hooks: Any = _autograd._top_saved_tensors_default_hooks
push_saved_tensor_hooks: Any = _autograd._push_saved_tensors_default_hooks
pop_saved_tensor_hooks: Any = _autograd._pop_saved_tensors_default_hooks


def forward_level() -> int:
    """The level of forward mode; negative for none."""
    return forward_ad._current_level
