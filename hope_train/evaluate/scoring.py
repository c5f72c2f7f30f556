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

from hope_train.model.hope import HopeModel, ModelState
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


class Shares:
    """Which part of the windows this process scores. Here: all of them."""

    rank, ranks = 0, 1

    lockstep = False
    """Whether the processes hold parts of one model and have to run it equally often, with whatever text."""

    def join(self, values: list[float]) -> list[float]:
        """The sum over the processes, entry by entry; each entry is zero in all processes but one."""
        return values


ALL_MINE = Shares()


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

    shares: Shares = ALL_MINE
    """Windows are dealt out to several processes, and every process gets all results."""

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
            groups = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
            for place, numbers in enumerate(groups):
                batch = [windows[number] for number in numbers]
                done += sum(window.scored for window in batch)
                if not self._is_mine(place):
                    if self.shares.lockstep and place == len(groups) - 1 and self._is_left_over(len(groups)):
                        self.model.row_nll(*self._pad(batch[:1]), chunk=self.chunk)
                    continue
                inputs_BT, targets_BT = self._pad(batch)
                nll_B = self.model.row_nll(inputs_BT, targets_BT, chunk=self.chunk)
                for number, nll in zip(numbers, nll_B.tolist(), strict=True):
                    results[number] = nll
                if progress is not None:
                    progress(done, total)
        return self.shares.join(results)

    def streams(self, streams: Sequence[np.ndarray], length: int, progress: Progress | None = None) -> list[float]:
        """As `windows`, for whole streams of tokens (int64 [tokens], the first one is not scored) read through `step`.

        The state is carried from window to window of `length` tokens, so each token sees all before it. Rows whose
        stream has ended run along on padding until the longest one of their batch ends.
        """
        order = sorted(range(len(streams)), key=lambda number: (-len(streams[number]), number))
        results = [0.0] * len(streams)
        total, done = sum(max(0, len(stream) - 1) for stream in streams), 0
        with self.running():
            long = [number for number in order if len(streams[number]) > 1]
            groups = list(_of_like_length([len(stream) for stream in streams], long, self.batch_size))
            # `step` gives logits of all its tokens; wherever a window is cut, the result is the same.
            strides = [max(1, min(length, self.chunk // len(numbers))) for numbers in groups]
            steps = [-(-(len(streams[g[0]]) - 1) // stride) for g, stride in zip(groups, strides, strict=True)]
            for place, numbers in enumerate(groups):
                batch = [Window(n, streams[n], len(streams[n]) - 1) for n in numbers]
                first = place // self.shares.ranks * self.shares.ranks
                most = max(steps[first : first + self.shares.ranks])
                if not self._is_mine(place):
                    done += sum(window.scored for window in batch)
                    if self.shares.lockstep and place == len(groups) - 1 and self._is_left_over(len(groups)):
                        self._idle(self.model.initial_state(1), 1, most)
                    continue
                inputs_BT, targets_BT = self._pad(batch)
                sums_B = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
                state = self.model.initial_state(len(batch))
                stride = strides[place]
                for start in range(0, inputs_BT.shape[1], stride):
                    target_BT = targets_BT[:, start : start + stride]
                    nll_B, state = self.model.step_nll(inputs_BT[:, start : start + stride], target_BT, state)
                    sums_B += nll_B
                    done += int((target_BT != IGNORED).sum())
                    if progress is not None:
                        progress(done, total)
                if self.shares.lockstep:
                    self._idle(state, len(batch), most - steps[place])
                for window, nll in zip(batch, sums_B.tolist(), strict=True):
                    results[window.owner] = nll
        return self.shares.join(results)

    def _is_mine(self, place: int) -> bool:
        """Whether this process scores batch number `place`: they are dealt out in turn."""
        return place % self.shares.ranks == self.shares.rank

    def _is_left_over(self, count: int) -> bool:
        """Whether there is no batch for this process in the last turn of `count` batches."""
        return count % self.shares.ranks != 0 and self.shares.rank >= count % self.shares.ranks

    def _idle(self, state: ModelState, rows: int, steps: int) -> None:
        """Run the model along with the others that are not done yet."""
        token_B1 = torch.full((rows, 1), self.eot_id, dtype=torch.int64, device=self.device)
        for _ in range(steps):
            _, state = self.model.step(token_B1, state)

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
