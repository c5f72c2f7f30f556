"""Balancing of pipeline stages against every possible cut."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from hope_train.config.load import load_config
from hope_train.config.parallel import ParallelConfig
from hope_train.errors import UserError
from hope_train.plan.stages import balanced, part_count, parts_of_rank, rank_of_part, stage_layers, training_costs

FOLDER = Path(__file__).resolve().parents[2] / "configs"


def part_costs(cut, costs, first, last):
    sums = [sum(costs[sum(cut[:part]) : sum(cut[: part + 1])]) for part in range(len(cut))]
    sums[0] += first
    sums[-1] += last
    return sums


@pytest.mark.parametrize("seed", range(30))
def test_no_cut_is_better(seed):
    random.seed(seed)
    count, parts = random.randint(3, 9), random.randint(1, 3)
    costs = [random.choice([1.0, 1.0, 2.5, random.random()]) for _ in range(count)]
    first, last = random.choice([0.0, 0.7]), random.choice([0.0, 2.2])
    chosen = balanced(costs, parts, first, last)
    assert (sum(chosen), len(chosen)) == (count, parts)
    assert min(chosen) >= 1
    cuts = [
        tuple(b - a for a, b in itertools.pairwise((0, *inner, count)))
        for inner in itertools.combinations(range(1, count), parts - 1)
    ]
    values = [part_costs(cut, costs, first, last) for cut in cuts]
    mine = part_costs(chosen, costs, first, last)
    lowest = min(max(value) for value in values)
    assert max(mine) == pytest.approx(lowest)
    squares = min(sum(c * c for c in value) for value in values if max(value) <= lowest * (1 + 1e-9))
    assert sum(c * c for c in mine) == pytest.approx(squares)


def test_equal_layers_leave_the_shorter_parts_at_the_end():
    assert balanced([1.0] * 24, 4) == (6, 6, 6, 6)
    assert balanced([1.0] * 10, 4) == (3, 3, 2, 2)
    assert balanced([0.1] * 10, 4) == (3, 3, 2, 2)


def test_a_heavy_head_gets_fewer_layers():
    assert balanced([1.0] * 24, 4, last=3.0) == (7, 7, 7, 3)
    assert balanced([1.0] * 4, 2, last=0.0) == (2, 2)
    assert balanced([1.0] * 4, 2, last=5.0) == (3, 1)


def test_more_parts_than_layers_are_refused():
    with pytest.raises(UserError, match=r"4 layers cannot be cut into 8 .*parallel\.pp"):
        balanced([1.0] * 4, 8)


def test_parts_of_the_schedules():
    plain, round_, vee = (ParallelConfig(pp=4, schedule=schedule) for schedule in ("1f1b", "interleaved_1f1b", "zbv"))
    assert [part_count(parallel) for parallel in (plain, round_, vee)] == [4, 8, 8]
    assert part_count(ParallelConfig(pp=1, schedule="zbv")) == 1
    assert [rank_of_part(part, plain) for part in range(4)] == [0, 1, 2, 3]
    assert [rank_of_part(part, round_) for part in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [rank_of_part(part, vee) for part in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert parts_of_rank(0, vee) == (0, 7)


def test_layers_given_are_taken_and_checked():
    path = FOLDER / "hope_1b3.yaml"
    good = load_config(path, ["parallel.pp=3", "parallel.layers_per_stage=[10,8,6]"])
    assert stage_layers(good) == (10, 8, 6)
    # The same file without a pipeline, as the engine takes it.
    assert stage_layers(load_config(path, ["parallel.layers_per_stage=[10,8,6]"])) == (24,)
    with pytest.raises(UserError, match=r"has 2 entries.* makes 3 parts"):
        stage_layers(load_config(path, ["parallel.pp=3", "parallel.layers_per_stage=[12,12]"]))
    with pytest.raises(UserError, match=r"adds up to 23 layers: model\.n_layers=24"):
        stage_layers(load_config(path, ["parallel.pp=3", "parallel.layers_per_stage=[10,8,5]"]))


def test_the_head_counts_and_counts_more_with_a_larger_vocabulary():
    path = FOLDER / "transformer_pp_small.yaml"
    layer, head = training_costs(load_config(path))
    more_layer, more_head = training_costs(load_config(path, ["model.vocab_size=65536"]))
    assert (more_layer, more_head) == (layer, 8 * head)
    cut = stage_layers(load_config(path, ["model.vocab_size=65536", "parallel.pp=2"]))
    assert cut[0] > cut[1]
    assert sum(cut) == 8
