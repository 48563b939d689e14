"""What a training step costs: how often its cell is evaluated, and how much memory it holds at most."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree


class Cost(NamedTuple):
    """A loss, its gradients, the calls of the cell in the forward and in the backward pass, and the peak in bytes."""

    loss: Tensor
    grads: tuple[Tensor, ...]
    forward: int
    backward: int
    peak: int


def cost(step: Callable[[], Tensor], cell: nn.Module, inputs: Iterable[Tensor]) -> Cost:
    """Of ``step``, which gives the loss. The second of two runs is measured: the first loads what is loaded once."""
    inputs, calls = tuple(inputs), []
    handle = cell.register_forward_pre_hook(lambda *_: calls.append(torch._C._current_graph_task_id() >= 0))
    for _ in range(2):
        torch.manual_seed(0)
        calls.clear()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            loss = step()
            grads = torch.autograd.grad(loss, inputs)
        backward = sum(calls)
        counted = len(calls) - backward, backward
        loss = loss.detach()
    handle.remove()
    return Cost(loss, grads, *counted, _peak(profiled))


def solved(f: Callable[[Tensor], Tensor], z: Tensor, rtol: float, dims: int) -> Tensor:
    """A program's own solver: plain iteration until the residual over the last ``dims`` dimensions is small."""
    over = tuple(range(-dims, 0))
    with torch.no_grad():
        while True:
            image = f(z)
            small = torch.linalg.vector_norm(image - z, dim=over) <= rtol * torch.linalg.vector_norm(image, dim=over)
            if bool(small.all()):
                return z
            z = image


def implicit(f: Callable[[Tensor], Tensor], z: Tensor, rtol: float, dims: int) -> Tensor:
    """A program's own implicit gradient: f once more at the solution, and a hook that solves over its graph."""
    z = z.requires_grad_()
    image = f(z)
    hooked = image.view_as(image)

    def adjoint(u: Tensor) -> Tensor:
        step = lambda g: torch.autograd.grad(image, z, g, retain_graph=True)[0].add_(u)  # noqa: E731
        return solved(step, torch.zeros_like(u), rtol, dims)

    hooked.register_hook(adjoint)
    return hooked


def _peak(profiled: Any) -> int:
    events = (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def assert_no_dearer(ours: Cost, own: Cost, state: Any, states: float, rtol: float = 1e-9) -> None:
    """The same loss and gradients, for no evaluation more, and in the memory of the program's own solver but for so
    many copies of the ``state``: residual, best iterate, what is returned."""
    torch.testing.assert_close(ours.loss, own.loss, rtol=rtol, atol=0)
    for a, b in zip(ours.grads, own.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))
    assert ours.forward <= own.forward
    assert ours.backward <= own.backward
    spare = states * sum(part.numel() * part.element_size() for part in pytree.tree_leaves(state))
    assert ours.peak <= own.peak + spare, f"{ours.peak} bytes where the program's own solver holds {own.peak}"
