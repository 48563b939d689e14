"""Batches of square linear maps that are given by their products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchimplicit.coupling import Coupling

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LinearOperator:
    """Linear maps :math:`A_i`, one per sample, each square of size ``dim``.

    Attributes:
        product: ``[batch, dim] -> [batch, dim]``, :math:`A_i` times row i.
        transposed_product: the same with :math:`A_i^T`; ``None`` where it is not available.
        block_product: ``[k, batch, dim] -> [k, batch, dim]``, k products in one call; ``None`` where ``product``
            has to be called k times.
        batch, dim, dtype, device: shape, dtype and device of the vectors.
        symmetric: whether every :math:`A_i` equals its transpose.
        transposed: whether this operator is the transpose of the one that the user has in mind, so that a
            preconditioner given for the latter has to be transposed as well.
        null: unit vectors ``[batch or 1, dim]`` with :math:`A_i n_i = 0` and the range of :math:`A_i` orthogonal to
            :math:`n_i`; solutions are sought orthogonal to it. ``None`` for a regular operator.
        restrict: ``rows -> LinearOperator`` of those samples only (rows: int64 ``[k]``, into this operator's batch),
            or ``None`` where samples cannot be separated. Making a restricted operator may cost an evaluation of the
            remaining rows, counted in its ``setup_rows``.
        setup_rows: the row evaluations that making this operator cost.
        unprojected: where :math:`A_i = PHP` with the projector P along ``null``, the operator of H; ``None`` otherwise,
            or where H is not available. ``Jacobi`` reads the diagonal of H instead of that of PHP, whose small entries
            are lost in rounding, and ``Dense`` saves the projections.
        coupling: the samples that may depend on each other after all; ``None`` where none can.
    """

    product: Product
    batch: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    transposed_product: Product | None = None
    block_product: Product | None = None
    symmetric: bool = False
    transposed: bool = False
    null: Tensor | None = None
    restrict: Callable[[Tensor], LinearOperator] | None = None
    setup_rows: int = 0
    unprojected: LinearOperator | None = None
    coupling: Coupling | None = None

    def project(self, v: Tensor) -> Tensor:
        """``v`` (``[batch, dim]``) without its component along ``null``."""
        if self.null is None:
            return v
        return v - (v * self.null).sum(-1, keepdim=True) * self.null

    def repeated(self, copies: int) -> LinearOperator:
        """``copies`` of the batch, one after another, for as many right-hand sides at once."""

        def each(product: Product, block: Product | None) -> Product:
            def repeated(v: Tensor) -> Tensor:
                vs = v.reshape(-1, self.batch, self.dim)
                out = block(vs) if block is not None else torch.stack([product(one) for one in vs])
                return out.reshape(v.shape)

            return repeated

        flipped = self.transposed_product
        block = self.block_product
        return LinearOperator(
            product=each(self.product, block),
            transposed_product=None if flipped is None else each(flipped, block if self.symmetric else None),
            batch=copies * self.batch,
            dim=self.dim,
            dtype=self.dtype,
            device=self.device,
            symmetric=self.symmetric,
            transposed=self.transposed,
            null=None if self.null is None else self.null.expand(self.batch, -1).repeat(copies, 1),
            coupling=self.coupling,
        )

    def joined(self, rows: int) -> LinearOperator:
        """Each group of ``rows`` neighbouring samples as one system, ``[batch / rows, rows * dim]``.

        Along ``null`` it multiplies by a number of the size of its other eigenvalues, which makes it regular without
        changing its condition.
        """
        middle = 0.0
        if self.null is not None:
            # a Rayleigh quotient lies between the extreme eigenvalues
            probe = self.project(torch.ones(self.batch, self.dim, dtype=self.dtype, device=self.device))
            quotient = (probe * self.product(probe)).sum() / probe.square().sum()
            middle = float(quotient.nan_to_num(nan=0.0)) or 1.0

        def whole(product: Product) -> Product:
            def applied(v: Tensor) -> Tensor:
                vs = v.reshape(*v.shape[:-2], self.batch, self.dim)
                out = product(vs)
                return (out if self.null is None else out + middle * (vs - self.project(vs))).reshape(v.shape)

            return applied

        flipped, block = self.transposed_product, self.block_product
        return LinearOperator(
            product=whole(self.product),
            transposed_product=None if flipped is None else whole(flipped),
            block_product=None if block is None else whole(block),
            batch=self.batch // rows,
            dim=rows * self.dim,
            dtype=self.dtype,
            device=self.device,
            symmetric=self.symmetric,
            transposed=self.transposed,
        )

    def in_units(self, left: Tensor, right: Tensor) -> LinearOperator:
        """:math:`D_l A_i D_r` with the diagonals ``left`` and ``right``, ``[batch, dim]``. The operator must not have a
        null vector."""
        assert self.null is None

        def scaled(product: Product | None, first: Tensor, last: Tensor) -> Product | None:
            return None if product is None else lambda v: last * product(first * v)

        product, restrict = scaled(self.product, right, left), self.restrict
        assert product is not None
        return replace(
            self,
            product=product,
            transposed_product=scaled(self.transposed_product, left, right),
            block_product=scaled(self.block_product, right, left),
            symmetric=self.symmetric and left is right,
            restrict=None if restrict is None else lambda rows: restrict(rows).in_units(left[rows], right[rows]),
            unprojected=None,
        )

    def shifted(self, shift: Tensor) -> LinearOperator:
        """:math:`A_i + s_i P`, with the projector P along ``null`` (the identity where there is none).

        Args:
            shift: ``[batch]``.
        """
        column = shift[:, None]

        def moved(product: Product | None) -> Product | None:
            return None if product is None else lambda v: product(v) + column * self.project(v)

        product, restrict = moved(self.product), self.restrict
        assert product is not None
        return replace(
            self,
            product=product,
            transposed_product=moved(self.transposed_product),
            block_product=moved(self.block_product),
            restrict=None if restrict is None else lambda rows: restrict(rows).shifted(shift[rows]),
            unprojected=None if self.unprojected is None else self.unprojected.shifted(shift),
        )

    def dense(self) -> Tensor:
        """Assemble the matrices, ``[batch, dim, dim]``, by ``dim`` products."""
        eye = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        basis = eye[:, None, :].expand(self.dim, self.batch, self.dim)
        if self.block_product is not None:
            columns = self.block_product(basis.contiguous())
        else:
            columns = torch.stack([self.product(e.contiguous()) for e in basis])
        return columns.permute(1, 2, 0)

    def spectrum_matrix(self, dtype: torch.dtype) -> Tensor:
        """Assemble the matrices of a symmetric operator for their eigenvalues, ``[batch, dim, dim]`` in ``dtype``.

        The zero along ``null`` is replaced (:func:`without_null`), so that the extreme eigenvalues are those on its
        complement.
        """
        return without_null(self.dense().to(dtype), None if self.null is None else self.null.to(dtype))


def without_null(matrix: Tensor, null: Tensor | None) -> Tensor:
    """Restrict symmetric matrices to the complement of a null vector.

    Args:
        matrix: ``[batch, dim, dim]``, symmetric up to rounding.
        null: unit vectors n ``[batch or 1, dim]``, or ``None``.

    Returns:
        :math:`PMP` with :math:`P=I-nn^T`, symmetrized, with the mean of the other eigenvalues in place of the zero
        along n.
    """
    matrix = 0.5 * (matrix + matrix.mT)
    if null is None:
        return matrix
    row = null.expand(len(matrix), -1)[:, None, :]
    image = row @ matrix  # n^T M
    inside = image @ row.mT
    mean = (matrix.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] - inside) / max(1, matrix.shape[1] - 1)
    return matrix - row.mT @ image - image.mT @ row + (inside + mean) * (row.mT @ row)
