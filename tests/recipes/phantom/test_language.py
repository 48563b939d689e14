"""The language recipes, on made-up text."""

from __future__ import annotations

import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

import made_up_text
from rich.console import Console
from running import assert_resumes

from torchimplicit import cli
from torchimplicit.models import deq_transformer_wikitext103
from torchimplicit.recipes import registry
from torchimplicit.recipes.phantom.language import (
    RUNNER,
    LanguageConfig,
    LanguageTask,
    place,
    python,
    wikitext2,
    wikitext103,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import RunOptions, create
from torchimplicit.recipes.runtime.settings import Machine, from_plain, to_plain
from torchimplicit.recipes.runtime.task import Shard
from torchimplicit.recipes.runtime.trainer import Results

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path) -> Path:
    return made_up_text.write(tmp_path / "text")


def small(config: LanguageConfig, text: Path, **optimization) -> LanguageConfig:
    """The recipe with few steps, and a model that is narrow where the recipe's is wide."""
    return replace(
        config,
        data_dir=text,
        **made_up_text.NARROW,
        cutoffs=(6,) if config.corpus == "wikitext-2" else (6, 12, 20),
        cluster_factor=2,
        optimization=replace(
            config.optimization, **{"steps": 2, "batch_size": 4, "validate_every": 1, "warmup_steps": 0} | optimization
        ),
        machine=Machine(device="cpu", tensorboard=False),
    )


def train(config: LanguageConfig, path: Path) -> Results:
    RUNNER.check(config)
    run = create("language-wikitext2", RunOptions(output=path))
    run.describe("language-wikitext2", config)
    assert RUNNER.train(config, run, Console(quiet=True))
    return Results.of(run)


@pytest.mark.parametrize("recipe", [wikitext2, wikitext103])
def test_a_recipe_trains(recipe, text, tmp_path):
    results = train(small(recipe(), text), tmp_path / "run")
    assert results.state == "complete"
    assert results.metric == "perplexity"
    assert results.best is not None
    assert results.best.figures["perplexity"] == min(v.figures["perplexity"] for v in results.validations)
    assert results.test is not None
    assert results.test.figures["perplexity"] == pytest.approx(math.exp(results.test.figures["loss"]))


def test_it_learns_how_frequent_words_are(text, tmp_path):
    config = small(wikitext2(), text, steps=30, learning_rate=0.02, validate_every=10)
    results = train(config, tmp_path / "run")
    assert results.validations[-1].figures["perplexity"] < 0.7 * 41  # as many words as there are


def test_settings_survive_the_run_directory():
    for config in (wikitext2(), wikitext103(), wikitext103("pre")):
        assert from_plain(LanguageConfig, to_plain(config)) == config


def test_the_published_settings():
    post, pre = wikitext103(), wikitext103("pre")
    assert (post.width, post.inner_width, post.memory_length) == (700, 48000, 150)
    assert (pre.memory_length, pre.equilibria.jacobian_weight, pre.equilibria.solver_steps) == (300, 2.0, 14)
    for config in (post, pre):
        assert config.model(267735) == deq_transformer_wikitext103(normalization=config.normalization)


def test_memory_is_carried_in_order_and_forgotten_at_begin(text):
    task = LanguageTask(small(wikitext2(), text))
    batches = list(task.training_batches(range(3), Shard()))
    task.begin()
    with torch.no_grad():
        first = [float(task.loss(batch)) for batch in batches]
        assert task.memory is not None
        assert task.memory.states.shape == (4, 4, 16)
        again = float(task.loss(batches[1]))
        assert again != first[1], "the third segment's memory is not the first one's"
        task.begin()
        assert task.memory is None
        assert [float(task.loss(batch)) for batch in batches] == first


def test_memory_does_not_cross_the_beginning_of_the_text(text):
    task = LanguageTask(small(wikitext2(), text))
    rounds = len(task.training_stream)
    last, first = task.training_batches(range(rounds - 1, rounds + 1), Shard())
    assert first.first
    with torch.no_grad():
        alone = float(task.loss(first))
        task.loss(last)
        assert float(task.loss(first)) == alone


def test_every_process_reads_its_own_rows(text):
    task = LanguageTask(small(wikitext2(), text))
    whole = list(task.training_batches(range(2), Shard()))
    parts = [list(task.training_batches(range(2), Shard(rank, 2))) for rank in range(2)]
    for step in range(2):
        for rank in range(2):
            assert torch.equal(parts[rank][step].tokens, whole[step].tokens[rank::2])
    sums = []
    with torch.no_grad():
        for shard in (Shard(), Shard(0, 2), Shard(1, 2)):
            task.begin()
            sums.append(sum(task.score(batch) for batch in task.held_out_batches("validation", shard)))
    torch.testing.assert_close(sums[1] + sums[2], sums[0], rtol=1e-3, atol=1e-3)  # the solver's tolerance


def test_a_resumed_run_is_the_undisturbed_one(text, tmp_path):
    config = replace(small(wikitext2(), text), dropout=0.1, attention_dropout=0.1)
    assert_resumes("language-wikitext2", config, tmp_path, steps=6)


