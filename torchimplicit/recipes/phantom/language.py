"""A DEQ transformer language model, and the cost of a step with every gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from torchimplicit.diagnostics import spectral_radius
from torchimplicit.gradients import Unrolled
from torchimplicit.models import (
    DEQTransformer,
    DEQTransformerConfig,
    ExplicitTransformer,
    deq_transformer_small,
    deq_transformer_wikitext103,
)
from torchimplicit.models.deq_transformer import Injection, LanguageModel, Memory
from torchimplicit.nn import LearnedStart
from torchimplicit.problems import FixedPoint
from torchimplicit.recipes.phantom import language_data as wikitext
from torchimplicit.recipes.phantom.language_data import (
    Segment,
    Stream,
    Text,
    folder_of,
    python_reference,
    read,
    sources,
    tokenizer,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, device, quietly, threads
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, option, positive
from torchimplicit.recipes.runtime.step_cost import StepCost, in_turn, one_step
from torchimplicit.recipes.runtime.task import Metric, Shard, Split, Task, generator, gradient, solver
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.regularizers import consistency, jacobian_frobenius
from torchimplicit.solution import Solution
from torchimplicit.solvers import FixedPointIteration
from torchimplicit.state import detached

# -- settings ----------------------------------------------------------------------------------------------------------


MODEL = {
    "d_model": "width",
    "d_head": "head_width",
    "d_inner": "inner_width",
    "div_val": "cluster_factor",
    "memory": "memory_length",
    "context": "context_length",
    **{name: name for name in ("heads", "cutoffs", "normalization", "dropout", "attention_dropout", "weight_norm")},
}
"""The model's fields, by the names of their options."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A DEQ transformer that predicts the next word of WikiText, or of a text of your own.

    The text is cut into --batch-size contiguous rows, which are read side by side in segments, with a memory of the end
    of the last segment. The memory is cleared where the text starts over and at every validation (every
    --validate-every steps), so that a run resumed there sees what an uninterrupted one does.
    """

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    corpus: Literal["python", "wikitext-2", "wikitext-103"] = "wikitext-2"
    """Text to train on if --data-dir is not given: the language reference that comes with Python, or a part of
    Wikipedia, which is downloaded."""

    data_dir: Path | None = None
    """Your own text: a file, or a folder with WikiText's files (word-level or raw), with train.txt, valid.txt and
    test.txt, or with any text files. A text without such splits is cut into 90, 5 and 5 percent."""

    tokenizer: str = "words"
    """words: split at spaces. characters. Or a Python file that defines 'tokenize(line)'."""

    vocabulary: int | None = 10000
    """Number of words to keep, the most frequent ones; all others become <unk>. Perplexities are comparable only for
    the same vocabulary."""

    segment_length: int = 64
    """Tokens per segment, for each sequence of the batch."""

    memory_length: int = 32
    """Number of past positions that a segment may attend to."""

    context_length: int = 256
    """Largest number of positions of a segment and its memory together."""

    validation_tokens: int | None = None
    """Number of tokens to validate on, from the beginning of the validation text. Default: all."""

    test_tokens: int | None = None
    """Number of tokens to test on, from the beginning of the test text. Default: all."""

    normalization: Literal["post", "pre"] = "post"
    """Position of the layer normalizations: after (post) or before (pre) the sublayers."""

    width: int = 128
    """Width of the state, in features per token."""

    heads: int = 4
    """Number of attention heads."""

    head_width: int = 32
    """Features per attention head."""

    inner_width: int = 512
    """Width of the feed-forward layer."""

    cutoffs: tuple[int, ...] = (2000,)
    """Word ranks at which the vocabulary's clusters begin (adaptive softmax and embedding). Those beyond the vocabulary
    are left out."""

    cluster_factor: int = 2
    """Factor by which the embeddings of each further cluster are narrower."""

    dropout: float = 0.0
    """Dropout probability, with one mask per segment."""

    attention_dropout: float = 0.0
    """Dropout probability of the attention weights, with one mask per segment."""

    weight_norm: bool = False
    """Apply weight normalization in the layer."""

    architecture: Literal["equilibrium", "looped", "stack"] = "equilibrium"
    """equilibrium: the fixed point of one layer. looped: the layer applied --depth times. stack: --depth layers with
    weights of their own. The latter two are differentiated through all their applications, whatever --gradient is."""

    depth: int = 8
    """Number of applications or layers of an explicit --architecture."""

    learned_start: bool = False
    """Begin the solves at a state that a small network predicts from the words, trained on the solutions."""

    consistency_weight: float = 0.0
    """Weight of the consistency loss, which asks the layer to reach the fixed point from the solver's iterates in one
    step."""

    def __post_init__(self) -> None:
        positive(self, "segment_length", "context_length", "validation_tokens", "test_tokens", "depth")
        not_negative(self, "memory_length", "consistency_weight")
        if self.architecture != "equilibrium":
            solved = {
                "--learned-start": self.learned_start,
                "--consistency-weight": self.consistency_weight,
                "--pretrain-steps": self.equilibria.pretrain_steps,
                "--evaluation-steps": self.equilibria.evaluation_steps,
                "--jacobian-weight": self.equilibria.jacobian_weight and self.architecture == "stack",
            }
            for name in (name for name, value in solved.items() if value):
                raise UserError(f"{name} has no effect on an explicit model: leave it out, or --architecture")
        if self.segment_length + self.memory_length > self.context_length:
            raise UserError(
                f"{option('segment_length')} {self.segment_length} and {option('memory_length')} {self.memory_length} "
                f"are together longer than {option('context_length')} {self.context_length}"
            )
        self.model(self.vocabulary or 10**6)

    def model(self, vocabulary: int) -> DEQTransformerConfig:
        """The model for a vocabulary of this size."""
        try:
            settings: dict[str, Any] = {theirs: getattr(self, ours) for theirs, ours in MODEL.items()}
            settings["cutoffs"] = tuple(rank for rank in self.cutoffs if rank < vocabulary)
            return DEQTransformerConfig(vocabulary=vocabulary, **settings)
        except (ValueError, TypeError) as error:
            raise UserError(f"there is no such model: {error}") from None


def python() -> LanguageConfig:
    """The characters of Python's language reference: minutes on one core, without a download."""
    return _with_model(
        replace(deq_transformer_small(), memory=64, cutoffs=()),
        vocabulary=None,
        corpus="python",
        tokenizer="characters",
        segment_length=64,
        optimization=Optimization(
            steps=800, batch_size=16, learning_rate=2e-3, warmup_steps=50, clip_norm=1.0, validate_every=100
        ),
        equilibria=Equilibria(phantom_damping=0.8),
    )


