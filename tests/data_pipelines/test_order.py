"""The shuffled order is a permutation, and looks like one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.order import permute


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_place_is_taken_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 65])
def test_small_sizes(size: int) -> None:
    assert sorted(permute(np.arange(size), size, 0, 0).tolist()) == list(range(size))


def test_places_may_be_asked_for_alone() -> None:
    whole = permute(np.arange(1000), 1000, 5, 2)
    assert [int(permute(np.array([place]), 1000, 5, 2)[0]) for place in range(0, 1000, 37)] == whole[::37].tolist()


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = [tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(10) for epoch in range(10)]
    assert len(set(orders)) == 100


def test_the_order_is_the_same_for_ever() -> None:
    """A changed order would give a resumed run other samples; these were written down with the first version."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [8, 1, 5, 2, 6, 7, 4, 3, 9, 0]
    assert permute(np.arange(3), 10**9, 7, 3).tolist() == [774203146, 60835280, 999174515]


def test_it_looks_random() -> None:
    size = 4096
    orders = np.stack([permute(np.arange(size), size, seed, 0) for seed in range(40)])
    # Means of 40 uniform places: 5 standard errors, for the mean over the orders and for neighbours' distances.
    error = size / np.sqrt(12 * 40 * size)
    assert abs(np.abs(np.diff(orders, axis=1)).mean() - size / 3) < 5 * size / np.sqrt(18 * 40 * size) * 2
    halves = orders[:, : size // 2].mean() - orders[:, size // 2 :].mean()
    assert abs(halves) < 5 * 2 * error
    correlation = np.corrcoef(np.arange(size), orders)[0, 1:]
    assert np.abs(correlation).max() < 5 / np.sqrt(size)
    # Small sizes reach all orders: 3! = 6.
    assert len({tuple(permute(np.arange(3), 3, seed, 0)) for seed in range(200)}) == 6
