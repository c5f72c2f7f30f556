"""Negative log-likelihoods of many windows or whole pages under a model, in batches, without all logits at once.

Shapes: B windows, T tokens, D model width, V vocabulary, M scored positions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hope_train.model.hope import HopeModel
from hope_train.model.loss import IGNORED

Progress = Callable[[int, int], None]
"""Called with (tokens scored so far, tokens to score)."""


@dataclass(frozen=True)
class Window:
    """`tokens[:-1]` is read, the last `scored` of `tokens` are predicted; `owner` says what the sum belongs to."""

    owner: int
    tokens: np.ndarray
    """int64 [inputs + 1]."""

    scored: int


@dataclass(frozen=True)
class Scorer:
    """How to run a model: everything that makes its figures, apart from the text."""

    model: HopeModel
    device: torch.device
    eot_id: int
    precision: str = "fp32"
    """`bf16`: autocast of the matrix products, as in training."""

    batch_size: int = 8
    """Windows per forward pass."""

    chunk: int = 1024
    """Scored positions whose logits exist at a time."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Evaluation mode, no gradients, the run's autocast; every module's mode is put back afterwards."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"),
            ):
                yield
        finally:
            for module in training:
                module.training = True

    def windows(self, windows: Sequence[Window], progress: Progress | None = None) -> list[float]:
        """Summed negative log-likelihood (nats) of each window's scored tokens, in the order given.

        The longest windows go first, so that memory runs out at once or never, and equal lengths share a batch.
        Padding stands on the right, where a causal model cannot see it. Deterministic: the order and the batches
        depend on the windows alone.
        """
        order = sorted(range(len(windows)), key=lambda number: (-len(windows[number].tokens), number))
        results = [0.0] * len(windows)
        total, done = sum(window.scored for window in windows), 0
        with self.running():
            for first in range(0, len(order), self.batch_size):
                numbers = order[first : first + self.batch_size]
                batch = [windows[number] for number in numbers]
                inputs_BT, targets_BT = self._pad(batch)
                x_BTD = self.model.hidden(inputs_BT)
                nll_B = row_sums(x_BTD, self.model.head_weight_VD, targets_BT, self.chunk)
                for number, nll in zip(numbers, nll_B.tolist(), strict=True):
                    results[number] = nll
                done += sum(window.scored for window in batch)
                if progress is not None:
                    progress(done, total)
        return results

    def streams(self, streams: Sequence[np.ndarray], length: int, progress: Progress | None = None) -> list[float]:
        """As `windows`, for whole streams of tokens (int64 [tokens], the first one is not scored) read through `step`.

        The state is carried from window to window of `length` tokens, so each token sees all before it. Rows whose
        stream has ended run along on padding until the longest one of their batch ends.
        """
        order = sorted(range(len(streams)), key=lambda number: (-len(streams[number]), number))
        results = [0.0] * len(streams)
        total, done = sum(max(0, len(stream) - 1) for stream in streams), 0
        with self.running():
            for numbers in _of_like_length([len(stream) for stream in streams], order, self.batch_size):
                batch = [Window(n, streams[n], len(streams[n]) - 1) for n in numbers if len(streams[n]) > 1]
                if not batch:
                    continue
                inputs_BT, targets_BT = self._pad(batch)
                sums_B = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
                state = self.model.initial_state(len(batch))
                # `step` gives logits of all its tokens; wherever a window is cut, the result is the same.
                stride = max(1, min(length, self.chunk // len(batch)))
                for start in range(0, inputs_BT.shape[1], stride):
                    logits_BTV, state = self.model.step(inputs_BT[:, start : start + stride], state)
                    target_BT = targets_BT[:, start : start + stride]
                    scored_BT = target_BT != IGNORED
                    nll_BT = _nll(logits_BTV, target_BT.where(scored_BT, 0)).where(scored_BT, 0)
                    sums_B += nll_BT.double().sum(1)
                    done += int(scored_BT.sum())
                    if progress is not None:
                        progress(done, total)
                for window, nll in zip(batch, sums_B.tolist(), strict=True):
                    results[window.owner] = nll
        return results

    def _pad(self, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Inputs [B, T] and targets [B, T], -100 where nothing is scored."""
        longest = max(len(window.tokens) for window in batch) - 1
        inputs = np.full((len(batch), longest), self.eot_id, dtype=np.int64)
        targets = np.full((len(batch), longest), IGNORED, dtype=np.int64)
        for row, window in enumerate(batch):
            read = len(window.tokens) - 1
            inputs[row, :read] = window.tokens[:-1]
            targets[row, read - window.scored : read] = window.tokens[len(window.tokens) - window.scored :]
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)


def token_nll(x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, chunk: int = 1024) -> Tensor:
    """-log softmax(x W^T)[target] of each row, [M] in fp32 (float64 for float64 inputs); every target is scored.

    At most `chunk` rows of logits exist at a time. Under autocast the products are in its dtype, the softmax is not.
    """
    parts = [
        _nll(torch.nn.functional.linear(x_MD[first : first + chunk], weight_VD), target_M[first : first + chunk])
        for first in range(0, x_MD.shape[0], chunk)
    ]
    return torch.cat(parts) if parts else x_MD.new_zeros(0)


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    """[..., V] and [...] -> [...]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, target[..., None])[..., 0]


def row_sums(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, chunk: int) -> Tensor:
    """Sum over each row's scored positions, [B] in float64."""
    scored_BT = targets_BT != IGNORED
    nll_M = token_nll(x_BTD[scored_BT], weight_VD, targets_BT[scored_BT], chunk)
    nll_BT = torch.zeros(targets_BT.shape, dtype=torch.float64, device=x_BTD.device)
    nll_BT[scored_BT] = nll_M.double()
    return nll_BT.sum(1)


def _of_like_length(lengths: Sequence[int], order: Sequence[int], most: int) -> Iterator[list[int]]:
    """Runs of `order` (longest first) of at most `most`, none shorter than 0.7 of its run's longest.

    Pages differ in length by a factor of twenty; a batch lasts as long as its longest.
    """
    group: list[int] = []
    for number in order:
        if group and (len(group) == most or lengths[number] < 0.7 * lengths[group[0]]):
            yield group
            group = []
        group.append(number)
    if group:
        yield group
