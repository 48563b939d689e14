"""Tokenized texts, cut into segments."""

from __future__ import annotations

import runpy
import shutil
import sys
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, replacing, unchanged, write_text

# -- Texts in the cache: WikiText, which is downloaded, and the language reference that comes with Python --------------


_PLACE = "https://s3.amazonaws.com/research.metamind.io/wikitext"

WIKITEXT2 = Download(
    name="wikitext-2-v1.zip",
    url=f"{_PLACE}/wikitext-2-v1.zip",
    sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
)
WIKITEXT103 = Download(
    name="wikitext-103-v1.zip",
    url=f"{_PLACE}/wikitext-103-v1.zip",
    sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
)
"""Word-level, as published by Merity et al. (2016, arXiv 1609.07843)."""


def python_reference() -> Path:
    """The text that ``help()`` shows of Python's syntax, about 370,000 characters, as a file in the cache.

    Every version of Python has its own; the file is named after it. A paragraph that several topics share is there
    once, so that held-out text is new.

    Raises:
        UserError: it cannot be written.
    """
    from pydoc_data.topics import topics

    version = ".".join(map(str, sys.version_info[:2]))
    path = cache_folder("python-reference") / f"python-{version}.txt"
    paragraphs = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs)) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder") from None
    return path


def folder_of(archive: Download) -> Path:
    """The folder in the cache with the three files, into which the archive is fetched and unpacked.

    Raises:
        UserError: the archive cannot be downloaded, or is not what was published.
    """
    folder = cache_folder(archive.name.removesuffix("-v1.zip"))
    if not all((folder / file_name(split)).is_file() for split in SPLITS):
        _unpack(fetch(archive, folder), folder)
    unchanged(folder, [file_name(split) for split in SPLITS])
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    again = "delete it, and it is downloaded again; or give a folder of your own with --data-dir"
    try:
        with zipfile.ZipFile(archive) as unpacked:
            for split in SPLITS:
                name = file_name(split)
                member = next((m for m in unpacked.namelist() if m.rsplit("/", 1)[-1] == name), None)
                if member is None:
                    raise UserError(f"{archive} holds no {name}: it is another archive; {again}")
                with replacing(folder / name) as part, unpacked.open(member) as inside, part.open("wb") as file:
                    shutil.copyfileobj(inside, file)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive} is no zip file, or is damaged ({error}): {again}") from None
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked to {folder} ({error.strerror})") from None


# -- A text as numbered words, and the segments that a language model is trained and tested on -------------------------
#
# WikiText is three files, ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens``: words separated by
# spaces, lines by line feeds (Merity et al. 2016, arXiv 1609.07843). Every line ends in ``<eos>``.


SPLITS = ("train", "valid", "test")
LONGEST_LINE = 1 << 24
UNKNOWN, END = "<unk>", "<eos>"


class Text(NamedTuple):
    """One split: int32 ``[tokens]``, and the file that it comes from, for messages."""

    tokens: Tensor
    source: Path


