"""A graph's weighted adjacency, and the sum over neighbours that graph networks take.

The sum is a sparse product in compressed-row form: 5 to 30 times as fast on a CPU as gathering and scattering edge by
edge. PyTorch differentiates its own sparse products in reverse mode and to first order only, and makes the transposed
matrix anew in every backward pass; here both matrices are made once, and the sum is a linear autograd node whose
derivatives, in every mode and of every order, are itself and its transposed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchimplicit._torch import Node
from torchimplicit.models.ignn.perron import perron_bound
from torchimplicit.precision import without_autocast


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Adjacency:
    """The matrix :math:`A` with ``A[i, j]`` the weight of the edge from node i (source) to node j (target).

    Made by :meth:`normalized` or :meth:`weighted`; the weights are constants.

    Attributes:
        nodes: n.
        into: :math:`A^T` in compressed rows, ``[n, n]``: row j has the edges that arrive at j.
        out_of: :math:`A` in compressed rows: row j has the edges that leave j.
        perron: :math:`\\lambda_{pf}(A)`, the largest eigenvalue, or an upper bound of it.
    """

    nodes: int
    into: Tensor = field(repr=False)
    out_of: Tensor = field(repr=False)
    perron: float

    def __post_init__(self) -> None:
        # Compiled code takes dense inputs only: it gets the matrices in parts.
        object.__setattr__(self, "_parts", tuple(_parts(matrix) for matrix in (self.into, self.out_of)))

    @classmethod
    def normalized(
        cls, edge_index: Tensor, nodes: int, edge_weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Adjacency:
        """:math:`D^{-1/2}(A+I)D^{-1/2}`, with :math:`D` the row sums of :math:`A+I`, as in the IGNN paper.

        In a directed graph those are the weights that *leave* a node, and one for itself. (Graph convolutions
        elsewhere count those that arrive; on undirected graphs the two are the same.) The matrix is then similar to
        the row-stochastic :math:`D^{-1}(A+I)`, so that its Perron eigenvalue is exactly 1, for directed acyclic graphs,
        isolated nodes and graphs without edges too.

        Args:
            edge_index: int64 ``[2, edges]``, sources and targets; an undirected edge stands there in both directions.
                Edges that stand there twice are added, and a self-loop that the graph has already adds to that of I.
            nodes: n; a node that no edge touches keeps its self-loop alone.
            edge_weight: ``[edges]``, nonnegative; ``None``: ones.
            dtype: dtype of the matrix.

        Raises:
            ValueError: an index or a weight out of range, or a weight that requires grad.
        """
        source, target, weight = _checked(edge_index, nodes, edge_weight)
        loops = torch.arange(nodes, device=source.device)
        source, target = torch.cat([source, loops]), torch.cat([target, loops])
        weight = torch.cat([weight, torch.ones(nodes, dtype=weight.dtype, device=weight.device)])
        scale = torch.zeros(nodes, dtype=weight.dtype, device=weight.device).index_add_(0, source, weight).rsqrt()
        weight = scale[source] * weight * scale[target]
        return cls._of(source, target, weight, nodes, dtype, 1.0)

    @classmethod
    def weighted(
        cls, edge_index: Tensor, nodes: int, edge_weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Adjacency:
        """The edges as they are, with :attr:`perron` computed: exactly for what lies on no cycle, and from above, by
        the power iteration, for the rest. The arguments are those of :meth:`normalized`."""
        source, target, weight = _checked(edge_index, nodes, edge_weight)
        return cls._of(source, target, weight, nodes, dtype, perron_bound(source, target, weight, nodes))

    @classmethod
    def _of(
        cls, source: Tensor, target: Tensor, weight: Tensor, nodes: int, dtype: torch.dtype, perron: float
    ) -> Adjacency:
        into = _compressed(target, source, weight, nodes, dtype)
        return cls(nodes=nodes, into=into, out_of=_compressed(source, target, weight, nodes, dtype), perron=perron)

    def sum_in(self, x: Tensor) -> Tensor:
        """:math:`A^T x`: each node's weighted sum over the nodes with an edge to it. ``x`` is ``[n, features]``."""
        return neighbour_sum(x, self, False)

    def padded(self, slots: Tensor, size: int) -> Adjacency:
        """The graph with its nodes at ``slots`` (int64 ``[n]``, increasing) of ``size``; the other nodes have no edges
        and no self-loops."""
        return Adjacency(
            nodes=size, into=_moved(self.into, slots, size), out_of=_moved(self.out_of, slots, size), perron=self.perron
        )


def neighbour_sum(x: Tensor, adjacency: Adjacency, transposed: bool) -> Tensor:
    """:math:`A^T x`, or :math:`A x` if ``transposed``; ``x`` is ``[n, features]``."""
    if has_torch_function_unary(x):  # an equilibrium that watches the tensors its map uses sees this one by its name
        return handle_torch_function(neighbour_sum, (x,), x, adjacency, transposed)
    if x.ndim != 2 or x.shape[0] != adjacency.nodes:
        raise ValueError(
            f"the graph has {adjacency.nodes} nodes, and the features have shape {tuple(x.shape)}: they must be "
            "[nodes, features]"
        )
    if torch.compiler.is_compiling():
        one, other = adjacency._parts  # type: ignore[attr-defined]
        return _compiled_sum(x, other, one) if transposed else _compiled_sum(x, one, other)
    return _NeighbourSum.apply(x, adjacency, transposed)


