"""A pipeline rank's share of the model: some blocks under their global numbers, embedding and head where they belong.

The model is cut into consecutive parts (`plan.stages`); a rank holds one part or several. Training runs them by a
schedule (`pipeline.py`); what needs no gradient is relayed here, part after part, from rank to rank.

Shapes: B rows, T tokens, t of them on this rank (sequence parallelism), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hope_train.config.tree import RunConfig
from hope_train.model.hope import HopeModel, ModelState
from hope_train.model.loss import row_logits_nll
from hope_train.parallel.tensor import Region
from hope_train.plan.stages import part_count, parts_of_rank, rank_of_part, stage_layers


class StageModel(HopeModel):
    """The parts that one pipeline rank holds. Parameters have the names of the whole model."""

    ENTRIES = ("run_part", "step_part", "initial_state")
    """Methods that compute with parameters, and that everything else goes through."""

    def __init__(self, config: RunConfig, rank: int, group: ProcessGroup | None = None) -> None:
        """
        Args:
            rank: along the pipeline.
            group: the pipeline's ranks; None: nothing will be run.
        """
        super().__init__(config.model)
        layers, parallel = stage_layers(config), config.parallel
        self.rank, self.group = rank, group
        self.parts = parts_of_rank(rank, parallel)
        """Numbers of the parts held here, in the order of the layers."""
        self.last_part = part_count(parallel) - 1
        self.ranks = [rank_of_part(part, parallel) for part in range(self.last_part + 1)]
        """The rank that holds each part."""
        self.names = {part: list(map(str, range(sum(layers[:part]), sum(layers[: part + 1])))) for part in self.parts}
        """Blocks of each part held here."""
        self.elsewhere = {name for name, _ in self.named_parameters()}
        """Names of the parameters that only other ranks hold."""
        self.region: Region | None = None
        """Where tensor parallelism divides the tokens."""
        self._prune()
        self.elsewhere -= {name for name, _ in self.named_parameters()}

    def _prune(self) -> None:
        mine = {name for names in self.names.values() for name in names}
        for name in list(self.blocks):
            if name not in mine:
                del self.blocks[name]
        first, last = 0 in self.parts, self.last_part in self.parts
        if not first and not (last and self.config.tie_embeddings):
            del self.embed
        if not last:
            del self.norm
            self.head = None

    @property
    def last_rank(self) -> int:
        """The pipeline rank that holds the last part."""
        return self.ranks[self.last_part]

    @property
    def tied_with(self) -> int | None:
        """The rank that has a copy of this rank's embedding, where it is the output matrix as well."""
        ends = (self.ranks[0], self.ranks[-1])
        if not self.config.tie_embeddings or ends[0] == ends[1] or self.rank not in ends:
            return None
        return ends[1] if self.rank == ends[0] else ends[0]

    # Running parts

    def begin(self, tokens_BT: Tensor) -> torch.Size:
        """A forward over these tokens begins; the shape [B, t, D] of the residual stream on this rank."""
        rows, length = tokens_BT.shape
        if self.region is not None:
            self.region.begin(length)
            length = self.region.length(length)
        return torch.Size((rows, length, self.config.d_model))

    def run_part(
        self,
        part: int,
        x: Tensor,
        starts_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        chunk: int = 1024,
    ) -> Tensor:
        """Tokens [B, T] (first part) or the residual stream [B, t, D] -> the residual stream; after the last part,
        final hidden states [B, T, D] or, with targets, their summed negative log-likelihood (0-d)."""
        x_BTD = self.run_blocks(self.names[part], self.embed(x) if part == 0 else x, starts_BT)
        if part < self.last_part:
            return x_BTD
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return x_BTD
        return self.vocabulary.sum_nll(x_BTD, self.head_weight_VD, targets_BT, chunk)

    def step_part(
        self, part: int, x: Tensor, state: ModelState, starts_BT: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """As `run_part`, for the next tokens after `state`; and the part's states after them."""
        x_BTD, after = self.step_blocks(self.names[part], self.embed(x) if part == 0 else x, state, starts_BT)
        return self.norm(x_BTD) if part == self.last_part else x_BTD, after

    def _relay(self, tokens_BT: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor | None:
        """What `run(part, x)` makes of the parts one after the other; None on ranks without the last one."""
        shape, dtype = self.begin(tokens_BT), next(self.parameters()).dtype
        x: Tensor = tokens_BT
        for part in self.parts:
            if part > 0 and self.ranks[part - 1] != self.rank:
                x = torch.empty(shape, dtype=dtype, device=tokens_BT.device)
                dist.recv(x, group=self.group, group_src=self.ranks[part - 1])
            x = run(part, x)
            if part == self.last_part:
                return x
            if self.ranks[part + 1] != self.rank:
                dist.send(x.detach().contiguous(), group=self.group, group_dst=self.ranks[part + 1])
        return None

    def _to_all(self, local: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The last part's result on every rank of the pipeline."""
        if local is None:
            local = torch.empty(shape, dtype=next(self.parameters()).dtype, device=like.device)
        else:
            local = local.to(next(self.parameters()).dtype).contiguous()
        dist.broadcast(local, group=self.group, group_src=self.last_rank)
        return local

    # The model's interface, without gradients

    def hidden(self, tokens_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Nobody has them but the last rank. Raises RuntimeError."""
        raise RuntimeError("a pipeline's rank has no hidden states: use row_nll, step or step_nll, on every rank")

    @torch.no_grad()
    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """As the whole model's, on every rank; not for training."""
        x_BTD = self._relay(tokens_BT, lambda part, x: self.run_part(part, x, starts_BT))
        logits_BTV = None if x_BTD is None else self.vocabulary.logits(x_BTD, self.head_weight_VD)
        return self._to_all(logits_BTV, (*tokens_BT.shape, self.config.vocab_size), tokens_BT)

    @torch.no_grad()
    def row_nll(
        self, tokens_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor | None = None, chunk: int = 1024
    ) -> Tensor:
        """As the whole model's, on the rank with the last part; zeros [B] on the others, which may go on meanwhile."""
        x_BTD = self._relay(tokens_BT, lambda part, x: self.run_part(part, x, starts_BT))
        if x_BTD is None:
            return torch.zeros(len(tokens_BT), dtype=torch.float64, device=tokens_BT.device)
        return self.hidden_nll(x_BTD, targets_BT, chunk)

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, state: ModelState, starts_BT: Tensor | None = None) -> tuple[Tensor, ModelState]:
        """As the whole model's: the logits on every rank, of the state each rank its own blocks'."""
        x_BTD, after = self._step(tokens_BT, state, starts_BT)
        logits_BTV = None if x_BTD is None else self.vocabulary.logits(x_BTD, self.head_weight_VD)
        return self._to_all(logits_BTV, (*tokens_BT.shape, self.config.vocab_size), tokens_BT), after

    @torch.no_grad()
    def step_nll(self, tokens_BT: Tensor, targets_BT: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """As the whole model's, on the rank with the last part; zeros [B] on the others."""
        x_BTD, after = self._step(tokens_BT, state, None)
        if x_BTD is None:
            return torch.zeros(len(tokens_BT), dtype=torch.float64, device=tokens_BT.device), after
        return row_logits_nll(self.vocabulary.logits(x_BTD, self.head_weight_VD), targets_BT), after

    def _step(self, tokens_BT: Tensor, state: ModelState, starts_BT: Tensor | None) -> tuple[Tensor | None, ModelState]:
        after: dict[str, Any] = {}

        def run(part: int, x: Tensor) -> Tensor:
            x_BTD, blocks = self.step_part(part, x, state, starts_BT)
            after.update(blocks)
            return x_BTD

        return self._relay(tokens_BT, run), ModelState(after)


def names_elsewhere(model: HopeModel) -> frozenset[str]:
    """Names of the model's parameters that are on other ranks alone, in a pipeline."""
    return frozenset(model.elsewhere) if isinstance(model, StageModel) else frozenset()
