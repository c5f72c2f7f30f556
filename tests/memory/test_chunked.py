"""The chunk-parallel form against the token loop whose inner gradients come from autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_train.config.model import MemoryConfig
from hope_train.memory import chunked, reference
from tests.memory.cases import BATCH, TOKENS, all_cases, make_problem, relative, worst_error

CASES = all_cases()
BAR = 1e-10


@pytest.mark.parametrize("first", range(8))
def test_sample_of_the_product(first: int) -> None:
    """Every 29th combination: a share of the cross product that meets every option in the fast suite."""
    for number in range(first * 29, len(CASES), 8 * 29):
        config, documents = CASES[number]
        error, _ = worst_error(make_problem(config, number, documents))
        assert error < BAR, (number, config, documents, error)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(48))
def test_whole_product(first: int) -> None:
    """All 1,152 combinations, unequal chunks and lengths that are no multiple of the chunk included."""
    for number in range(first, len(CASES), 48):
        config, documents = CASES[number]
        error, _ = worst_error(make_problem(config, number, documents))
        assert error < BAR, (number, config, documents, error)


def _clamped(config: MemoryConfig) -> int:
    problem = make_problem(config, 5, False)
    return reference.run(config, problem.z_BTHN, problem.q_BTHN, problem.init).clamped


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_clamp_is_active_where_it_is_tested(kind: str) -> None:
    """The product's tight clamp holds matrices, or it would test nothing."""
    tight = [config for config, _ in CASES if config.clamp and config.kind == kind and config.chunk_size == 4]
    held = [_clamped(config) for config in tight[::6]]
    assert sum(count > 0 for count in held) >= 3, held


@pytest.mark.parametrize("number", range(0, len(CASES), 61))
def test_any_split_equals_the_whole(number: int) -> None:
    """Prefill in pieces that end inside chunks, then single tokens, gives the full forward's outputs and state."""
    config, documents = CASES[number]
    problem = make_problem(config, number, documents)
    with torch.no_grad():
        whole, end = chunked.run(config, problem.z_BTHN, problem.q_BTHN, problem.init, problem.starts_BT)
        outputs, state = [], None
        for first, last in zip([0, 3, 4, 9, 10, 11, 17], [3, 4, 9, 10, 11, 17, 19], strict=True):
            q = None if problem.q_BTHN is None else problem.q_BTHN[:, first:last]
            starts = None if problem.starts_BT is None else problem.starts_BT[:, first:last]
            output, state = chunked.run(config, problem.z_BTHN[:, first:last], q, problem.init, starts, state)
            outputs.append(output)
    assert relative(torch.cat(outputs, 1), whole) < BAR
    assert state is not None
    for group, want in zip(state.groups, end.groups, strict=True):
        for which in ("now", "anchor", "speed"):
            for name, weight in getattr(want, which).items():
                assert relative(getattr(group, which)[name], weight) < BAR


@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(1, TOKENS - 1), max_size=6, unique=True),
    read=st.sampled_from(["after", "before", "start"]),
)
def test_splits_by_property(cuts: list[int], read: str) -> None:
    config = MemoryConfig(chunk_size=8, generator_chunk_size=4, read=read)  # type: ignore[arg-type]
    problem = make_problem(config, 3, True)
    edges = [0, *sorted(cuts), TOKENS]
    assert problem.q_BTHN is not None
    assert problem.starts_BT is not None
    with torch.no_grad():
        whole, _ = chunked.run(config, problem.z_BTHN, problem.q_BTHN, problem.init, problem.starts_BT)
        outputs, state = [], None
        for first, last in itertools.pairwise(edges):
            rows = (slice(None), slice(first, last))
            output, state = chunked.run(
                config, problem.z_BTHN[rows], problem.q_BTHN[rows], problem.init, problem.starts_BT[rows], state
            )
            outputs.append(output)
    assert relative(torch.cat(outputs, 1), whole) < BAR


def test_documents_do_not_see_each_other() -> None:
    """Each document gives the outputs it gives alone, wherever its boundary falls (chunk counting included)."""
    config = MemoryConfig(chunk_size=4, generator_chunk_size=4)
    problem = make_problem(config, 8, False)
    starts = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    starts[:, 8] = True
    assert problem.q_BTHN is not None
    together, _ = chunked.run(config, problem.z_BTHN, problem.q_BTHN, problem.init, starts)
    alone, _ = chunked.run(config, problem.z_BTHN[:, 8:], problem.q_BTHN[:, 8:], problem.init)
    assert relative(together[:, 8:], alone) < BAR


def test_recomputing_chunks_changes_nothing() -> None:
    """save_every trades time for memory: same outputs, same gradients."""
    kept = make_problem(MemoryConfig(chunk_size=4, generator_chunk_size=4), 2, True)
    again = make_problem(MemoryConfig(chunk_size=4, generator_chunk_size=4, save_every=3), 2, True)
    results = []
    for problem in (kept, again):
        output, _ = chunked.run(problem.config, problem.z_BTHN, problem.q_BTHN, problem.init, problem.starts_BT)
        results.append((output, *torch.autograd.grad((output * problem.weight_BTHN).sum(), problem.leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_state_does_not_grow() -> None:
    """The recurrent state has one size whatever the number of tokens."""
    config = MemoryConfig(chunk_size=4, generator_chunk_size=4)
    problem = make_problem(config, 4, False)
    assert problem.q_BTHN is not None

    def size(state: chunked.MemoryState) -> int:
        return sum(t.numel() for g in state.groups for d in (g.anchor, g.now, g.speed) for t in d.values())

    sizes = []
    with torch.no_grad():
        for tokens in (1, 6, 19):
            _, state = chunked.run(config, problem.z_BTHN[:, :tokens], problem.q_BTHN[:, :tokens], problem.init)
            sizes.append(size(state))
    assert len(set(sizes)) == 1