def wikitext2() -> LanguageConfig:
    """WikiText-2: minutes on one core."""
    return _with_model(
        deq_transformer_small(),
        corpus="wikitext-2",
        segment_length=64,
        validation_tokens=20000,
        optimization=Optimization(
            steps=800, batch_size=8, learning_rate=2e-3, warmup_steps=50, clip_norm=1.0, validate_every=100
        ),
        equilibria=Equilibria(phantom_damping=0.8),
    )


def wikitext103(normalization: Literal["post", "pre"] = "post") -> LanguageConfig:
    """The settings of Bai et al. (2019, 2021) and Geng et al. (2021), for GPUs.

    Their backward solver is Broyden with 35 steps, ours GMRES with as many. PreLN goes with Jacobian regularization and
    14 steps each way.
    """
    pre = normalization == "pre"
    return _with_model(
        deq_transformer_wikitext103(normalization=normalization),
        corpus="wikitext-103",
        vocabulary=None,
        segment_length=150,
        optimization=Optimization(
            steps=300_000, batch_size=56, learning_rate=2.5e-4, warmup_steps=16_000, clip_norm=0.25, validate_every=5000
        ),
        equilibria=Equilibria(
            solver_steps=14 if pre else 30,
            backward_steps=14 if pre else 35,
            phantom_damping=0.8,
            pretrain_steps=32_000,
            pretrain_depth=2,
            jacobian_weight=2.0 if pre else 0.0,
            jacobian_probability=0.4 if pre else 1.0,
        ),
    )


