"""A byte-level tokenizer.json of Hugging Face's (GPT-2's kind, Llama 3's, Qwen's), encoded by its own library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hope_train.errors import UserError

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "[EOS]")


class HuggingFaceModel:
    """As much of SentencePiece's processor as `Tokenizer` needs.

    Attributes: `pieces`, the bytes that each piece stands for; special pieces stand for nothing.
    """

    def __init__(self, proto: bytes, name: str, as_it_is: bool = True) -> None:
        """as_it_is: False: without a normaliser (Qwen's composes characters) and without a space in front.

        Raises UserError for a file that is not byte-level, or has no end-of-text piece.
        """
        import tokenizers

        try:
            text = proto.decode("utf-8")
            tree = json.loads(text)
            if not as_it_is:
                cutting = _without_space(tree.get("pre_tokenizer"))
                text = json.dumps({**tree, "normalizer": None, "pre_tokenizer": cutting})
            self._model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises plain Exceptions.
            raise UserError(f"tokenizer {name}: not a tokenizer.json ({' '.join(str(error).split())})") from None
        if not _mentions(tree.get("decoder"), "ByteLevel"):
            raise UserError(
                f"tokenizer {name}: only byte-level tokenizer.json files are known to lose nothing, and this one "
                "is not byte-level: take the SentencePiece model (tokenizer.model) that it was made from, or train one "
                "with `hope data tokenizer train`"
            )
        # Text that spells a special piece out is text: none of those comes from a document.
        self._model.encode_special_tokens = True
        self._model.no_padding()
        self._model.no_truncation()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        special = {token.content for token in self._model.get_added_tokens_decoder().values() if token.special}
        self.size = max(vocabulary.values()) + 1
        self.eos = next((vocabulary[text] for text in _ENDS if text in special and text in vocabulary), -1)
        if self.eos < 0:
            raise UserError(f"tokenizer {name}: it has no end-of-text piece; known are {', '.join(_ENDS)}")
        added = {token.content for token in self._model.get_added_tokens_decoder().values()}
        alphabet = {character: byte for byte, character in _byte_characters().items()}
        self.pieces = [b""] * self.size
        for piece, token in vocabulary.items():
            if piece in added:
                self.pieces[token] = b"" if piece in special else piece.encode()
            else:
                self.pieces[token] = (
                    bytes(alphabet[c] for c in piece) if set(piece) <= set(alphabet) else piece.encode()
                )

    def get_piece_size(self) -> int:
        """Number of ids."""
        return self.size

    def eos_id(self) -> int:
        """End of text."""
        return self.eos

    def unk_id(self) -> int:
        """None: bytes leave nothing unknown."""
        return -1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special ones."""
        return [found.ids for found in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]


def _without_space(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: False if key == "add_prefix_space" else _without_space(value) for key, value in tree.items()}
    return [_without_space(value) for value in tree] if isinstance(tree, list) else tree


def _mentions(tree: Any, kind: str) -> bool:
    if isinstance(tree, dict):
        return tree.get("type") == kind or any(_mentions(value, kind) for value in tree.values())
    return isinstance(tree, list) and any(_mentions(value, kind) for value in tree)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte (its `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
