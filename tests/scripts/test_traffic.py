"""Traffic by level, counted on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_train.config.load import load_config
from scripts.traffic import LAYOUTS, rows_of

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "hope_1b3.yaml"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["DDP, 4 ranks", "FSDP2, 4 ranks, kept gathered", "DDP 2, pipeline of 2 (1F1B)"])
def test_a_level_of_period_p_has_one_pth_of_the_traffic(layout: str) -> None:
    config = load_config(CONFIG, [])
    periods = {f"level_{place}": level.period for place, level in enumerate(config.model.cms.levels)}
    rows = list(rows_of(config, {layout: LAYOUTS[layout]}))
    for row in rows:
        period = periods.get(row["set"], 1)
        if row["kind"] == "reduced" and row["set"] != "all":
            assert row["share"] == 1 / period, row
        if row["kind"] == "gathered" and period > 1:  # kept: once per period instead of around both uses
            assert row["share"] == 1 / (2 * period), row
        if row["kind"] == "reduced" and row["set"] == "all":
            assert row["share"] <= 0.55
    assert {row["kind"] for row in rows} == ({"reduced", "gathered"} if "FSDP2" in layout else {"reduced"})
