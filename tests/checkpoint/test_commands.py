"""`hope checkpoint ls|verify|prune|consolidate|diff`, called as the command line calls them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hope_train import cli
from hope_train.checkpoint import commands
from hope_train.checkpoint.fence import INCARNATION
from hope_train.checkpoint.manifest import is_trimmed, list_checkpoints, step_name, verify
from hope_train.checkpoint.retention import removals, remove
from tests.checkpoint.toy import facts, make_writer, names
from tests.checkpoint.toy_levels import level_state, load_levels, save_levels

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Out = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 4 to 7 of periods 1, 2 and 4; the last two are kept, and what they refer to."""
    writer, _ = make_writer(tmp_path / "run", keep_last=2)
    save_levels(writer, [4, 5, 6, 7])
    writer.fence.release()
    return tmp_path / "run"


def hope(*arguments: object) -> int:
    return cli.run(["checkpoint", *map(str, arguments)])


def answer(capsys: Out, *arguments: object, code: int = 0) -> Any:
    """The JSON of a command."""
    assert hope(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestLs:
    def test_every_level_with_its_age_and_home(self, run: Path, capsys: Out) -> None:
        found = answer(capsys, "ls", run)
        entries = {entry["name"]: entry for entry in found["checkpoints"]}
        assert list(entries) == [step_name(step) for step in (4, 6, 7)]
        assert (entries[step_name(4)]["kind"], entries[step_name(4)]["held"]) == ("remains", ["level_2"])
        newest = entries[step_name(7)]
        assert (newest["step"], newest["tokens"], newest["whole"], newest["problem"]) == (7, 70, True, None)
        assert {name: (part["folder"], part["age"]) for name, part in newest["sets"].items()} == {
            "core": (f"{step_name(7)}/core", 0),
            "level_0": (f"{step_name(7)}/level_0", 0),
            "level_1": (f"{step_name(6)}/level_1", 1),
            "level_1_accumulator": (f"{step_name(7)}/level_1_accumulator", 0),
            "level_2": (f"{step_name(4)}/level_2", 3),
            "level_2_accumulator": (f"{step_name(7)}/level_2_accumulator", 0),
        }
        on_disk = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
        assert found["bytes"] == sum(entry["bytes"] for entry in entries.values()) == on_disk
        assert newest["bytes_with_references"] > newest["bytes"]

    def test_in_words(self, run: Path, capsys: Out) -> None:
        (run / "checkpoints" / f"{step_name(8)}.tmp-x").mkdir()
        (run / "checkpoints" / step_name(7) / "core" / "__0_0.distcp").unlink()
        (run / "checkpoints" / step_name(9)).mkdir()
        assert hope("ls", run) == 0
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for words in ("held for others: level_2", "level_2 (3)", "core/__0_0.distcp is missing", "half written", "NO"):
            assert words in out.replace("- ", "-"), out
        found = answer(capsys, "ls", run / "checkpoints")["checkpoints"]
        assert {entry["name"]: entry.get("whole") for entry in found} == {
            step_name(4): False,
            step_name(6): True,
            step_name(7): False,
            step_name(9): False,
            f"{step_name(8)}.tmp-x": None,
        }

    def test_of_nothing(self, tmp_path: Path, capsys: Out) -> None:
        (tmp_path / "checkpoints").mkdir()
        assert hope("ls", tmp_path) == 0
        assert "no checkpoints" in capsys.readouterr().out


class TestVerify:
    def test_whole(self, run: Path, capsys: Out) -> None:
        found = answer(capsys, "verify", run)
        assert found["damaged"] == 0
        assert [(each["name"], each["whole"]) for each in found["checkpoints"]] == [
            (step_name(6), True),
            (step_name(7), True),
        ]
        assert hope("verify", run / "checkpoints" / step_name(7)) == 0
        assert capsys.readouterr().out == f"{step_name(7)}: whole, 14 files\n"

    def test_every_damaged_file_is_named(self, run: Path, capsys: Out) -> None:
        checkpoints = run / "checkpoints"
        flip(checkpoints / step_name(4) / "level_2" / "__0_0.distcp")
        flip(checkpoints / step_name(7) / "core" / "__0_0.distcp")
        (checkpoints / step_name(7) / "trainer.json").unlink()
        found = answer(capsys, "verify", run, code=2)
        assert found["damaged"] == 2
        six, seven = (each["problems"] for each in found["checkpoints"])
        assert [line.split(": ")[1] for line in six] == [
            "step_00000004/level_2/__0_0.distcp does not have the sha256 of the manifest"
        ]
        assert len(seven) == 3
        assert "trainer.json is missing" in seven[0]
        assert hope("verify", run) == 2
        assert capsys.readouterr().out.count("DAMAGED") == 2

    def test_a_folder_without_a_manifest_is_damaged(self, run: Path, capsys: Out) -> None:
        (run / "checkpoints" / step_name(8)).mkdir()
        found = answer(capsys, "verify", run, code=2)
        assert [each["whole"] for each in found["checkpoints"]] == [True, True, False]
        assert "has no manifest.json" in found["checkpoints"][2]["problems"][0]

    def test_one_that_the_run_removes_meanwhile_is_not_damaged(
        self, run: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        problems = commands.problems

        def removing(folder: Path, *arguments: Any) -> Iterator[str]:
            if folder.name == step_name(6):
                remove(removals(run / "checkpoints", keep_last=1), "x")
            yield from problems(folder, *arguments)

        monkeypatch.setattr(commands, "problems", removing)
        found = answer(capsys, "verify", run)
        assert [each["name"] for each in found["checkpoints"]] == [step_name(7)]


class TestPrune:
    def test_a_dry_run_says_what_a_real_one_does(self, run: Path, capsys: Out) -> None:
        (run / "checkpoints" / f"{step_name(9)}.tmp-x").mkdir()
        before = names(run)
        promised = answer(capsys, "prune", run, "--keep-last", 1, "--dry-run")
        assert names(run) == before
        done = answer(capsys, "prune", run, "--keep-last", 1)
        assert {**promised, "dry_run": False} == done
        assert [(row["name"], row["keeps"]) for row in done["removed"]] == [
            (step_name(6), ["level_1"]),
            (f"{step_name(9)}.tmp-x", []),
        ]
        assert names(run) == [step_name(step) for step in (4, 6, 7)]
        load_levels(run / "checkpoints" / step_name(7), 7)
        assert hope("prune", run) == 0
        assert capsys.readouterr().out == "nothing to remove\n"

    def test_what_the_run_is_configured_to_keep_stays(self, tmp_path: Path, capsys: Out) -> None:
        writer, _ = make_writer(tmp_path)
        for step in (4, 5, 6, 7):
            writer.save(level_state(step), facts(step, config={"checkpoint": {"keep_every": 5}}))
        writer.fence.release()
        assert hope("prune", tmp_path, "--keep-last", "1") == 0
        kept = [folder.name for folder in list_checkpoints(tmp_path / "checkpoints") if not is_trimmed(folder)]
        assert kept == [step_name(5), step_name(7)]
        assert hope("prune", tmp_path, "--keep-last", "1", "--keep-every", "0") == 0
        kept = [folder.name for folder in list_checkpoints(tmp_path / "checkpoints") if not is_trimmed(folder)]
        assert kept == [step_name(7)]
        capsys.readouterr()

    def test_a_damaged_one_does_not_drive_out_the_last_that_is_whole(self, run: Path, capsys: Out) -> None:
        (run / "checkpoints" / step_name(7) / "core" / "__0_0.distcp").write_bytes(b"")
        assert hope("prune", run, "--keep-last", "1") == 0
        assert capsys.readouterr().out == "nothing to remove\n"
        verify(run / "checkpoints" / step_name(6))

    def test_refused_while_a_process_owns_the_run(
        self, run: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = (
            "import sys, time\nfrom pathlib import Path\nfrom hope_train.checkpoint.fence import Fence\n"
            "Fence.take(Path(sys.argv[1])); print('taken', flush=True); time.sleep(60)\n"
        )
        owner = subprocess.Popen([sys.executable, "-c", program, str(run)], stdout=subprocess.PIPE, text=True)
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "taken\n"
            before = names(run)
            assert hope("prune", run, "--keep-last", "1", "--force") == 2
            assert f"in use by process {owner.pid}" in capsys.readouterr().err
            monkeypatch.chdir(run / "checkpoints")
            assert hope("prune", ".", "--keep-last", "1") == 2
            assert f"in use by process {owner.pid}" in capsys.readouterr().err
            assert names(run) == before
        finally:
            owner.kill()
            owner.wait(30)
        assert hope("prune", run, "--keep-last", "1") == 0

    def test_an_owner_on_another_machine_has_to_be_known_dead(self, run: Path, capsys: Out) -> None:
        (run / INCARNATION).write_text(json.dumps({"id": "x", "host": "elsewhere", "pid": 7}), encoding="utf-8")
        assert hope("prune", run) == 2
        assert "process 7 on elsewhere" in capsys.readouterr().err
        assert hope("prune", run, "--force") == 0

    def test_those_set_aside(self, run: Path, capsys: Out) -> None:
        writer, _ = make_writer(run, keep_last=1)
        writer.set_aside(after=6)
        writer.fence.release()
        aside = f"{step_name(7)}.superseded-{writer.fence.id}"
        assert hope("prune", run, "--keep-last", "1") == 0
        verify(run / "checkpoints" / aside)
        assert hope("prune", run, "--superseded") == 0
        assert names(run) == [step_name(4), step_name(6)]
        verify(run / "checkpoints" / step_name(6))
        capsys.readouterr()

    def test_a_directory_that_cannot_be_written(self, run: Path, capsys: Out) -> None:
        (run / "incarnation.lock").unlink()
        (run / "incarnation.lock").mkdir()
        assert hope("prune", run) == 2
        assert "cannot be pruned: Is a directory" in capsys.readouterr().err


class TestDiff:
    def test_the_same(self, run: Path, capsys: Out) -> None:
        shutil.copytree(run, run.parent / "copy")
        assert hope("diff", run, run.parent / "copy") == 0
        assert "9 tensors are equal, 0 differ" in capsys.readouterr().out

    def test_two_steps(self, run: Path, capsys: Out) -> None:
        six, seven = (run / "checkpoints" / step_name(step) for step in (6, 7))
        found = answer(capsys, "diff", six, seven, code=1)
        names_of = {each["name"] for each in found["tensors"]}
        up = "blocks.0.cms.levels.{}.up.weight"
        assert names_of == {
            "embed.weight",
            up.format(0),
            f"optimizer.exp_avg.{up.format(0)}",
            f"optimizer.accumulator.{up.format(2)}",
        }
        assert found["only_in_one"] == []
        assert found["only_in_other"] == [f"optimizer.accumulator.{up.format(1)}"]
        assert found["counters"] == {
            "step": [6, 7],
            "tokens": [60, 70],
            "core.updates": [6, 7],
            "core.steps": [6, 7],
            "level_0.updates": [6, 7],
            "level_1.tokens": [None, 10],
            "level_2.tokens": [20, 30],
        }
        assert found["same"] is False
        found = answer(capsys, "diff", six, seven, "--weights", code=1)
        assert {each["name"] for each in found["tensors"]} == {"embed.weight", up.format(0)}
        assert found["counters"] == {}
        assert hope("diff", six, seven) == 1
        out = capsys.readouterr().out
        assert "level_1.tokens: none -> 10" in out
        assert f"only in {seven}: optimizer.accumulator" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["ls", "nowhere"], "no such folder"),
        (["ls", "{tmp}"], "has no folder checkpoints"),
        (["ls", "{run}/checkpoints/step_00000007"], "that is one checkpoint; name the run directory"),
        (["verify", "nowhere"], "no such folder"),
        (["verify", "{tmp}"], "has no folder checkpoints"),
        (["prune", "nowhere"], "no such folder"),
        (["prune", "{run}", "--keep-last", "0"], "--keep-last"),
        (["consolidate", "nowhere", "--out", "x"], "no such folder"),
        (["consolidate", "{run}"], "--out"),
        (["consolidate", "{run}", "--out", "{tmp}"], "is a folder"),
        (["consolidate", "{run}", "--out", "{tmp}/no/x"], "there is no folder"),
        (["consolidate", "{run}", "--out", "{run}/incarnation.json"], "is there already"),
        (["consolidate", "{run}/checkpoints/step_00000004", "--out", "x"], "was given up"),
        (["diff", "{run}", "nowhere"], "no such folder"),
        (["diff", "{run}"], "RUN"),
        (["list"], "list"),
    ],
    ids=" ".join,
)
def test_a_wrong_line_is_answered_in_one(run: Path, tmp_path: Path, capsys: Out, line: list[str], words: str) -> None:
    assert hope(*(text.format(run=run, tmp=tmp_path) for text in line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_a_login_node_needs_no_torch(run: Path, command: str) -> None:
    program = (
        f"import sys; sys.modules['torch'] = None\nfrom hope_train import cli\n"
        f"sys.exit(cli.run(['checkpoint', {command!r}, {str(run)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
