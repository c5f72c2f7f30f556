"""The tasks of an array: lines of a file, points of a grid."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_train.errors import UserError
from launch.sweep import array_option, sweep_overrides


def test_a_grid_is_a_product_whose_last_key_varies_fastest() -> None:
    assert sweep_overrides(None, ["a=1,2", "b=x,y"]) == [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]


def test_commas_in_a_list_do_not_divide_it() -> None:
    assert sweep_overrides(None, ["optimizer.betas=[0.9,0.95],[0.9,0.99]"]) == [
        ["optimizer.betas=[0.9,0.95]"],
        ["optimizer.betas=[0.9,0.99]"],
    ]


def test_a_line_of_a_file_is_a_task(tmp_path: Path) -> None:
    file = tmp_path / "sweep.txt"
    file.write_text('seed=1 optimizer.lr=1e-3\n\n# not this\nseed=2 dir="a b"  # nor this\n', encoding="utf-8")
    assert sweep_overrides(str(file), []) == [["seed=1", "optimizer.lr=1e-3"], ["seed=2", "dir=a b"]]
    assert len(sweep_overrides(str(file), ["x=1,2"])) == 4


@pytest.mark.parametrize(
    ("file", "grid", "said"),
    [("nowhere.txt", [], "cannot be read"), (None, ["a"], "key=a,b,c"), (None, ["a="], "key=a,b,c")],
)
def test_mistakes(file: str | None, grid: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sweep_overrides(file, grid)


def test_words_that_are_no_overrides(tmp_path: Path) -> None:
    file = tmp_path / "sweep.txt"
    file.write_text("seed 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="'seed'"):
        sweep_overrides(str(file), [])
    file.write_text('seed=1\nname="a b\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: no closing quotation"):
        sweep_overrides(str(file), [])
    file.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="no task"):
        sweep_overrides(str(file), [])


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("0-5%2", [0, 1, 2, 3, 4, 5]), ("1,3", [1, 3]), ("0-5:2", [0, 2, 4]), ("5,0-2:2,1", [0, 1, 2, 5])],
)
def test_tasks_to_run(text: str, tasks: list[int]) -> None:
    assert array_option(text, 6) == (text, tasks)
    assert array_option(None, 6) == ("0-5", [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("text", ["0-6", "x", "7", "1,9%2", "3-1", "0-5%", "0-5%0", "", "1,,2", "0-99999999999"])
def test_tasks_that_are_not_there(text: str) -> None:
    with pytest.raises(UserError, match="--array"):
        array_option(text, 6)
