"""The held-out text of a streamed corpus: found at the beginning of each source, tokenised once, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.corpus import cache_errors, lock, new_folder
from data_pipelines.lanes import Corpus
from data_pipelines.pack import CorpusSplit, PackWriter, open_split
from data_pipelines.records import Place
from data_pipelines.selecting import Selector, reading_again

_log = logging.getLogger(__name__)

_FARTHEST = 4.0
"""Reading ends when so many times the text has been read in which enough was to be expected."""

_CHARACTERS_PER_TOKEN = 8
_LEAST = 1 << 20


def held_out_split(corpus: Corpus, identity: dict[str, Any]) -> CorpusSplit | None:
    """Held-out documents of about data.stream.validation_tokens, the same share from each source.

    None where nothing is held out, or nothing was found. Any number of processes may call this at once. Raises
    UserError for text that cannot be read, and for a cache that cannot be written.
    """
    data, tokenizer = corpus.data, corpus.tokenizer
    if not data.validation_fraction or not data.stream.validation_tokens:
        return None
    key = {
        "selection": {name: identity[name] for name in ("files", "selection", "on_fault")},
        "tokenizer": tokenizer.fingerprint,
        "fraction": data.validation_fraction,
        "tokens": data.stream.validation_tokens,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    root = Path(data.cache_dir).expanduser() / "held-out"
    folder = root / name
    with cache_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f"{name}.lock"):
            if not folder.is_dir():
                with new_folder(folder) as work:
                    writer = PackWriter(work, "validation", tokenizer.vocab_size, tokenizer.eot_id)
                    try:
                        for document_id, text in _find(corpus):
                            writer.add(document_id, tokenizer.encode(text), len(text.encode("utf-8")))
                        counts = writer.close()
                    finally:
                        writer.abandon()
                    (work / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        split = open_split(folder, "validation", tokenizer.vocab_size, counts)
    return split if split.documents else None


def _find(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """(id, text) of held-out documents."""
    data = corpus.data
    wanted = data.stream.validation_tokens / len(data.sources)
    farthest = _FARTHEST * wanted * _CHARACTERS_PER_TOKEN / data.validation_fraction
    for number, source in enumerate(data.sources):
        selector = Selector(source, data)
        tokens, read = 0, 0
        for shard in (shard for shard in corpus.shards if shard.source == number):
            if tokens >= wanted or read >= max(farthest, _LEAST):
                break
            records = reading_again(
                shard,
                Place(),
                part=0,
                parts=1,
                columns=selector.columns,
                retries=data.retries,
                wait=data.retry_seconds,
                tell=_log.warning,
            )
            for record in records:
                read += len(record.text or "")
                if selector.judge(record) == "held_out" and record.text is not None:
                    yield (shard.name if record.whole_file else f"{shard.name}:{record.number}"), record.text
                    tokens += len(corpus.tokenizer.encode(record.text)) + 1
                if tokens >= wanted or read >= max(farthest, _LEAST):
                    break
