"""The DEQ transformer as a language model."""

from __future__ import annotations

from torch import Tensor, nn

from torchimplicit.gradients import Gradient
from torchimplicit.models.deq_transformer.cell import DecoderCell, Memory
from torchimplicit.models.deq_transformer.config import DEQTransformerConfig
from torchimplicit.models.deq_transformer.language_model import LanguageModel
from torchimplicit.nn import Equilibrium
from torchimplicit.solvers import Solver


class DEQTransformer(LanguageModel):
    """A language model whose hidden states are the fixed point of one decoder layer (Bai et al. 2019).

    With ``solver=FixedPointIteration(steps=k)`` and ``gradient=Unrolled()`` it is a looped transformer: the layer is
    applied k times, and all applications are differentiated.

    Args:
        config: the sizes; see :func:`deq_transformer_wikitext103` and :func:`deq_transformer_small`.
        solver, gradient: solver and gradient estimator of the equilibrium layer; ``None``: its defaults.
        start: see :class:`~torchimplicit.nn.Equilibrium`; it is called with the :class:`Injection`.

    Attributes:
        embedding, softmax: the input and the output.
        equilibrium: the layer; its cell is a :class:`DecoderCell`.
    """

    def __init__(
        self,
        config: DEQTransformerConfig,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        start: nn.Module | None = None,
    ):
        super().__init__(config)
        cell = DecoderCell(config)
        self.equilibrium = Equilibrium(cell, solver=solver, gradient=gradient, start=start, rowwise=True)

    @property
    def cell(self) -> DecoderCell:
        """The map whose fixed point the hidden states are."""
        cell = self.equilibrium.cell
        assert isinstance(cell, DecoderCell)
        return cell

    def hidden(self, embedded: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """See :meth:`LanguageModel.hidden`. The memory holds the equilibria."""
        x, injected = self.cell.injection(embedded, memory)
        z = self.equilibrium(x)
        return z, Memory(z.detach(), injected)
