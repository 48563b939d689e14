"""A preconditioner for the Hessian of a network's loss: Kronecker factors of its Fisher matrix (K-FAC)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import Preconditioner, PreparedPreconditioner, shared
from torchimplicit.precision import working_dtype
from torchimplicit.validation import at_least


class _Factors(NamedTuple):
    """A layer's block of the matrix, in the basis of its eigenvectors.

    Attributes:
        weight, bias: the places of its parameters among the leaves of the state; ``None`` where they are not.
        inputs: eigenvectors of the second moment of its inputs, ``[in, in]``, with a constant input for the bias.
        outputs: those of the second moment of the gradients at its outputs, ``[out, out]``.
        inverse: the inverse of the eigenvalues, ``[out, in]``.
    """

    weight: int
    bias: int | None
    inputs: Tensor
    outputs: Tensor
    inverse: Tensor


@final
@dataclass(frozen=True, eq=False)
class KFAC(Preconditioner):
    """The Fisher matrix of a network, a Kronecker product for each layer (Martens and Grosse 2015, arXiv 1503.05671;
    convolutions: Grosse and Martens 2016, arXiv 1602.01407).

    For a :class:`~torchimplicit.Minimum` whose state is a network's parameters (``batched=False``), as in the tuning of
    hyperparameters by the exact gradient: the Hessian of such a loss is ill-conditioned, and too large to be assembled.
    Near a minimum it is close to the Fisher matrix plus the curvature of the penalty, of which this keeps the blocks of
    the layers. It serves ``Implicit(linear_solver=CG(preconditioner=...))`` and ``LBFGS(preconditioner=...)``. Made by
    :meth:`at`.

    Attributes:
        sizes: the numbers of elements of the state's leaves.
        factors: of each linear and convolutional layer.
        rest: what divides the other leaves (normalization, say), by their places: a number each.
    """

    sizes: tuple[int, ...]
    factors: tuple[_Factors, ...]
    rest: Mapping[int, float]

    @classmethod
    def at(
        cls,
        model: nn.Module,
        state: Mapping[str, Tensor],
        inputs: Any,
        likelihood: str = "categorical",
        *,
        damping: float | Mapping[str, float] = 1e-3,
        samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> KFAC:
        """The preconditioner at some parameters.

        Args:
            model: the network; its ``Linear`` and ungrouped ``Conv2d`` layers have a block each.
            state: its parameters by name, as in ``dict(model.named_parameters())``: the state of the problem, in its
                order, at which the matrix is made. Parameters that are not in it keep the model's values.
            inputs: of the model, a tensor ``[n, ...]`` or a tuple of such. As many as give a good estimate suffice.
            likelihood: what the loss is, as a mean over the inputs: ``"categorical"``, the cross-entropy of outputs
                ``[n, classes]``; ``"gaussian"``, half the squared error, summed over an output's dimensions.
            damping: curvature that is added: that of the penalty, such as a weight decay; by the names of parameters
                where it differs (a layer takes that of its weight), otherwise for all.
            samples: draws from the model's predictions in place of the exact expectation, each costing a backward
                pass; ``None``: exact, a backward pass for every output.
            generator: for the draws.

        Raises:
            ValueError: no layer's weight is in ``state``, or a number out of range.
        """
        if samples is not None:
            at_least("KFAC", "samples", samples, 1)
        if likelihood not in ("categorical", "gaussian"):
            raise ValueError(f'KFAC: likelihood is {likelihood!r}, and must be "categorical" or "gaussian"')
        added = damping if isinstance(damping, Mapping) else dict.fromkeys(state, damping)
        if not all(added.get(name, 0.0) > 0 for name in state):
            raise ValueError(f"KFAC: damping is {damping}, and must be positive for every parameter of the state")
        places = {name: place for place, name in enumerate(state)}
        layers = {
            name: layer for name, layer in model.named_modules() if _serves(layer) and _joined(name, "weight") in places
        }
        if not layers:
            raise ValueError(
                "KFAC: the state holds the weight of no Linear or Conv2d layer of the model; give its parameters by "
                "name, as in dict(model.named_parameters())"
            )
        moments = _moments(model, layers, state, inputs, likelihood, samples, generator)
        factors, scales = [], []
        for name, (of_inputs, of_outputs) in moments.items():
            bias = places.get(_joined(name, "bias"))
            if bias is None and layers[name].bias is not None:  # the constant input that stands for a bias
                of_inputs = of_inputs[:-1, :-1]
            (values_in, inputs_basis), (values_out, outputs_basis) = map(torch.linalg.eigh, (of_inputs, of_outputs))
            curvature = values_out.clamp_min(0)[:, None] * values_in.clamp_min(0)
            weight = _joined(name, "weight")
            scales.append(float(curvature.mean()))
            inverse = (curvature + added[weight]).reciprocal()
            factors.append(_Factors(places[weight], bias, inputs_basis, outputs_basis, inverse))
        held = {place for block in factors for place in (block.weight, block.bias)}
        middle = sum(scales) / len(scales)
        rest = {place: middle + added[name] for name, place in places.items() if place not in held}
        return cls(tuple(p.numel() for p in state.values()), tuple(factors), rest)

    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        if operator.dim != sum(self.sizes):
            raise ValueError(
                f"KFAC was made for a state of {sum(self.sizes)} numbers, and the system has {operator.dim}: give "
                "KFAC.at(...) the problem's own state"
            )
        dtype = working_dtype(operator.dtype)
        factors = [
            block._replace(**{
                name: getattr(block, name).to(operator.device, dtype) for name in ("inputs", "outputs", "inverse")
            })
            for block in self.factors
        ]  # fmt: skip

        def apply(v: Tensor) -> Tensor:
            parts = list(v.split(self.sizes, dim=-1))
            for place, value in self.rest.items():
                parts[place] = parts[place] / value
            for block in factors:
                out = block.outputs.shape[0]
                matrix = parts[block.weight].unflatten(-1, (out, -1))
                if block.bias is not None:
                    matrix = torch.cat((matrix, parts[block.bias].unsqueeze(-1)), dim=-1)
                turned = (block.outputs.T @ matrix @ block.inputs) * block.inverse
                matrix = block.outputs @ turned @ block.inputs.T
                if block.bias is not None:
                    matrix, parts[block.bias] = matrix[..., :-1], matrix[..., -1]
                parts[block.weight] = matrix.flatten(-2)
            return torch.cat(parts, dim=-1)

        return shared(apply)


def _serves(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _joined(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter


def _moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    inputs: Any,
    likelihood: str,
    samples: int | None,
    generator: torch.Generator | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Second moments of every layer's inputs, with a constant one, and of the gradients at its outputs.

    The places where a layer is applied (tokens, pixels, repeated calls) count as independent: a mean over them of the
    inputs' moment, a sum of the gradients'.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    outputs: list[tuple[str, Tensor]] = []

    def watch(name: str, layer: nn.Module, got: tuple[Tensor, ...], out: Tensor) -> None:
        seen[name].append(_rows(layer, got[0].detach()))
        outputs.append((name, out))

    with ExitStack() as stack, torch.enable_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(watch, name)).remove)
        parameters = {name: p.detach().requires_grad_() for name, p in state.items()}
        predicted = functional_call(model, parameters, arguments)
    count = predicted.shape[0]
    of_outputs: dict[str, Tensor] = {}
    tensors = [out for _, out in outputs]
    for seed in _seeds(predicted.detach(), likelihood, samples, generator):
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            predicted, tensors, seed, retain_graph=True, allow_unused=True
        )
        for (name, _), gradient in zip(outputs, gradients, strict=True):
            if gradient is None:
                continue
            convolution = isinstance(layers[name], nn.Conv2d)
            rows = (gradient.movedim(1, -1) if convolution else gradient).flatten(0, -2)
            moment = rows.T @ rows / count
            of_outputs[name] = of_outputs[name] + moment if name in of_outputs else moment
    of_inputs = {name: torch.cat(rows) for name, rows in seen.items()}
    return {
        name: (rows.T @ rows / rows.shape[0], of_outputs[name])
        for name, rows in of_inputs.items()
        if name in of_outputs
    }


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weight by, a row for each place where it is applied: ``[places, in (+ 1)]``."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        unfolded = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = unfolded.mT.flatten(0, 1)
    else:
        rows = x.flatten(0, -2)
    return functional.pad(rows, (0, 1), value=1.0) if layer.bias is not None else rows


def _seeds(
    predicted: Tensor, likelihood: str, samples: int | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Vectors at the outputs whose outer products add up to the second derivatives of each input's loss there."""
    noise = partial(torch.randn, predicted.shape, dtype=predicted.dtype, generator=generator)
    if likelihood == "gaussian":
        if samples is None:
            units = torch.eye(predicted[0].numel(), dtype=predicted.dtype, device=predicted.device)
            yield from (unit.view(predicted.shape[1:]).expand_as(predicted) for unit in units)
        else:
            yield from (noise().to(predicted.device) / samples**0.5 for _ in range(samples))
    elif predicted.ndim != 2:
        raise ValueError(f'KFAC: the model gives {list(predicted.shape)}, and "categorical" needs [n, classes]')
    else:
        shares = predicted.softmax(dim=1)
        for index in range(shares.shape[1] if samples is None else samples):
            # the gradient of the loss of a label, weighted by the root of its probability, or at a label that is drawn
            if samples is None:
                label = torch.full((len(shares), 1), index, device=shares.device)
                weight = shares.gather(1, label).sqrt()
            else:
                label = torch.multinomial(shares, 1, generator=generator)
                weight = torch.full_like(label, samples**-0.5, dtype=shares.dtype)
            yield weight * (shares - torch.zeros_like(shares).scatter_(1, label, 1.0))