def test_a_copy_for_another_process_has_the_weights(text):
    """Parametrized modules cannot be pickled: a spawned process makes the model anew."""
    module = RUNNER.module(small(wikitext103(), text))
    assert module.task.config.weight_norm
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    module.history.steps = 7
    copy = pickle.loads(pickle.dumps(module))
    assert copy.history.steps == 7
    for (name, p), other in zip(module.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(p, other), name


def test_held_out_texts_may_be_shortened(text):
    task = LanguageTask(replace(small(wikitext2(), text), validation_tokens=40, test_tokens=80))
    assert task.held_out["validation"].rows.numel() == 40
    assert task.held_out["test"].rows.numel() == 80


def test_a_vocabulary_smaller_than_the_clusters_has_one(text):
    config = replace(small(wikitext2(), text), tokenizer="characters", vocabulary=None, cutoffs=(2000,))
    assert LanguageTask(config).model.config.cutoffs == ()


def test_the_bundled_text_is_read_without_a_download(text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = replace(small(python(), text, steps=1), data_dir=None, validation_tokens=200, test_tokens=200)
    assert train(config, tmp_path / "run").state == "complete"
    assert '"assert" statement' in place(config).read_text(encoding="utf-8")
    paragraphs = place(config).read_text(encoding="utf-8").split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)


class TestGenerate:
    @pytest.mark.parametrize("architecture", ["equilibrium", "looped", "stack"])
    def test_a_text_goes_on_without_the_data(self, architecture, text, tmp_path, capsys):
        train(replace(small(wikitext2(), text), architecture=architecture, depth=2), tmp_path / "run")
        shutil.rmtree(text)
        command = ["generate", str(tmp_path / "run"), "--prompt", "word1 word2", "--tokens", "5", "--seed", "3"]
        assert cli.main(command) == 0
        first = capsys.readouterr().out
        written, _, rest = first.partition("─")
        assert written.startswith("word1 word2")
        assert len(written.replace("\n", " \n ").split(" ")) >= 5
        assert "<unk>" not in written
        assert "evaluations of a layer for each token" in rest
        assert cli.main(command) == 0
        assert capsys.readouterr().out == first

    def test_characters_and_lines_are_joined_as_they_were_cut(self, text, tmp_path, capsys):
        config = replace(small(wikitext2(), text), tokenizer="characters", vocabulary=None)
        train(config, tmp_path / "run")
        assert cli.main(["generate", str(tmp_path / "run"), "--prompt", "word1\nwo", "--tokens", "3"]) == 0
        assert capsys.readouterr().out.startswith("word1\nwo")

    def test_an_unknown_word_is_named(self, text, tmp_path, capsys):
        train(small(wikitext2(), text), tmp_path / "run")
        assert cli.main(["generate", str(tmp_path / "run"), "--prompt", "word1 nonsense", "--tokens", "2"]) == 0
        assert "Not in the vocabulary, read as <unk>: nonsense" in capsys.readouterr().out

    def test_a_run_of_an_earlier_version_reads_its_text(self, text, tmp_path):
        train(small(wikitext2(), text), tmp_path / "run")
        (tmp_path / "run" / "vocabulary.json").unlink()
        assert cli.main(["generate", str(tmp_path / "run"), "--tokens", "2"]) == 0

    @pytest.mark.parametrize(
        ("words", "message"),
        [(["--tokens", "0"], "--tokens"), (["--temperature", "-1"], "--temperature"), (["--top", "0"], "--top")],
    )
    def test_bad_input(self, words, message, tmp_path, capsys):
        assert cli.main(["generate", str(tmp_path), *words]) == 2
        assert message in capsys.readouterr().err

    def test_another_run_is_refused(self, tmp_path, capsys):
        run = create("digits", RunOptions(output=tmp_path / "run"))
        run.describe("digits", registry.settings("digits"))
        assert cli.main(["generate", str(tmp_path / "run")]) == 2
        assert "is no language model" in capsys.readouterr().err


class TestBadInput:
    def test_no_folder(self, tmp_path, capsys):
        assert cli.main(["train", "language-wikitext2", "--data-dir", str(tmp_path / "nowhere")]) == 2
        assert f"{tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err

    def test_no_file(self, text, capsys):
        (text / "wiki.test.tokens").unlink()
        assert cli.main(["train", "language-wikitext103", "--data-dir", str(text)]) == 2
        assert "nothing for test: give wiki.test.tokens" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [(b"", "has no words"), (b"\x1f\x8b\x08\x00", "zero bytes|UTF-8"), (b"a b c\n", "is it cut off")],
    )
    def test_a_file_that_is_no_text_or_too_short(self, content, complaint, text):
        (text / "wiki.valid.tokens").write_bytes(content)
        with pytest.raises(UserError, match=rf"wiki\.valid\.tokens.*({complaint})"):
            LanguageTask(small(wikitext2(), text))

    def test_a_segment_longer_than_the_context(self, capsys):
        assert cli.main(["train", "language-wikitext2", "--segment-length", "300"]) == 2
        message = capsys.readouterr().err
        assert "--segment-length 300 and --memory-length 32 are together longer than --context-length 256" in message

    def test_a_model_that_cannot_be(self, capsys):
        assert cli.main(["train", "language-wikitext2", "--cutoffs", "9", "9"]) == 2
        assert "rise strictly" in capsys.readouterr().err
