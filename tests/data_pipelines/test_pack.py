"""Packed files give back what was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.pack import PackWriter, open_split, token_dtype


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "<u2"), (65536, "<u2"), (65537, "<u4"), (200_000, "<u4")])
def test_documents_come_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    top = vocab_size - 1
    writer = PackWriter(tmp_path, "train", vocab_size, eot_id=1)
    writer.add("a.txt", [5, top, 7], 11)
    writer.add('quote" line\n \u2028', [9], 2)
    counts = writer.close()
    assert counts == {"documents": 2, "tokens": 7, "bytes": 13}
    split = open_split(tmp_path, "train", vocab_size, counts)
    assert split.tokens.dtype == np.dtype(dtype)
    assert split.tokens.tolist() == [1, 5, top, 7, 1, 9, 1]
    assert split.offsets.tolist() == [0, 4, 6]
    assert split.document_lengths().tolist() == [3, 1]
    assert split.document_ids() == ["a.txt", 'quote" line\n \u2028']
    assert (split.name, split.documents, split.text_bytes) == ("train", 2, 13)


def test_an_empty_split(tmp_path: Path) -> None:
    counts = PackWriter(tmp_path, "validation", 300, eot_id=1).close()
    split = open_split(tmp_path, "validation", 300, counts)
    assert (len(split.tokens), split.documents, split.document_ids()) == (0, 0, [])


@pytest.mark.parametrize(
    "counts", [{"tokens": 5, "documents": 1, "bytes": 1}, {"tokens": 4, "documents": 2, "bytes": 1}]
)
def test_counts_that_do_not_fit_are_noticed(tmp_path: Path, counts: dict[str, int]) -> None:
    writer = PackWriter(tmp_path, "train", 300, eot_id=1)
    writer.add("a", [5, 6], 1)
    assert writer.close() == {"tokens": 4, "documents": 1, "bytes": 1}
    with pytest.raises(ValueError):
        open_split(tmp_path, "train", 300, counts)
