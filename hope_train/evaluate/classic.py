"""The classic closed-vocabulary perplexity, and why it rarely applies.

The LSTM-era figures (Merity et al., arXiv 1609.07843) are over text in which rare words are `<unk>`, under a model
whose vocabulary is exactly the 33,278 words of the training file, with one `<eos>` per line:
PPL = exp(nll / (words + lines)). A subword model assigns probability to strings outside that vocabulary and spells
`<unk>` as characters; dividing its likelihood by the same denominator gives a number that only looks comparable. So
the protocol is refused unless each word, and each line end, is one token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.tokenizer import Tokenizer
from hope_train.errors import UserError
from hope_train.evaluate.protocols import rolling_windows
from hope_train.evaluate.scoring import Window
from hope_train.evaluate.sources import read_lines
from hope_train.evaluate.wikitext import KNOWN, SPLITS


@dataclass(frozen=True)
class ClassicText:
    """A split as a closed-vocabulary model reads it."""

    place: str
    tokens: tuple[int, ...]
    """One per word, and one per line end."""

    eos: int
    """The line end's token: what the first word is predicted from."""

    def windows(self, length: int) -> list[Window]:
        """Disjoint windows with one token of context, as the word protocol's, over the file as one stream."""
        return rolling_windows(self.tokens, self.eos, length)


def read_classic(place: str | None, split: str, tokenizer: Tokenizer) -> ClassicText:
    """The `<unk>` file of a split, where the classic protocol applies.

    Args:
        place: folder with wiki.valid.tokens or valid.txt (test likewise), each plain or .gz.

    Raises:
        UserError: no such file; words + lines are not 217,646 (validation) or 245,569 (test); or the tokenizer is
            not one of whole words.
    """
    stem = SPLITS[split]
    names = (f"wiki.{stem}.tokens", f"{stem}.txt")
    found = None if place is None or place.startswith("hub") else read_lines(place, names)
    if found is None:
        raise UserError(
            f"protocol classic needs WikiText-2's <unk> text, {names[0]} or {names[1]} (or .gz), in the WikiText "
            f"folder{'' if place is None else ' ' + place}; without it use protocol word"
        )
    text, file = found
    lines = text.removesuffix("\n").split("\n")
    count = sum(len(line.split()) for line in lines) + len(lines)
    if count != KNOWN[split].classic_words or "<unk>" not in text:
        raise UserError(
            f"{file}: {count:,} words and line ends; protocol classic is defined on WikiText-2's {split} split with "
            f"<unk>, which has {KNOWN[split].classic_words:,}"
        )
    tokens, eos = closed_vocabulary_tokens(lines, tokenizer)
    return ClassicText(str(file), tuple(tokens), eos)


def closed_vocabulary_tokens(lines: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """(one token per word and per line end, the line end's token).

    A line is written as each word with a space in front, then a line break. Raises UserError where any word takes
    more than one token, or two words share one (an unknown-word piece): then the vocabulary is not closed over words.
    """
    words = [word for line in lines for word in (*(f" {word}" for word in line.split()), "\n")]
    kinds = sorted(set(words))
    tokens_of = dict(zip(kinds, tokenizer.encode_batch(kinds), strict=True))
    split_up = [kind for kind in kinds if len(tokens_of[kind]) != 1]
    if split_up:
        total = sum(len(tokens_of[word]) for word in words)
        raise UserError(
            f"protocol classic does not apply to a subword model: this tokenizer makes {total:,} tokens of "
            f"{len(words):,} words and line ends ({split_up[0]!r} is {len(tokens_of[split_up[0]])}), and its figure "
            "would only look comparable; use protocol word"
        )
    if len({tokens_of[kind][0] for kind in kinds}) < len(kinds):
        raise UserError(
            "protocol classic does not apply: this tokenizer gives different words the same token; use protocol word"
        )
    return [tokens_of[word][0] for word in words], tokens_of["\n"][0]
