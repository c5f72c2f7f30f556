"""Whole runs on streamed text: resumed exactly, refused on other text, saved when a source is gone."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hope_train.errors import UserError
from tests.train.tiny import STEPS, Tiny, assert_same_run, write_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ALL = ("checkpoint.every=1", "checkpoint.keep_last=99", "model.arch=transformer_pp", "model.mlp_width=48")


@pytest.fixture
def text(tmp_path: Path, corpus: dict[str, Any]) -> Path:
    """The corpus in four files of this test's own."""
    lines = Path(corpus["sources"][0]["path"]).read_text(encoding="utf-8").splitlines(keepends=True)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        (folder / f"part-{number}.jsonl").write_text("".join(lines[number::4]), encoding="utf-8")
    return folder


@pytest.fixture
def streaming(tiny: Tiny, corpus: dict[str, Any], text: Path) -> Tiny:
    stream = {"lanes": 3, "shuffle_documents": 8, "workers": 0, "validation_tokens": 300}
    retry = {"retries": 1, "retry_seconds": 0.0}
    data = {**corpus, "sources": [{"path": str(text)}], "mode": "streaming", "stream": stream, **retry}
    write_config(tiny.config, data)
    return Tiny(tiny.folder, tiny.config)


def cut(tiny: Tiny, name: str, step: int) -> None:
    """As a kill right after the save of this step leaves run `whole`."""
    shutil.copytree(tiny.dir("whole"), tiny.dir(name))
    (tiny.dir(name) / "STOPPED.json").unlink()
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(tiny.checkpoint(name, later))


def levels(*overrides: str) -> tuple[str, ...]:
    return (*overrides, "model.cms.levels=[]")


@pytest.mark.timeout(200)
def test_a_run_on_a_stream_is_resumed_exactly(streaming: Tiny) -> None:
    assert streaming.train("whole", *levels(*ALL)) == 0
    rows = streaming.metrics("whole")
    assert rows[-1]["data"]["documents"] > 0
    assert rows[-1]["data"]["held_out"] > 0
    for step, workers in ((1, 0), (4, 2), (8, 0)):
        cut(streaming, f"killed-{step}", step)
        assert streaming.train(f"killed-{step}", *levels(*ALL), f"data.stream.workers={workers}") == 0
        assert_same_run(streaming, f"killed-{step}", "whole")
    trainer = json.loads((streaming.checkpoint("whole", STEPS) / "trainer.json").read_text())
    assert set(trainer["data"]["lanes"]) == {"0", "1", "2"}


def test_every_fault_has_its_counter_in_the_metrics(streaming: Tiny, text: Path) -> None:
    good = (text / "part-0.jsonl").read_bytes()
    bad = (
        b'{"text": "caf\xe9"}\n{"text": "half\n[1]\n{"body": "x"}\n{"text": "\\ud800"}\n{"text": ""}\n{"text": "ab"}\n'
    )
    long = json.dumps({"text": "river " * 180_000}).encode() + b"\n"
    (text / "part-0.jsonl").write_bytes(bad + long + good)
    (text / "torn.jsonl.gz").write_bytes(gzip.compress(good)[:-20])
    with pytest.raises(UserError, match=r"part-0\.jsonl:1: .*not UTF-8"):
        streaming.train("stops", *levels(*ALL))
    source = json.dumps({"path": str(text), "min_characters": 3})
    skips = ("data.on_fault=skip", f"data.sources=[{source}]", "data.stream.shuffle_documents=256")
    assert streaming.train("skips", *levels(*ALL), *skips) == 0
    counts = streaming.metrics("skips")[-1]["data"]
    expected = {"not_utf8": 1, "not_json": 2, "no_text": 1, "not_unicode": 1, "empty": 1, "too_short": 1, "long": 1}
    assert {name: counts.get(name) for name in expected} == expected
    assert counts["damaged"] == 1


def test_another_corpus_is_refused_by_name(streaming: Tiny, text: Path) -> None:
    assert streaming.train("whole", *levels(*ALL)) == 0
    cut(streaming, "grown", 3)
    with (text / "part-2.jsonl").open("a") as out:
        out.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"trained on other data .*part-2\.jsonl"):
        streaming.train("grown", *levels(*ALL))
    cut(streaming, "lanes", 3)
    with pytest.raises(UserError, match=r"data\.stream\.lanes is 3 there and 2 here"):
        streaming.train("lanes", *levels(*ALL), "data.stream.lanes=2")


def test_a_source_that_goes_away_ends_in_a_save_and_loses_nothing(
    streaming: Tiny, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small files, since one that is open may be read to its end.
    lines = [line for path in sorted(text.iterdir()) for line in path.read_text().splitlines(keepends=True)]
    for path in text.iterdir():
        path.unlink()
    for number in range(50):
        (text / f"part-{number}.jsonl").write_text("".join(lines[number * 4 : number * 4 + 4]))
    few = levels(*ALL[2:], "data.stream.shuffle_documents=2")
    assert streaming.train("whole", *few, "checkpoint.every=1", "checkpoint.keep_last=99") == 0
    from hope_train.train import loop

    hidden = text.with_name("hidden")
    step = loop.take_step

    def hide(run: Any, index: int, measure: bool) -> Any:
        if index == 3:
            hidden.mkdir()
            for path in text.iterdir():
                path.rename(hidden / path.name)
        return step(run, index, measure)

    monkeypatch.setattr(loop, "take_step", hide)
    assert streaming.train("gone", *few) == 2
    said = capsys.readouterr().out
    assert "cannot be read" in said
    assert "tried 2 times" in said
    stopped = streaming.stopped("gone")
    assert stopped["reason"] == "error"
    assert 4 <= stopped["step"] < STEPS
    assert streaming.checkpoints("gone")[-1].endswith(f"{stopped['step']:08d}")
    for path in hidden.iterdir():
        path.rename(text / path.name)
    monkeypatch.setattr(loop, "take_step", step)
    assert streaming.train("gone", *few) == 0
    ours, whole = ([row["loss"] for row in streaming.metrics(name)] for name in ("gone", "whole"))
    assert ours == whole


def test_a_run_on_a_token_set_is_resumed_exactly_and_refuses_another(
    tiny: Tiny, corpus: dict[str, Any], text: Path
) -> None:
    from data_pipelines.commands import tokenize_command

    write_config(tiny.config, {**corpus, "sources": [{"path": str(text)}]})
    sets = [tiny.folder / name for name in ("set", "other")]
    assert tokenize_command(str(tiny.config), [], str(sets[0]), workers=1, as_json=True) == 0
    with (text / "part-2.jsonl").open("a") as out:
        out.write('{"text": "one more"}\n')
    assert tokenize_command(str(tiny.config), [], str(sets[1]), workers=1, as_json=True) == 0
    write_config(tiny.config, {**corpus, "mode": "indexed", "sources": [{"indexed": str(sets[0])}]})
    assert tiny.train("whole", *levels(*ALL)) == 0
    for step in (1, 5):
        cut(tiny, f"killed-{step}", step)
        assert tiny.train(f"killed-{step}", *levels(*ALL)) == 0
        assert_same_run(tiny, f"killed-{step}", "whole")
    cut(tiny, "other-text", 3)
    shutil.rmtree(sets[0])
    sets[1].rename(sets[0])
    with pytest.raises(UserError, match=r"trained on other data \(text"):
        tiny.train("other-text", *levels(*ALL))
