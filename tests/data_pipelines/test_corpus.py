"""The cache: made once, found again, mended when damaged, safe with many processes at once."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import corpus as module
from data_pipelines.corpus import Corpus, open_corpus
from data_pipelines.pack import FILES, CorpusSplit
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenizer_training import train_tokenizer
from hope_train.config.data import DataConfig
from hope_train.errors import UserError

MakeConfig = Callable[..., DataConfig]


def documents_of(split: CorpusSplit, tokenizer: Tokenizer) -> list[str]:
    bounds = split.offsets.tolist()
    assert all(split.tokens[place] == tokenizer.eot_id for place in bounds if split.documents)
    return [tokenizer.decode(split.tokens[a:b]) for a, b in itertools.pairwise(bounds)]


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    built: list[Path] = []
    build = module._build

    def counting(folder: Path, *rest: Any) -> None:
        built.append(folder)
        build(folder, *rest)

    monkeypatch.setattr(module, "_build", counting)
    return built


def test_all_text_is_there_once_in_order(texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    corpus = open_corpus(make_config(texts), tokenizer)
    train, held = documents_of(corpus.train, tokenizer), documents_of(corpus.validation, tokenizer)
    held_set = set(held)
    assert held
    assert train == [text for text in texts if text not in held_set]
    assert held == [text for text in texts if text in held_set]
    assert int(np.count_nonzero(corpus.train.tokens == tokenizer.eot_id)) == len(train) + 1
    assert corpus.train.text_bytes == sum(len(text.encode()) for text in train)
    assert corpus.manifest["splits"]["train"] == {
        "documents": len(train),
        "tokens": len(corpus.train.tokens),
        "bytes": corpus.train.text_bytes,
    }
    assert all(name.split("corpus.jsonl:")[1].isdigit() for name in corpus.train.document_ids())


def test_few_documents_are_cut_and_none_of_their_text_is_lost(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer
) -> None:
    books = ["\n\n".join(texts[number::6]) for number in range(6)]
    corpus = open_corpus(make_config(books, validation_fraction=0.05), tokenizer)
    assert corpus.manifest["cut_into_pieces_of"] is not None
    train, held = documents_of(corpus.train, tokenizer), documents_of(corpus.validation, tokenizer)
    assert sum(map(len, held)) + sum(map(len, train)) == sum(map(len, books))
    assert all(any(part in book for book in books) for part in held + train)
    assert 0.02 < sum(map(len, held)) / sum(map(len, books)) < 0.1


def test_batches_of_tokenising_do_not_show(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = open_corpus(make_config(texts), tokenizer)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 1000)
    parts = open_corpus(make_config(texts, cache_dir=str(tmp_path / "other")), tokenizer)
    assert np.array_equal(whole.train.tokens, parts.train.tokens)
    hashes = [{n: f["sha256"] for n, f in corpus.manifest["files"].items()} for corpus in (whole, parts)]
    assert hashes[0] == hashes[1]


def test_the_cache_is_found_again(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = count_builds(monkeypatch)
    data = make_config(texts)
    first, second = open_corpus(data, tokenizer), open_corpus(data, tokenizer)
    assert len(built) == 1
    assert first.folder == second.folder
    assert first.manifest == second.manifest
    left = {path.name for path in first.folder.parent.iterdir()}
    assert left - {first.folder.name + ".lock"} == {first.folder.name}


def test_anything_that_matters_makes_another_corpus(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer, unigram_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = make_config(texts)
    folders = [
        open_corpus(data, tokenizer).folder,
        open_corpus(data, unigram_tokenizer).folder,
        open_corpus(make_config(texts, validation_fraction=0.2), tokenizer).folder,
    ]
    with (tmp_path / "corpus.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    grown = open_corpus(data, tokenizer)
    assert len({*folders, grown.folder}) == 4
    assert "one more" in documents_of(grown.train, tokenizer) + documents_of(grown.validation, tokenizer)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", [*(name for name in FILES if name.startswith("train")), "manifest.json"])
@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink], ids=["flip", "shorten", "remove"])
def test_damage_is_noticed_and_mended(
    texts: list[str],
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    data = make_config(texts[:100])
    corpus = open_corpus(data, tokenizer)
    tokens = np.array(corpus.train.tokens)
    if name == "manifest.json" and damage is flip:
        (corpus.folder / name).write_text("{}")
    else:
        damage(corpus.folder / name)
    with caplog.at_level(logging.WARNING):
        mended = open_corpus(data, tokenizer)
    assert "is damaged" in caplog.text
    assert np.array_equal(mended.train.tokens, tokens)
    caplog.clear()
    open_corpus(data, tokenizer)
    assert not caplog.records
    assert not list(mended.folder.parent.glob("*.removed"))


def test_a_large_corpus_is_hashed_again_only_when_its_times_changed(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_config(texts[:100])
    corpus = open_corpus(data, tokenizer)
    monkeypatch.setattr(module, "_HASH_ALWAYS_BYTES", 0)
    hashed: list[str] = []
    file_hash = module._file_hash

    def noting(path: Path) -> str:
        hashed.append(path.name)
        return file_hash(path)

    monkeypatch.setattr(module, "_file_hash", noting)
    open_corpus(data, tokenizer)
    assert hashed == []
    os.utime(corpus.folder / "train.tokens.bin")
    open_corpus(data, tokenizer)
    assert hashed == ["train.tokens.bin"]
    flip(corpus.folder / "train.tokens.bin")
    assert open_corpus(data, tokenizer).folder == corpus.folder
    assert file_hash(corpus.folder / "train.tokens.bin") == corpus.manifest["files"]["train.tokens.bin"]["sha256"]


def test_bad_text_leaves_nothing_behind(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = make_config(texts)
    with (tmp_path / "corpus.jsonl").open("ab") as stream:
        stream.write(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl:501: not UTF-8"):
        open_corpus(data, tokenizer)
    assert [path.suffix for path in (tmp_path / "cache" / "corpora").iterdir()] in ([], [".lock"])


def test_no_sources_and_no_text_are_refused(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        open_corpus(make_config([], sources=[]), tokenizer)
    with pytest.raises(UserError, match="there is no text in it"):
        open_corpus(make_config(["", ""]), tokenizer)


def test_text_that_changes_between_the_readings_is_refused(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = make_config(texts)
    tokenise = module._tokenise

    def late(*arguments: Any) -> Any:
        (tmp_path / "corpus.jsonl").write_text('{"text": "something else"}\n')
        return tokenise(*arguments)

    monkeypatch.setattr(module, "_tokenise", late)
    with pytest.raises(UserError, match=r"corpus\.jsonl changed while it was being read"):
        open_corpus(data, tokenizer)
    assert not [path for path in (tmp_path / "cache" / "corpora").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "free some space or set data.cache_dir"), (errno.EROFS, "set ")]
)
def test_a_full_or_read_only_disk_is_named(
    texts: list[str],
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    code: int,
    said: str,
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(UserError, match=f"{os.strerror(code)}.*{said}"):
        open_corpus(make_config(texts), tokenizer)
    assert not [path for path in (tmp_path / "cache" / "corpora").iterdir() if path.is_dir()]


def test_a_cache_folder_that_is_a_file_is_named(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer
) -> None:
    data = make_config(texts)
    assert data.tokenizer is not None
    with pytest.raises(UserError, match=r"cannot be written .* set data\.cache_dir"):
        open_corpus(make_config(texts, cache_dir=data.tokenizer), tokenizer)


def test_what_a_killed_process_left_is_cleared(texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    data = make_config(texts)
    folder = open_corpus(data, tokenizer).folder
    shutil.rmtree(folder)
    left = folder.with_name(f"{folder.name}.tmp-{module.socket.gethostname()}-abc")
    left.mkdir()
    (left / "train.tokens.bin").write_bytes(b"half")
    open_corpus(data, tokenizer)
    assert not left.exists()


def test_another_machine_without_our_lock_may_be_first(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = make_config(texts)
    other = open_corpus(data.model_copy(update={"cache_dir": str(tmp_path / "other")}), tokenizer)
    tokenise = module._tokenise

    def slow(work: Path, *rest: Any) -> Any:
        counts = tokenise(work, *rest)
        shutil.copytree(other.folder, work.parent / other.folder.name)
        return counts

    monkeypatch.setattr(module, "_tokenise", slow)
    corpus = open_corpus(data, tokenizer)
    assert corpus.manifest == other.manifest
    assert not list(corpus.folder.parent.glob("*.tmp-*"))


def _open_in_process(data: dict[str, Any], proto: bytes, start: Any, answers: Any) -> None:
    builds = 0
    build = module._build

    def counting(*arguments: Any) -> None:
        nonlocal builds
        builds += 1
        build(*arguments)

    module._build = counting  # type: ignore[assignment]
    start.wait(60)
    corpus = open_corpus(DataConfig.model_validate(data), Tokenizer.from_proto(proto))
    answers.put((builds, corpus.manifest["files"]["train.tokens.bin"]["sha256"], int(corpus.train.tokens.sum())))


@pytest.mark.timeout(120)
def test_of_many_processes_at_once_one_tokenises(
    texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer
) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(4), context.Queue()
    arguments = (make_config(texts).model_dump(), tokenizer.proto, start, answers)
    processes = [context.Process(target=_open_in_process, args=arguments, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sum(builds for builds, *_ in results) == 1
    assert len({tuple(rest) for _, *rest in results}) == 1


def test_waiting_is_said(
    texts: list[str],
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import filelock

    data = make_config(texts)
    folder = open_corpus(data, tokenizer).folder
    shutil.rmtree(folder)
    monkeypatch.setattr(module, "_NOTICE_SECONDS", 0.05)
    holder = filelock.FileLock(f"{folder}.lock")
    holder.acquire()

    class Release(logging.Handler):
        """Lets go as soon as the waiting has been said."""

        def emit(self, record: logging.LogRecord) -> None:
            holder.release()

    handler = Release()
    module._log.addHandler(handler)
    try:
        with caplog.at_level(logging.WARNING):
            assert isinstance(open_corpus(data, tokenizer), Corpus)
    finally:
        module._log.removeHandler(handler)
        holder.release(force=True)
    assert "waiting for another process" in caplog.text


def test_a_wide_vocabulary_takes_wide_tokens(make_config: MakeConfig, tmp_path: Path) -> None:
    """Ids above 65535 survive; a vocabulary of every Chinese character and more is the cheapest way to have them."""
    characters = [chr(code) for code in [*range(0x4E00, 0xA000), *range(0xAC00, 0xD7A4), *range(0x20000, 0x2A6E0)]]
    text = "".join(characters)
    tokenizer = train_tokenizer([text], tmp_path / "wide", 258 + len(characters) + 1, character_coverage=1.0)
    corpus = open_corpus(make_config([text], validation_fraction=0.0), tokenizer)
    assert corpus.train.tokens.dtype == np.uint32
    assert int(corpus.train.tokens.max()) > 65535
    assert documents_of(corpus.train, tokenizer) == [text]


def test_the_manifest_says_what_it_is_made_of(texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    manifest = json.loads((open_corpus(make_config(texts), tokenizer).folder / "manifest.json").read_text())
    assert manifest["key"]["tokenizer"] == tokenizer.fingerprint
    assert manifest["key"]["validation_fraction"] == 0.1
    assert set(manifest["files"]) == set(FILES)
    assert (manifest["eot_id"], manifest["vocab_size"]) == (tokenizer.eot_id, 400)
