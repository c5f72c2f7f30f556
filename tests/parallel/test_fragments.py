"""Runs of numbers as boxes, and boxes in a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hope_train.checkpoint.tensors import Staging, load_set, save_set
from hope_train.parallel.fragments import Fragment, Run, boxes

SHAPES = [(), (5,), (3, 4), (2, 3, 4), (4, 1, 3), (1, 6), (2, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_are_the_run_in_its_order(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    whole = torch.arange(count).view(shape)
    for first in range(count + 1):
        for last in range(first, count + 1):
            found, numbers = boxes(shape, first, last), []
            for box in found:
                assert box.start == len(numbers)
                place = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
                numbers += whole[place].flatten().tolist()
            assert numbers == list(range(first, last))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_a_run_is_read_from_the_whole_and_written_as_a_part_of_it(tmp_path: Path, dim: int | None) -> None:
    whole = torch.randn(6, 4, 3)
    save_set(tmp_path / "whole", {"x": whole, "rows": torch.stack([whole, 2 * whole])})
    local = whole if dim is None else whole.chunk(2, dim)[1]
    for first, last in ((0, local.numel()), (5, 31), (7, 8), (4, 4)):
        run = Run.of((6, 4, 3), dim, 1, 2, first, last)
        mine, rows = torch.zeros(last - first), torch.zeros(2, last - first)
        load_set(tmp_path / "whole", {"x": Fragment(mine, run), "rows": Fragment(rows, run, rows=2)})
        expected = local.flatten()[first:last]
        assert torch.equal(mine, expected)
        assert torch.equal(rows, torch.stack([expected, 2 * expected]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_runs_are_written_as_one_tensor(tmp_path: Path) -> None:
    whole = torch.randn(5, 3)
    parts = {name: Run.of((5, 3), None, 0, 1, *place) for name, place in {"a": (0, 7), "b": (7, 15)}.items()}

    class Both(Fragment):  # what two ranks write, in one process
        def __create_write_items__(self, fqn: str, object: object) -> list:
            return [item for part in (one, other) for item in Fragment.__create_write_items__(part, fqn, part)]

        def __get_tensor_shard__(self, index):  # type: ignore[no-untyped-def]
            for part in (one, other):
                if any(chunk.offsets == index.offset for chunk in part.__create_chunk_list__()):
                    return Fragment.__get_tensor_shard__(part, index)
            raise AssertionError(index)

    one, other = Fragment(whole.flatten()[:7], parts["a"]), Fragment(whole.flatten()[7:], parts["b"])
    save_set(tmp_path / "set", {"x": Both(whole.flatten()[:7], parts["a"])})
    read = torch.zeros(5, 3)
    load_set(tmp_path / "set", {"x": read})
    assert torch.equal(read, whole)


def test_a_copy_for_a_save_in_the_background_keeps_its_numbers() -> None:
    local = torch.arange(4.0)
    part = Fragment(local, Run.of((3, 4), None, 0, 1, 2, 6))
    staging = Staging()
    for round_ in range(2):  # the second one goes into memory that is there
        copied = staging.copy({"core": {"x": part}})["core"]["x"]
        local.add_(10)
        assert isinstance(copied, Fragment)
        assert copied.to_local().tolist() == [value + 10 * round_ for value in range(4)]
        assert copied.shape == (3, 4)


def test_a_part_is_zeroed_where_it_lies_and_nothing_else_is_computed_with_it() -> None:
    local = torch.ones(4)
    part = Fragment(local, Run.of((3, 4), None, 0, 1, 2, 6))
    with torch.no_grad():
        part.zero_()
    assert local.tolist() == [0.0] * 4
    with pytest.raises(NotImplementedError, match="part of a tensor"):
        part + 1
