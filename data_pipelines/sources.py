"""Every source of text as one stream of documents, always in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from data_pipelines.builtin import python_docs, python_docs_fingerprint
from data_pipelines.documents import Document
from data_pipelines.files import find_files, fingerprint, read_file
from data_pipelines.hub import read_hub
from hope_train.config.data import SourceConfig
from hope_train.errors import UserError

__all__ = ["Document", "describe_source", "fingerprint_sources", "parse_source", "read_source", "read_sources"]

DEFAULT_HUB_TIMEOUT = 5.0


def parse_source(text: str, text_field: str = "text") -> SourceConfig:
    """A source as the command line writes it: a path, `hub:owner/name[:config]` or `builtin:python-docs`."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "hub":
        values = {"hub": rest}
    elif colon and kind == "builtin":
        values = {"builtin": rest}
    else:
        values = {"path": text}
    try:
        return SourceConfig.model_validate({**values, "text_field": text_field})
    except ValueError:
        raise UserError(f"source {text!r} is none of: a path, hub:owner/name[:config], builtin:python-docs") from None


def describe_source(source: SourceConfig) -> str:
    """A source as `parse_source` reads it."""
    if source.path is not None:
        return source.path
    return f"hub:{source.hub}" if source.hub is not None else f"builtin:{source.builtin}"


def read_sources(
    sources: Sequence[SourceConfig], hub_timeout: float = DEFAULT_HUB_TIMEOUT, stream_hub: bool = False
) -> Iterator[Document]:
    """The documents of all sources, one source after the other.

    Args:
        stream_hub: read data sets of the hub as rows are asked for, also those without max_bytes.

    Raises UserError (naming file and line) for what cannot be read, and for a source without any text.
    """
    for source in sources:
        yield from read_source(source, hub_timeout, stream_hub)


def read_source(
    source: SourceConfig, hub_timeout: float = DEFAULT_HUB_TIMEOUT, stream_hub: bool = False
) -> Iterator[Document]:
    """The documents of one source: whole ones, up to the one with which `max_bytes` is reached."""
    read_bytes = 0
    for document in _read_whole(source, hub_timeout, stream_hub):
        yield document
        read_bytes += len(document.text.encode("utf-8"))
        if source.max_bytes is not None and read_bytes >= source.max_bytes:
            return
    if not read_bytes:
        raise UserError(f"{describe_source(source)}: there is no text in it")


def _read_whole(source: SourceConfig, hub_timeout: float, stream_hub: bool) -> Iterator[Document]:
    if source.path is not None:
        root = Path(source.path).expanduser()
        label = PurePath(source.path).as_posix()
        for file in find_files(root):
            name = label if file == root else f"{label}/{file.relative_to(root).as_posix()}"
            yield from read_file(file, name, source.text_field)
    elif source.hub is not None:
        yield from read_hub(
            source.hub,
            split=source.split,
            revision=source.revision,
            text_field=source.text_field,
            streaming=stream_hub or source.max_bytes is not None,
            timeout=hub_timeout,
        )
    else:
        yield from python_docs()


def fingerprint_sources(sources: Sequence[SourceConfig]) -> list[object]:
    """What the documents depend on, without reading them: names, sizes and time stamps, in a form that JSON holds.

    A hub data set counts as unchanged while its name and revision are: looking it up would need the network.
    Raises UserError for a path that is not there.
    """
    return [_fingerprint(source) for source in sources]


def _fingerprint(source: SourceConfig) -> object:
    if source.path is not None:
        root = Path(source.path).expanduser()
        files = [
            [file.name if file == root else file.relative_to(root).as_posix(), *fingerprint(file)]
            for file in find_files(root)
        ]
        return ["path", source.path, str(root.resolve()), source.text_field, source.max_bytes, files]
    if source.hub is not None:
        return ["hub", source.hub, source.split, source.revision, source.text_field, source.max_bytes]
    return ["builtin", source.builtin, source.max_bytes, python_docs_fingerprint()]
