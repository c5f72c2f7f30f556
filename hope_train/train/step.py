"""One optimizer step of a model on its mesh."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data_pipelines.batches import Batch, BatchSource
from hope_train.config.train import TrainConfig
from hope_train.levels.report import StepReport
from hope_train.model.loss import IGNORED
from hope_train.parallel.engine import Engine


def optimizer_step(
    engine: Engine, source: BatchSource, config: TrainConfig, index: int, measure: bool
) -> tuple[float, StepReport, list[int]]:
    """Train on global batch `index`, of which each rank takes its rows.

    Returns, the same on every rank, the mean loss in nats per scored token of the whole batch, the optimizer's report,
    and, if the step was refused, the windows of the training text that its not-finite micro-batches held (all of the
    batch's, if only a gradient was not finite).
    """
    device = engine.mesh.device
    batch = engine.batch(source, index)
    scored = engine.total_scored(int((batch.targets != IGNORED).sum()))
    parts = list(micro_batches(batch, config.micro_batch_size, device))
    sums = []
    for number, (tokens_BT, targets_BT, starts_BT) in enumerate(parts):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            nll, _ = engine.model.loss(tokens_BT, targets_BT, starts_BT, config.loss_chunk)
        if number == len(parts) - 1:
            engine.arm()
        # Divided by the whole step's count, so that the gradient is the mean over all its tokens, however they are cut.
        (nll / max(scored, 1)).backward()
        sums.append(nll.detach())
    engine.finish_backward()
    sums_M = engine.all_rows(torch.stack(sums).double())
    loss = float(sums_M.sum()) / max(scored, 1)
    report = engine.optimizer.step(tokens=scored, loss=loss, measure=measure)
    engine.optimizer.zero_grad()
    engine.check(report)
    if report.applied:
        return loss, report, []
    windows = source.window_numbers(index * source.batch_sequences, source.batch_sequences)
    finite = torch.isfinite(sums_M).cpu().numpy()
    bad = np.repeat(~finite, config.micro_batch_size)[: len(windows)]
    return loss, report, (windows if finite.all() else windows[bad]).tolist()


def micro_batches(batch: Batch, rows_each: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(tokens, targets, starts or None), each [rows_each, T], on `device`."""
    for first in range(0, len(batch.tokens), rows_each):
        part = slice(first, first + rows_each)
        starts_BT = None if batch.starts is None else torch.from_numpy(batch.starts[part]).to(device)
        yield (
            torch.from_numpy(batch.tokens[part]).to(device),
            torch.from_numpy(batch.targets[part]).to(device),
            starts_BT,
        )
