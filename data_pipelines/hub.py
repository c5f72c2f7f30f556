"""Data sets of the Hugging Face hub, through `datasets`. A hub that cannot be reached costs seconds, not minutes."""

from __future__ import annotations

import http.client
import os
import queue
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_pipelines.documents import Document, check_text
from hope_train.errors import UserError

_TRUE = {"1", "ON", "YES", "TRUE"}
_probed: dict[str, bool] = {}


def hub_reachable(timeout: float) -> bool:
    """Whether the hub answers at all within `timeout` seconds; asked once per process and address.

    False without a probe where HF_HUB_OFFLINE (or HF_DATASETS_OFFLINE) is set. HF_ENDPOINT names another address.
    """
    if _switched_off():
        return False
    address = hub_address()
    if address not in _probed:
        _probed[address] = _probe(address, timeout)
    return _probed[address]


def _switched_off() -> bool:
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def hub_address() -> str:
    """The hub's address, HF_ENDPOINT where that is set."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _probe(address: str, timeout: float) -> bool:
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=timeout).close()
        except urllib.error.HTTPError:
            answers.put(True)  # An answer all the same: mirrors may refuse a HEAD of their front page.
        except (OSError, ValueError, http.client.HTTPException):
            answers.put(False)
        else:
            answers.put(True)

    # A thread, because the time limit of a connection does not cover the look-up of the name.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=timeout)
    except queue.Empty:
        return False


def load_hub(name: str, *, split: str, revision: str | None, streaming: bool, timeout: float) -> Any:
    """The rows of hub data set `owner/name` or `owner/name:config`, from the network or datasets' own cache.

    Args:
        streaming: read rows as they are asked for instead of downloading the whole data set.
        timeout: seconds for the hub's first sign of life (`data.hub_timeout`).

    Returns:
        A `datasets.Dataset` or `datasets.IterableDataset`: an iterable of mappings with `column_names`.

    Raises:
        UserError: the hub is out of reach and its cache has no copy, or it does not know the data set or the split.
    """
    online = hub_reachable(timeout)
    try:
        import datasets
    except ImportError:
        raise UserError(f"hub data set {name}: the package `datasets` is not installed") from None
    path, _, config = name.partition(":")
    with network(online):
        try:
            rows = datasets.load_dataset(path, config or None, split=split, revision=revision, streaming=streaming)
        except Exception as error:
            # The library raises some thirty kinds of error of several packages; none of them is a defect of ours.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if not online:
                raise UserError(describe_missing_hub(name, timeout, "the local cache has no usable copy")) from error
            raise UserError(f"hub data set {name} (split {split}): {reason}") from error
    return rows


def describe_missing_hub(name: str, timeout: float, more: str) -> str:
    """One line for a hub that does not answer."""
    why = (
        "is switched off by the environment" if _switched_off() else f"gave no answer (asked for {timeout:g} s at most)"
    )
    return (
        f"hub data set {name}: {hub_address()} {why} and {more}; "
        "name a local folder with data.sources.N.path, or set HF_ENDPOINT"
    )


def read_hub(
    name: str, *, split: str, revision: str | None, text_field: str, streaming: bool, timeout: float
) -> Iterator[Document]:
    """Documents of a hub data set, ids `name/split:row`. Raises UserError as `load_hub`, and for a wrong text field."""
    rows = load_hub(name, split=split, revision=revision, streaming=streaming, timeout=timeout)
    if rows.column_names is not None:
        if text_field not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise UserError(f"hub data set {name}: no column {text_field!r}; set text_field to one of: {known}")
        rows = rows.select_columns([text_field])
    for number, row in enumerate(_guarded(rows, name), start=1):
        text = row.get(text_field)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise UserError(f"hub data set {name}: column {text_field!r} is not text but {type(text).__name__}")
        document_id = f"{name}/{split}:{number}"
        yield Document(document_id, check_text(text, document_id))


def _guarded(rows: Any, name: str) -> Iterator[Any]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # A network that fails in mid-stream, a damaged download.
            raise UserError(f"hub data set {name}: reading failed: {' '.join(str(error).split())[:300]}") from error
        yield row


@contextmanager
def network(online: bool) -> Iterator[None]:
    """Tell the hub's libraries, which look at the environment only when they are first imported, to use no network."""
    import datasets
    import huggingface_hub.constants

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if online:
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
