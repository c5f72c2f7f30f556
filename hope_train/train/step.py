"""One optimizer step of a model on its mesh."""

from __future__ import annotations

import numpy as np
import torch

from data_pipelines.batches import BatchSource
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
    batch = engine.batch(source, index)
    scored = engine.total_scored(int((batch.targets != IGNORED).sum()))
    sums_M = engine.forward_backward(batch, scored, config)
    loss = float(sums_M.sum()) / max(scored, 1)
    report = engine.optimizer.step(tokens=scored, loss=loss, measure=measure)
    engine.zero_grad()
    engine.check(report)
    if report.applied:
        return loss, report, []
    windows = source.window_numbers(*source.sizes.samples_of(index))
    finite = torch.isfinite(sums_M).cpu().numpy()
    bad = np.repeat(~finite, config.micro_batch_size)[: len(windows)]
    return loss, report, (windows if finite.all() else windows[bad]).tolist()
