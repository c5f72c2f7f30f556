"""The data section: which text, which tokenizer, how it is packed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_train.config.base import Section


class SourceConfig(Section):
    """One source of documents: exactly one of `path`, `hub`, `builtin`, `indexed`."""

    path: str | None = None
    """A local file or folder: .txt, .jsonl (each also .gz or .zst), .parquet, .arrow. A folder is searched for all."""

    hub: str | None = Field(None, pattern=r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")
    """A data set on the Hugging Face hub, `owner/name` or `owner/name:config`."""

    builtin: Literal["python-docs"] | None = None
    """Text that every machine has: Python's own library sources and documentation."""

    indexed: str | None = None
    """Tokens in Megatron's format (data.mode=indexed): a folder that `hope data tokenize` wrote, a folder of
    .bin/.idx pairs, or the common prefix of one pair."""

    weight: float | None = Field(None, gt=0.0)
    """Share of this source in the tokens trained on, relative to the other sources' weights; all sources have one or
    none has (data.mode=streaming, indexed). null: sources count by their size."""

    min_characters: int = Field(0, ge=0)
    """Documents with fewer characters are filtered out (and counted)."""

    max_characters: int | None = Field(None, ge=1)
    """Documents with more characters are filtered out (and counted). null: no limit."""

    language: tuple[str, ...] = ()
    """Only documents whose `language_field` has one of these values. Empty: all."""

    language_field: str = "language"
    """Column or JSON key that names a document's language."""

    filter: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """A Python function `package.module:function` that gets a document's columns as a dict and says whether to keep
    it. Its module's source is part of what a resumed run compares."""

    split: str = "train"
    """Split of a hub data set. Of a `path` everything is read: name the folder or the files of a split there."""

    revision: str | None = None
    """Commit, tag or branch of a hub data set. null: the newest one at the time it is first read."""

    text_field: str = "text"
    """Column or JSON key that holds the text."""

    max_bytes: int | None = Field(None, ge=1)
    """Stop after the document with which the source has given this many bytes of text; a hub data set is then
    streamed instead of downloaded whole. null: all of it."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if sum(x is not None for x in (self.path, self.hub, self.builtin, self.indexed)) != 1:
            raise ValueError("a source needs exactly one of path, hub, builtin, indexed")
        if self.path is not None and not self.path.strip():
            raise ValueError("path is empty")
        if self.hub is None and self.split != "train":
            raise ValueError(f"split={self.split} goes with hub: of other text, name the files of that split as path")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError("max_characters is below min_characters: no document is left")
        return self

    @property
    def selects(self) -> bool:
        """Whether anything is filtered out but documents without text."""
        return bool(self.min_characters or self.max_characters or self.language or self.filter)


class StreamConfig(Section):
    """data.mode=streaming: text that is tokenised while it is trained on."""

    lanes: int = Field(16, ge=1, le=65536)
    """Independent streams that the samples are dealt from, sample k from lane k mod `lanes`. Part of what fixes the
    samples. A rank or worker works on whole lanes: best a multiple of ranks times workers, and far fewer than
    documents."""

    shuffle_documents: int = Field(256, ge=1)
    """Documents of a lane that are read at a time and given in shuffled order (fewer, if they are long). 1: none."""

    packing: Literal["split", "best_fit"] = "split"
    """`split`: documents one after the other, cut where a row ends. `best_fit`: documents up to the context length stay
    whole; rows are filled as far as they fit, and the rest is padding that is not scored."""

    pack_rows: int = Field(32, ge=1)
    """best_fit: documents for about so many rows are fitted at a time."""

    validation_tokens: int = Field(262_144, ge=0)
    """Held-out text to find at the beginning of the sources (fewer, if they have fewer)."""

    workers: int = Field(2, ge=0, le=1024)
    """Processes of each rank that read, tokenise and pack. 0: the training process does it. Changes no sample."""

    prefetch_rows: int = Field(32, ge=1)
    """Rows that a worker prepares ahead for each lane, about."""


class DataConfig(Section):
    """From text to packed batches."""

    sources: tuple[SourceConfig, ...] = Field((), max_length=1000)
    """Where the training documents come from, in this order."""

    mode: Literal["cached", "indexed", "streaming"] = "cached"
    """`cached`: all of the text is tokenised once into `cache_dir`. `indexed`: it has been tokenised before, by
    `hope data tokenize` or by Megatron. `streaming`: it is tokenised while it is trained on."""

    stream: StreamConfig = StreamConfig()
    """data.mode=streaming."""

    on_fault: Literal["stop", "skip"] = "stop"
    """What to do about a record that cannot be used (not UTF-8, not JSON, no text; a file that breaks off): stop and
    name it, or count it and pass over it."""

    tokenizer: str | None = None
    """A SentencePiece model file, made by `hope data tokenizer train` or elsewhere, or a byte-level tokenizer.json."""

    lossy_tokenizer: bool = False
    """Take a tokenizer that loses text (docs/data.md says which do), as it is. Nothing is measured per word or byte."""

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

    retries: int = Field(6, ge=0)
    """How often a source that fails in mid-run is tried again before the run is saved and stops."""

    retry_seconds: float = Field(1.0, ge=0.0)
    """Wait before the first of these tries; each further one waits twice as long, a minute at most."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        seen = set()
        for source in self.sources:
            name = source.path or source.hub or source.builtin or source.indexed
            place = (source.path, source.hub, source.builtin, source.indexed, source.split, source.text_field)
            if place in seen:
                raise ValueError(f"source {name} is listed twice")
            seen.add(place)
            if (source.indexed is not None) != (self.mode == "indexed"):
                key = "indexed needs" if source.indexed is not None else "has text, which does not go with"
                raise ValueError(f"source {name} {key} data.mode=indexed (mode is {self.mode})")
            if source.indexed is not None and (source.selects or source.max_bytes):
                raise ValueError(f"source {name} is tokenised already: filters and max_bytes belong to its text")
        weighted = {source.weight is not None for source in self.sources}
        if len(weighted) > 1:
            raise ValueError("some sources have a weight and some have none: give all of them one, or none")
        if weighted == {True} and self.mode == "cached":
            raise ValueError("weights need data.mode=streaming or indexed: a cached corpus is all of its text")
        return self
