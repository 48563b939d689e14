"""Weight or spectral normalization of all layers of a model in one call, and its removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchimplicit.nn.normalization import SpectralNorm, WeightNorm, weight_norm

Module = TypeVar("Module", bound=nn.Module)

# The parameters that multiply the input, and the dimension of their outputs.
_WEIGHTS: dict[type[nn.Module], tuple[tuple[str, ...], int]] = {
    nn.Linear: (("weight",), 0),
    nn.Conv1d: (("weight",), 0),
    nn.Conv2d: (("weight",), 0),
    nn.Conv3d: (("weight",), 0),
    nn.ConvTranspose1d: (("weight",), 1),
    nn.ConvTranspose2d: (("weight",), 1),
    nn.ConvTranspose3d: (("weight",), 1),
    nn.MultiheadAttention: (("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 0),
}


def apply_norm(
    model: Module, norm: Callable[..., Any] = weight_norm, *, skip: str | Sequence[str] = (), **options: Any
) -> Module:
    """Normalize the weight of every linear layer, convolution, transposed convolution and attention in ``model``.

    Biases, embeddings, recurrent layers and the weights of other modules are left unchanged. Make the optimizer
    afterwards, since there are new parameters. To make the map of an equilibrium contract, give its cell, not the whole
    network.

    Args:
        model: a module; its layers are changed in place.
        norm: :func:`weight_norm` or :func:`spectral_norm`, or any function ``norm(module, name, dim=dim, **options)``.
        skip: names of modules inside ``model``, as in ``named_modules()``, that are left unchanged together with all
            modules inside them; or patterns as for file names (``"*.out"``, ``"embed*"``).
        options: options of ``norm``: ``target`` and ``clip`` for :func:`weight_norm`; ``bound``, ``only_above``,
            ``clip``, ``scale``, ``paired`` and ``iterations`` for :func:`spectral_norm`.

    Returns:
        ``model``.

    Raises:
        ValueError: there is nothing to normalize; a name in ``skip`` matches no module; a weight is normalized already,
            or two modules share it (normalizing would untie them). The model is then unchanged.
    """
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    unused = set(patterns)
    chosen: list[tuple[str, nn.Module, str, int]] = []
    for where, module in model.named_modules():
        matched = {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in _ancestry(where))}
        unused -= matched
        if not matched:
            chosen += [(where, module, name, dim) for name, dim in _weights(module)]
    if unused:
        raise ValueError(
            f"apply_norm: skip names {', '.join(sorted(map(repr, unused)))}, but {type(model).__name__} has no such "
            "module: names are those of named_modules(), and '*' stands for any part of one"
        )
    if not chosen:
        raise ValueError(f"apply_norm: there is no linear layer, convolution or attention in {type(model).__name__}")
    _check_unnormalized(chosen)
    _check_untied(model, chosen)
    done: list[tuple[nn.Module, str, Any]] = []
    try:
        for where, module, name, dim in chosen:
            before = getattr(module, name)
            try:
                norm(module, name, dim=dim, **options)
            except ValueError as error:
                raise ValueError(f"{error} (in {where or 'the model itself'})") from None
            done.append((module, name, before))
    except Exception:
        for module, name, before in reversed(done):
            _restored(module, name, before)
        raise
    return model


def remove_norm(model: Module) -> Module:
    """Replace all weights that :func:`weight_norm`, :func:`spectral_norm` or :func:`apply_norm` has normalized by plain
    parameters.

    They keep the value of eval mode. Other parametrizations stay.

    Returns:
        ``model``.

    Raises:
        ValueError: a weight has another parametrization as well. The model is then unchanged.
    """
    normalized: list[tuple[nn.Module, str, Any]] = []
    for where, module in model.named_modules():
        for name, chain in _chains(module):
            ours = [isinstance(step, WeightNorm | SpectralNorm) for step in chain]
            if any(ours) and not all(ours):
                others = ", ".join(type(s).__name__ for s, is_ours in zip(chain, ours, strict=True) if not is_ours)
                raise ValueError(
                    f"remove_norm: {_dotted(where, name)} has another parametrization too ({others}), and one of "
                    "several cannot be removed: torch.nn.utils.parametrize.remove_parametrizations removes them all"
                )
            if all(ours):
                normalized.append((module, name, chain))
    # in reverse, as a parameter that is put back moves before the module's others: the order is then as it was
    for module, name, chain in reversed(normalized):
        training = chain.training
        with torch.no_grad():
            weight = chain.eval()()  # in training mode the call would run the power method
        chain.train(training)
        if chain.is_tensor:
            chain.original.data = weight  # the same parameter object, so that an optimizer can continue with it
            _restored(module, name, chain.original)
        else:
            originals = list(chain.parameters(recurse=False))
            trained = any(p.requires_grad for p in originals)
            _restored(module, name, nn.Parameter(weight, trained) if originals else weight)
    return model


def _weights(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the weights of a layer, and the dimension of their outputs."""
    for kind, (names, dim) in _WEIGHTS.items():
        if isinstance(module, kind):
            yield from ((name, dim) for name in names if getattr(module, name, None) is not None)
            return


def _ancestry(name: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _chains(module: nn.Module) -> list[tuple[str, Any]]:
    return list(module.parametrizations.items()) if parametrize.is_parametrized(module) else []  # type: ignore[operator, union-attr]


def _check_unnormalized(chosen: Sequence[tuple[str, nn.Module, str, int]]) -> None:
    done = [_dotted(where, name) for where, module, name, _ in chosen if parametrize.is_parametrized(module, name)]
    if done:
        raise ValueError(
            f"apply_norm: {', '.join(done)} already has a parametrization: name the module in skip, or call "
            "remove_norm(model) first"
        )


def _check_untied(model: nn.Module, chosen: Sequence[tuple[str, nn.Module, str, int]]) -> None:
    places: dict[int, list[str]] = {}
    for where, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(_dotted(where, name))
    for _, module, name, _ in chosen:
        shared = places.get(id(module._parameters.get(name)), [])
        if len(shared) > 1:
            raise ValueError(
                f"apply_norm: {' and '.join(shared)} are one parameter, and normalizing it in one module would untie "
                "them: name all these modules in skip"
            )


def _restored(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Put ``weight`` in the place of the parametrized tensor, before the module's other parameters, as layers order
    them: the state dict of an optimizer identifies parameters by their order."""
    chain = dict(_chains(module))[name]
    # PyTorch removes the parametrized attribute from the module's dynamic class, which deep copies of the module share:
    # give this module a class of its own first
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    parametrize.remove_parametrizations(module, name, leave_parametrized=not chain.is_tensor)
    delattr(module, name)
    if isinstance(weight, nn.Parameter):
        module.register_parameter(name, weight)
        for other in [other for other in module._parameters if other != name]:
            module._parameters[other] = module._parameters.pop(other)
    else:
        module.register_buffer(name, weight)
