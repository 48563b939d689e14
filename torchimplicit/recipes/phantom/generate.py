"""``torchimplicit generate``: continues a text with a trained language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from torchimplicit.models.deq_transformer import generate
from torchimplicit.recipes.phantom.language import VOCABULARY, LanguageConfig, LanguageTask
from torchimplicit.recipes.phantom.language_data import END, UNKNOWN, joining, tokenizer
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.execution import opened
from torchimplicit.recipes.runtime.run import quietly, threads
from torchimplicit.recipes.runtime.settings import positive
from torchimplicit.recipes.runtime.trainer import Trainer


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained language model (torchimplicit train language-python, or one of your own text)."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """Directory of a language run."""

    prompt: str = "\n"
    """The beginning of the text. Default: a new line."""

    tokens: int = 400
    """Number of tokens to add: words or characters, as in training."""

    temperature: float = 0.8
    """Divides the log-probabilities before a token is drawn. 1: the model's own distribution. 0: always the most
    probable token."""

    top: int | None = None
    """Draw among this many most probable tokens only. Default: among all."""

    samples: int = 1
    """Number of continuations."""

    seed: int = 0
    """Random seed of the draws."""

    def __post_init__(self) -> None:
        positive(self, "tokens", "top", "samples")
        if not self.temperature >= 0:
            raise UserError(f"--temperature {self.temperature} must not be negative")

    def run(self, console: Console) -> int:
        run, runner, settings = opened(self.path)
        if not isinstance(settings, LanguageConfig):
            raise UserError(f"{run} is no language model: generate takes a run of a recipe named language-...")
        if not (run.path / VOCABULARY).is_file():  # a run of an earlier version
            runner.check(settings)
            words: Sequence[str] = LanguageTask(settings).words
        else:
            words = run.read_json(VOCABULARY)["words"]
        numbers = {word: number for number, word in enumerate(words)}
        prompt = _tokens(self.prompt, settings.tokenizer)
        strange = sorted({token for token in prompt if token not in numbers})
        if strange:
            console.print(f"Not in the vocabulary, read as {UNKNOWN}: {' '.join(strange)}", markup=False)
        numbered = torch.tensor([[numbers.get(token, numbers[UNKNOWN]) for token in prompt]])
        with threads(settings.machine.threads), quietly(), console.status("Writing"):
            task: LanguageTask = Trainer(partial(LanguageTask, words=words)).best(settings, run)
            where = next(task.parameters()).device
            found = generate(
                task.model,
                numbered.expand(self.samples, -1).to(where),
                self.tokens,
                temperature=self.temperature,
                top=self.top,
                exclude=(numbers[UNKNOWN],),
                generator=torch.Generator(where).manual_seed(self.seed),
                cache=settings.architecture != "looped",
            )
        for row in found.tokens.tolist():
            text = _text([*prompt, *(words[number] for number in row[len(prompt) :])], settings.tokenizer)
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            console.rule()
        surprise = -float(found.log_probabilities.mean())
        console.print(
            f"{found.evaluations:.1f} evaluations of a layer for each token; mean surprise {surprise:.2f} nats",
            highlight=False,
        )
        return 0


def _tokens(text: str, chosen: str) -> list[str]:
    """The tokens of a text, with an end between its lines and none after the last."""
    tokenize = tokenizer(chosen)
    lines = [tokenize(line) for line in text.split("\n")]
    return [token for line in lines for token in (*line, END)][:-1] or [END]


def _text(tokens: Sequence[str], chosen: str) -> str:
    """The text of tokens, a line for each end."""
    join = joining(chosen)
    ends = [place for place, token in enumerate(tokens) if token == END]
    pieces = pairwise([-1, *ends, len(tokens)])
    return "\n".join(join(tokens[before + 1 : after]) for before, after in pieces)
