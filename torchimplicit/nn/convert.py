"""State dicts of models that were trained with TorchDEQ or the deq and mdeq repositories, for the same model here."""

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
    """A checkpoint of TorchDEQ (0.1.0), or of locuslab's ``deq`` and ``mdeq`` repositories, for ``model``.

    ``model`` is the same network, written for this library and normalized before with the options of the checkpoint,
    which holds no options: ``apply_norm(model, weight_norm)`` for ``norm_type="weight_norm"``, with ``target=`` for
    ``norm_no_scale``, and ``clip=`` for ``norm_clip``; ``apply_norm(model, spectral_norm, scale=True, paired=True,
    iterations=1)`` for ``norm_type="spectral_norm"``, with ``bound=`` in the place of ``scale`` for ``norm_no_scale``.
    ``remove_norm(model)`` gives plain weights afterwards.

    The result goes into ``model.load_state_dict(convert_state_dict(torch.load(path), model))``:

    - ``weight_g`` and ``weight_v`` become the parameters of :func:`weight_norm`; ``weight_orig``, ``weight_g``,
      ``weight_u`` and ``weight_v`` those of :func:`spectral_norm`. The names of PyTorch's own normalizations, old and
      new, are understood too.
    - One tensor that ``model`` has under several names (a cell that is also inside an :class:`Equilibrium`, tied
      weights) gets its value under all of them.
    - A prefix that all keys have from ``DataParallel`` or ``torch.compile`` goes.
    - What the older code stored twice goes: ``func_copy.*`` and ``fullstage_copy.*``, the copy that its backward pass
      evaluated, and ``deq.func.*``, the same module under a second name.
    - A model with a method ``published_names``, such as :class:`torchimplicit.models.MDEQ`, says itself how other
      implementations name its tensors.

    Nothing else is left out: what has no place in ``model`` stays in the result, so that ``load_state_dict`` names it.

    Args:
        state: the state dict, from names to tensors; it is not changed.
        model: for which it is converted; it is not changed either.
        rename: from the beginnings of old names to those in ``model``, where a module moved:
            ``{"func.": "layer.cell."}``; the longest beginning counts. ``None``: as ``model.published_names()`` says,
            if there is one.

    Returns:
        a new dict, for ``model.load_state_dict``.

    Raises:
        ValueError: not a state dict; a normalization that the model does not have, or has otherwise; two values for one
            tensor; a beginning in ``rename`` that no key has.

    Warns:
        UserWarning: a spectral norm without ``paired=True`` in ``model``, where the checkpoint's :math:`u^\\top Wv` and
            the :math:`\\lVert Wv\\rVert` that is taken here differ by more than 0.1 %, since the weight has changed
            after :math:`u` was computed.
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
        found, taken = _normalized(old, where, tensor_name, chain)
        new.update(found)
        used |= taken
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
            "convert_state_dict: this is no state dict, from names to tensors"
            + (f", but a checkpoint with other dicts inside: pass one of them ({', '.join(nested)})" if nested else "")
        )
    return dict(state)


def _unwrapped(old: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Without the prefix of a wrapper around the whole model."""
    names = list(model.state_dict())
    while True:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in old)), None)
        if prefix is None or all(name.startswith(prefix) for name in names):
            return old
        old = {name.removeprefix(prefix): value for name, value in old.items()}


def _without_copies(old: dict[str, Any]) -> dict[str, Any]:
    """Without the copies of a module ``func`` that the older code keeps as ``func_copy``."""

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
    """Our normalizations in ``model``, under all names that they have: module, tensor, parametrizations."""
    for where, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                if len(chain) == 1 and isinstance(chain[0], WeightNorm | SpectralNorm):
                    yield (f"{where}." if where else ""), name, chain


def _normalized(old: dict[str, Any], where: str, name: str, chain: Any) -> tuple[dict[str, Any], set[str]]:
    """The tensors of one normalization here, from those of the checkpoint, and which keys they were; nothing where the
    checkpoint has no other form of it."""
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
    found = {f"{here}.original": weight}
    if "g" in parts:
        found = {f"{here}.original0": parts["g"], f"{here}.original1": weight}
    if spectral:
        found[f"{here}.0.right"] = parts["v"]
        if chain[0].paired:
            found[f"{here}.0.left"] = parts["u"]
        else:
            _tell_stale(plain, parts, chain[0])
    return found, {key for key in keys.values() if key in old}


def _check_kind(plain: str, parts: Mapping[str, Tensor], norm: WeightNorm | SpectralNorm) -> None:
    """Raise where checkpoint and model are normalized in different ways."""
    spectral = isinstance(norm, SpectralNorm)
    if spectral != ("orig" in parts):
        stored, got = ("weight", "spectral") if spectral else ("spectral", "weight")
        raise ValueError(
            f"convert_state_dict: {plain} has {stored} normalization in the checkpoint, and {got} normalization in the "
            f"model: remove_norm(model), then apply_norm(model, {stored}_norm, ...)"
        )
    learned = norm.scale if isinstance(norm, SpectralNorm) else norm.target is None
    if learned and "g" not in parts:
        option = "scale=False and bound=" if spectral else "target="
        raise ValueError(
            f"convert_state_dict: {plain} has no learned scale in the checkpoint (norm_no_scale), and one in the "
            f"model: normalize it with {option} the target norm that it was trained with"
        )
    if not learned and "g" in parts:
        option = "scale=True" if spectral else "target=None"
        raise ValueError(
            f"convert_state_dict: {plain} has a learned scale in the checkpoint, and none in the model: normalize it "
            f"with {option}"
        )


def _tell_stale(plain: str, parts: Mapping[str, Tensor], norm: SpectralNorm) -> None:
    matrix = norm._matrix(parts["orig"].detach())
    image = matrix @ parts["v"].to(matrix)
    theirs, ours = (parts["u"].to(matrix) @ image).item(), torch.linalg.vector_norm(image).item()
    if abs(theirs - ours) > 1e-3 * ours:
        notice(
            f"the spectral norm of {plain} is stale in the checkpoint",
            f"convert_state_dict: the weight {plain} has changed since the vectors of its spectral norm were computed: "
            f"the model that was saved divides by {theirs:.4g} in eval mode, and this one by {ours:.4g}, which is "
            "nearer to the singular value. spectral_norm(..., paired=True) does as the old one",
            UserWarning,
        )


def _fill_aliases(new: dict[str, Any], homes: Mapping[str, Any]) -> None:
    """Give every name of a tensor of the model the value that one of them has."""
    names: dict[int, list[str]] = {}
    for name, tensor in homes.items():
        if isinstance(tensor, Tensor):
            names.setdefault(id(tensor), []).append(name)
    for same in names.values():
        known = [name for name in same if name in new]
        for other in known[1:]:
            if not _equal(new[known[0]], new[other]):
                raise ValueError(
                    f"convert_state_dict: {known[0]} and {other} are one tensor in the model, and have different "
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
                    f"convert_state_dict: {plain} is normalized in the checkpoint ({name}), and not in the model: call "
                    "apply_norm(model, ...) with the options of its training before, and remove_norm(model) after "
                    "loading if plain weights are wanted"
                )


def _stored_twice(name: str, value: Any, old: Mapping[str, Any], used: set[str]) -> bool:
    """Whether a key without a place is a module that has one, below another module."""
    parts = name.split(".")
    return any(_equal(value, old[end]) for i in range(1, len(parts)) if (end := ".".join(parts[i:])) in used)


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
