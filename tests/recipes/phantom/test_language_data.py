"""WikiText's files, numbered and cut into segments; on made-up text."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchimplicit.recipes.phantom import language_data as wikitext
from torchimplicit.recipes.phantom.language_data import Stream, Text, read, tokenizer
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download

TRAIN = " \n = A cat = \n the cat sat on the mat \n the <unk> sat \n"
VALID = " the cat ran \n"
TEST = " a mat \n the dog \n"


def write(folder: Path, train: str | bytes = TRAIN) -> Path:
    folder.mkdir(exist_ok=True)
    for split, content in (("train", train), ("valid", VALID), ("test", TEST)):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / f"wiki.{split}.tokens").write_bytes(data)
    return folder


def words(corpus, text) -> list[str]:
    return [corpus.words[number] for number in text.tokens.tolist()]


def numbers(count: int) -> Text:
    return Text(torch.arange(count, dtype=torch.int32), Path("made-up.tokens"))


def test_every_line_ends_in_eos_and_strange_words_are_unk(tmp_path):
    corpus = read(write(tmp_path))
    assert words(corpus, corpus.train) == [*TRAIN.replace("\n", "<eos>").split()]
    assert words(corpus, corpus.valid) == ["the", "cat", "<unk>", "<eos>"]
    assert words(corpus, corpus.test) == ["<unk>", "mat", "<eos>", "the", "<unk>", "<eos>"]
    assert corpus.unknown == {"train": 1 / 17, "valid": 1 / 4, "test": 2 / 6}


def test_frequent_words_come_first(tmp_path):
    corpus = read(write(tmp_path))
    assert corpus.words[:2] == ("<eos>", "the")  # 4 and 3 times
    assert set(corpus.words[2:5]) == {"=", "cat", "sat"}  # twice
    assert len(set(corpus.words)) == len(corpus.words) == 9


def test_a_capped_vocabulary_keeps_the_most_frequent(tmp_path):
    corpus = read(write(tmp_path), vocabulary=4)
    assert len(corpus.words) == 4
    assert corpus.words[0] == "<unk>"  # 8 of 17, with those that were cut
    assert set(corpus.words[1:]) == {"<eos>", "the", "="}
    assert words(corpus, corpus.valid) == ["the", "<unk>", "<unk>", "<eos>"]
    assert corpus.unknown["train"] == 8 / 17
    assert read(write(tmp_path), vocabulary=100).words == read(write(tmp_path)).words


def test_lines_end_at_line_feeds_only(tmp_path):
    corpus = read(write(tmp_path, train="a b\x85c\u2028d \n e \n"))
    assert words(corpus, corpus.train) == ["a", "b", "c", "d", "<eos>", "e", "<eos>"]


def test_segments_follow_each_other_in_every_row():
    stream = Stream(numbers(25), batch=2, length=5)
    assert len(stream) == 2
    tokens, targets, first = stream.segment(0)
    assert tokens.tolist() == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16]]
    assert torch.equal(targets, tokens + 1)
    assert tokens.dtype == targets.dtype == torch.int64
    assert first
    later = stream.segment(1)
    assert later.tokens[:, 0].tolist() == [5, 17]
    assert not later.first


def test_a_segment_depends_on_its_step_alone():
    stream = Stream(numbers(25), batch=2, length=5)
    forward = [stream.segment(step).tokens for step in range(6)]
    backward = [stream.segment(step).tokens for step in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert torch.equal(forward[4], forward[0])
    assert stream.segment(4).first


def test_evaluation_reads_every_target_of_its_rows():
    stream = Stream(numbers(25), batch=2, length=5, whole=True)
    assert [s.tokens.shape[1] for s in stream] == [5, 5, 1]
    seen = torch.cat([s.targets for s in stream], dim=1)
    assert seen.tolist() == [list(range(1, 12)), list(range(13, 24))]
    assert Stream(numbers(25), batch=1, length=24, whole=True).count == 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_text_too_short_for_its_batch_names_the_file(whole):
    with pytest.raises(UserError, match=r"made-up\.tokens has 11 tokens, and 6 rows"):
        Stream(numbers(11), batch=6, length=3, whole=whole)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds picture\.png, and no text files"):
        read(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    (write(tmp_path) / "wiki.valid.tokens").unlink()
    with pytest.raises(
        UserError, match=r"wiki\.train\.tokens, wiki\.test\.tokens and nothing for valid: give wiki\.valid"
    ):
        read(tmp_path)


LINES = [f"line {number} of a text" for number in range(40)]


@pytest.mark.parametrize("how", ["file", "folder", "raw", "named"])
def test_texts_of_ones_own(tmp_path, how):
    if how == "file":
        place = tmp_path / "text.txt"
        place.write_text("\n".join(LINES), encoding="utf-8")
    elif how == "folder":
        place = tmp_path
        for part, lines in (("a.txt", LINES[:30]), ("b.txt", LINES[30:])):
            (place / part).write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        place = tmp_path
        form = "wiki.{}.raw" if how == "raw" else "{}.txt"
        names = zip(
            ("train", "valid" if how == "raw" else "validation", "test"), (0, 36, 38), (36, 38, 40), strict=True
        )
        for name, first, last in names:
            (place / form.format(name)).write_text("\n".join(LINES[first:last]), encoding="utf-8")
    corpus = read(place)
    assert words(corpus, corpus.train)[:6] == ["line", "0", "of", "a", "text", "<eos>"]
    assert [len(split.tokens) for split in (corpus.train, corpus.valid, corpus.test)] == [36 * 6, 2 * 6, 2 * 6]
    assert words(corpus, corpus.test).count("<unk>") == 2  # numbers that training has not seen


def test_tokenizers_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text("def tokenize(line):\n    return line.split('l')\n", encoding="utf-8")
    place = tmp_path / "text.txt"
    place.write_text("\n".join(LINES), encoding="utf-8")
    found = read(place, tokenize=tokenizer(str(tmp_path / "own.py")))
    assert words(found, found.train)[:3] == ["", "ine 0 of a text", "<eos>"]
    assert words(found := read(place, tokenize=tokenizer("characters")), found.train)[:5] == list("line ")
    (tmp_path / "own.py").write_text("x = 1", encoding="utf-8")
    for chosen, match in ((str(tmp_path / "own.py"), "must define a function 'tokenize'"), ("bpe", "it is 'bpe'")):
        with pytest.raises(UserError, match=match):
            tokenizer(chosen)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no words"),
        (b" \n \n", "has no words"),
        (b"PK\x03\x04\x00\x00", "zero bytes"),
        (b"\xff\xfe\x41", "no UTF-8 text"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, complaint):
    with pytest.raises(UserError, match=rf"wiki\.train\.tokens.*{complaint}"):
        read(write(tmp_path, train=content))


def test_a_vocabulary_needs_room():
    with pytest.raises(UserError, match="3 or more"):
        read(Path("anywhere"), vocabulary=2)


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Download:
    """A made-up one, at a file address, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "made-up.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for file in write(tmp_path / "text").iterdir():
            packed.write(file, f"wikitext-9/{file.name}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Download(name="wikitext-9-v1.zip", url=path.as_uri(), sha256=digest)


def test_it_is_downloaded_once(archive, tmp_path):
    folder = wikitext.folder_of(archive)
    assert folder == tmp_path / "cache" / "torchimplicit" / "wikitext-9"
    assert read(folder).words == read(tmp_path / "text").words
    assert not list(folder.glob("*.part"))
    (tmp_path / "made-up.zip").unlink()
    assert wikitext.folder_of(archive) == folder


def test_a_download_with_another_checksum_is_refused(archive, tmp_path):
    with pytest.raises(UserError, match="SHA-256"):
        wikitext.folder_of(replace(archive, sha256="0" * 64))
    assert not list((tmp_path / "cache").rglob("*.tokens"))


def test_a_damaged_archive_is_named(archive, tmp_path):
    path = tmp_path / "made-up.zip"
    path.write_bytes(path.read_bytes()[:100])
    damaged = replace(archive, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"wikitext-9-v1\.zip is no zip file"):
        wikitext.folder_of(damaged)


def test_another_archive_is_named(archive, tmp_path):
    path = tmp_path / "made-up.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("readme", "nothing here")
    other = replace(archive, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"holds no wiki\.train\.tokens"):
        wikitext.folder_of(other)
