"""Token sets: the same whatever the number of workers, whole or gone on with, in a format that is Megatron's."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import tokenising as module
from data_pipelines.carving import is_held_out, text_hash
from data_pipelines.commands import verify_command
from data_pipelines.megatron import IndexedWriter, open_indexed
from data_pipelines.tokenising import tokenise
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenset import MANIFEST, read_manifest
from hope_train.config.data import DataConfig
from hope_train.errors import UserError
from tests.data_pipelines.conftest import make_texts

MakeConfig = Callable[..., DataConfig]


def hashes(folder: Path) -> dict[str, str]:
    manifest = read_manifest(folder)
    return {
        name: entry["sha256"]
        for shard in manifest["shards"]
        for part in shard["splits"].values()
        for name, entry in part["files"].items()
    }


def documents(folder: Path, split: str, tokenizer: Tokenizer) -> Iterator[str]:
    for shard in read_manifest(folder)["shards"]:
        file = open_indexed(folder / shard["splits"][split]["prefix"])
        for first, last in zip(file.documents[:-1], file.documents[1:], strict=True):
            tokens = file.tokens[first:last]
            assert tokens[-1] == tokenizer.eot_id
            yield tokenizer.decode(tokens[:-1])


@pytest.fixture
def several(tmp_path: Path, texts: list[str]) -> DataConfig:
    """Five files of three kinds in a folder."""
    folder = tmp_path / "books"
    folder.mkdir()
    lines = [json.dumps({"text": text, "language": "de" if n % 3 else "en"}) + "\n" for n, text in enumerate(texts)]
    (folder / "part-1.jsonl").write_text("".join(lines[:120]))
    (folder / "part-2.jsonl").write_text("".join(lines[120:240]))
    (folder / "part-10.jsonl.gz").write_bytes(gzip.compress("".join(lines[240:400]).encode()))
    (folder / "part-11.jsonl").write_text("".join(lines[400:]))
    return DataConfig.model_validate({"sources": [{"path": str(folder)}], "validation_fraction": 0.1})


def test_every_document_is_there_once_on_its_side(
    several: DataConfig, texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    manifest = tokenise(several, tokenizer, tmp_path / "set", 1)
    held = [text for text in texts if is_held_out(text_hash(text), 0.1)]
    train = sorted(documents(tmp_path / "set", "train", tokenizer))
    assert train == sorted(text for text in texts if text not in held)
    assert sorted(documents(tmp_path / "set", "validation", tokenizer)) == sorted(held)
    assert manifest["counts"] == {"documents": len(train), "held_out": len(held)}
    figures = manifest["splits"]["train"]
    assert figures["documents"] == len(train)
    assert figures["bytes"] == sum(len(text.encode()) for text in train)
    assert figures["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in train)
    assert len(manifest["shards"]) >= module.FEWEST_PARTS


def test_megatrons_own_reader_reads_it(several: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenise(several, tokenizer, tmp_path / "set", 1)
    data = IndexedDataset(str(tmp_path / "set" / "train-00003"))
    ours = open_indexed(tmp_path / "set" / "train-00003")
    assert len(data) == len(ours.documents) - 1 > 0
    assert data.index.dtype == np.uint16
    for number in range(len(data)):
        assert np.array_equal(data.get(number), ours.tokens[ours.documents[number] : ours.documents[number + 1]])


@pytest.mark.timeout(120)
def test_the_number_of_workers_changes_nothing(several: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    alone = tokenise(several, tokenizer, tmp_path / "one", 1)
    together = tokenise(several, tokenizer, tmp_path / "two", 2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert alone["splits"] == together["splits"]


def test_finished_shards_are_kept(
    several: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    tokenise(several, tokenizer, whole, 1)
    out = tmp_path / "set"
    write, written = module._write_shard, list[int]()

    def failing(number: int) -> dict[str, Any]:
        if number == 7:
            raise KeyboardInterrupt
        written.append(number)
        return write(number)

    monkeypatch.setattr(module, "_write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        tokenise(several, tokenizer, out, 1)
    with pytest.raises(UserError, match=r"has no manifest\.json: it is not finished"):
        read_manifest(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*.bin")}
    monkeypatch.setattr(module, "_write_shard", lambda number: (written.append(number), write(number))[1])
    (out / "train-00002.bin").write_bytes(b"torn")
    tokenise(several, tokenizer, out, 1)
    assert written == [*range(7), 2, *range(7, 16)]
    assert hashes(out) == hashes(whole)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*.bin")}
    assert {name for name in times if kept[name] == times[name]} == set(times) - {"train-00002.bin", "train-00007.bin"}


@pytest.mark.timeout(120)
def test_a_killed_process_is_gone_on_with(several: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenise(several, tokenizer, tmp_path / "whole", 1)
    out = tmp_path / "set"
    (tmp_path / "data.json").write_text(several.model_dump_json())
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from data_pipelines import tokenising as t\nfrom data_pipelines.tokenizer import Tokenizer\n"
        "from hope_train.config.data import DataConfig\n"
        "write = t._write_shard\n"
        "def slow(number):\n    entry = write(number)\n    print(number, flush=True)\n"
        "    time.sleep(0.3)\n    return entry\n"
        "t._write_shard = slow\n"
        "data = DataConfig.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "t.tokenise(data, Tokenizer(sys.argv[2]), Path(sys.argv[3]), 1)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "data.json"), tokenizer.path, str(out)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert len(list(out.glob("shard-*.json"))) >= 3
    lines: list[str] = []
    tokenise(several, tokenizer, out, 1, lines.append)
    assert "shards are there already" in lines[0]
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_worker_that_is_killed_is_a_clear_stop(several: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenise(several, tokenizer, tmp_path / "whole", 1)
    lines: list[str] = []

    def kill(line: str) -> None:
        lines.append(line)
        multiprocessing.active_children()[0].kill()

    with pytest.raises(UserError, match=r"has ended \(exit code -9\): was it killed, .* the same command goes on"):
        tokenise(several, tokenizer, tmp_path / "set", 2, kill)
    assert 0 < len(lines) < module.FEWEST_PARTS
    assert multiprocessing.active_children() == []
    tokenise(several, tokenizer, tmp_path / "set", 2, lines.append)
    assert any("shards are there already" in line for line in lines)
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_workers_end_with_the_command(several: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Also in the middle of a shard, which the next call would write beside them."""
    asleep = {"path": several.sources[0].path, "filter": "tests.data_pipelines.filters:asleep"}
    data = DataConfig.model_validate({**several.model_dump(), "sources": [asleep]})
    (tmp_path / "data.json").write_text(data.model_dump_json())
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from data_pipelines.tokenising import tokenise\nfrom data_pipelines.tokenizer import Tokenizer\n"
        "from hope_train.config.data import DataConfig\n"
        "if __name__ == '__main__':\n"
        "    data = DataConfig.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "    tokenise(data, Tokenizer(sys.argv[2]), Path(sys.argv[3]), 2)\n"
    )
    (tmp_path / "program.py").write_text(program)
    names = [str(tmp_path / "program.py"), str(tmp_path / "data.json"), tokenizer.path, str(tmp_path / "set")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen([sys.executable, *names], env=environment) as process:
        while not all((tmp_path / "set" / f"train-0000{number}.bin").exists() for number in (0, 1)):
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        process.kill()
    while any(Path(f"/proc/{pid}").exists() for pid in children):  # Or the test's own time is over.
        time.sleep(0.05)


def test_another_set_in_the_folder_is_left_alone(
    several: DataConfig, tokenizer: Tokenizer, unigram_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    tokenise(several, tokenizer, out, 1)
    before = hashes(out)
    with pytest.raises(UserError, match=r"holds another token set \(tokenizer, vocab_size, eot_id differ\)|differ"):
        tokenise(several, unigram_tokenizer, out, 1)
    with Path(several.sources[0].path or "", "part-1.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"holds another token set \(text differ\)"):
        tokenise(several, tokenizer, out, 1)
    assert hashes(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and no token set"):
        tokenise(several, tokenizer, tmp_path / "full", 1)


def test_a_disk_that_is_full_is_said(
    several: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: IndexedWriter, token_ids: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "add", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room, and run the same"):
        tokenise(several, tokenizer, tmp_path / "set", 1)


def test_filters_and_faults_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows: list[object] = [
        {"text": "good and long enough", "language": "en"},
        {"text": "", "language": "en"},
        {"text": None, "language": "en"},
        {"text": "short", "language": "en"},
        {"text": "lang genug, aber deutsch", "language": "de"},
        {"text": "no vowels? rhythm myths", "language": "en"},
        {"text": "x" * 2_000_000 + " long", "language": "en"},
        {"text": "y" * 3_000_000, "language": "en"},
        {"body": "no text field"},
        [1, 2],
    ]
    lines = [json.dumps(row).encode() for row in rows]
    lines += [b'{"text": "caf\xe9"}', b'{"text": "half', b'{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    packed = gzip.compress(b"".join(b'{"text": "the same line %d", "language": "en"}\n' % n for n in range(5000)))
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    source = {
        "path": str(tmp_path),
        "min_characters": 10,
        "max_characters": 2_500_000,
        "language": ["en"],
        "filter": "tests.data_pipelines.filters:no_rhythm",
    }
    tree = {"sources": [source], "validation_fraction": 0.0, "on_fault": "skip"}
    manifest = tokenise(DataConfig.model_validate(tree), tokenizer, tmp_path / "set", 1)
    counts = dict(manifest["counts"])
    before_the_break = counts.pop("documents") - 2
    assert counts == {
        "empty": 2,
        "too_short": 1,
        "other_language": 1,
        "filtered": 1,
        "long": 1,
        "too_long": 1,
        "no_text": 1,
        "not_json": 2,
        "not_utf8": 1,
        "not_unicode": 1,
        "damaged": 1,
    }
    assert 1000 < before_the_break < 4999
    none = {**tree, "sources": [{**source, "max_characters": 11}]}
    with pytest.raises(UserError, match=r"there is no training text in .* \(1 damaged, 2 empty, .* 1 too_short\)"):
        tokenise(DataConfig.model_validate(none), tokenizer, tmp_path / "none", 1)
    with pytest.raises(UserError, match=r"a\.jsonl:9: no field 'text'|cut short|a\.jsonl"):
        tokenise(DataConfig.model_validate({**tree, "on_fault": "stop"}), tokenizer, tmp_path / "other", 1)


def test_a_set_is_verified(
    several: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    tokenise(several, tokenizer, out, 1)
    assert verify_command(str(out)) == 0
    assert "0 damaged" in capsys.readouterr().out
    raw = bytearray((out / "train-00004.bin").read_bytes())
    raw[10] ^= 1
    (out / "train-00004.bin").write_bytes(raw)
    (out / "train-00001.idx").unlink()
    assert verify_command(str(out), as_json=True) == 2
    damaged = json.loads(capsys.readouterr().out)["damaged"]
    assert len(damaged) == 2
    assert any("train-00004.bin does not have the sha256" in line for line in damaged)
    assert any("train-00001.idx: No such file" in line for line in damaged)
    with pytest.raises(UserError, match="not a token set"):
        verify_command(str(tmp_path))
    (out / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        verify_command(str(out))


def test_cached_corpora_are_verified_too(texts: list[str], make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    from data_pipelines.corpus import open_corpus

    folder = open_corpus(make_config(texts), tokenizer).folder
    assert verify_command(str(folder)) == 0
    (folder / "train.tokens.bin").write_bytes(b"")
    assert verify_command(str(folder)) == 2


def test_two_processes_do_not_write_one_set(several: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    import filelock

    (tmp_path / "set").mkdir()
    with (
        filelock.FileLock(tmp_path / "set" / ".lock"),
        pytest.raises(UserError, match="another process is writing this token set"),
    ):
        tokenise(several, tokenizer, tmp_path / "set", 1)


def test_text_that_changes_meanwhile_is_refused(
    several: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module._write_shard

    def meddling(number: int) -> dict[str, Any]:
        path = Path(several.sources[0].path or "", "part-2.jsonl")
        path.write_text('{"text": "all new"}\n' * (number + 1))
        return write(number)

    monkeypatch.setattr(module, "_write_shard", meddling)
    with pytest.raises(UserError, match="changed while it was tokenised"):
        tokenise(several, tokenizer, tmp_path / "set", 1)


def test_a_source_that_goes_away_is_tried_again(
    several: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipelines import selecting
    from data_pipelines.records import Place
    from data_pipelines.shards import list_shards

    shard = list_shards(several.sources, 1.0)[0]
    hidden = tmp_path / "hidden"
    path = Path(several.sources[0].path or "", "part-1.jsonl")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            shutil.move(hidden, path)

    shutil.move(path, hidden)
    lines: list[str] = []
    found = list(selecting.reading_again(shard, Place(), 0, 1, (), 5, 0.5, lines.append, sleep))
    assert len(found) == 120
    assert waits == [0.5, 1.0, 2.0]
    assert "try 3 of 5" in lines[2]
    path.unlink()
    with pytest.raises(UserError, match=r"part-1\.jsonl: cannot be read.*\(tried 3 times\)"):
        list(selecting.reading_again(shard, Place(), 0, 1, (), 2, 0.0, sleep=lambda _: None))


def test_many_short_texts_of_other_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A large vocabulary is kept in int32, as Megatron does."""
    from data_pipelines.megatron import indexed_dtype

    assert (indexed_dtype(65499).name, indexed_dtype(65500).name) == ("uint16", "int32")
    writer = IndexedWriter(tmp_path / "big", indexed_dtype(100_000))
    for text in make_texts(3):
        writer.add([70_000, *tokenizer.encode(text)])
    writer.close()
    file = open_indexed(tmp_path / "big")
    assert file.tokens.dtype == np.int32
    assert file.tokens[0] == 70_000
