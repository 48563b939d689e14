"""The loss of all molecules, by one process or several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from torchimplicit.models.orbital_free import Molecule, OrbitalFree
from torchimplicit.recipes.orbital_free.case import Case
from torchimplicit.recipes.orbital_free.config import OrbitalFreeTraining
from torchimplicit.recipes.orbital_free.share import Share, Work
from torchimplicit.recipes.orbital_free.weights import Weights
from torchimplicit.recipes.runtime.optimize import Array
from torchimplicit.recipes.runtime.run import threads


class DensityFit(AbstractContextManager["DensityFit"]):
    """An :class:`~torchimplicit.recipes.runtime.optimize.Objective`: the shares of the molecules, and the decay of
    the network's weights.

    Molecules are independent problems of different size, so they are shared among processes, the largest first, each to
    the one that has least to do. To be used in a ``with`` statement, at whose end the processes end.

    Attributes:
        evaluations, jacobians, rejected: see there.
        work: of the last call, over all molecules.
    """

    def __init__(self, functional: OrbitalFree, molecules: Sequence[Molecule], config: OrbitalFreeTraining):
        self.functional, self.config = functional, config
        self.evaluations = self.jacobians = self.rejected = 0
        self.work = Work()
        self._weights = _weights(functional, molecules, config)
        count = min(config.processes, len(molecules))
        loads: list[list[int]] = [[] for _ in range(count)]
        cost = [molecule.size**2 * len(molecule.quadrature) for molecule in molecules]
        for place in sorted(range(len(molecules)), key=lambda k: -cost[k]):
            min(loads, key=lambda load: sum(cost[k] for k in load)).append(place)
        split = [[molecules[k] for k in sorted(load)] for load in loads]
        self._share = made(functional, split[0], molecules, config)
        self._others = [_Worker(functional, own, molecules, config) for own in split[1:]]

    def __exit__(self, *exc: Any) -> None:
        for other in self._others:
            other.close()

    @property
    def model(self) -> OrbitalFree:
        """See :class:`~torchimplicit.recipes.runtime.optimize.Objective`."""
        return self.functional

    @property
    def weights(self) -> Array:
        """Those that the molecules depend on."""
        return self._weights.get()

    def set_weights(self, vector: Array) -> None:
        """Put a vector into the functional."""
        self._weights.put(vector)

    def residuals(self, vector: Array) -> Array:
        """Of all molecules, and of the decay; infinite where a density is not found."""
        self.evaluations += 1
        found = np.concatenate([*self._all("residuals", vector), self._decay(vector)])
        self.rejected += not np.isfinite(found).all()
        return np.asarray(found if np.isfinite(found).all() else np.full_like(found, np.inf))

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``."""
        self.jacobians += 1
        decay = self.config.decay**0.5 * np.eye(len(vector))[self._weights.network.numpy()]
        return np.concatenate([*self._all("jacobian", vector), decay])

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """Where a density is not found, at the best iterate."""
        self.evaluations += 1
        parts = self._all("loss_and_gradient", vector)
        self.rejected += self.work.unconverged > 0
        decay = self._decay(vector)
        value = sum(part[0] for part in parts) + 0.5 * float(decay @ decay)
        gradient = np.sum([part[1] for part in parts], axis=0)
        gradient[self._weights.network.numpy()] += self.config.decay**0.5 * decay
        return value, gradient

    def _decay(self, vector: Array) -> Array:
        return np.asarray(self.config.decay**0.5 * np.asarray(vector)[self._weights.network.numpy()])

    def _all(self, what: str, vector: Array) -> list[Any]:
        for other in self._others:
            other.ask(what, vector)
        found = [getattr(self._share, what)(vector)]
        works = [self._share.work]
        for other in self._others:
            answer, work = other.answer()
            found.append(answer)
            works.append(work)
        self.work = Work(*(sum(values) for values in zip(*(vars(work).values() for work in works), strict=True)))
        return found


def made(
    functional: OrbitalFree, own: Sequence[Molecule], every: Sequence[Molecule], config: OrbitalFreeTraining
) -> Share:
    """The share of some of all molecules."""
    cases = [Case.of(molecule, config.tail_weight) for molecule in own]
    return Share(functional, cases, _weights(functional, every, config), config, len(every))


def _weights(functional: OrbitalFree, molecules: Sequence[Molecule], config: OrbitalFreeTraining) -> Weights:
    return Weights(functional, molecules, constants=config.energy_weight > 0)


class _Worker:
    """Another process, with its share."""

    def __init__(
        self, functional: OrbitalFree, own: Sequence[Molecule], every: Sequence[Molecule], config: OrbitalFreeTraining
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, functional, own, every, config), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, vector: Array) -> None:
        self._pipe.send((what, vector))

    def answer(self) -> tuple[Any, Work]:
        try:
            found, work = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process that shares the molecules has ended; its error is above") from None
        return found, work

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()


def _serve(
    pipe: Connection,
    functional: OrbitalFree,
    own: Sequence[Molecule],
    every: Sequence[Molecule],
    config: OrbitalFreeTraining,
) -> None:
    """Answer until the other end closes, or is gone."""
    import signal
    import warnings

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the asking process' to handle
    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, config.threads))
    share = made(functional, own, every, config)
    with threads(config.threads):
        while True:
            try:
                what, vector = pipe.recv()
            except (EOFError, OSError):
                return
            pipe.send((getattr(share, what)(vector), share.work))