Parts = tuple[Tensor, Tensor, Tensor]
"""Where rows start, columns and values of a matrix in compressed rows."""


def _parts(matrix: Tensor) -> Parts:
    """The tensors themselves, and no views of the matrix, which is an input that compiled code has not."""
    return matrix.crow_indices().data, matrix.col_indices().data, matrix.values().data


# Defined without ``torch.library.custom_op``, whose checks of every call take as long as the product of small graphs
_library = torch.library.Library("torchimplicit", "FRAGMENT")
_library.define("neighbour_sum(Tensor x, Tensor[] matrix, Tensor[] transposed) -> Tensor")
_compiled_sum = torch.ops.torchimplicit.neighbour_sum.default
"""The same sum as one operation of a graph that is compiled: ``(x, matrix, transposed)``, of :data:`Parts`."""


def _product(x: Tensor, matrix: Parts, transposed: Parts) -> Tensor:
    """The CSR matrix is made anew, of the tensors that it shares: 5 microseconds."""
    wide = x.to(matrix[2].dtype).contiguous()
    csr = torch.sparse_csr_tensor(*matrix, (x.shape[0], x.shape[0]), check_invariants=False)
    return (csr @ wide).to(x.dtype)


def _empty(x: Tensor, matrix: Parts, transposed: Parts) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _note(ctx: Any, inputs: Any, output: Any) -> None:
    _, matrix, transposed = inputs
    ctx.save_for_backward(*matrix, *transposed)


def _back(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    matrix, transposed = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    return _compiled_sum(v, list(transposed), list(matrix)), [None] * 3, [None] * 3


def _side_by_side(info: Any, in_dims: Any, x: Tensor, matrix: Parts, transposed: Parts) -> tuple[Tensor, int]:
    copies = x.movedim(in_dims[0], 1)
    out = _compiled_sum(copies.flatten(1), matrix, transposed)
    return out.unflatten(1, copies.shape[1:]), 1


_NAME = "torchimplicit::neighbour_sum"
_library.impl("neighbour_sum", _product, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _empty, lib=_library)
torch.library.register_autograd(_NAME, _back, setup_context=_note, lib=_library)
torch.library.register_vmap(_NAME, _side_by_side, lib=_library)


class _NeighbourSum(Node):
    """``(x, adjacency, transposed) -> A^T x`` or ``A x``, linear in ``x``."""

    @staticmethod
    def forward(x: Tensor, adjacency: Adjacency, transposed: bool) -> Tensor:
        matrix = adjacency.out_of if transposed else adjacency.into
        with without_autocast(x.device):  # the sparse product has no half-precision form on every device
            return (matrix @ x.to(matrix.dtype).contiguous()).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.adjacency, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        return neighbour_sum(v, ctx.adjacency, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: Any) -> Tensor:
        return neighbour_sum(dx, ctx.adjacency, ctx.transposed)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, adjacency: Adjacency, transposed: bool) -> tuple[Tensor, int]:
        side_by_side = x.movedim(in_dims[0], 1)  # [nodes, copies, features]
        out = neighbour_sum(side_by_side.flatten(1), adjacency, transposed)
        return out.unflatten(1, side_by_side.shape[1:]), 1


def _checked(edge_index: Tensor, nodes: int, edge_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, targets and weights (float64), or an error in words."""
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"edge_index must be int64 of shape [2, edges], and it is {edge_index.dtype} of {tuple(edge_index.shape)}"
        )
    if nodes < 1:
        raise ValueError(f"the graph has {nodes} nodes, and needs at least one")
    edges = edge_index.shape[1]
    if edges and (int(edge_index.min()) < 0 or int(edge_index.max()) >= nodes):
        raise ValueError(
            f"edge_index has indices from {int(edge_index.min())} to {int(edge_index.max())}, and the graph has "
            f"{nodes} nodes: they must lie in 0...{nodes - 1}"
        )
    if edge_weight is None:
        return edge_index[0], edge_index[1], torch.ones(edges, dtype=torch.float64, device=edge_index.device)
    if edge_weight.requires_grad:
        raise ValueError(
            "the edge weights of an IGNN are constants of the graph, and these require grad: detach() them. The "
            "projection that makes the model well-posed needs the weights before the solve"
        )
    if edge_weight.shape != (edges,):
        raise ValueError(f"edge_weight must have one number per edge, shape ({edges},), not {tuple(edge_weight.shape)}")
    weight = edge_weight.to(torch.float64)
    if edges and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError(
            f"edge weights must be finite and nonnegative, for the Perron eigenvalue to bound the spectral radius; the "
            f"smallest is {float(weight.min())}"
        )
    return edge_index[0], edge_index[1], weight


def _compressed(rows: Tensor, columns: Tensor, weight: Tensor, nodes: int, dtype: torch.dtype) -> Tensor:
    """The matrix in compressed rows, with what stands in one place twice added."""
    places, which = torch.unique(rows * nodes + columns, return_inverse=True)
    values = torch.zeros(places.shape, dtype=weight.dtype, device=weight.device).index_add_(0, which, weight)
    counts = torch.bincount(places // nodes, minlength=nodes)
    return _csr(_starts(counts), places % nodes, values.to(dtype), nodes)


def _moved(matrix: Tensor, slots: Tensor, size: int) -> Tensor:
    counts = torch.zeros(size, dtype=torch.int64, device=slots.device)
    counts[slots] = matrix.crow_indices().diff()
    return _csr(_starts(counts), slots[matrix.col_indices()], matrix.values(), size)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, (size, size), check_invariants=False)
