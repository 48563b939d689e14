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

    Biases, embeddings, recurrent layers and what other modules call a weight are left alone. Make the optimizer
    afterwards, since there are new parameters. For a cell whose map is to contract, it is the cell that is given, not
    the whole network around it.

    Args:
        model: a module; its layers are changed in place.
        norm: :func:`weight_norm` or :func:`spectral_norm`, or any function ``norm(module, name, dim=dim, **options)``.
        skip: names of modules inside ``model``, as ``named_modules()`` gives them, to be left alone together with what
            is inside them; patterns as in file names (``"*.out"``, ``"embed*"``) too.
        options: what ``norm`` takes: ``target`` and ``clip`` for :func:`weight_norm`; ``bound``, ``only_above``,
            ``clip``, ``scale`` and ``iterations`` for :func:`spectral_norm`.

    Returns:
        ``model``.

    Raises:
        ValueError: there is nothing to normalize; a name in ``skip`` that is nowhere; a weight that is normalized
            already, or that two modules share (normalizing it would untie them). The model is then as it was.
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
            f"apply_norm: skip names {', '.join(sorted(map(repr, unused)))}, and {type(model).__name__} has no such "
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
    """Put plain parameters in the place of all weights in ``model`` that :func:`weight_norm`, :func:`spectral_norm` or
    :func:`apply_norm` has normalized; they keep the value that eval mode gives them. Other parametrizations stay.

    Returns:
        ``model``.

    Raises:
        ValueError: a weight has another parametrization besides: the model is then as it was.
    """
    found: list[tuple[nn.Module, str, Any]] = []
    for where, module in model.named_modules():
        for name, chain in _chains(module):
            ours = [isinstance(step, WeightNorm | SpectralNorm) for step in chain]
            if any(ours) and not all(ours):
                others = ", ".join(type(s).__name__ for s, own in zip(chain, ours, strict=True) if not own)
                raise ValueError(
                    f"remove_norm: {_dotted(where, name)} has another parametrization too ({others}), and one of "
                    "several cannot be taken away: torch.nn.utils.parametrize.remove_parametrizations removes them all"
                )
            if all(ours):
                found.append((module, name, chain))
    for module, name, chain in reversed(found):
        training = chain.training
        with torch.no_grad():
            weight = chain.eval()()  # in training the power method would move it
        chain.train(training)
        if chain.is_tensor:
            chain.original.data = weight  # an optimizer that has this parameter goes on with it
            _restored(module, name, chain.original)
        else:
            own = list(chain.parameters(recurse=False))
            _restored(module, name, nn.Parameter(weight, any(p.requires_grad for p in own)) if own else weight)
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
            "remove_norm(model) before"
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
                f"apply_norm: {' and '.join(shared)} are one parameter, and normalizing it in one place would untie "
                "them: name the modules in skip, all of them"
            )


def _restored(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Put ``weight`` in the place of the tensor that has a parametrization, and before the module's other parameters,
    where layers have it: optimizers know parameters by their order."""
    chain = dict(_chains(module))[name]
    # deep copies share the class that PyTorch makes for a parametrized module, and takes the attribute from
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
