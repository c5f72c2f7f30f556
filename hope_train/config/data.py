"""The data section: which text, which tokenizer, how it is packed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_train.config.base import Section


class SourceConfig(Section):
    """One source of documents."""

    path: str | None = None
    """A local file or folder: .txt, .jsonl, .jsonl.gz, .parquet (a folder is searched for all of them)."""

    hub: str | None = None
    """A data set on the Hugging Face hub, `owner/name` or `owner/name:config`."""

    builtin: Literal["python-docs"] | None = None
    """Text that every machine has: Python's own library sources and documentation."""

    split: str = "train"
    """Split of a hub data set."""

    text_field: str = "text"
    """Column or JSON key that holds the text."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if sum(x is not None for x in (self.path, self.hub, self.builtin)) != 1:
            raise ValueError("a source needs exactly one of path, hub, builtin")
        return self


class DataConfig(Section):
    """From text to packed batches."""

    sources: tuple[SourceConfig, ...] = Field((), max_length=1000)
    """Where the training documents come from."""

    tokenizer: str | None = None
    """A SentencePiece model file (made by `hope data tokenizer train`)."""

    validation_fraction: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of documents held out of training, chosen by a hash of each document's text."""

    reset_at_documents: bool = False
    """Memories, convolution and attention start afresh at each document. False: a packed row is one sequence."""

    cache_dir: str = "~/.cache/hope-train"
    """Where tokenised corpora are kept between runs."""

    hub_timeout: float = Field(5.0, gt=0.0)
    """Seconds after which an unreachable hub is given up."""
