"""The data section: which text, which tokenizer, how it is packed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_train.config.base import Section


class SourceConfig(Section):
    """One source of documents: exactly one of `path`, `hub`, `builtin`."""

    path: str | None = None
    """A local file or folder: .txt, .jsonl (each also .gz or .zst), .parquet. A folder is searched for all of them."""

    hub: str | None = Field(None, pattern=r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")
    """A data set on the Hugging Face hub, `owner/name` or `owner/name:config`."""

    builtin: Literal["python-docs"] | None = None
    """Text that every machine has: Python's own library sources and documentation."""

    split: str = "train"
    """Split of a hub data set."""

    revision: str | None = None
    """Commit, tag or branch of a hub data set. null: the newest one at the time it is first read."""

    text_field: str = "text"
    """Column or JSON key that holds the text."""

    max_bytes: int | None = Field(None, ge=1)
    """Stop after the document with which the source has given this many bytes of text; a hub data set is then
    streamed instead of downloaded whole. null: all of it."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if sum(x is not None for x in (self.path, self.hub, self.builtin)) != 1:
            raise ValueError("a source needs exactly one of path, hub, builtin")
        if self.path is not None and not self.path.strip():
            raise ValueError("path is empty")
        return self


class DataConfig(Section):
    """From text to packed batches."""

    sources: tuple[SourceConfig, ...] = Field((), max_length=1000)
    """Where the training documents come from, in this order."""

    tokenizer: str | None = None
    """A SentencePiece model file (made by `hope data tokenizer train`)."""

    validation_fraction: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of documents held out of training, chosen by a hash of each document's text. With too few documents
    for that, the share of the pieces that long documents are cut into (see docs/data.md)."""

    reset_at_documents: bool = False
    """Memories, convolution and attention start afresh at each document, on the end-of-text token that opens it,
    and at each row. False: a packed row is one sequence."""

    cache_dir: str = "~/.cache/hope-train"
    """Where tokenised corpora are kept between runs; `~` is the home folder."""

    hub_timeout: float = Field(5.0, gt=0.0)
    """Seconds after which an unreachable hub is given up."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        seen = set()
        for source in self.sources:
            place = (source.path, source.hub, source.builtin, source.split, source.text_field)
            if place in seen:
                raise ValueError(f"source {source.path or source.hub or source.builtin} is listed twice")
            seen.add(place)
        return self
