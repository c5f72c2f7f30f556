"""The parallel bench: its two sides train alike, its rows have what its bars are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import bench_parallel
from scripts.bench_engines import ENGINES
from scripts.bench_overhead import OVERHEADS, joined, launched_mesh, mesh_of_one, overhead
from scripts.bench_parallel import LAYOUTS, Source, bars, process_group, spread

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose step takes no time."""
    plain = bench_parallel.run_config

    def config(parallel: dict[str, Any]) -> Any:
        model = {"arch": "hope", "d_model": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 4096}
        levels = [{"width": 8, "period": period} for period in (1, 2)]
        found = plain(parallel)
        kind = type(found.model)
        return found.model_copy(update={"model": kind.model_validate({**model, "cms": {"levels": levels}})})

    monkeypatch.setattr(bench_parallel, "run_config", config)


def test_everything_is_engaged_on_a_mesh_of_one(small: None) -> None:
    from hope_train.parallel.engine import build_engine
    from hope_train.parallel.ranks import MeshRanks

    with process_group(0, 1):
        engine = build_engine(bench_parallel.run_config({}), mesh_of_one(OVERHEADS["both"]))
    assert engine.spread.tensor is not None
    assert engine.spread.tensor.ranks == 1
    assert engine.data is not None
    assert engine.data.sizes.keys() == {"core", "level_0", "level_1"}
    assert isinstance(engine.optimizer.ranks, MeshRanks)


def test_a_rank_that_is_launched_alone_gets_the_plain_engine(small: None) -> None:
    from hope_train.parallel.engine import build_engine
    from hope_train.parallel.ranks import MeshRanks

    with process_group(0, 1):
        engine = build_engine(bench_parallel.run_config({}), launched_mesh(bench_parallel.run_config({})))
    assert engine.mesh.device_mesh is None
    assert engine.data is None
    assert not isinstance(engine.optimizer.ranks, MeshRanks)


@pytest.mark.parametrize("kind", OVERHEADS)
def test_both_sides_train_alike(small: None, kind: str) -> None:
    with process_group(0, 1):
        row = overhead(
            kind, bench_parallel.run_config({}), Source(), 2, kind != "both"
        )  # raises if their losses differ
    assert row["plain_s"] > 0
    assert row["engaged_s"] > 0
    assert row["share"] > -1


def test_rows_of_several_processes() -> None:
    rows = [{"row": "overhead", "plain_s": 1.0, "engaged_s": 1 + share, "share": share} for share in (0.01, 0.04)]
    row = joined(rows)
    assert row["share"] == pytest.approx(0.025)
    assert row["shares"] == [0.01, 0.04]
    assert joined([*rows, {"row": "overhead", "error": "x"}]) == {"row": "overhead", "error": "x"}


def test_a_sharded_checkpoint_against_copies(tmp_path: Path) -> None:
    row = spread(2, {"row": "sharded save and load", "gib": 0.002, "dir": str(tmp_path), "repeats": 1})
    assert "error" not in row
    assert row["mib"] == pytest.approx(2, rel=0.1)
    assert row["save_share_of_copy"] == pytest.approx(row["save_mib_per_s"] / row["copy_mib_per_s"], rel=0.05)
    assert not list(tmp_path.glob("copy_*"))


@pytest.mark.slow
def test_an_engine_s_row() -> None:
    row = spread(2, {"row": "engine", "engine": "deepspeed stage 1, dp 2", "steps": 1})
    assert "error" not in row
    assert row["step_s"] > 0
    assert row["peak_mib"] > row["libraries_mib"] > 0


def test_bars() -> None:
    rows = [
        {"row": "overhead", "kind": "both", "share": 0.031},
        {"row": "communication", "share": 0.5},
        {"row": "background save", "error": "x"},
    ]
    assert bars(rows) == [{"bar": "overhead both", "value": 0.031, "wanted": "<= 0.03", "met": False}]


def test_layouts_are_configurations() -> None:
    for ranks, parallel in (*LAYOUTS.values(), *ENGINES.values()):
        config = bench_parallel.run_config(parallel)
        assert ranks % (config.parallel.tp * config.parallel.pp * config.parallel.dp_shard) == 0