def _with_model(model: DEQTransformerConfig, vocabulary: int | None = 10000, **settings: Any) -> LanguageConfig:
    sizes: dict[str, Any] = {ours: getattr(model, theirs) for theirs, ours in MODEL.items()}
    return LanguageConfig(vocabulary=vocabulary, **sizes, **settings)


# -- the model, its data, and what is asked of it ---------------------------------------------------------------------


_ARCHIVES = {"wikitext-2": wikitext.WIKITEXT2, "wikitext-103": wikitext.WIKITEXT103}

VOCABULARY = "vocabulary.json"
"""File of a run with its words, in the order of their numbers."""


def place(config: LanguageConfig) -> Path:
    """The text's file or folder.

    Raises:
        UserError: it cannot be downloaded or written.
    """
    if config.data_dir is not None:
        return config.data_dir
    return python_reference() if config.corpus == "python" else folder_of(_ARCHIVES[config.corpus])


def made(config: LanguageConfig, vocabulary: int) -> LanguageModel:
    """The model of the settings, with initial weights."""
    sizes = config.model(vocabulary)
    if config.architecture == "stack":
        return ExplicitTransformer(sizes, config.depth)
    if config.architecture == "looped":
        return DEQTransformer(sizes, solver=FixedPointIteration(steps=config.depth), gradient=Unrolled())
    chosen = replace(solver(config.equilibria), keep_trajectory=bool(config.consistency_weight))
    start = LearnedStart(StartNetwork(sizes)) if config.learned_start else None
    return DEQTransformer(sizes, solver=chosen, gradient=gradient(config.equilibria), start=start)


class StartNetwork(nn.Module):
    """Predicts a token's state from its injection and those of the tokens before it.

    A causal convolution over four tokens and a linear map, normalized as the layer's output is.
    """

    def __init__(self, config: DEQTransformerConfig):
        super().__init__()
        self.mixed = nn.Conv1d(config.heads * 3 * config.d_head, config.d_model, 4)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Injection) -> Tensor:
        before = functional.pad(x.tokens.mT, (3, 0))
        z = self.out(functional.relu(self.mixed(before)).mT)
        return functional.layer_norm(z, z.shape[-1:])


class LanguageTask(Task):
    """Next-word prediction. With several processes, each reads its own rows of the text.

    Args:
        config: settings; the text is read here.
        words: the vocabulary, for a model that is used without its text.

    Raises:
        UserError: no such text, or too little of it.
    """

    metric = Metric("perplexity", "", "min")

    def __init__(self, config: LanguageConfig, words: Sequence[str] | None = None):
        super().__init__()
        self.config = config
        self.words = self._read() if words is None else words
        self.model = made(config, len(self.words))
        self.memory: Memory | None = None

    def _read(self) -> Sequence[str]:
        """Read the text, and return its vocabulary."""
        config = self.config
        corpus = read(place(config), config.vocabulary, tokenizer(config.tokenizer))
        self.unknown = corpus.unknown
        rows, length = config.optimization.batch_size, config.segment_length
        self.training_stream = Stream(corpus.train, rows, length)
        self.held_out = {
            "validation": Stream(_beginning(corpus.valid, config.validation_tokens), rows, length, whole=True),
            "test": Stream(_beginning(corpus.test, config.test_tokens), rows, length, whole=True),
        }
        return corpus.words

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        return self._loader(self.training_stream, steps, shard)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        stream = self.held_out[split]
        return self._loader(stream, range(len(stream)), shard)

    def _loader(self, stream: Stream, steps: range, shard: Shard) -> Iterable[Any]:
        data = _Rows(stream, steps, shard)
        # a generator of its own: a loader without one draws from the global one, which dropout draws from
        order = generator(self.config.optimization.seed, -2)
        return DataLoader(data, batch_size=None, num_workers=self.config.machine.workers, generator=order)

    def begin(self) -> None:
        self.memory = None

    def loss(self, batch: Segment) -> Tensor:
        weight = self.config.consistency_weight
        if not weight and not self.config.learned_start:
            return self._losses(batch).mean()
        layer, seen = equilibrium_of(self).equilibrium, []
        handle = layer.register_solution_hook(lambda _, solution: seen.append(solution))
        total = self._losses(batch).mean()
        handle.remove()
        (solution,) = seen
        if isinstance(layer.start, LearnedStart) and torch.is_grad_enabled():
            total = total + layer.start.loss(solution)
        if weight:
            total = total + weight * consistency(solution.problem, solution, *solution.args)
        return total

    def score(self, batch: Segment) -> Tensor:
        losses = self._losses(batch).double()
        return torch.stack((losses.sum(), losses.new_tensor(losses.numel())))

    def figures(self, sums: list[float]) -> dict[str, float]:
        total, count = sums
        return {"perplexity": math.exp(min(total / count, 700.0)), "loss": total / count}

    def _losses(self, batch: Segment) -> Tensor:
        losses, self.memory = self.model(batch.tokens, batch.targets, None if batch.first else self.memory)
        return losses

    def beside_weights(self) -> dict[str, Any]:
        return {VOCABULARY: {"words": self.words}}

    def describe(self) -> str:
        tokens = self.training_stream.rows.numel()
        return (
            f"{self.config.data_dir or self.config.corpus}: {tokens} tokens for training, a vocabulary of "
            f"{len(self.words)}; <unk> is {100 * self.unknown['valid']:.1f} % of the validation text."
        )