@final
@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The three splits, numbered by one vocabulary.

    Attributes:
        train, valid, test: the splits.
        words: the vocabulary, the most frequent word in train first.
        unknown: the share of ``<unk>`` in each split. Perplexities are with it: the larger the share, the lower they
            are, so that they compare at one vocabulary only.
    """

    train: Text
    valid: Text
    test: Text
    words: tuple[str, ...]
    unknown: dict[str, float]


class Segment(NamedTuple):
    """A segment of a stream.

    Attributes:
        tokens, targets: int64 ``[batch, length]``; a target is the token that comes next.
        first: whether the text begins anew here, so that there is no memory.
    """

    tokens: Tensor
    targets: Tensor
    first: bool


@final
class Stream:
    """A text cut into ``batch`` rows that are read side by side, in segments of ``length`` tokens.

    Segment i depends on i alone, so that a run can go on at any step; it goes round and round through the text. Tokens
    that do not fill a row, fewer than ``batch``, are left out.

    Args:
        text: to be read.
        batch: how many rows.
        length: length of a segment.
        whole: whether a shorter segment at the end counts, as in evaluation; otherwise it is left out, so that all have
            one shape.

    Raises:
        UserError: the text is too short for one segment.
    """

    def __init__(self, text: Text, batch: int, length: int, whole: bool = False):
        row = len(text.tokens) // batch
        least = 2 if whole else length + 1
        if row < least:
            raise UserError(
                f"{text.source} has {len(text.tokens)} tokens, and {batch} rows need {least * batch} at least: is it "
                "cut off? Otherwise take a smaller batch or shorter segments"
            )
        self.rows = text.tokens[: row * batch].view(batch, row)
        self.length = length
        self.count = -(-(row - 1) // length) if whole else (row - 1) // length

    def __len__(self) -> int:
        """Segments in one round."""
        return self.count

    def segment(self, step: int) -> Segment:
        """The segment of a step, counted from 0 over all passes."""
        place = step % self.count
        low = place * self.length
        high = min(low + self.length, self.rows.shape[1] - 1)
        return Segment(self.rows[:, low:high].long(), self.rows[:, low + 1 : high + 1].long(), place == 0)

    def __iter__(self) -> Iterator[Segment]:
        return (self.segment(step) for step in range(self.count))


class Source(NamedTuple):
    """The files of a split.

    Attributes:
        paths: the files, one after another.
        share: from which to which of their lines, as shares of all.
    """

    paths: tuple[Path, ...]
    share: tuple[float, float] = (0.0, 1.0)


Tokenize = Callable[[str], list[str]]
"""A function from a line without its end to its tokens."""

SHARES = {"train": (0.0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1.0)}
"""Shares of the lines for training, validation and test, for a text without splits of its own."""

NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
"""Names that the splits' files may have, after an optional ``wiki.`` and before ``.tokens``, ``.raw`` or ``.txt``."""


def sources(place: Path) -> dict[str, Source]:
    """The splits of your own text: a file; a folder with a file per split (WikiText's, or ``train.txt`` and so on); or
    a folder of text files, in the order of their names.

    Raises:
        UserError: there is no text.
    """
    if place.is_file():
        return {split: Source((place,), share) for split, share in SHARES.items()}
    if not place.is_dir():
        raise UserError(f"{place} does not exist: --data-dir must be a text file, or a folder with texts")
    files = {split: _split_file(place, split) for split in SPLITS}
    if all(files.values()):
        return {split: Source((path,)) for split, path in files.items() if path is not None}
    if any(files.values()):
        missing = [split for split, path in files.items() if path is None]
        there = ", ".join(path.name for path in files.values() if path is not None)
        raise UserError(
            f"{place} holds {there} and nothing for {' and '.join(missing)}: give {file_name(missing[0])}, or "
            f"{missing[0]}.txt, or one text file that is split here"
        )
    texts = tuple(sorted(path for path in place.iterdir() if path.suffix.lower() in (".txt", ".tokens", ".raw", ".md")))
    if not texts:
        names = sorted(path.name for path in place.iterdir())
        there = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "") if names else "nothing"
        raise UserError(f"{place} holds {there}, and no text files (*.txt)")
    return {split: Source(texts, share) for split, share in SHARES.items()}


def _split_file(folder: Path, split: str) -> Path | None:
    names = (
        f"{begin}{name}{end}" for begin in ("wiki.", "") for name in NAMES[split] for end in (".tokens", ".raw", ".txt")
    )
    return next((folder / name for name in names if (folder / name).is_file()), None)


def tokenizer(chosen: str) -> Tokenize:
    """The function that splits a line into tokens.

    Args:
        chosen: ``words``, at spaces; ``characters``; or a Python file that defines ``tokenize(line)``.

    Raises:
        UserError: it is none of these, or the file defines no such function.
    """
    if chosen == "words":
        return str.split
    if chosen == "characters":
        return list
    tokenize = _defined(chosen, "tokenize")
    if tokenize is None:
        raise UserError(f"{chosen} must define a function 'tokenize', of a line to a list of strings")
    return tokenize


