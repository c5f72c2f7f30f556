"""DeepSpeed's own loader reads what `to-universal` writes, and `from-universal` what DeepSpeed's own converter writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.checkpoint.manifest import verify
from hope_train.checkpoint.store import find_checkpoint
from hope_train.checkpoint.universal.export import to_universal
from hope_train.checkpoint.universal.load import from_universal
from tests.parallel import universal_jobs
from tests.parallel.harness import Gang
from tests.parallel.zero_jobs import run
from tests.train.tiny import Tiny, read_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(300)]

STATE = {"fp32": "", "exp_avg": "optimizer.exp_avg.", "exp_avg_sq": "optimizer.exp_avg_sq."}


def export(tiny: Tiny, step: int, *overrides: str) -> tuple[Path, Path]:
    """A checkpoint of a run, and the same in DeepSpeed's format."""
    assert tiny.train("run", f"checkpoint.every={step}", "checkpoint.keep_last=9", f"train.tokens={128 * step}") == 0
    folder, out = tiny.checkpoint("run", step), tiny.folder / "universal"
    to_universal(*find_checkpoint(folder), out)
    return folder, out


def assert_holds(found: dict[str, dict[str, torch.Tensor]], checkpoint: Path) -> None:
    """Weights and moments of an engine are those of a checkpoint, to the bit."""
    flat = {name.partition("/")[2]: tensor for name, tensor in read_checkpoint(checkpoint).items()}
    assert set(found) == {name for name in flat if not name.startswith("optimizer.")}
    for name, parts in found.items():
        for key, prefix in STATE.items():
            assert torch.equal(parts[key], flat[prefix + name]), f"{name}: {key}"


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_goes_on_from_a_checkpoint_and_back(gang: Gang, tiny: Tiny, stage: int) -> None:
    checkpoint, out = export(tiny, 3)  # levels 1 and 2 are in mid-period
    save = tiny.folder / "deepspeed"
    ranks: list[Any] = run(
        gang, universal_jobs.go_on, 2, folder=str(out), stage=stage, steps=2, groups=True, save=str(save)
    )
    for found in ranks:
        assert_holds(found["loaded"], checkpoint)
        assert (found["client"], found["global_steps"]) == ({"step": 3, "tokens": 384}, 5)
        assert all(rate < 0.02 for rate, _ in found["rates"]), "the file's groups, not the 1.0 it was made with"
        assert {decay for _, decay in found["rates"]} == {0.0, 0.1}

    made = from_universal(save / "universal", tiny.folder / "back", find_checkpoint(checkpoint))
    assert (made["exact"], made["step"], made["tokens"], made["collected"]) == (False, 5, 640, [])
    verify(tiny.folder / "back")
    assert_holds(ranks[0]["final"], tiny.folder / "back")
    assert not torch.equal(ranks[0]["final"]["head.weight"]["fp32"], ranks[0]["loaded"]["head.weight"]["fp32"])
    state = read_checkpoint(tiny.folder / "back")
    # This engine has stepped every level twice: Adam's own count is DeepSpeed's, the level's is its period's.
    names = [f"level_{level}/optimizer.step.blocks.0.cms.levels.{level}.up.weight" for level in range(3)]
    assert [int(state[name]) for name in names] == [5, 3, 2]
    assert [int(state[f"level_{level}/optimizer.updates"]) for level in range(3)] == [5, 2, 1]
    assert tiny.train("on", resume=str(tiny.folder / "back")) == 0

    # The same, with what to-universal had left put beside it.
    shutil.copytree(out / "hope_train", save / "universal" / "hope_train")
    assert not from_universal(save / "universal", tiny.folder / "again")["exact"]
    assert_holds(ranks[0]["final"], tiny.folder / "again")


def test_stage_3_takes_it_too(gang: Gang, tiny: Tiny) -> None:
    checkpoint, out = export(tiny, 3)
    save = tiny.folder / "deepspeed"
    ranks: list[Any] = run(
        gang, universal_jobs.go_on, 2, folder=str(out), stage=3, steps=1, groups=True, save=str(save)
    )
    for found in ranks:
        assert_holds(found["loaded"], checkpoint)
    made = from_universal(save / "universal", tiny.folder / "back", find_checkpoint(checkpoint))
    assert made["step"] == 4
    assert_holds(ranks[0]["final"], tiny.folder / "back")


def test_one_group_takes_it_where_all_have_taken_as_many_updates(gang: Gang, tiny: Tiny) -> None:
    _, out = export(tiny, 3)
    with pytest.raises(AssertionError, match="Steps .* are not equal"):  # DeepSpeed's words
        run(gang, universal_jobs.go_on, 2, folder=str(out), stage=1, steps=0, groups=False)
