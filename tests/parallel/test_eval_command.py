"""`hope eval` under a launcher: the figures of one process, said once, on a mesh of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.tokenizer import Tokenizer
from tests.evaluate.conftest import tokenizer as tokenizer
from tests.evaluate.conftest import wikitext_folder as wikitext_folder
from tests.evaluate.tiny import make_run, run_config
from tests.parallel import jobs
from tests.parallel.harness import Gang

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def one_process(gang: Gang, arguments: list[str]) -> list[dict[str, Any]]:
    ((code, text, _),) = gang.run(jobs.eval_run, 1, arguments=arguments)
    assert code == 0
    found: list[dict[str, Any]] = json.loads(text)
    assert len(found) == 3
    return found


def check(gang: Gang, arguments: list[str], ranks: int, overrides: list[str], expected: list[dict[str, Any]]) -> None:
    first, *others = gang.run(jobs.eval_run, ranks, arguments=[*arguments, *overrides])
    assert [other[:2] for other in others] == [(0, "")] * (ranks - 1)
    assert first[0] == 0, first
    for mine, theirs in zip(json.loads(first[1]), expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in theirs.keys() - {"seconds"}:
            value = theirs[key]
            assert mine[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


PROTOCOLS = ("--protocol", "word", "--protocol", "token", "--stateful", "--json")


def test_figures_are_those_of_one_process(
    gang: Gang, tmp_path: Path, tokenizer: Tokenizer, wikitext_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)
    # Five pages, one of them empty; a training batch of 2 rows, which 4 ranks could not share.
    make_run(tmp_path, run_config("hope", tokenizer.vocab_size, parallel={"tp": 2}), tokenizer)
    arguments = [str(tmp_path), "--wikitext", str(wikitext_folder), *PROTOCOLS]
    expected = one_process(gang, arguments)
    for ranks, overrides in (
        (3, []),
        (2, ["parallel.tp=2"]),
        (4, ["parallel.tp=2"]),
        (4, ["parallel.pp=2"]),
        (2, ["parallel.engine=deepspeed"]),
    ):
        check(gang, arguments, ranks, overrides, expected)
    first, second = gang.run(jobs.eval_run, 2, arguments=[*arguments, "parallel.tp=2", "parallel.pp=2"])
    assert first[0] == second[0] == 2
    assert "cannot be divided" in first[2]
    assert second[2] == ""
    ((code, _, said),) = gang.run(jobs.eval_run, 1, arguments=[*arguments, "parallel.tp=2"])
    assert code == 2
    assert "start a multiple of 2 processes" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_figures_of_shards_and_of_other_schedules(
    gang: Gang, tmp_path: Path, tokenizer: Tokenizer, wikitext_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)
    make_run(tmp_path, run_config("hope", tokenizer.vocab_size, model={"n_layers": 4}), tokenizer)
    arguments = [str(tmp_path), "--wikitext", str(wikitext_folder), *PROTOCOLS]
    expected = one_process(gang, arguments)
    for ranks, overrides in (
        (2, ["parallel.dp_shard=2"]),
        (2, ["parallel.dp_shard=2", "parallel.keep_gathered=never"]),
        (4, ["parallel.dp_shard=2"]),
        (4, ["parallel.dp_shard=2", "parallel.tp=2"]),
        (2, ["parallel.pp=2", "parallel.schedule=zbv"]),
        (2, ["parallel.pp=2", "parallel.schedule=interleaved_1f1b"]),
        (4, ["parallel.pp=2", "parallel.dp_shard=2"]),
    ):
        check(gang, arguments, ranks, overrides, expected)
