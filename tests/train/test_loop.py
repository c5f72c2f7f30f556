"""The step, and that every sample is seen once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipelines.batches import BatchSource
from hope_train.train import loop
from tests.train.tiny import STEPS, Tiny, assert_same_tensors, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def losses(tiny: Tiny, name: str) -> list[float]:
    return [row["loss"] for row in tiny.metrics(name)]


@pytest.mark.parametrize("arch", ["hope", "transformer_pp"])
def test_micro_batches_recompute_and_chunks_change_nothing_but_rounding(tiny: Tiny, arch: str) -> None:
    model = tiny.model(arch)
    assert tiny.train("a", *model) == 0
    for name, option in [
        ("one", "train.micro_batch_size=1"),
        ("four", "train.micro_batch_size=4"),
        ("chunks", "train.loss_chunk=7"),
        ("recompute", "train.recompute=true"),
    ]:
        assert tiny.train(name, *model, option) == 0
        torch.testing.assert_close(losses(tiny, name), losses(tiny, "a"), rtol=2e-5, atol=0)


def test_the_loss_is_the_mean_over_the_steps_tokens(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # Targets that are not scored, unevenly over the micro-batches: a mean of means would be another number.
    seen: list[tuple[float, float]] = []
    plain = BatchSource.batch

    def holed(self: BatchSource, *arguments: Any) -> Any:
        batch = plain(self, *arguments)
        batch.targets[0, 5:] = -100
        batch.targets[3, :1] = -100
        return batch

    take_step = loop.take_step

    def check(run: Any, index: int, measure: bool) -> Any:
        batch = run.data.train.batch(index)
        with torch.no_grad():
            logits_BTV = run.model(torch.from_numpy(batch.tokens))
            mean = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1), torch.from_numpy(batch.targets).flatten()
            )
        result = take_step(run, index, measure)
        seen.append((result[0], float(mean)))
        return result

    monkeypatch.setattr(BatchSource, "batch", holed)
    monkeypatch.setattr(loop, "take_step", check)
    assert tiny.train("a") == 0
    assert len(seen) == STEPS
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-6)


def test_each_batch_is_taken_once_over_all_starts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    plain = BatchSource.batch

    def counting(self: BatchSource, index: int, *arguments: Any) -> Any:
        taken.append(index)
        if index in (2, 5, 6):
            (tiny.dir("a") / "STOP").touch()
        return plain(self, index, *arguments)

    monkeypatch.setattr(BatchSource, "batch", counting)
    starts = 0
    while starts < 5 and (starts == 0 or tiny.stopped("a")["reason"] != "completed"):
        assert tiny.train("a") == 0
        starts += 1
    assert starts == 4
    assert taken == list(range(STEPS))


def test_bf16_and_resets_at_documents(tiny: Tiny) -> None:
    assert tiny.train("a", "train.precision=bf16", "data.reset_at_documents=true") == 0
    found = losses(tiny, "a")
    assert found[-1] < found[0] - 0.1
    assert all(tensor.dtype != torch.bfloat16 for tensor in read_checkpoint(tiny.checkpoint("a", STEPS)).values()), (
        "weights and optimizer stay in fp32"
    )


def test_deterministic_mode_is_asked_for(tiny: Tiny) -> None:
    try:
        assert tiny.train("a", "train.deterministic=true") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert tiny.train("b") == 0
    assert_same_tensors(tiny.checkpoint("a", STEPS), tiny.checkpoint("b", STEPS))


def test_the_shortest_run_and_one_without_evaluation(tiny: Tiny) -> None:
    assert tiny.train("a", "train.tokens=1", "eval.every=0", "eval.validation_batches=0") == 0
    assert [row["step"] for row in tiny.metrics("a")] == [1]
    assert tiny.evaluations("a") == []
