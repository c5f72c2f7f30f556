"""`hope …` as a user meets it: what is passed on to the commands, and what is said when the line is wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hope_train import __version__, cli
from hope_train.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Puts a stand-in for a command's module in place and returns the calls made to its function."""

    def install(module: str, function: str, result: object = 0) -> Calls:
        calls: Calls = []

        def stand_in(*positional: Any, **named: Any) -> object:
            calls.append((positional, named))
            if isinstance(result, BaseException):
                raise result
            return result

        fake = types.ModuleType(module)
        setattr(fake, function, stand_in)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return install


def hope(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real thing in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "hope_train.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of error on stderr; nothing is on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("line", "module", "function", "expected"),
    [
        (
            ["train", "c.yaml"],
            "hope_train.train.run",
            "train_command",
            (("c.yaml", [], "auto", False, False), {}),
        ),
        (
            ["train", "c.yaml", "a.b=1", "--resume", "never", "name=x", "--force-config", "--json"],
            "hope_train.train.run",
            "train_command",
            (("c.yaml", ["a.b=1", "name=x"], "never", True, True), {}),
        ),
        (
            ["generate", "runs/x", "--prompt", "Once", "--temperature", "0"],
            "hope_train.generate",
            "generate_command",
            (("runs/x", [], "Once", 200, 0.0, 0.95, 0, False), {}),
        ),
        (
            ["plan", "c.yaml", "model.d_model=64", "--devices", "8", "--device", "h100"],
            "hope_train.plan.report",
            "plan_command",
            (("c.yaml", ["model.d_model=64"], "h100", 8, False), {"interconnect": None, "with_dry_run": False}),
        ),
        (
            ["plan", "c.yaml", "--json", "--interconnect", "ib-hdr", "--dry-run"],
            "hope_train.plan.report",
            "plan_command",
            (("c.yaml", [], "h200", 1, True), {"interconnect": "ib-hdr", "with_dry_run": True}),
        ),
        (
            ["report", "runs/a", "runs/b", "--out", "o"],
            "hope_train.report.draw",
            "report_command",
            ((["runs/a", "runs/b"], "o", False), {}),
        ),
        (
            [
                "data",
                "tokenizer",
                "train",
                "a.txt",
                "b",
                "--out",
                "t.model",
                "--vocab-size",
                "512",
                "--no-split-digits",
            ],
            "data_pipelines.commands",
            "train_tokenizer_command",
            ((["a.txt", "b"], "t.model", 512, "bpe", "text", False, None, 0, False, False, []), {}),
        ),
        (
            ["data", "inspect", "c.yaml", "seed=3", "--batch", "7", "--rows", "1"],
            "data_pipelines.looking",
            "inspect_command",
            (("c.yaml", ["seed=3"], 7, 1, False), {}),
        ),
        (
            ["data", "stats", "c.yaml", "--json"],
            "data_pipelines.looking",
            "stats_command",
            (("c.yaml", [], True), {}),
        ),
        (
            ["checkpoint", "ls", "runs/x", "--json"],
            "hope_train.checkpoint.commands",
            "ls_command",
            (("runs/x", True), {}),
        ),
        (
            ["checkpoint", "verify", "runs/x"],
            "hope_train.checkpoint.commands",
            "verify_command",
            (("runs/x", False), {}),
        ),
        (
            ["checkpoint", "prune", "runs/x"],
            "hope_train.checkpoint.commands",
            "prune_command",
            (("runs/x", None, None, False, False, False, False), {}),
        ),
        (
            [
                "checkpoint",
                "prune",
                "r",
                "--keep-last",
                "3",
                "--keep-every",
                "0",
                "--superseded",
                "--dry-run",
                "--force",
            ],
            "hope_train.checkpoint.commands",
            "prune_command",
            (("r", 3, 0, True, True, True, False), {}),
        ),
        (
            ["checkpoint", "consolidate", "runs/x", "--out", "x.safetensors", "--overwrite"],
            "hope_train.checkpoint.commands",
            "consolidate_command",
            (("runs/x", "x.safetensors", True, False), {}),
        ),
        (
            ["checkpoint", "diff", "a", "b", "--weights", "--json"],
            "hope_train.checkpoint.commands",
            "diff_command",
            (("a", "b", True, True), {}),
        ),
        (["launch", "status", "a", "7", "--json"], "launch.status", "status_command", ((["a", "7"], True), {})),
        (["launch", "history", "a"], "launch.status", "history_command", (("a", False), {})),
        (
            ["launch", "logs", "a", "-f", "--node", "n2", "--start", "7.1", "-n", "5"],
            "launch.logs",
            "logs_command",
            (("a", True, "n2", "7.1", 5), {}),
        ),
        (["launch", "cancel", "a", "--now"], "launch.control", "cancel_command", (("a", True), {})),
        (["launch", "requeue", "a"], "launch.control", "requeue_command", (("a",), {})),
        (["launch", "resubmit", "a"], "launch.control", "resubmit_command", (("a",), {})),
        (["launch", "site", "--site", "s.yaml", "--docs"], "launch.site", "site_command", (("s.yaml", True), {})),
        (
            ["launch", "local", "c.yaml", "a.b=1", "--ranks", "4"],
            "launch.local",
            "local_command",
            (("c.yaml", ["a.b=1"], 4, None, {"survive": {"lead_s": None, "max_failures": None}}), {}),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_command_gets_what_the_line_says(
    command: Callable[..., Calls], line: list[str], module: str, function: str, expected: object
) -> None:
    calls = command(module, function)
    assert cli.run(line) == 0
    assert calls == [expected]


def test_eval_passes_every_option_by_name(command: Callable[..., Calls]) -> None:
    calls = command("hope_train.evaluate.commands", "eval_command")
    line = "eval runs/x eval.batch_size=2 --wikitext w --split test --protocol word --protocol token"
    assert cli.run([*line.split(), "--context-length", "64", "--stateful", "--pages", "3", "--json"]) == 0
    assert cli.run(["eval", "runs/x"]) == 0
    given, plain = (named for _, named in calls)
    assert given == {
        "run": "runs/x",
        "overrides": ["eval.batch_size=2"],
        "wikitext": "w",
        "split": "test",
        "protocols": ["word", "token"],
        "context_length": 64,
        "stateful": True,
        "pages": 3,
        "as_json": True,
    }
    assert plain == {
        "run": "runs/x",
        "overrides": [],
        "wikitext": None,
        "split": "validation",
        "protocols": [],
        "context_length": None,
        "stateful": False,
        "pages": None,
        "as_json": False,
    }


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("hope_train.train.run", "train_command"),
        ("hope_train.evaluate.commands", "eval_command"),
        ("hope_train.generate", "generate_command"),
        ("hope_train.plan.report", "plan_command"),
        ("hope_train.report.draw", "report_command"),
        ("hope_train.config.commands", "show_command"),
        *(
            ("hope_train.checkpoint.commands", f"{name}_command")
            for name in ("ls", "verify", "prune", "consolidate", "diff")
        ),
        ("launch.submit", "submit_command"),
        ("launch.status", "status_command"),
        ("launch.status", "history_command"),
        ("launch.logs", "logs_command"),
        *(("launch.control", f"{name}_command") for name in ("cancel", "requeue", "resubmit")),
        ("launch.site", "site_command"),
        ("launch.local", "local_command"),
        ("data_pipelines.commands", "train_tokenizer_command"),
        ("data_pipelines.looking", "inspect_command"),
        ("data_pipelines.looking", "stats_command"),
    ],
)
def test_the_functions_behind_the_commands_exist(module: str, function: str) -> None:
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(("result", "code"), [(0, 0), (3, 3), (None, 0)])
def test_the_exit_code_is_the_command_s(command: Callable[..., Calls], result: object, code: int) -> None:
    command("hope_train.train.run", "train_command", result)
    assert cli.run(["train", "c.yaml"]) == code


def test_a_user_error_is_one_line_and_exit_code_2(
    command: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    command("hope_train.train.run", "train_command", UserError("no text in\n  corpus.txt"))
    assert cli.run(["train", "c.yaml"]) == 2
    assert one_line(capsys) == "no text in corpus.txt"


def test_an_interrupt_is_130(command: Callable[..., Calls]) -> None:
    command("hope_train.train.run", "train_command", KeyboardInterrupt())
    assert cli.run(["train", "c.yaml"]) == 130


def test_an_error_of_ours_keeps_its_traceback(command: Callable[..., Calls]) -> None:
    command("hope_train.train.run", "train_command", ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.run(["train", "c.yaml"])


def test_a_broken_pipe_that_is_not_stdout_s_is_an_error_of_ours(command: Callable[..., Calls]) -> None:
    command("hope_train.train.run", "train_command", BrokenPipeError("a socket"))
    with pytest.raises(BrokenPipeError, match="a socket"):
        cli.run(["train", "c.yaml"])


@pytest.mark.parametrize(("package", "extra"), [("torch", "train"), ("matplotlib", "report"), ("lm_eval", "lmeval")])
def test_a_missing_package_names_the_extra(
    command: Callable[..., Calls], capsys: pytest.CaptureFixture[str], package: str, extra: str
) -> None:
    missing = ModuleNotFoundError(f"No module named '{package}.sub'", name=f"{package}.sub")
    command("hope_train.train.run", "train_command", missing)
    assert cli.run(["train", "c.yaml"]) == 2
    message = one_line(capsys)
    assert package in message
    assert f"[{extra}]" in message


def test_a_missing_module_of_ours_is_an_error_of_ours(command: Callable[..., Calls]) -> None:
    command("hope_train.train.run", "train_command", ModuleNotFoundError("x", name="hope_train.nothing"))
    with pytest.raises(ModuleNotFoundError):
        cli.run(["train", "c.yaml"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian c.yaml", ["trian", "train"]),
        ("train", ["CONFIG", "hope train --help"]),
        ("train c.yaml --train.tokens=5", ["train.tokens=VALUE", "without dashes"]),
        ("train c.yaml --resum never", ["--resum", "--resume"]),
        ("train c.yaml train.tokens 5", ["'train.tokens'", "key=value"]),
        ("train c.yaml -- --lr=1", ["'--lr=1'", "without dashes"]),
        ("train train.tokens=5", ["'train.tokens=5'", "file"]),
        ("eval r --split train", ["--split", "validation, test"]),
        ("eval r --protocol bits", ["--protocol", "word, token, classic", "'bits'"]),
        ("eval r --pages 0", ["--pages"]),
        ("generate r --max-tokens x", ["--max-tokens"]),
        ("generate r --seed 99999999999999999999999", ["--seed", "9223372036854775807"]),
        ("data tokenizer train a.txt --out t.model --seed 99999999999999999999999", ["--seed"]),
        ("generate r --top-p 1.5", ["--top-p"]),
        ("plan c.yaml --devices 0", ["--devices"]),
        ("report", ["RUN"]),
        ("config", ["--docs"]),
        ("config no/such.yaml", ["no/such.yaml"]),
        ("data tokenizer train a.txt", ["--out"]),
        ("data tokenizer train a.txt --out t --kind bep", ["--kind", "bpe, unigram"]),
    ],
)
def test_a_wrong_line_is_answered_in_one(capsys: pytest.CaptureFixture[str], line: str, words: list[str]) -> None:
    assert cli.run(line.split()) == 2
    message = one_line(capsys)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("line", ["", "data", "data tokenizer", "checkpoint"])
def test_a_group_alone_shows_its_commands(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert cli.run(line.split()) == 2
    assert "Commands:" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"hope-train {__version__}\n"
    for line in (["--help"], ["-h"], ["train", "--help"], ["data", "tokenizer", "train", "-h"]):
        assert cli.run(line) == 0
        assert "Usage: hope" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_numpy_nor_the_configuration() -> None:
    program = (
        "import sys; from hope_train import cli; code = cli.run(['--help'])\n"
        "print(code, sorted({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize("buffering", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("line", [["config", "--docs", "--json"], ["--help"], ["--version"]], ids=" ".join)
def test_stdout_closed_early_ends_quietly(buffering: list[str], line: list[str]) -> None:
    # What a reader such as `head` leaves behind when it has seen enough: a pipe that nobody reads.
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *buffering, "-m", "hope_train.cli", *line],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_error_in_a_process_of_its_own() -> None:
    done = hope("config", "nowhere.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no configuration file nowhere.yaml")
    assert done.stderr.count("\n") == 1


class TestConfig:
    """`hope config`."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        path = tmp_path / "c.yaml"
        path.write_text("name: a\nmodel: {cms: {levels: [{width: 8}]}}\n", encoding="utf-8")
        return str(path)

    def test_prints_yaml_that_reads_back(self, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from hope_train.config.load import load_config

        assert cli.run(["config", file, "train.tokens=1e6"]) == 0
        again = tmp_path / "again.yaml"
        again.write_text(capsys.readouterr().out, encoding="utf-8")
        assert load_config(again) == load_config(file, ["train.tokens=1000000"])

    def test_prints_json(self, file: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["config", file, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["cms"]["levels"][0]["width"] == 8

    def test_refuses_an_unknown_key(self, file: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["config", file, "train.tokns=5"]) == 2
        assert "did you mean `train.tokens`" in one_line(capsys)

    def test_explains_all_fields_or_those_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["config", "--docs", "--json"]) == 0
        rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
        assert "default" not in rows["model.cms.levels.N.width"]
        assert rows["train.context_length"]["default"] == 512
        assert all(row["doc"] for row in rows.values()), "a field without a docstring"
        assert cli.run(["config", "--docs", "model.cms.levels.0.width", "optimizer.schedule"]) == 0
        out = capsys.readouterr().out
        assert "model.cms.levels.N.width  (int, >= 1; required)" in out
        assert "optimizer.schedule.kind" in out
        assert "train.tokens" not in out

    def test_names_the_nearest_key(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["config", "--docs", "optimiser"]) == 2
        assert "did you mean `optimizer`" in one_line(capsys)


def test_the_console_script_is_this_command() -> None:
    # In the environment of `make setup` the script `hope` stands beside python and is this very command.
    script = Path(sys.executable).parent / "hope"
    if not script.exists():
        assert hope("--version").stdout == f"hope-train {__version__}\n"
        return
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.stdout == f"hope-train {__version__}\n"
