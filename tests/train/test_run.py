"""Starting runs: what a run directory holds, and what is refused before any work starts."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml

from data_pipelines.tokenizer_training import train_tokenizer
from hope_train.checkpoint.manifest import verify
from hope_train.checkpoint.store import load_model
from hope_train.errors import UserError
from hope_train.generate import generate_command
from hope_train.train import rundir
from hope_train.train import session as session_module
from tests.train.tiny import STEPS, WORDS, Tiny, assert_same_run, assert_same_tensors, lines

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def refused(tiny: Tiny, name: str, *overrides: str, resume: str = "auto", force: bool = False) -> str:
    """The one line with which a start is refused; the run directory is as it was."""
    before = contents(tiny.dir(name))
    with pytest.raises(UserError) as caught:
        tiny.train(name, *overrides, resume=resume, force=force)
    assert contents(tiny.dir(name)) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with size and time of change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TestFresh:
    """A run from beginning to end."""

    def test_what_it_leaves(self, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
        assert tiny.train("a", json=True) == 0
        out = capsys.readouterr()
        summary = json.loads(out.out)
        assert (summary["reason"], summary["step"], summary["tokens"]) == ("completed", STEPS, STEPS * 128)
        assert summary["checkpoint"] == f"checkpoints/step_{STEPS:08d}"
        run_dir = tiny.dir("a")
        assert {path.name for path in run_dir.iterdir()} == {
            *("config.yaml", "environment.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "tokenizer.model"),
            *("STOPPED.json", "incarnation.json", "incarnation.lock"),
        }
        rows = lines(run_dir / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert [row["tokens"] for row in rows] == [128 * step for step in range(1, STEPS + 1)]
        assert set(rows[0]) == {
            *(
                "step",
                "tokens",
                "loss",
                "lr",
                "grad_norm",
                "tokens_per_s",
                "peak_memory_bytes",
                "time",
                "levels",
                "clip",
            )
        }
        assert set(rows[0]["levels"]) == {"core", "0", "1", "2"}
        assert [row["levels"]["2"]["updates"] for row in rows] == [step // 4 for step in range(1, STEPS + 1)]
        assert all(row["tokens_per_s"] > 0 for row in rows)
        evaluations = lines(run_dir / "eval.jsonl")
        assert [row["step"] for row in evaluations if "validation_loss" in row] == [0, 4, 8, STEPS]
        assert evaluations[-1]["validation_loss"] < evaluations[0]["validation_loss"] - 0.1
        assert summary["evaluation"]["validation_loss"]["last"] == evaluations[-1]["validation_loss"]
        assert tiny.stopped("a")["reason"] == "completed"
        environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
        assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
        assert environment["host"] == socket.gethostname()
        assert load_model(run_dir)[2].step == STEPS

    def test_log_every(self, tiny: Tiny) -> None:
        assert tiny.train("a") == 0
        assert tiny.train("b", "train.log_every=4") == 0
        chosen = {row["step"]: row for row in tiny.metrics("a") if row["step"] in (4, 8, STEPS)}
        assert {row["step"]: row for row in tiny.metrics("b")} == chosen

    def test_evaluating_and_saving_leave_no_trace_in_the_weights(self, tiny: Tiny) -> None:
        assert tiny.train("a", "eval.every=1", "checkpoint.every=2", "checkpoint.async_save=true") == 0
        assert tiny.train("b", "eval.every=0", "eval.validation_batches=0", "eval.test_at_end=false") == 0
        assert_same_tensors(tiny.checkpoint("a", STEPS), tiny.checkpoint("b", STEPS))
        assert tiny.evaluations("b") == []

    def test_it_goes_on_from_its_own_last_step_only_if_there_is_one(
        self, tiny: Tiny, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tiny.train("a") == 0
        before = contents(tiny.dir("a"))
        capsys.readouterr()
        assert tiny.train("a") == 0
        assert "nothing to do" in capsys.readouterr().out
        assert contents(tiny.dir("a")) == before

    def test_a_completed_run_is_looked_at_again(self, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
        assert tiny.train("whole", "checkpoint.every=4") == 0
        assert tiny.train("a", "checkpoint.every=4") == 0
        file = tiny.checkpoint("a", STEPS) / "core" / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        capsys.readouterr()
        assert tiny.train("a", "checkpoint.every=4") == 0
        out = capsys.readouterr().out
        assert "passed over" in out
        assert "(step 8, 1,024 tokens)" in out
        assert_same_run(tiny, "a", "whole")

    def test_a_completed_run_without_its_checkpoints_is_complete(
        self, tiny: Tiny, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tiny.train("a", "train.tokens=128") == 0
        shutil.rmtree(tiny.checkpoint("a", 1))
        capsys.readouterr()
        assert tiny.train("a", "train.tokens=128") == 0
        assert "nothing to do" in capsys.readouterr().out

    def test_killed_before_the_last_evaluation(self, tiny: Tiny) -> None:
        assert tiny.train("a") == 0
        shutil.copytree(tiny.dir("a"), tiny.dir("b"))
        (tiny.dir("b") / "STOPPED.json").unlink()
        kept = [line for line in (tiny.dir("b") / "eval.jsonl").read_text().splitlines(True) if '"step": 9' not in line]
        (tiny.dir("b") / "eval.jsonl").write_text("".join(kept))
        assert tiny.train("b") == 0
        assert_same_run(tiny, "b", "a")


class TestResume:
    """`--resume` and what stands in its way."""

    def test_auto_passes_over_damaged_checkpoints(self, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
        assert tiny.train("a", "checkpoint.every=2", "checkpoint.keep_last=9") == 0
        shutil.copytree(tiny.dir("a"), tiny.dir("b"))
        (tiny.dir("b") / "STOPPED.json").unlink()
        (tiny.checkpoint("b", STEPS) / "manifest.json").unlink()
        (tiny.checkpoint("b", 8) / "core" / "__0_0.distcp").write_bytes(b"")
        capsys.readouterr()
        assert tiny.train("b", "checkpoint.every=2", "checkpoint.keep_last=9") == 0
        out = capsys.readouterr().out
        assert "step_00000009 has no manifest.json" in out
        assert "step_00000008: core/__0_0.distcp has 0 bytes" in out
        assert "going on from" in out
        assert_same_run(tiny, "b", "a")
        verify(tiny.checkpoint("b", 8))
        # What was logged beyond step 6, and the damaged checkpoints, are still there under other names.
        assert [row["step"] for file in tiny.dir("b").glob("metrics.beyond-6-*.jsonl") for row in lines(file)] == [
            7,
            8,
            9,
        ]
        assert len(list((tiny.dir("b") / "checkpoints").glob("*.superseded-*"))) == 2

    def test_auto_with_nothing_whole_left_is_refused(self, tiny: Tiny) -> None:
        assert tiny.train("a", "train.tokens=256") == 0
        (tiny.dir("a") / "STOPPED.json").unlink()
        (tiny.checkpoint("a", 2) / "trainer.json").unlink()
        assert "none of them is whole" in refused(tiny, "a", "train.tokens=256")

    def test_never(self, tiny: Tiny) -> None:
        assert tiny.train("a", resume="never") == 0
        assert "has checkpoints already (the newest is step_00000009)" in refused(tiny, "a", resume="never")

    def test_from_a_checkpoint_of_elsewhere(self, tiny: Tiny) -> None:
        assert tiny.train("a", "checkpoint.every=3", "checkpoint.keep_last=9") == 0
        assert tiny.train("b", "checkpoint.keep_last=9", resume=str(tiny.checkpoint("a", 3))) == 0
        assert_same_tensors(tiny.checkpoint("b", STEPS), tiny.checkpoint("a", STEPS))
        assert tiny.metrics("b") == tiny.metrics("a")[3:]
        assert_same_tensors(tiny.checkpoint("b", 3), tiny.checkpoint("a", 3))

    def test_from_an_older_one_of_its_own(self, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
        assert tiny.train("a", "checkpoint.every=3", "checkpoint.keep_last=9") == 0
        shutil.copytree(tiny.dir("a"), tiny.dir("b"))
        assert tiny.train("b", "checkpoint.keep_last=9", resume=str(tiny.checkpoint("b", 3))) == 0
        assert_same_run(tiny, "b", "a")
        assert "step_00000006 is of an abandoned or damaged continuation" in capsys.readouterr().out

    def test_a_path_that_is_no_checkpoint(self, tiny: Tiny) -> None:
        assert "neither a run directory nor a checkpoint" in refused(tiny, "a", resume=str(tiny.folder))
        assert "no such folder" in refused(tiny, "a", resume=str(tiny.folder / "nowhere"))

    def test_a_checkpoint_of_another_model(self, tiny: Tiny) -> None:
        assert tiny.train("a", "train.tokens=128") == 0
        path = str(tiny.checkpoint("a", 1))
        assert "is of another model: not as in this configuration is model.d_model;" in refused(
            tiny, "b", "model.d_model=64", resume=path
        )
        message = refused(tiny, "b", "model.d_model=64", resume=path, force=True)
        assert "embed.weight has shape [300, 32] there and [300, 64] here" in message
        assert "is of another model" in refused(tiny, "b", *tiny.model("transformer_pp"), resume=path)
        message = refused(tiny, "b", "model.cms.levels.1.period=3", resume=path, force=True)
        assert "level_1 has period 2 in the checkpoint and 3" in message

    def test_of_levels_it_is_said_which_and_in_what(self) -> None:
        levels = [{"width": 8, "period": 1}, {"width": 8, "period": 2}]
        others = [levels[0], {**levels[1], "period": 4}]
        assert rundir.differences({"levels": levels}, {"levels": others}) == {"levels.1.period": (2, 4)}
        assert rundir.differences({"levels": levels}, {"levels": levels[:1]}) == {"levels": (levels, levels[:1])}
        assert rundir.differences({"betas": [0.9, 0.95]}, {"betas": [0.9, 0.99]}).keys() == {"betas"}

    def test_other_settings_are_named(self, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
        assert tiny.train("a", "train.tokens=256", "checkpoint.every=1") == 0
        path = str(tiny.checkpoint("a", 1))
        capsys.readouterr()
        changes = ("train.tokens=256", "optimizer.lr=1.0", "optimizer.schedule.min_ratio=0.5", "train.log_every=2")
        assert tiny.train("b", *changes, resume=path) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "differs" in line]
        assert line == (
            "configuration differs from the checkpoint's: optimizer.lr 0.01 -> 1.0, "
            "optimizer.schedule.min_ratio 0.1 -> 0.5"
        )
        assert tiny.train("c", "train.tokens=256", resume=path) == 0
        assert "differs" not in capsys.readouterr().out

    @pytest.mark.parametrize("force", [False, True])
    def test_a_checkpoint_from_beyond_the_end(self, tiny: Tiny, force: bool) -> None:
        assert tiny.train("a", "train.tokens=512") == 0
        message = refused(tiny, "b", "train.tokens=256", resume=str(tiny.checkpoint("a", 4)), force=force)
        assert (
            "is of step 4, and this run ends at 2: raise train.tokens (now 256, the checkpoint has seen 512)" in message
        )
        assert "is of step 4" in refused(tiny, "a", "train.tokens=256", force=True)

    def test_other_text_is_refused(self, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert tiny.train("a", "train.tokens=256", "checkpoint.every=1") == 0
        other = tmp_path / "other.txt"
        other.write_text("another text altogether, long enough for a few windows " * 100, encoding="utf-8")
        sources = f"data.sources=[{{path: {other}}}]"
        path = str(tiny.checkpoint("a", 1))
        message = refused(tiny, "b", sources, resume=path)
        assert "was trained on other data (text, windows differ)" in message
        assert "seed differ" in refused(tiny, "b", "seed=4", resume=path)
        capsys.readouterr()
        assert tiny.train("b", sources, "train.tokens=256", resume=path, force=True) == 0
        said = "data differs from the checkpoint's: text, windows; samples may be lost or seen twice"
        assert said in capsys.readouterr().out.splitlines()


class TestRunDirectory:
    """Whose it is."""

    def test_another_configuration(self, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
        assert tiny.train("a", "train.tokens=256") == 0
        message = refused(tiny, "a", "train.tokens=256", "optimizer.lr=0.5", "seed=4")
        assert "belongs to another configuration: seed is 3 there and 4 here (and 1 more: optimizer.lr)" in message
        assert "--force-config" in message
        capsys.readouterr()
        assert tiny.train("a", "train.tokens=512", force=True) == 0
        assert "configuration changed since the last start: train.tokens" in capsys.readouterr().out
        assert [row["step"] for row in tiny.metrics("a")] == [1, 2, 3, 4]
        config = yaml.safe_load((tiny.dir("a") / "config.yaml").read_text(encoding="utf-8"))
        assert config["train"]["tokens"] == 512
        old = list(tiny.dir("a").glob("config.before-*.yaml"))
        assert [yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["tokens"] for path in old] == [256]

    def test_what_does_not_change_the_learning_may_change(self, tiny: Tiny, tmp_path: Path) -> None:
        assert tiny.train("a") == 0
        (tiny.dir("a") / "STOPPED.json").unlink()
        moved = tmp_path / "moved.model"
        shutil.copy(tiny.dir("a") / "tokenizer.model", moved)
        changes = ("checkpoint.every=3", "eval.every=2", "train.log_every=2", f"data.tokenizer={moved}")
        assert tiny.train("a", *changes) == 0

    def test_a_damaged_config_is_no_match(self, tiny: Tiny) -> None:
        assert tiny.train("a", "train.tokens=128") == 0
        (tiny.dir("a") / "config.yaml").write_text("a: [", encoding="utf-8")
        assert "belongs to another configuration" in refused(tiny, "a", "train.tokens=128")

    def test_another_tokenizer(self, tiny: Tiny, tmp_path: Path) -> None:
        assert tiny.train("a", "train.tokens=128") == 0
        texts = [f"{number} quite other words, many of them, {number * 7919}" for number in range(300)]
        other = train_tokenizer(texts, tmp_path / "other.model", 300)
        message = refused(tiny, "a", f"data.tokenizer={other.path}", "train.tokens=128")
        assert "is not the one of run directory" in message
        message = refused(tiny, "b", f"data.tokenizer={other.path}", resume=str(tiny.dir("a")))
        assert "was trained with another tokenizer" in message

    def test_a_file_in_its_place(self, tiny: Tiny) -> None:
        (tiny.folder / "a").write_text("x")
        with pytest.raises(UserError, match="is a file"):
            tiny.train("a")

    @pytest.mark.parametrize("place", ["/proc/runs/a", "/dev/null/a"])
    def test_one_that_cannot_be_written(self, tiny: Tiny, place: str) -> None:
        with pytest.raises(UserError, match=r"run directory .* (not writable|is a file|cannot be written)"):
            tiny.train("a", f"dir={place}")

    def test_one_in_use(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        assert tiny.train("a", "train.tokens=128") == 0
        (tiny.dir("a") / "STOPPED.json").unlink()

        def in_use(run_dir: Path) -> None:
            raise UserError(f"run directory {run_dir} is in use")

        monkeypatch.setattr(session_module, "refuse_if_in_use", in_use)
        assert "is in use" in refused(tiny, "a", "train.tokens=128")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.tokns=5", "did you mean `train.tokens`"),
        ("train.device=cuda", "train.device=cuda"),
        ("data.tokenizer=null", "data.tokenizer is not set"),
        ("data.tokenizer=/nowhere.model", "no tokenizer file /nowhere.model"),
        ("model.vocab_size=301", "set model.vocab_size=300"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources=[{path: /nowhere.txt}]", "/nowhere.txt"),
        ("eval.wikitext=/nowhere", "/nowhere"),
        ("train.context_length=64000", "batch_tokens=128 is not a multiple"),
        ("model.arch=transformer_pp", "mlp_width"),
        ("model.d_model=200000000", "weights, gradients and moments need"),
        ("model.cms.levels.1.width=100000000000", "GiB, and this machine has"),
        ("model.n_layers=1000000000", "10000"),
        ("seed=99999999999999999999999", "seed"),
        ("train.threads=100000", "train.threads"),
    ],
)
def test_bad_input_is_one_line_and_no_run_directory(tiny: Tiny, override: str, message: str) -> None:
    if override == "train.device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert message in refused(tiny, "a", override)
    assert not tiny.dir("a").exists()


def test_a_model_that_finds_no_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small enough for the machine, and more than is free: what the allocator says is made a line of ours.
    def build(*arguments: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(session_module, "build_engine", build)
    message = refused(tiny, "a")
    assert "weights, gradients and moments need 0.0 GiB, more than is free here" in message


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed(tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hope_train.train.loggers.importlib.util.find_spec", lambda package: None)
    assert f"needs the package {name}" in refused(tiny, "a", f"log.{name}=true")


def test_memory_compilation_without_a_memory(tiny: Tiny) -> None:
    message = refused(tiny, "a", *tiny.model("transformer_pp"), "train.compile=memory")
    assert "arch=transformer_pp has no memory" in message


def test_a_tokenizer_made_elsewhere_trains_and_says_what_it_leaves_off(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.folder / "llama.model"
    with model.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(WORDS) for _ in range(9)),
            model_writer=writer,
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            minloglevel=3,
        )
    assert tiny.train("one", f"data.tokenizer={model}", "train.tokens=256") == 0
    assert f"tokenizer {model} is made to put a space in front of a text" in capsys.readouterr().out
    heldout = [row for row in tiny.evaluations("one") if "validation_loss" in row]
    assert heldout[-1]["validation_loss"] < heldout[0]["validation_loss"]
    assert tiny.train("one", f"data.tokenizer={model}", "train.tokens=384", force=True) == 0, "by its fingerprint"


def test_a_tokenizer_that_loses_text_trains_on_request_and_is_not_measured_per_word(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.folder / "defaults.model"
    with model.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(WORDS) for _ in range(9)), model_writer=writer, vocab_size=30, minloglevel=3
        )
    options = ["model.vocab_size=30", f"data.tokenizer={model}", "train.tokens=256"]
    with pytest.raises(UserError, match=r"it is not lossless .*data\.lossy_tokenizer=true"):
        tiny.train("one", *options)
    options.append("data.lossy_tokenizer=true")
    with pytest.raises(UserError, match=r"loses text.*set eval\.protocols=\[token\]"):
        tiny.train("one", *options)
    assert tiny.train("one", *options, "eval.protocols=[token]") == 0
    assert f"warning: tokenizer {model} loses text" in capsys.readouterr().out
    assert all("word_ppl" not in row for row in tiny.evaluations("one"))
    assert verify(tiny.checkpoint("one", 2)).tokenizer.endswith("-lossy")
    stream = ("data.mode=streaming", "data.stream.lanes=2", "data.stream.workers=1")
    assert tiny.train("two", *options, *stream, "eval.protocols=[token]") == 0
    assert generate_command(str(tiny.dir("one")), [], "river", 2, 1.0, 1.0, 0, as_json=True) == 0
