"""Saves off the schedule: what each data-parallel rank has collected is kept apart, or summed where it is too much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.checkpoint.collected import stacked_bytes
from hope_train.checkpoint.commands import diff_command, ls_command, verify_command
from hope_train.checkpoint.export import read_weights
from hope_train.checkpoint.manifest import MANIFEST, DamagedCheckpointError, verify, wanted_files
from hope_train.checkpoint.store import find_checkpoint, load_model
from hope_train.config.mesh import MeshSizes
from hope_train.parallel.mesh import Mesh
from hope_train.parallel.rows import Rows
from hope_train.train.saving import is_overdue
from hope_train.train.session import Progress
from tests.parallel import cases, jobs
from tests.parallel.harness import Gang
from tests.parallel.test_runs import assert_same_figures, continue_elsewhere, train
from tests.train.tiny import STEPS, Tiny, assert_same_run, assert_same_tensors, read_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(300)]

RARE = ("checkpoint.every=0", "checkpoint.keep_last=99")
HSDP: dict[str, Any] = {"dp_shard": 2, "keep_gathered": "never"}
LAYOUTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (2, {}),
    (2, {"tp": 2}),
    (4, {}),
    (4, {"tp": 2}),
    (4, HSDP),
    (4, {"dp_shard": 2, "tp": 2}),
)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {}),
        (4, {"tp": 2}),
        (4, HSDP),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(4, {"dp_shard": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_same_layout_reads_its_own_and_another_the_sum(
    gang: Gang, tmp_path: Path, ranks: int, layout: dict[str, Any]
) -> None:
    # Step 3 is in mid-period of the levels of period 2 and 4.
    case = {"folder": str(tmp_path), "arch": "hope_attention"}
    written = gang.run(cases.save, ranks, **case, steps=3, stack=True, **layout)
    rows = ranks // layout.get("tp", 1)
    manifest = verify(tmp_path / "checkpoints" / "step_00000003")
    assert {name: part.rows for name, part in manifest.sets.items() if part.rows} == {
        "level_1_accumulator": rows,
        "level_2_accumulator": rows,
    }
    assert not torch.equal(written[0]["own"], written[-1]["own"]), "data-parallel ranks have collected different things"
    for others, other in LAYOUTS:
        read = gang.run(cases.load, others, **case, **other)
        for rank, found in enumerate(read):
            if (others, other) == (ranks, layout):
                assert torch.equal(found["own"], written[rank]["own"]), rank
            for name, tensor in written[0].items():
                if name == "own":
                    continue
                assert found[name].dtype == tensor.dtype
                if "accumulator" in name and tensor.is_floating_point():
                    scale = float(tensor.abs().max())
                    assert float((found[name] - tensor).abs().max()) <= 1e-6 * scale, (name, others, other)
                else:  # weights, moments, and all counters, of tokens too
                    assert torch.equal(found[name], tensor), (name, others, other)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (3, 1), (1, 4), (2, 2), (2, 3), (4, 2)])
def test_every_row_is_some_rank_s(rows: int, sizes: tuple[int, int]) -> None:
    class At(Mesh):
        place = (0, 0)

        def coordinate(self, dimension: str) -> int:
            return self.place[dimension == "dp_shard"]

    def found() -> Iterator[int]:
        for replicate in range(sizes[0]):
            for shard in range(sizes[1]):
                mesh = At(MeshSizes(dp_replicate=sizes[0], dp_shard=sizes[1]), torch.device("cpu"))
                object.__setattr__(mesh, "place", (replicate, shard))
                own = list(Rows(mesh).mine(rows))
                if rows == sizes[0] * sizes[1]:
                    assert own == [mesh.data_rank], "the same layout: each rank its own"
                yield from own

    assert list(found()) == list(range(rows))


def stop_and_go_on(gang: Gang, tiny: Tiny, name: str, ranks: int, *layout: str) -> None:
    options = ["checkpoint.every=0", *layout]
    continue_elsewhere(gang, tiny, name, [(ranks, options, 3), (ranks, options, 7), (ranks, options, 0)])


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ()),
        (4, ("parallel.tp=2",)),
        (2, ("parallel.dp_shard=2",)),
        pytest.param(4, (), marks=pytest.mark.slow),
        pytest.param(4, ("parallel.dp_shard=2",), marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_mid_period_leaves_no_trace(gang: Gang, tiny: Tiny, ranks: int, layout: tuple[str, ...]) -> None:
    train(gang, tiny, ranks, "whole", "checkpoint.every=0", *layout)
    stop_and_go_on(gang, tiny, "halves", ranks, *layout)
    for step in (3, 7):
        assert verify(tiny.checkpoint("halves", step)).stacked == (2 if "parallel.tp=2" in layout else ranks)
    assert tiny.checkpoints("whole") == [f"step_{STEPS:08d}"], "the uninterrupted run has summed nothing on the way"
    assert_same_run(tiny, "halves", "whole")


def test_scheduled_saves_are_summed_and_signals_between_them_are_not(gang: Gang, tiny: Tiny) -> None:
    options = ["checkpoint.every=3", "checkpoint.async_save=true"]
    train(gang, tiny, 2, "whole", *options)
    continue_elsewhere(gang, tiny, "halves", [(2, options, at) for at in (2, 5, 0)])
    rows = {step: verify(tiny.checkpoint("halves", step)).stacked for step in (2, 3, 5, 6, 9)}
    assert rows == {2: 2, 3: None, 5: 2, 6: None, 9: None}
    assert_same_run(tiny, "halves", "whole")
    assert_same_tensors(tiny.checkpoint("halves", 6), tiny.checkpoint("whole", 6))


def test_beyond_the_limit_it_is_summed(gang: Gang, tiny: Tiny) -> None:
    train(gang, tiny, 2, "whole", "checkpoint.every=0")
    stop_and_go_on(gang, tiny, "summed", 2, "checkpoint.stacked_gib=1e-9")
    assert verify(tiny.checkpoint("summed", 3)).stacked is None
    assert_same_figures(tiny, "summed", "whole")
    mine, theirs = read_checkpoint(tiny.checkpoint("summed", STEPS)), read_checkpoint(tiny.checkpoint("whole", STEPS))
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine.keys() & theirs.keys())


def test_four_ranks_two_one_and_four_again(gang: Gang, tiny: Tiny) -> None:
    assert tiny.train("one", *RARE, "train.micro_batch_size=1") == 0
    legs = [(ranks, ["checkpoint.every=0"], at) for ranks, at in ((4, 3), (2, 5), (1, 7), (4, 0))]
    continue_elsewhere(gang, tiny, "moved", legs)
    assert [verify(tiny.checkpoint("moved", step)).stacked for step in (3, 5, 7, 9)] == [4, 2, None, 4]
    assert_same_figures(tiny, "moved", "one")
    mine = read_checkpoint(tiny.checkpoint("moved", STEPS))
    for name, tensor in read_checkpoint(tiny.checkpoint("one", STEPS)).items():
        found = mine[name].sum(0) if "accumulator." in name else mine[name]
        if not tensor.is_floating_point():
            assert torch.equal(found, tensor), name
        assert float((found.double() - tensor.double()).norm()) <= 1e-4 * float(tensor.double().norm()), name


def test_commands_read_stacked_checkpoints(
    gang: Gang, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apart, summed, other = (str(tmp_path / name) for name in ("apart", "summed", "other"))
    case: dict[str, Any] = {"arch": "hope_attention", "tp": 2}
    for folder, stack, steps in ((apart, True, 3), (summed, False, 3), (other, True, 2)):
        Path(folder).mkdir()
        gang.run(cases.save, 4, folder=folder, stack=stack, steps=steps, **case)

    assert verify_command(apart, as_json=False) == 0
    capsys.readouterr()
    assert ls_command(apart, as_json=True) == 0
    (entry,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert {name: part["rows"] for name, part in entry["sets"].items()} == {
        **dict.fromkeys(("core", "level_0", "level_1", "level_2")),
        **dict.fromkeys(("level_1_accumulator", "level_2_accumulator"), 2),
    }
    monkeypatch.setenv("COLUMNS", "200")
    assert ls_command(apart, as_json=False) == 0
    assert "level_1_accumulator of 2 ranks" in " ".join(capsys.readouterr().out.split())

    # A checkpoint is itself; and it is the summed one of the same step to the rounding of a sum.
    assert diff_command(apart, apart, weights_only=False, as_json=False) == 0
    capsys.readouterr()
    assert diff_command(apart, summed, weights_only=False, as_json=True) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert (found["only_in_one"], found["only_in_other"], found["counters"]) == ([], [], {})
    assert all("accumulator" in each["name"] and each["kind"] == "values" for each in found["tensors"])
    assert all(each["max_abs"] < 1e-6 for each in found["tensors"])
    assert diff_command(apart, other, weights_only=False, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counters"]["step"] == [3, 2]
    assert diff_command(apart, summed, weights_only=True, as_json=False) == 0

    one, two = (read_weights(*find_checkpoint(folder)) for folder in (apart, summed))
    model, _, _ = load_model(apart)
    assert one.keys() == two.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(one[name], two[name])
        assert torch.equal(one[name], parameter)


def test_a_flipped_byte_in_any_file_is_found(gang: Gang, tmp_path: Path) -> None:
    for number, stack in enumerate((True, False)):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        gang.run(cases.save, 4, folder=str(run_dir), arch="hope_attention", steps=3, stack=stack, tp=2)
        folder = run_dir / "checkpoints" / "step_00000003"
        files = [folder / MANIFEST, *wanted_files(folder, verify(folder))]
        shards = [path for path in files if path.suffix == ".distcp"]
        assert len(shards) >= 4 * 4, "several sets, each with a file for every rank that has something to write"
        for place, path in enumerate(files):
            whole = path.read_bytes()
            at = (7919 * (place + 1)) % len(whole)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
            with pytest.raises(DamagedCheckpointError):
                find_checkpoint(folder)
            path.write_bytes(whole)
        find_checkpoint(folder)


def test_what_rests_in_host_memory_is_not_copied_to_the_device_of_the_mesh(gang: Gang) -> None:
    found = gang.run(jobs.wrapped_in_host_memory, 4)
    assert found == [[([6, 2], 6.0 * rank), ([12, 2], 6.0 * rank)] for rank in (1, 2, 3, 4)]


def test_resting_moments_go_through_any_layout(gang: Gang, tiny: Tiny) -> None:
    options = ("checkpoint.every=2", "checkpoint.async_save=true")
    train(gang, tiny, 4, "whole", *options, "parallel.tp=2")
    legs = [
        (4, [*options, "parallel.tp=2", rest], at)
        for rest, at in (
            ("optimizer.rest_from_period=2", 3),
            ("optimizer.rest_from_period=null", 5),
            ("optimizer.rest_from_period=4", 0),
        )
    ]
    continue_elsewhere(gang, tiny, "rested", legs)
    assert_same_run(tiny, "rested", "whole")


def test_bytes_of_what_is_stacked() -> None:
    config = cases.make_config("hope_attention")
    one_level = stacked_bytes(["level_1"], config.model, 1)
    # up and down of width 16 in two layers of width 32 with a gate, and the norm of each
    assert one_level == 4 * 2 * (3 * 16 * 32 + 32)
    assert stacked_bytes(["core", "level_1"], config.model, 4) == 4 * one_level


@pytest.mark.parametrize(
    ("step", "refused", "every", "overdue"),
    [(8, 0, 4, False), (8, 1, 4, True), (9, 1, 4, False), (9, 2, 4, True), (11, 2, 4, False), (5, 5, 0, False)],
)
def test_a_scheduled_save_that_fell_into_refused_steps_is_made_up_for(
    step: int, refused: int, every: int, overdue: bool
) -> None:
    assert is_overdue(Progress(step=step, refused=refused), every) is overdue