def equilibrium_of(task: LanguageTask) -> DEQTransformer:
    """The model of a task that has a layer to iterate."""
    assert isinstance(task.model, DEQTransformer)
    return task.model


def _beginning(text: Text, tokens: int | None) -> Text:
    return Text(text.tokens[:tokens], text.source)


class _Rows(Dataset[Segment]):
    """The segments of a range of steps, for one process's rows."""

    def __init__(self, stream: Stream, steps: range, shard: Shard):
        self.stream, self.steps, self.shard = stream, steps, shard

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Segment:
        if not 0 <= index < len(self.steps):
            raise IndexError(index)
        tokens, targets, first = self.stream.segment(self.steps[index])
        rows = slice(self.shard.rank, None, self.shard.world)
        return Segment(tokens[rows], targets[rows], first)


def ready(config: LanguageConfig) -> None:
    """Raise :class:`~torchimplicit.recipes.runtime.errors.UserError` if the data is missing."""
    tokenizer(config.tokenizer)
    if config.data_dir is not None:
        sources(config.data_dir)


RUNNER = Trainer(LanguageTask, ready)


# -- What a training step costs, with every estimator at the same trained weights --------------------------------------


CONVERGED = 1e-6
"""Relative tolerance of an exact backward solve that counts as converged."""

UNREACHED = 1e-12
"""A relative tolerance that single precision cannot reach."""

KINDS = {
    "implicit": "implicit",
    "converged": f"implicit, backward to {CONVERGED:g}",
    "phantom": "UPG(5, 0.8)",
    "published": "implicit, as published: 30 steps forward, 35 backward",
    "published-phantom": "UPG(5, 0.8), as published: 30 steps forward",
    "penalty": "the penalty alone",
}
"""Kinds of steps that are timed. The published ones use their whole step budget, as the published runs do (their
absolute tolerances are not reached); the others stop at the recipe's tolerance."""


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Runs of a table to measure."""

    names: tuple[str, ...] = ()
    """Names of the runs beside this one's folder; each is measured at its best weights."""

    runs: tuple[LanguageConfig, ...] = ()
    """Settings of these runs."""

    repeats: int = 8
    """Number of times every kind of step is timed."""


def costs() -> CostConfig:
    """Empty settings: a table fills them in."""
    return CostConfig()


@dataclass(frozen=True)
class Measured:
    """The measurements at one run's weights.

    Attributes:
        costs: by the kind of step.
        radius: spectral radius of the Jacobian at the equilibria of a validation segment, mean over its rows.
    """

    costs: dict[str, dict[str, StepCost]] = field(default_factory=dict)
    radius: dict[str, float] = field(default_factory=dict)


