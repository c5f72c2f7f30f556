"""What is observed is what happens: against `chunked.run` and the token loop."""

from __future__ import annotations

import pytest
import torch

from hope_train.config.model import MemoryConfig
from hope_train.memory import chunked, reference
from hope_train.memory.activity import by_box, observe
from tests.memory.cases import TOKENS, all_cases, make_problem, relative

CASES = all_cases()


@pytest.mark.parametrize("number", range(0, len(CASES), 97))
def test_answers_and_clamping_are_those_of_the_token_loop(number: int) -> None:
    """The number of matrices that the clamp holds is the reference's own count, to the last one."""
    config, documents = CASES[number]
    problem = make_problem(config, number, documents)
    want = reference.run(config, problem.z_BTHN, problem.q_BTHN, problem.init, problem.starts_BT)
    seen = observe(config, problem.z_BTHN, problem.q_BTHN, problem.init, problem.starts_BT)
    assert relative(seen.o_BTHN, want.o_BTHN) < 1e-10
    assert sum(int(part.held.sum()) for part in seen.matrices.values()) == want.clamped


@pytest.mark.parametrize("chunks", [(4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_deviation_is_that_of_the_state(kind: str, chunks: tuple[int, int]) -> None:
    """At every chunk's end, by every name, and counted per sequence and head."""
    config = MemoryConfig(kind=kind, chunk_size=chunks[0], generator_chunk_size=chunks[1], clamp=1.05)  # type: ignore[arg-type]
    problem = make_problem(config, 2, False)
    assert problem.q_BTHN is not None
    seen = observe(config, problem.z_BTHN, problem.q_BTHN, problem.init)
    assert seen.matrices.keys() == problem.init.keys()
    for name, part in seen.matrices.items():
        size = chunks[0] if name.endswith("mem") else chunks[1]
        assert part.deviation.shape == (TOKENS // size, 2, 2)
        for number in range(TOKENS // size):
            last = (number + 1) * size
            with torch.no_grad():
                _, state = chunked.run(config, problem.z_BTHN[:, :last], problem.q_BTHN[:, :last], problem.init)
            flat = {}
            for group, boxes in zip(state.groups, chunked.groups_of(config), strict=True):
                flat |= by_box(config, boxes, group.now)
            start = problem.init[name].detach()
            for b in range(2):
                for h in range(2):
                    moved = (flat[name][h, b] - start[h]).norm() / start[h].norm()
                    assert part.deviation[number, b, h].item() == pytest.approx(moved.item(), rel=1e-9)


def test_rates_are_those_at_the_chunks_start() -> None:
    """In the first chunk the memories are their initial states, so eta and alpha follow from the inputs alone."""
    config = MemoryConfig(kind="linear", chunk_size=8, generator_chunk_size=8, eta_max=0.7)
    problem = make_problem(config, 3, False)
    seen = observe(config, problem.z_BTHN, problem.q_BTHN, problem.init)
    z = problem.z_BTHN[:, :8]
    eta = torch.einsum("bthn,hn->bth", z, problem.init["w_eta"][:, 0])
    alpha = torch.einsum("bthn,hn->bth", z, problem.init["w_alpha"][:, 0])
    torch.testing.assert_close(seen.eta_BTH[:, :8], 0.7 * torch.sigmoid(eta - 2).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(seen.alpha_BTH[:, :8], torch.sigmoid(alpha + 4).detach(), rtol=1e-12, atol=0)


def test_rows_say_it_in_plain_numbers() -> None:
    config = MemoryConfig(chunk_size=4, generator_chunk_size=8, adaptive_q=True)
    problem = make_problem(config, 4, True)
    seen = observe(config, problem.z_BTHN, None, problem.init, problem.starts_BT)
    rows = {row["box"]: row for row in seen.rows()}
    assert set(rows) == {"k", "v", "q", "eta", "alpha", "mem"}
    assert len(rows["mem"]["deviation_by_chunk"]) == TOKENS // 4
    assert len(rows["k"]["deviation_by_chunk"]) == TOKENS // 8
    for row in rows.values():
        assert row["deviation_min"] <= row["deviation"] <= row["deviation_max"]
        assert row["deviation"] == pytest.approx(sum(row["deviation_by_chunk"]) / len(row["deviation_by_chunk"]))
    with pytest.raises(KeyError, match="no memory 'nothing'"):
        seen.box("nothing")


def test_less_than_a_chunk_has_rates_and_no_figures() -> None:
    config = MemoryConfig()
    problem = make_problem(config, 4, False)
    seen = observe(config, problem.z_BTHN, problem.q_BTHN, problem.init)
    assert seen.eta_BTH.shape == (2, TOKENS, 2)
    assert all(row["deviation"] is None for row in seen.rows())
