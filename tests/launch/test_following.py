"""What status, history and logs make of a run directory, without a cluster."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hope_train.errors import UserError
from launch.client import Slurm
from launch.logs import follow_file, log_file, logs_command, tail
from launch.places import Places, find_run, read_lines, register, submitted_jobs
from launch.status import history_command, history_of, status_command, status_of


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A run of 100 steps that has logged three, was lost once with its node, and was then asked to stop."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "a"
    (run_dir / "checkpoints").mkdir(parents=True)
    tree = {
        "name": "a",
        "model": {"arch": "transformer_pp", "d_model": 32, "n_heads": 2, "mlp_width": 48, "vocab_size": 300},
        "train": {"context_length": 32, "batch_tokens": 128, "micro_batch_size": 2, "tokens": 12800},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = [
        {"step": step, "tokens": step * 128, "loss": 2.0, "tokens_per_s": 64.0, "time": time.time()}
        for step in (1, 2, 3)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "tok')
    (run_dir / "eval.jsonl").write_text('{"step": 0, "word_ppl": 30.5}\n{"step": 2, "validation_loss": 1.0}\n')
    found = Places(run_dir)
    found.note("submitted", job="local-1", submission="x")
    found.note("started", start="7.0", nodes=["n1"], from_step=0)
    found.note("started", start="7.1", nodes=["n2", "n3"], from_step=2)
    found.note("ranks", start="7.1", nodes=["n2"], ranks=1, mesh="", idle=["n3"])
    found.note("ended", start="7.1", action="requeue", reason="time limit", failure=False, exclude=["n3"], step=3)
    return found


def test_status_says_what_the_files_say(places: Places) -> None:
    status = status_of(places, Slurm())
    assert (status["step"], status["total_steps"], status["tokens"], status["tokens_per_s"]) == (3, 100, 384, 64.0)
    assert (status["word_ppl"], status["word_ppl_step"]) == (30.5, 0)
    assert status["training_left_s"] == pytest.approx((12800 - 384) / 64)
    assert (status["starts"], status["restarts"], status["last_end"]) == (2, 1, "time limit")
    assert status["estimated_end"] is None  # nothing runs
    assert status["job"] is None


def test_a_slurm_that_is_not_there_is_said_and_the_rest_shown(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places.note("submitted", job="7", submission="x")
    assert submitted_jobs(places) == ["7"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert status_command(["a"], as_json=False) == 0
    text = capsys.readouterr().out
    assert "not on this machine's" in text
    assert "3 of 100" in text


def test_status_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    status = status_of(Places(tmp_path), Slurm())
    assert status["step"] is None
    assert status["total_steps"] is None


def test_history_names_the_start_that_was_lost(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    lost, asked = history_of(places)
    assert lost["end"].startswith("lost")
    assert (lost["from_step"], lost["to_step"]) == (0, 2)
    assert (asked["to_step"], asked["nodes"]) == (3, ["n2", "n3"])
    assert asked["end"] == "time limit: requeue; left out: n3"
    assert history_command("a", as_json=True, slurm=Slurm(0.1)) == 0
    assert [row["start"] for row in json.loads(capsys.readouterr().out)] == ["7.0", "7.1"]


def test_history_names_what_was_asked_of_a_start_that_was_cut_off(places: Places) -> None:
    places.note("started", start="7.2", nodes=["n2"], from_step=3)
    places.note("asked", start="7.2", why="preempted")
    places.note("started", start="7.3", nodes=["n2"], from_step=3)
    assert [row["end"].partition(",")[0] for row in history_of(places)[2:]] == ["preempted", ""]
    end = {"action": "requeue", "failure": True, "exclude": [], "step": 3}
    places.note("ended", start="7.4", reason="no space left in the run directory", **end)  # nor for a word before
    places.note("ended", start="7.2", reason="overtaken", **end)
    assert [row["start"] for row in history_of(places)] == ["7.0", "7.1", "7.2", "7.3", "7.4"]
    assert history_of(places)[-1]["end"].startswith("no space left")


def test_a_run_is_found_by_directory_name_and_job(
    places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register(places.run_dir, "elsewhere", ["12", "13_0"])
    for text in ("a", "runs/a", str(places.run_dir), "elsewhere", "12"):
        assert find_run(text).run_dir == places.run_dir
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert find_run("13_0").run_dir == places.run_dir
    with pytest.raises(UserError, match="'a' is no run directory"):
        find_run("a")


def test_torn_lines_are_left_out(places: Places) -> None:
    assert [row["step"] for row in read_lines(places.run_dir / "metrics.jsonl")] == [1, 2, 3]


def log(places: Places, start: str, node: str, text: str) -> Path:
    file = places.start(start) / f"{node}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_logs_show_the_end_of_rank_0_s_node(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    log(places, "7.1", "n2", "one\ntwo\nthree\n")
    log(places, "7.1", "n3", "other\n")
    assert logs_command("a", False, None, None, 2) == 0
    assert capsys.readouterr().out == "two\nthree\n"
    assert logs_command("a", False, "n3", None, 2) == 0
    assert capsys.readouterr().out == "other\n"
    (places.start("7.1") / "ranks").mkdir()
    (places.start("7.1") / "ranks" / "0.json").write_text('{"node": "n3"}')
    assert log_file(places, "7.1", None).name == "n3.log"
    with pytest.raises(UserError, match=r"this start has n2\.log, n3\.log"):
        logs_command("a", False, "n9", None, 2)


def test_logs_before_the_first_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "launch").mkdir()
    with pytest.raises(UserError, match="has not been started"):
        logs_command(str(tmp_path), False, None, None, 5)
    output = tmp_path / "launch" / "submissions" / "1" / "job-9.out"
    output.parent.mkdir(parents=True)
    output.write_text("no such interpreter\n")
    assert logs_command(str(tmp_path), False, None, None, 5) == 0
    assert capsys.readouterr().out == "no such interpreter\n"


def test_following_waits_for_the_first_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = Places(tmp_path)
    log(places, "9.0", "n1", "trained\n")
    log(places, "submissions/1", "job-9", "").rename(places.submission(1) / "job-9.out")

    def later() -> None:
        (places.submission(1) / "job-9.out").write_text("a module\n")
        time.sleep(1)
        places.note("started", start="9.0", nodes=["n1"], from_step=0)
        places.note("ranks", start="9.0", nodes=["n1"], ranks=1, mesh="", idle=[])
        places.note("ended", start="9.0", action="finish", reason="completed", failure=False, exclude=[], step=1)

    thread = threading.Thread(target=later)
    thread.start()
    assert logs_command(str(tmp_path), True, None, None, 5) == 0
    thread.join()
    first, *rest = capsys.readouterr().out.splitlines()
    assert "has not been started yet" in first
    assert rest == ["a module", "trained"]


def test_following_goes_on_with_the_next_start(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    file = log(places, "7.1", "n2", "old\n")

    def later() -> None:
        time.sleep(1)
        with file.open("a") as stream:
            stream.write("new\n")
        time.sleep(1)
        places.note("started", start="7.2", nodes=["n4"], from_step=3)
        time.sleep(1)
        log(places, "7.2", "n4", "again\n")
        places.note("ranks", start="7.2", nodes=["n4"], ranks=1, mesh="", idle=[])
        time.sleep(1)
        places.note("ended", start="7.2", action="finish", reason="completed", failure=False, exclude=[], step=100)

    thread = threading.Thread(target=later)
    thread.start()
    assert logs_command("a", True, None, None, 1) == 0
    thread.join()
    assert capsys.readouterr().out == "old\nnew\n== start 7.2\nagain\n"


def test_following_a_file_that_does_not_exist_yet(tmp_path: Path) -> None:
    done: list[Any] = []

    def until() -> bool:
        if not done:
            (tmp_path / "x").write_text("all of it")
            done.append(1)
            return False
        return True

    assert list(follow_file(lambda: tmp_path / "x", from_end=True, until=until)) == ["all of it"]
    assert tail(tmp_path / "nowhere", 3) == []