def measured(config: CostConfig, run: Run) -> Measured:
    """All kinds of steps at the weights of all runs, in turn.

    Raises:
        UserError: none of the runs has been trained.
    """
    beside = {name: Run(run.path.parent / name) for name in config.names}
    pairs = zip(beside.items(), config.runs, strict=True)
    probes = {name: _Probe(one, other) for (name, other), one in pairs if other.best.is_file()}
    if not probes:
        raise UserError(f"none of the runs that {run} is to measure has been trained; resume the table")
    steps = {(name, kind): partial(probe.step, kind) for name, probe in probes.items() for kind in KINDS}
    with threads(config.runs[0].machine.threads):
        costs = in_turn(steps, config.repeats)
        radius = {name: probe.radius() for name, probe in probes.items()}
    return Measured({name: {kind: costs[name, kind] for kind in KINDS} for name in probes}, radius)


class _Probe:
    """One trained model and its training batches."""

    def __init__(self, config: LanguageConfig, run: Run):
        self.where = device(config.machine.device)
        self.task: LanguageTask = RUNNER.best(config, run).train()
        self.model = equilibrium_of(self.task)
        exact = replace(config.equilibria, gradient="implicit")
        steps = max(200, exact.backward_steps)
        phantom = replace(exact, gradient="unrolled-phantom")
        budgets = {"solver_steps": 30, "backward_steps": 35, "tolerance": UNREACHED, "backward_tolerance": UNREACHED}
        self.settings: dict[str, Equilibria] = {
            "implicit": exact,
            "converged": replace(exact, backward_tolerance=CONVERGED, backward_steps=steps),
            "phantom": phantom,
            "published": replace(exact, **budgets),  # type: ignore[arg-type]
            "published-phantom": replace(phantom, **budgets),  # type: ignore[arg-type]
            "penalty": exact,
        }
        self.batches = (
            Segment(tokens.to(self.where), targets.to(self.where), first)
            for _ in repeat(None)
            for tokens, targets, first in self.task.training_stream
        )
        self.batch, self.memory = next(self.batches), self.task.memory

    @torch.no_grad()
    def radius(self) -> float:
        """See :class:`Measured`. Uses the second segment, which has a memory, as nearly all do."""
        task, model = self.task.eval(), self.model
        first, second = (task.held_out["validation"].segment(step) for step in range(2))
        _, memory = model(first.tokens.to(self.where), first.targets.to(self.where))
        x, _ = model.cell.injection(model.embedding(second.tokens.to(self.where)), memory)
        radius = spectral_radius(FixedPoint(model.cell), model.equilibrium(x), x, subspace=32, restarts=2)
        task.train()
        return float(radius.mean())

    def step(self, kind: str) -> StepCost:
        """The cost of one step. Every kind sees the same batch and memory, which advance when the first kind is due
        again."""
        task, layer = self.task, self.model.equilibrium
        if kind == next(iter(KINDS)):
            self.batch, self.memory = next(self.batches), task.memory
        settings = self.settings[kind]
        task.memory, layer.solver, layer.gradient = self.memory, solver(settings), gradient(settings)
        with quietly():
            if kind != "penalty":
                return one_step(task, lambda: task.loss(self.batch), self.where)
            seen: list[Solution] = []
            handle = layer.register_solution_hook(lambda _, solution: seen.append(solution))
            task.loss(self.batch)
            handle.remove()
            z, problem, args = detached(seen[-1].value), seen[-1].problem, seen[-1].args
            cost = one_step(task, lambda: jacobian_frobenius(problem, z, *args), self.where)  # alone: what it adds
            return replace(cost, forward=1.0, backward=1.0)


def costs_ready(config: CostConfig) -> None:
    """Raise if the first of the runs could not be run."""
    for one in config.runs[:1]:
        RUNNER.check(one)


COSTS = Measuring(measure=measured, name="results.json", ready=costs_ready)
