"""A function of tensors, traced and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchimplicit.captured.graph import Uncapturable
from torchimplicit.precision import without_autocast

Compiled = Callable[..., Any]


def compiled(function: Callable[..., Any], examples: Sequence[Any]) -> Compiled:
    """``function``, whose result is a flat tuple of tensors, for inputs like ``examples``: as they come from the
    compiler's frontend, with symbols for the sizes that may vary.

    Raises:
        Uncapturable: it draws random numbers, which a graph that is run many times must not.
    """
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    device = next(t.device for t in examples if isinstance(t, Tensor))
    # in the lower precision runs the function alone, which enters it by itself
    with torch.no_grad(), without_autocast(device), _without_cached_casts():
        with detect_fake_mode(examples) or nullcontext():
            graph = make_fx(spelt(function))(*examples)
        for module in graph.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                if _draws(node):
                    raise Uncapturable(f"the function draws random numbers ({node.target})")
        # the frontend's guards have checked the inputs, and what the code makes itself has the sizes that it makes
        run = compile_fx(graph, list(examples), config_patches={"size_asserts": False, "alignment_asserts": False})

    def call(*inputs: Any) -> Any:
        with torch.no_grad():
            return run(*inputs)  # type: ignore[operator]

    return call


def traced_apart(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """The graph of ``function``, traced on stand-ins beside the tracing that goes on."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

    with disable_proxy_modes_tracing():
        return make_fx(spelt(function))(*(torch.empty_like(t) if isinstance(t, Tensor) else t for t in inputs))


def spelt(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, without what cannot be traced where sizes are symbols."""

    def called(*inputs: Any) -> Any:
        with _Spelt():
            return function(*inputs)

    return called


class _Spelt(TorchFunctionMode):
    """``addcmul`` and ``baddbmm`` written out: with sizes that are symbols they cannot be traced. ``frexp``, too: fused
    with a ``clamp`` it is code that a C++ compiler refuses. And what ``cat`` makes of tensors that are not contiguous
    is contiguous, as it is outside of the compiler, whose own idea of it changes on the way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.frexp, Tensor.frexp):
            (number,) = args
            size = number.abs()
            within = (size > 0) & (size < torch.inf)
            exponent = torch.where(within, torch.floor(torch.log2(torch.where(within, size, 1))) + 1, 0)
            return torch.ldexp(number, -exponent), exponent
        if func is torch.cat and not all(t.is_contiguous() for t in args[0]):
            return func(*args, **(kwargs or {})).clone(memory_format=torch.contiguous_format)
        if func in (torch.baddbmm, Tensor.baddbmm):
            base, one, two = args
            beta, alpha = ((kwargs or {}).get(name, 1) for name in ("beta", "alpha"))
            product = torch.bmm(one, two) if alpha == 1 else alpha * torch.bmm(one, two)
            return product if beta == 0 else product + (base if beta == 1 else beta * base)
        if func not in (torch.addcmul, Tensor.addcmul, Tensor.addcmul_):
            return func(*args, **(kwargs or {}))
        base, one, two = args
        more = (kwargs or {}).get("value", 1) * one * two
        return base.add_(more) if func is Tensor.addcmul_ else base + more


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast without its cache, which would carry a parameter's cast from the trace of one subgraph into the next."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operation draws random numbers: attention that could drop some, but is told to drop none, does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            default = node.kwargs.get("dropout_p", argument.default_value)
            return bool((node.args[place] if place < len(node.args) else default) != 0)
    return True
