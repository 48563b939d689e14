"""Conversion of checkpoints of TorchDEQ and of the deq and mdeq repositories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchimplicit.nn.normalization import SpectralNorm, WeightNorm
from torchimplicit.notices import notice

_WRAPPERS = ("module.", "_orig_mod.")
_COPIES = ("func_copy", "fullstage_copy")  # of the older deq and mdeq code


def convert_state_dict(
    state: Mapping[str, Any], model: nn.Module, *, rename: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Convert a checkpoint of TorchDEQ (0.1.0), or of locuslab's ``deq`` and ``mdeq`` repositories, for ``model``.

    ``model`` is the same network, written for this library. It must be normalized first, with the options of the
    training, which the checkpoint does not hold: ``apply_norm(model, weight_norm)`` for ``norm_type="weight_norm"``,
    with ``target=`` for ``norm_no_scale`` and ``clip=`` for ``norm_clip``; ``apply_norm(model, spectral_norm,
    scale=True, paired=True, iterations=1)`` for ``norm_type="spectral_norm"``, with ``bound=`` in place of ``scale``
    for ``norm_no_scale``. After loading, ``remove_norm(model)`` gives plain weights.

    Load the result by ``model.load_state_dict(convert_state_dict(torch.load(path), model))``. The conversion:

    - ``weight_g`` and ``weight_v`` become the parameters of :func:`weight_norm`; ``weight_orig``, ``weight_g``,
      ``weight_u`` and ``weight_v`` those of :func:`spectral_norm`. The names of PyTorch's own normalizations, old and
      new, are understood too.
    - A tensor that ``model`` has under several names (a cell that is also inside an :class:`Equilibrium`, tied
      weights) gets its value under all of them.
    - A prefix of all keys from ``DataParallel`` or ``torch.compile`` is removed.
    - Tensors that the older code stored twice are removed: ``func_copy.*`` and ``fullstage_copy.*``, the copy that its
      backward pass evaluated, and ``deq.func.*``, the same module under a second name.

    Nothing else is removed: keys without a place in ``model`` stay in the result, so that ``load_state_dict`` names
    them.

    Args:
        state: the state dict, from names to tensors; it is not changed.
        model: the model to load into; it is not changed.
        rename: maps the beginnings of old names to those in ``model``, where a module moved:
            ``{"func.": "layer.cell."}``; the longest matching beginning counts. ``None``: the mapping that the method
            ``published_names`` of the model returns, if it has one, such as :class:`torchimplicit.models.MDEQ`.

    Returns:
        a new dict, for ``model.load_state_dict``.

    Raises:
        ValueError: ``state`` is not a state dict; it has a normalization that the model does not have, or has with
            other options; it has two values for one tensor; a beginning in ``rename`` matches no key.

    Warns:
        UserWarning: a spectral norm in ``model`` is without ``paired=True``, and the :math:`u^\\top Wv` of the
            checkpoint differs from the :math:`\\lVert Wv\\rVert` used here by more than 0.1 %, because the weight
            changed after :math:`u` was computed.
    """
    old = _without_copies(_unwrapped(_checked(state), model))
    if rename is None:
        published: Any = getattr(model, "published_names", dict)
        rename = {start: to for start, to in published().items() if any(name.startswith(start) for name in old)}
    old = _renamed(old, rename)
    homes = model.state_dict(keep_vars=True)
    new: dict[str, Any] = {}
    used: set[str] = set()
    for where, tensor_name, chain in _norms(model):
        converted, keys = _normalized(old, where, tensor_name, chain)
        new.update(converted)
        used |= keys
    for name in homes:
        if name in old and name not in used:
            new.setdefault(name, old[name])
            used.add(name)
    _fill_aliases(new, homes)
    left = {name: value for name, value in old.items() if name not in used}
    _refuse_norms_without_place(left, homes)
    new.update((name, value) for name, value in left.items() if not _stored_twice(name, value, old, used))
    return new


def _checked(state: Mapping[str, Any]) -> dict[str, Any]:
    nested = [name for name, value in state.items() if isinstance(value, Mapping)]
    if nested or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            "convert_state_dict: this is not a state dict, from names to tensors"
            + (f", but a checkpoint with other dicts inside: pass one of them ({', '.join(nested)})" if nested else "")
        )
    return dict(state)


def _unwrapped(old: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """``old`` without the prefix of a wrapper around the whole model."""
    names = list(model.state_dict())
    while True:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in old)), None)
        if prefix is None or all(name.startswith(prefix) for name in names):
            return old
        old = {name.removeprefix(prefix): value for name, value in old.items()}


def _without_copies(old: dict[str, Any]) -> dict[str, Any]:
    """``old`` without the copies of a module ``func`` that the older code keeps as ``func_copy``."""

    def original(name: str) -> str | None:
        parts = name.split(".")
        copied = next((i for i, part in enumerate(parts) if part in _COPIES), None)
        return None if copied is None else ".".join([*parts[:copied], parts[copied].removesuffix("_copy"), ""])

    return {
        name: value
        for name, value in old.items()
        if (start := original(name)) is None or not any(key.startswith(start) for key in old)
    }


