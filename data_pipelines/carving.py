"""Which text is held out for validation: a function of the text alone, not of file names or the order of reading.

With enough documents, a document is held out when the hash of its text falls below the wanted share. With few
(18 books and a share of 1%), that would hold out nothing or far too much; then documents are cut into pieces at
paragraph or line ends, and the pieces with the smallest hashes are held out until their number is the wanted share.
Neighbouring pieces of one document on the same side stay one text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from data_pipelines.documents import Document

# Fewer held-out documents than this, expected or found, and pieces are cut instead.
_FEWEST_HELD_OUT = 4
_PIECES_PER_HELD_OUT_SHARE = 8
_PIECE_CHARACTERS = (256, 1 << 16)


@dataclass(frozen=True)
class Carving:
    """The decision for one corpus.

    Attributes: `documents`, `characters`, `content` (hash over all texts in order) as found by reading everything;
    `piece_characters` is None where whole documents are held out; `held_out` are the (document, piece) numbers
    otherwise; `fraction` is the wanted share.
    """

    documents: int
    characters: int
    content: str
    fraction: float
    piece_characters: int | None = None
    held_out: frozenset[tuple[int, int]] = frozenset()


class ContentHash:
    """Hash over a sequence of texts, boundaries included."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text: str) -> bytes:
        """Take in a text; returns the text's own hash."""
        own = text_hash(text)
        self._digest.update(own)
        return own

    def hexdigest(self) -> str:
        """The hash so far, in hex."""
        return self._digest.hexdigest()


def text_hash(text: str) -> bytes:
    """16 bytes of hash of a text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def is_held_out(own_hash: bytes, fraction: float) -> bool:
    """Whether a document with this hash belongs to validation: true for the share `fraction` of all hashes."""
    return int.from_bytes(own_hash[:8]) < fraction * 2.0**64


def survey(read: Callable[[], Iterable[Document]], fraction: float) -> Carving:
    """Read everything (once; few documents twice) and decide what is held out.

    Args:
        read: gives all documents, the same ones each time.
        fraction: wanted share of validation, in [0, 1).
    """
    content = ContentHash()
    documents = characters = held_out = 0
    for document in read():
        held_out += is_held_out(content.add(document.text), fraction)
        documents += 1
        characters += len(document.text)
    whole = Carving(documents, characters, content.hexdigest(), fraction)
    enough = documents * fraction >= _FEWEST_HELD_OUT and _FEWEST_HELD_OUT <= held_out < documents
    if fraction == 0.0 or not documents or enough:
        return whole
    return _carve_pieces(read, whole)


def _carve_pieces(read: Callable[[], Iterable[Document]], whole: Carving) -> Carving:
    smallest, largest = _PIECE_CHARACTERS
    wanted = int(whole.characters * whole.fraction / _PIECES_PER_HELD_OUT_SHARE)
    size = min(max(wanted, smallest), largest)
    ranked = sorted(
        (text_hash(piece), (number, place))
        for number, document in enumerate(read())
        for place, piece in enumerate(cut(document.text, size))
    )
    count = min(max(1, round(len(ranked) * whole.fraction)), len(ranked) - 1)
    held_out = frozenset(key for _, key in ranked[:count])
    return Carving(whole.documents, whole.characters, whole.content, whole.fraction, size, held_out)


def carve(carving: Carving, number: int, document: Document, own_hash: bytes) -> Iterator[tuple[str, Document]]:
    """The parts of document `number` with the split they belong to; pieces are `id#first-last` (characters)."""
    if carving.piece_characters is None:
        yield ("validation" if is_held_out(own_hash, carving.fraction) else "train"), document
        return
    runs: list[tuple[str, list[str]]] = []
    for place, piece in enumerate(cut(document.text, carving.piece_characters)):
        split = "validation" if (number, place) in carving.held_out else "train"
        if runs and runs[-1][0] == split:
            runs[-1][1].append(piece)
        else:
            runs.append((split, [piece]))
    start = 0
    for split, pieces in runs:
        text = "".join(pieces)
        end = start + len(text)
        yield split, document if len(runs) == 1 else Document(f"{document.id}#{start}-{end - 1}", text)
        start = end


def cut(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of at most 1.5 `size` characters, cut after a blank line, a line end or a space if possible."""
    start = 0
    while len(text) - start > size + size // 2:
        end = start + size
        for mark in ("\n\n", "\n", " "):
            place = text.rfind(mark, start + size // 2, end)
            if place >= 0:
                end = place + len(mark)
                break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
