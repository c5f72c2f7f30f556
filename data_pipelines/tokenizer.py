"""SentencePiece without loss: decode(encode(text)) == text for every valid Unicode text.

SentencePiece normalises, collapses white space and adds a space in front by default. Models trained here do not; in
models made elsewhere (Llama 2's, Mistral's) it is switched off as they are loaded: same pieces, same numbers, and text
as it stands. One loss is left in the library: it writes a space as U+2581 inside, so that a U+2581 of the text would
come back as a space. Here that character never reaches it: the text is cut there and the character's three UTF-8 bytes
go between the parts as byte pieces.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_pipelines.documents import check_text
from data_pipelines.huggingface_tokenizer import HuggingFaceModel
from hope_train.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SPACE_MARK = "\u2581"
_SEGMENT = 1 << 16
# normalizer_spec { precompiled_charsmap: "" add_dummy_prefix: false remove_extra_whitespaces: false }, as the end of a
# ModelProto: serialised messages that follow each other are merged, the last value of a field wins (Protocol Buffers,
# Encoding, "Last One Wins").
_LEAVE_TEXT_ALONE = bytes([3 << 3 | 2, 6, 2 << 3 | 2, 0, 3 << 3, 0, 4 << 3, 0])
# Everything that a lossy model was seen to change.
_PROBES = (
    " two  spaces \t\r\n\n\u2581 \0\u0007 ﬁ ½ Å e\u0301 漢字 🙂 \ufeff\u00a0\u3000 "
    "<unk> <s></s> <|endoftext|> <0x0A>\n ",
    "no space in front",
)


class Tokenizer:
    """A lossless SentencePiece model, or a byte-level tokenizer.json of Hugging Face's, with an end-of-text piece.

    Attributes: `path` (where the model came from), `proto` (the file's bytes), `vocab_size` (number of pieces),
    `eot_id` (end of text; no text encodes to it), `fingerprint` (sha256 of the file, in hex; `-lossy` behind it where
    text is lost), `rewrites` (the model's own use changes text, by a space in front or by normalisation, which is left
    off here), `lossless`.
    """

    def __init__(self, path: str | Path, lossy: bool = False) -> None:
        """Read a model file. `lossy`: one that loses text will do, and is used as it is.

        Raises UserError if it is missing, unreadable, without an end-of-text piece, or lossy where that will not do.
        """
        file = Path(path).expanduser()
        try:
            proto = file.read_bytes()
        except FileNotFoundError:
            raise UserError(f"no tokenizer file {path}; `hope data tokenizer train` makes one") from None
        except OSError as error:
            raise UserError(f"tokenizer {path}: cannot be read: {error.strerror}") from None
        self._load(proto, str(path), lossy)

    @classmethod
    def from_proto(cls, proto: bytes, name: str = "(in memory)", lossy: bool = False) -> Tokenizer:
        """A tokenizer from a model file's bytes; `name` stands for the path in messages. Raises as `__init__`."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(proto, name, lossy)
        return tokenizer

    def _load(self, proto: bytes, name: str, lossy: bool) -> None:
        self.path = name
        self.proto = proto
        self.fingerprint = hashlib.sha256(proto).hexdigest()
        try:
            if not proto:
                raise RuntimeError("the file is empty")
            self._open(proto, as_it_is=True)
            self.lossless, self.rewrites = self._keeps(), False
            if not self.lossless and self._mark is not None:
                self._open(proto, as_it_is=False)
                self.lossless = self.rewrites = self._keeps()
                if not self.lossless:
                    self._open(proto, as_it_is=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"tokenizer {name}: not a SentencePiece model file ({reason})") from None
        if self.eot_id < 0:
            raise UserError(f"tokenizer {name}: it has no end-of-text piece (SentencePiece's eos); train one that has")
        if not self.lossless:
            self.fingerprint += "-lossy"
        if not self.lossless and not lossy:
            why = (
                ""
                if self._mark is not None
                else ": it was trained without byte_fallback, so unknown characters are lost"
            )
            raise UserError(
                f"tokenizer {name}: it is not lossless (decode(encode(text)) != text), so perplexities per word or "
                f"byte would be wrong{why}; train one with `hope data tokenizer train`, or take it as it is with "
                "data.lossy_tokenizer=true"
            )

    @property
    def note(self) -> str | None:
        """What somebody who uses the model has to know, in a line."""
        if not self.lossless:
            return (
                f"warning: tokenizer {self.path} loses text (decode(encode(text)) != text): nothing is measured per "
                "word or byte with it"
            )
        if not self.rewrites:
            return None
        return (
            f"tokenizer {self.path} is made to put a space in front of a text or to normalise it: that is left off, so "
            "that nothing is lost; tokens made by it elsewhere may differ there"
        )

    def _open(self, proto: bytes, as_it_is: bool) -> None:
        """as_it_is: False: with whatever changes text left off. Raises RuntimeError for what is no model."""
        # A tokenizer.json of Hugging Face's is JSON; no model file of SentencePiece begins like that.
        self._foreign = HuggingFaceModel(proto, self.path, as_it_is) if proto.lstrip().startswith(b"{") else None
        added = b"" if as_it_is else _LEAVE_TEXT_ALONE
        processor: Any = self._foreign or sentencepiece.SentencePieceProcessor(model_proto=proto + added)
        self._model = processor
        self.vocab_size: int = self._model.get_piece_size()
        self.eot_id: int = self._model.eos_id()
        self._unknown: int = self._model.unk_id()
        self._mark: list[int] | None
        if self._foreign is not None:
            self._bytes, self._mark = self._foreign.pieces, []
        else:
            self._bytes = [self._piece_bytes(token) for token in range(self.vocab_size)]
            mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
            self._mark = mark if all(self._model.is_byte(token) for token in mark) else None

    def _keeps(self) -> bool:
        """Whether text comes back."""
        return all(self.decode(self.encode(text)) == text for text in _PROBES)

    def _piece_bytes(self, token: int) -> bytes:
        """The text a piece stands for, in UTF-8. A byte piece may be a part of a character."""
        piece: str = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_control(token):
            return b""
        if self._model.is_unknown(token):
            return "\ufffd".encode()
        return piece.replace(SPACE_MARK, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-text token. Raises UserError for lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of several texts, on `threads` threads; the result does not depend on their number."""
        if self._foreign is not None:
            return self._foreign.encode([check_text(text, "tokenizer") for text in texts])
        segments: list[str] = []
        plan: list[list[int]] = []  # Per text: numbers of its segments, -1 for a U+2581.
        for text in texts:
            check_text(text, "tokenizer")
            entries: list[int] = []
            for number, part in enumerate(text.split(SPACE_MARK) if self._mark is not None else [text]):
                if number:
                    entries.append(-1)
                for segment in _segments(part):
                    entries.append(len(segments))
                    segments.append(segment)
            plan.append(entries)
        encoded: list[list[int]] = self._model.encode(segments, num_threads=threads) if segments else []
        mark = self._mark or []
        return [
            encoded[entries[0]]  # Nearly every text is one segment: its list is taken as it is.
            if len(entries) == 1 and entries[0] >= 0
            else [token for entry in entries for token in (mark if entry < 0 else encoded[entry])]
            for entries in plan
        ]

    def piece_bytes(self) -> np.ndarray:
        """Bytes of text that each piece stands for, int64 [vocab_size]; their sum is a text's length in UTF-8."""
        return np.array([len(piece) for piece in self._bytes], dtype=np.int64)

    @property
    def unknown_id(self) -> int:
        """The unknown piece, which stands for text that has no piece and no bytes."""
        return self._unknown

    def count_unknowns(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens are the unknown piece."""
        return token_ids.count(self._unknown)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids. End-of-text gives nothing; bytes that are not UTF-8 give U+FFFD."""
        return b"".join([self._bytes[int(token)] for token in tokens]).decode("utf-8", errors="replace")

    def decode_stream(self) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        return StreamDecoder(self._bytes)

    def save(self, path: str | Path) -> None:
        """Write the model file, byte for byte."""
        Path(path).write_bytes(self.proto)


class StreamDecoder:
    """Gives what can be printed so far: a character is held back until all of its bytes have come."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes; often none."""
        return self._decoder.decode(self._pieces[int(token)])

    def flush(self) -> str:
        """The rest at the end of a text: U+FFFD if a character stayed incomplete."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _segments(text: str) -> Iterator[str]:
    """Parts of at most `_SEGMENT` characters: SentencePiece needs some 100 bytes for each character at a time.

    A piece has spaces only in front, so a cut before a space that follows another character changes no token.
    """
    start = 0
    while len(text) - start > _SEGMENT:
        end = start + _SEGMENT
        space = text.rfind(" ", start + 1, end)
        while space > start and text[space - 1] == " ":
            space -= 1
        if space > start:
            end = space
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
