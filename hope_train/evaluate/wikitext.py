"""WikiText-2 (raw) as lm-evaluation-harness's `wikitext` 2.0 sees it: pages, the text scored, the normalisers.

What is counted and what is scored differ: words and bytes are those of the ORIGINAL page, while the model scores the
detokenised one (lm_eval/tasks/wikitext/preprocess_wikitext.py marks this IMPORTANT).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

from hope_train.errors import UserError

SPLITS = {"validation": "valid", "test": "test"}
"""Our names of the splits, and how the files call them."""

VERIFIED = "wikitext-2-raw"
UNVERIFIED = "wikitext-2-raw (unverified)"

HELD_OUT = "held-out python-docs"
"""Source of rows measured on the held-out part of the built-in text; such rows never carry `word_ppl`."""


@dataclass(frozen=True)
class Known:
    """What one split of the real WikiText-2-raw is."""

    sha256: str
    pages: int
    words: int
    bytes: int
    classic_words: int
    """Whitespace-separated words plus one `<eos>` per line: the classic closed-vocabulary denominator."""


KNOWN = {
    "validation": Known(
        "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7", 60, 214_006, 1_146_785, 217_646
    ),
    "test": Known("173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08", 62, 241_335, 1_290_527, 245_569),
}
"""Denominators of the real files; the test split's ratio is the one that a published Llama-2-7B result implies."""


@dataclass(frozen=True)
class Page:
    """One document to score."""

    text: str
    """The original page, which is counted."""

    scored: str
    """What the model reads."""

    @cached_property
    def words(self) -> int:
        """Pieces of the original between runs of white space, the empty ones at both ends included."""
        return len(re.split(r"\s+", self.text))

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the original."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True)
class Text:
    """One split of an evaluation text, from wherever it came."""

    source: str
    """`wikitext-2-raw`, `wikitext-2-raw (unverified)` or `held-out python-docs`."""

    split: str
    place: str
    """File or hub data set, for people."""

    pages: tuple[Page, ...]

    @property
    def verified(self) -> bool:
        """Whether this is the real WikiText-2-raw, byte for byte."""
        return self.source == VERIFIED

    def first(self, pages: int | None) -> tuple[Page, ...]:
        """The first `pages` pages, or all."""
        return self.pages if pages is None else self.pages[:pages]


def wikitext_text(raw: str, split: str, place: str) -> Text:
    """The split in the raw file's text `raw`.

    The real file is known by its sha256; its pages, words and bytes are then asserted. Any other text is taken as it
    is and called unverified. CRLF line ends (a common accident of copies) are undone where that gives the real file.

    Raises:
        UserError: the text has no words.
    """
    raw = _undo_crlf(raw, split)
    if not raw.strip():
        raise UserError(f"{place}: the file is empty; WikiText-2-raw's {split} split was looked for")
    known = KNOWN[split] if _digest(raw) == KNOWN[split].sha256 else None
    other = next((name for name, entry in KNOWN.items() if name != split and entry.sha256 == _digest(raw)), None)
    if other is not None:
        raise UserError(f"{place}: this is WikiText-2's {other} split, where the {split} split belongs")
    pages = tuple(Page(page, detokenize(page)) for page in split_pages(raw))
    text = Text(VERIFIED if known else UNVERIFIED, split, place, pages)
    if known is not None:
        found = (len(pages), sum(page.words for page in pages), sum(page.bytes for page in pages))
        if found != (known.pages, known.words, known.bytes):
            raise AssertionError(f"{place}: pages, words, bytes are {found}, not those of the real WikiText-2: {known}")
    return text


def split_pages(raw: str) -> list[str]:
    """Pages of a raw file: a page starts at a top-level heading, ` = Title = `.

    Source: the page splitter behind EleutherAI/wikitext_document_level. A line is such a heading when, with `= = =`
    written as `===` and then `= =` as `==` and stripped, it starts with `= ` and ends with ` =`. Blank text before
    the first heading is dropped; the last page keeps the file's end.
    """
    pages: list[str] = []
    lines: list[str] = []
    for line in raw.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            page = "\n".join(lines)
            if page.strip():
                pages.append(page)
            lines = []
        lines.append(line)
    return [*pages, "\n".join(lines)]


def join_pages(pages: list[str]) -> str:
    """The raw file whose pages these are: undoes `split_pages` for the real files, which open with a blank line."""
    return " \n" + "\n".join(pages)


# The rules of wikitext 2.0's detokenizer in their order; each works on what the ones before have left.
_DETOKENIZER: tuple[tuple[str, str, bool], ...] = (
    ("s '", "s'", False),
    (r"/' [0-9]/", r"/'[0-9]/", True),  # As in the original: it matches literal slashes, so in practice nothing.
    (" @-@ ", "-", False),
    (" @,@ ", ",", False),
    (" @.@ ", ".", False),
    (" : ", ": ", False),
    (" ; ", "; ", False),
    (" . ", ". ", False),
    (" ! ", "! ", False),
    (" ? ", "? ", False),
    (" , ", ", ", False),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)", True),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]", True),
    (r"{\s*([^}]*?)\s*}", r"{\1}", True),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"', True),
    (r"'\s*([^']*?)\s*'", r"'\1'", True),
    ("= = = =", "====", False),
    ("= = =", "===", False),
    ("= =", "==", False),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}", False),
    (" \n", "\n", False),
    ("\n ", "\n", False),
    (" N ", " 1 ", False),
    (" 's", "'s", False),
)


def detokenize(page: str) -> str:
    """The text that is scored for a page: WikiText's spaced-out punctuation undone, by wikitext 2.0's own rules."""
    for old, new, is_pattern in _DETOKENIZER:
        page = re.sub(old, new, page) if is_pattern else page.replace(old, new)
    return page


def _undo_crlf(raw: str, split: str) -> str:
    if "\r\n" not in raw:
        return raw
    mended = raw.replace("\r\n", "\n")
    return mended if _digest(mended) == KNOWN[split].sha256 else raw


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
