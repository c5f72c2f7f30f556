"""WikiText inside the loop: when, what, and that a run begins only with text that is there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hope_train.errors import UserError
from tests.train.tiny import STEPS, Tiny, lines

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PAGE = """ = River {n} =\x20
\x20
 The green lamp walked under the river of stone .\x20
 = = Memory = =\x20
 Seven quietly into the a .\x20
"""


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """A folder with files of WikiText's form."""
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for split in ("valid", "test"):
        pages = [PAGE.replace("{n}", f"{split} {number}") for number in range(3)]
        (folder / f"wiki.{split}.raw").write_text(" \n" + " \n".join(pages), encoding="utf-8")
    return folder


def test_perplexities_fall_and_the_test_split_comes_last(tiny: Tiny, wikitext: Path) -> None:
    assert tiny.train("a", f"eval.wikitext={wikitext}", "eval.pages=2") == 0
    rows = [row for row in lines(tiny.dir("a") / "eval.jsonl") if row.get("protocol") == "word"]
    assert [(row["step"], row["split"]) for row in rows] == [
        *((step, "validation") for step in (0, 4, 8, STEPS)),
        (STEPS, "test"),
    ]
    assert all(row["tokens"] == 128 * row["step"] and math.isfinite(row["word_ppl"]) for row in rows)
    assert rows[3]["word_ppl"] < rows[0]["word_ppl"]


def test_only_at_the_end(tiny: Tiny, wikitext: Path) -> None:
    assert tiny.train("a", f"eval.wikitext={wikitext}", "eval.every=0", "eval.test_at_end=false") == 0
    assert {(row["step"], row["split"]) for row in tiny.evaluations("a")} == {(STEPS, "validation")}


def test_missing_text_is_noticed_before_the_start(tiny: Tiny, wikitext: Path) -> None:
    (wikitext / "wiki.test.raw").unlink()
    with pytest.raises(UserError, match=r"wiki\.test\.raw"):
        tiny.train("a", f"eval.wikitext={wikitext}")
    assert not tiny.dir("a").exists()
    assert tiny.train("a", f"eval.wikitext={wikitext}", "eval.test_at_end=false") == 0
