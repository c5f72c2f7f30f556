"""Training SentencePiece models that lose nothing (see tokenizer.py for what that takes)."""

from __future__ import annotations

import hashlib
import heapq
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from data_pipelines.tokenizer import END_OF_TEXT, SPACE_MARK, Tokenizer
from hope_train.errors import UserError

# SentencePiece leaves out longer lines (in bytes), and lines with these characters.
_LINE_BYTES = 4192
_RESERVED = re.compile("[\0\u2581\u2585]+")
# A part of the result for unigram, whose sums run per thread; so a constant, not the machine's number of cores.
_THREADS = 4
_SPECIAL_PIECES = 2


def train_tokenizer(
    texts: Iterable[str],
    out: str | Path,
    vocab_size: int = 32000,
    kind: Literal["bpe", "unigram"] | str = "bpe",
    *,
    split_digits: bool = True,
    character_coverage: float = 0.9995,
    max_bytes: int | None = None,
    seed: int = 0,
    user_symbols: Sequence[str] = (),
) -> Tokenizer:
    """Train a lossless SentencePiece model with byte fallback and write it to `out`, atomically.

    The result depends on the texts, their order and the arguments alone. Texts are read one by one; SentencePiece
    itself holds what it trains on in memory, some 10 to 20 times the text's size.

    Args:
        out: the model file; `.model` is appended where it is missing.
        vocab_size: number of pieces, 258 of them the bytes, the unknown piece and end-of-text.
        split_digits: each digit is a piece of its own.
        character_coverage: share of the text's characters that get a piece of their own; the others are bytes.
        max_bytes: train on a random sample of about this size, spread over all of the text. None: on all of it.
        seed: of the sample.
        user_symbols: strings that are one piece wherever they stand in a text.

    Raises:
        UserError: no text, an unknown kind, or a vocabulary too large or too small for the text (with the limit).
    """
    if kind not in ("bpe", "unigram"):
        raise UserError(f"tokenizer kind {kind!r} is neither bpe nor unigram")
    if vocab_size < 256 + _SPECIAL_PIECES + 1:
        raise UserError(
            f"vocab_size={vocab_size} is too small: 256 bytes, {_SPECIAL_PIECES} special pieces and the text's own "
            "characters need room"
        )
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max_bytes={max_bytes} must be at least 1")
    for symbol in user_symbols:
        if not symbol or symbol == END_OF_TEXT or re.search(r"[\s\u2581,]", symbol):
            raise UserError(
                f"symbol {symbol!r}: a symbol has no white space, comma or U+2581, and is not {END_OF_TEXT}"
            )
    path = model_path(out)
    lines: Iterable[str] = training_lines(texts)
    if max_bytes is not None:
        lines = _sample(lines, max_bytes, seed)
    feed = _Feed(lines)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=feed,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            required_chars=SPACE_MARK,  # Without a piece for the space, byte fallback would make it a U+2581.
            split_digits=split_digits,
            user_defined_symbols=list(user_symbols),
            max_sentence_length=_LINE_BYTES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            num_threads=_THREADS,
            minloglevel=3,
        )
    except (RuntimeError, ValueError) as error:
        if feed.error is None:
            raise UserError(_explain(str(error), vocab_size, feed.lines)) from None
    if feed.error is not None:
        raise feed.error
    tokenizer = Tokenizer.from_proto(model.getvalue(), str(path))
    _write(path, tokenizer.proto)
    return tokenizer


def model_path(out: str | Path) -> Path:
    """The model file that `train_tokenizer` writes for `out`."""
    path = Path(out).expanduser()
    return path if path.suffix == ".model" else path.with_name(path.name + ".model")


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """All of the text in lines that SentencePiece takes: at most 4192 bytes, without its reserved characters.

    Lines begin with a line break where they can: SentencePiece strips those at a line's end, so that pieces such as
    `:\\n` would never be learnt.
    """
    limit = _LINE_BYTES // 4  # Characters; one has at most four bytes.
    for text in texts:
        for part in _RESERVED.split(text):
            start = 0
            while start < len(part):
                end = start + limit
                if end < len(part):
                    cut = part.rfind("\n", start + 1, end)
                    if cut < 0:
                        cut = part.rfind(" ", start + 1, end)
                    end = cut if cut > start else end
                yield part[start:end]
                start = end


class _Feed:
    """Hands lines to the C++ side; an error of the source stops it there and is kept to be raised afterwards."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.lines = 0
        self.error: BaseException | None = None

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise StopIteration from None
        self.lines += 1
        return line


def _sample(lines: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Those lines with the smallest hash of (seed, line number), as many as fit into `max_bytes`, in their order."""
    kept: list[tuple[int, int, str, int]] = []  # A heap, the largest hash first.
    size = 0
    for number, line in enumerate(lines):
        key = int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest())
        length = len(line.encode("utf-8", errors="replace"))
        heapq.heappush(kept, (-key, number, line, length))
        size += length
        while size > max_bytes and len(kept) > 1:
            size -= heapq.heappop(kept)[3]
    return [line for _, _, line, _ in sorted(kept, key=lambda entry: entry[1])]


def _explain(message: str, vocab_size: int, lines: int) -> str:
    if not lines:
        return "no text to train a tokenizer on"
    if found := re.search(r"Vocabulary size too high \(\d+\).*<= (\d+)", message):
        limit = found[1]
        return (
            f"vocab_size={vocab_size} is too large for this little text: set it to at most {limit}, or give more text"
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"vocab_size={vocab_size} is too small for the characters of this text: set it to at least {found[1]}"
    return f"the tokenizer could not be trained: {' '.join(message.split())}"


def _write(path: Path, proto: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(proto)
                os.fchmod(stream.fileno(), 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"tokenizer {path}: cannot be written: {error.strerror}") from None