def _renamed(old: dict[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    unused = [start for start in rename if not any(name.startswith(start) for name in old)]
    if unused:
        raise ValueError(f"convert_state_dict: no key begins with {', '.join(map(repr, unused))}, as rename says")
    renamed: dict[str, Any] = {}
    for name, value in old.items():
        start = max((s for s in rename if name.startswith(s)), key=len, default=None)
        to = name if start is None else rename[start] + name.removeprefix(start)
        if to in renamed and not _equal(renamed[to], value):
            raise ValueError(f"convert_state_dict: with rename, two keys become {to!r}")
        renamed[to] = value
    return renamed


def _norms(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """The normalizations of this library in ``model``, under all their names: module, tensor, parametrizations."""
    for where, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                if len(chain) == 1 and isinstance(chain[0], WeightNorm | SpectralNorm):
                    yield (f"{where}." if where else ""), name, chain


def _normalized(old: dict[str, Any], where: str, name: str, chain: Any) -> tuple[dict[str, Any], set[str]]:
    """The tensors of one normalization converted from the checkpoint, and the keys that they had there; empty if the
    checkpoint has no foreign form of it."""
    plain, here = f"{where}{name}", f"{where}parametrizations.{name}"
    spectral = isinstance(chain[0], SpectralNorm)
    if f"{plain}_v" in old:  # TorchDEQ, locuslab, the hooks of torch.nn.utils
        keys = {part: f"{plain}_{part}" for part in ("g", "v", "u", "orig")}
    elif f"{here}.0._v" in old:  # torch.nn.utils.parametrizations.spectral_norm
        keys = {"orig": f"{here}.original", "u": f"{here}.0._u", "v": f"{here}.0._v"}
    else:
        return {}, set()
    parts = {part: old[key] for part, key in keys.items() if key in old}
    _check_kind(plain, parts, chain[0])
    weight = parts["orig"] if spectral else parts["v"]
    converted = {f"{here}.original": weight}
    if "g" in parts:
        converted = {f"{here}.original0": parts["g"], f"{here}.original1": weight}
    if spectral:
        converted[f"{here}.0.right"] = parts["v"]
        if chain[0].paired:
            converted[f"{here}.0.left"] = parts["u"]
        else:
            _warn_if_stale(plain, parts, chain[0])
    return converted, {key for key in keys.values() if key in old}


def _check_kind(plain: str, parts: Mapping[str, Tensor], norm: WeightNorm | SpectralNorm) -> None:
    """Raise if the checkpoint and the model are normalized in different ways."""
    spectral = isinstance(norm, SpectralNorm)
    if spectral != ("orig" in parts):
        theirs, ours = ("weight", "spectral") if spectral else ("spectral", "weight")
        raise ValueError(
            f"convert_state_dict: {plain} has {theirs} normalization in the checkpoint, but {ours} normalization in "
            f"the model: remove_norm(model), then apply_norm(model, {theirs}_norm, ...)"
        )
    learned = norm.scale if isinstance(norm, SpectralNorm) else norm.target is None
    if learned and "g" not in parts:
        option = "scale=False and bound=" if spectral else "target="
        raise ValueError(
            f"convert_state_dict: {plain} has no learned scale in the checkpoint (norm_no_scale), but one in the "
            f"model: normalize it with {option} the target norm that it was trained with"
        )
    if not learned and "g" in parts:
        option = "scale=True" if spectral else "target=None"
        raise ValueError(
            f"convert_state_dict: {plain} has a learned scale in the checkpoint, but none in the model: normalize it "
            f"with {option}"
        )


def _warn_if_stale(plain: str, parts: Mapping[str, Tensor], norm: SpectralNorm) -> None:
    """Warn if the model's scale would differ from that of the checkpoint, whose vectors are older than its weight."""
    matrix = norm._matrix(parts["orig"].detach())
    image = matrix @ parts["v"].to(matrix)
    theirs, ours = (parts["u"].to(matrix) @ image).item(), torch.linalg.vector_norm(image).item()
    if abs(theirs - ours) > 1e-3 * ours:
        notice(
            f"the spectral norm of {plain} is stale in the checkpoint",
            f"convert_state_dict: the weight {plain} has changed since the vectors of its spectral norm were computed: "
            f"the saved model divides by {theirs:.4g} in eval mode, and this one by {ours:.4g}, which is nearer to "
            "the singular value. spectral_norm(..., paired=True) gives the saved model's value",
            UserWarning,
        )


def _fill_aliases(new: dict[str, Any], homes: Mapping[str, Any]) -> None:
    """Copy the value of each tensor to all names that the model has for it."""
    names: dict[int, list[str]] = {}
    for name, tensor in homes.items():
        if isinstance(tensor, Tensor):
            names.setdefault(id(tensor), []).append(name)
    for same in names.values():
        known = [name for name in same if name in new]
        for other in known[1:]:
            if not _equal(new[known[0]], new[other]):
                raise ValueError(
                    f"convert_state_dict: {known[0]} and {other} are one tensor in the model, but have different "
                    "values in the checkpoint"
                )
        if known:
            new.update((name, new[known[0]]) for name in same)


def _refuse_norms_without_place(left: Mapping[str, Any], homes: Mapping[str, Any]) -> None:
    for name in left:
        for ending in ("_v", ".original1", ".0._v"):
            plain = name.removesuffix(ending).replace("parametrizations.", "")
            if name.endswith(ending) and plain in homes:
                raise ValueError(
                    f"convert_state_dict: {plain} is normalized in the checkpoint ({name}), but not in the model: call "
                    "apply_norm(model, ...) with the options of its training first, and remove_norm(model) after "
                    "loading if plain weights are wanted"
                )


def _stored_twice(name: str, value: Any, old: Mapping[str, Any], used: set[str]) -> bool:
    """Return whether a key without a place in the model is a second name of a key that has one (``deq.func.*``)."""
    parts = name.split(".")
    return any(_equal(value, old[end]) for i in range(1, len(parts)) if (end := ".".join(parts[i:])) in used)


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