def joining(chosen: str) -> Callable[[Iterable[str]], str]:
    """The function that makes a line of its tokens: the reverse of :func:`tokenizer`.

    A Python file may define ``join(tokens)``; otherwise its tokens are joined by spaces, as words are.
    """
    if chosen == "characters":
        return "".join
    return " ".join if chosen == "words" else _defined(chosen, "join") or " ".join


def _defined(chosen: str, name: str) -> Callable[[Any], Any] | None:
    """The function that a tokenizer's file defines by this name, if any."""
    path = Path(chosen)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            "--tokenizer must be words, characters, or a Python file that defines 'tokenize(line)', and it is "
            f"'{chosen}'"
        )
    try:
        function = runpy.run_path(str(path)).get(name)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    return function if callable(function) else None


def read(splits: Path | Mapping[str, Source], vocabulary: int | None = None, tokenize: Tokenize = str.split) -> Corpus:
    """Read a corpus.

    Args:
        splits: where they are read, or a place as :func:`sources` takes it.
        vocabulary: how many words are told apart, ``<unk>`` and ``<eos>`` among them: the most frequent of train;
            ``None``: all. Words that train does not have are ``<unk>`` in any case.
        tokenize: cuts lines into words.

    Raises:
        UserError: a missing folder or file, one that is empty or no text, or a vocabulary that cannot be.
    """
    if vocabulary is not None and vocabulary < 3:
        raise UserError(
            f"a vocabulary of {vocabulary} has no room for a word beside {UNKNOWN} and {END}: give 3 or more"
        )
    splits = sources(splits) if isinstance(splits, Path) else splits
    words = _vocabulary(splits["train"], vocabulary, tokenize)
    numbers = {word: number for number, word in enumerate(words)}
    texts = {split: _numbered(splits[split], numbers, tokenize) for split in SPLITS}
    unknown = {
        split: float((text.tokens == numbers[UNKNOWN]).sum()) / len(text.tokens) for split, text in texts.items()
    }
    return Corpus(**texts, words=words, unknown=unknown)


def file_name(split: str) -> str:
    """File name of a WikiText split."""
    return f"wiki.{split}.tokens"


def _vocabulary(source: Source, size: int | None, tokenize: Tokenize) -> tuple[str, ...]:
    """Words by decreasing frequency; ties are ordered by first occurrence."""
    counts: Counter[str] = Counter({UNKNOWN: 0, END: 0})
    for line in _lines(source, tokenize):
        counts.update(line)
    if size is not None and len(counts) > size:
        rare = [word for word, _ in counts.most_common() if word not in (UNKNOWN, END)][size - 2 :]
        counts[UNKNOWN] += sum(counts.pop(word) for word in rare)
    return tuple(word for word, _ in counts.most_common())


def _numbered(source: Source, numbers: dict[str, int], tokenize: Tokenize) -> Text:
    unknown = numbers[UNKNOWN]
    encoded = array("i")
    for line in _lines(source, tokenize):
        encoded.extend([numbers.get(word, unknown) for word in line])
    return Text(torch.frombuffer(encoded, dtype=torch.int32).clone(), source.paths[0])


def _lines(source: Source, tokenize: Tokenize) -> Iterator[list[str]]:
    """The words of each line, with ``<eos>``; raises if the file is not text."""
    first, last = 0, None
    if source.share != (0.0, 1.0):
        total = sum(1 for _ in _texts(source.paths))
        first, last = (round(share * total) for share in source.share)
    count = 0
    for text in islice(_texts(source.paths), first, last):
        words = tokenize(text.rstrip("\r\n"))
        count += len(words)
        yield [*words, END]
    if not count:
        where = "" if last is None else f" among its lines {first + 1} to {last}, which are one of its three parts"
        raise UserError(f"{source.paths[0]} has no words{where}: it is empty, or cut off, or too short to be split")


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="\n") as file:
                for line in iter(partial(file.readline, LONGEST_LINE), ""):
                    if len(line) == LONGEST_LINE and not line.endswith("\n"):
                        raise UserError(f"{path} has a line of more than {LONGEST_LINE} characters: it is no such text")
                    if "\0" in line:
                        raise UserError(f"{path} holds zero bytes: it is not text")
                    yield line
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): give a text, unpacked"
            ) from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
