"""GMRES in compiled code: the steps of :mod:`torchimplicit.linear.gmres`, in memory that is allocated at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.captured.linear import Product, Right, Solved
from torchimplicit.captured.loop import while_loop
from torchimplicit.captured.rings import Rings, inner, less, write
from torchimplicit.linear.basis import room
from torchimplicit.linear.gmres import FALL, threshold
from torchimplicit.precision import widened


class _Going(NamedTuple):
    """After ``taken`` steps.

    Attributes:
        r: the residual, zero for rows that have stopped.
        last: the latest image.
        norm: that of the residual when the row stopped, or now.
        slow: the rows whose next direction is the latest image.
        gram: the images' products with each other, ``[batch, memory, memory]``, but for the latest one.
        steps, going: int64 and bool ``[batch]``.
        sound: bool ``[batch]``, whether no image was numerically in the span of the ones before.
        size: ``[batch]``, a lower bound of the norm of the matrix.
    """

    taken: Tensor
    r: Tensor
    last: Tensor
    norm: Tensor
    slow: Tensor
    gram: Tensor
    steps: Tensor
    going: Tensor
    sound: Tensor
    size: Tensor


class _Numbers(NamedTuple):
    """Of each step, ``[batch, memory]``: 1 where its direction was the image before, and the product of the residual
    with its image; and the columns of the inverse of U, ``[batch, memory, memory]``, one after another."""

    turned: Tensor
    coefficients: Tensor
    inverse: Tensor


def by_gmres(memory: int, tolerance: Tensor, product: Product, saved: Any, right: Right) -> Solved:
    """At most ``memory`` steps from zero.

    Images are made orthogonal by one pass over the ones before: what rounding has left of their products with each
    other is known from the pass of the step that follows, and taken into account.

    Args:
        memory: how many images there is room for.
        tolerance: of the residual's norm, ``[batch]``.
    """
    given_dtype = right.b.dtype
    b, scale, tolerance = widened(right.b), widened(right.scale), widened(tolerance)
    tiny = torch.finfo(b.dtype).tiny
    images = room(b, memory)
    none = b.new_zeros(b.shape[0], memory)
    square = torch.zeros(b.shape[0], memory, memory, dtype=b.dtype, device=b.device)
    numbers = _Numbers(none, none.clone(), square)
    going = scale > tolerance
    zero = torch.zeros((), dtype=torch.int64, device=b.device)
    steps = torch.zeros_like(going, dtype=torch.int64)
    r = torch.where(going[:, None], b, 0)
    start = _Going(
        zero,
        r,
        torch.zeros_like(b),
        scale.clone(),
        torch.zeros_like(going),
        square.clone(),
        steps,
        going,
        torch.ones_like(going),
        torch.zeros_like(scale),
    )

    def body(now: tuple[_Going, _Numbers], constants: Any, rings: Rings) -> tuple[_Going, _Numbers]:
        (k, r, last, norm, slow, gram, steps, going, sound, matrix), numbers = now
        saved, tolerance = constants
        slots = torch.arange(memory, device=r.device)
        turned = slow & (k > 0)
        z = torch.where(turned[:, None], last, r)
        length = torch.where(turned, 1, torch.linalg.vector_norm(r, dim=-1))
        w = product(z.to(given_dtype), *saved).to(z.dtype)
        # one pass over the images: their products with the new one, and with the latest one
        column, before = inner(rings[0], k, torch.stack((w, last), 1)).unbind(1)
        at, here = slots == k - 1, slots == k
        gram = torch.where(at[:, None], before[:, None, :], torch.where(at, before[:, :, None], gram))
        # the inverse of G = I + E but for squares of E
        column = 2 * column - (gram * column[:, None]).sum(-1)
        w = less(w, column, rings[0], k)
        size = torch.linalg.vector_norm(w, dim=-1).clamp_min(tiny)
        image = w / size[:, None]
        a = (r * image).sum(-1)
        after = r - a[:, None] * image
        left = torch.linalg.vector_norm(after, dim=-1)
        # the latest image was in the span of the ones before
        whole = torch.linalg.vector_norm(column, dim=-1).hypot(size)
        within = size < threshold(r.dtype) * whole
        broken, sound = turned & within, sound & ~within
        # U gets one column more, and so does its inverse
        parts = torch.where(here, 1, 0) - (numbers.inverse * column[:, :, None]).sum(1)
        parts = torch.where(sound[:, None], parts / size[:, None], 0)
        still = going & ~broken
        on = still & (left > tolerance) & (left < torch.inf)
        numbers = _Numbers(
            torch.where(here, turned[:, None], numbers.turned),
            torch.where(here, a[:, None], numbers.coefficients),
            torch.where(here[:, None], parts[:, None], numbers.inverse),
        )
        write(rings[0], k, image)
        count = k + 1
        return _Going(
            taken=count,
            r=torch.where(on[:, None], after, 0),
            last=torch.where(on[:, None], image, 0),
            norm=torch.where(still, left, norm),
            slow=on & (left > FALL * norm),
            gram=gram,
            steps=torch.where(going, count, steps),
            going=on,
            sound=sound,
            size=torch.where(length > 0, matrix.maximum(whole / torch.where(length > 0, length, 1)), matrix),
        ), numbers

    def on(now: tuple[_Going, _Numbers]) -> Tensor:
        return (now[0].taken < memory) & (now[0].going.sum() > 0)

    end, numbers = while_loop(on, body, (start, numbers), (saved, tolerance), (images,))
    x = _iterate(end.taken, numbers, torch.where((scale > tolerance)[:, None], b, 0), images)
    spent = end.going & (end.taken == memory)
    solved = end.norm <= tolerance
    return Solved(
        x.to(given_dtype), solved, end.steps, end.taken + 1, end.size, torch.ones_like(solved), spent, end.norm
    )


def _iterate(taken: Tensor, numbers: _Numbers, first: Tensor, images: Tensor) -> Tensor:
    """The iterate, from the first residual and the images: residuals are what is left of the one of the other."""

    def leave(now: tuple[Tensor, Tensor], constants: Any, rings: Rings) -> tuple[Tensor, Tensor]:
        (turned, coefficients, inverse), taken, first = constants
        t = (inverse * coefficients[:, :, None]).sum(1)
        along_image = turned * t
        sums = (t - along_image).cumsum(1)
        total = (t - along_image).sum(1, keepdim=True)
        weights = (total - sums) * coefficients
        weights = weights - torch.cat((along_image[:, 1:], torch.zeros_like(turned[:, :1])), 1)
        return now[0] + 1, less(total * first, weights, rings[0], taken)

    # outside of a loop, rings are not what loops have written to them
    start = torch.zeros_like(taken), torch.zeros_like(first)
    _, x = while_loop(lambda now: now[0] < 1, leave, start, (numbers, taken, first), (images,))
    return x
