"""The tensor-parallel plan carried out on a model: each rank holds its part, exchanges stand where the plan says.

The model's own code runs unchanged on the parts: it reads the number of heads off its parameters. Parameters are plain
tensors of this rank's shape under the unsharded model's names; `Layout` knows what they are parts of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from hope_train.model.hope import HopeModel
from hope_train.parallel import collectives
from hope_train.parallel.plan import Split, part_of, split_of_module, split_of_parameter
from hope_train.parallel.vocab import VocabularyPart, embed_part


@dataclass(frozen=True)
class Layout:
    """What a parameter is a part of."""

    shape: tuple[int, ...]
    """In the unsharded model."""

    dim: int | None
    """The dimension divided over the tensor-parallel ranks; None: every rank has it whole."""

    def part(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's part of the whole tensor, as a view."""
        if self.dim is None:
            return whole
        rows = part_of(self.shape[self.dim], rank, ranks)
        return whole.narrow(self.dim, rows.start, len(rows))


class Region:
    """Where the residual stream is divided along the tokens, and the exchanges at its borders."""

    def __init__(self, group: ProcessGroup, sequence_parallel: bool) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        self.sequence_parallel = sequence_parallel
        self.divided = False
        """Whether the forward under way has the tokens divided; what does not divide evenly (decoding, an evaluation's
        odd window) is run with all tokens on every rank."""

    def begin(self, tokens: int) -> None:
        """A forward over sequences of this length begins."""
        self.divided = self.sequence_parallel and tokens % self.ranks == 0

    def length(self, tokens: int) -> int:
        """Tokens of such sequences on this rank."""
        return tokens // self.ranks if self.divided else tokens

    def enter(self, x: Tensor) -> Tensor:
        """From the residual stream into split modules, which need every token."""
        return (collectives.gather_tokens if self.divided else collectives.copy_to_ranks)(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """From the ranks' partial results back to the residual stream."""
        return (collectives.scatter_sum if self.divided else collectives.sum_over_ranks)(x, self.group)


class VocabularyEmbedding(nn.Embedding):
    """An embedding of which this rank has the rows of its part of the vocabulary."""

    def __init__(self, region: Region, vocabulary: VocabularyPart, weight_vD: Tensor) -> None:
        rows, width = weight_vD.shape
        super().__init__(rows, width, _weight=weight_vD)
        self.region, self.vocabulary = region, vocabulary

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] -> the residual stream: [B, T, D], or this rank's tokens of it."""
        self.region.begin(tokens_BT.shape[1])
        return self.region.leave(embed_part(self.weight, tokens_BT, self.vocabulary.rows))


class TensorParallel:
    """The model's parts on this rank, and what has to be exchanged outside forward and backward."""

    def __init__(self, model: HopeModel, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        """Cut a model on `meta` down to this rank's parts and put the exchanges into it.

        Args:
            mesh: one-dimensional, over the ranks that divide the model.
        """
        self.model, self.mesh = model, mesh
        self.group = mesh.get_group()
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()
        self.layouts = {
            name: Layout(tuple(parameter.shape), split_of_parameter(name).dim)
            for name, parameter in model.named_parameters()
        }
        self.region = Region(self.group, sequence_parallel)
        self.vocabulary = self.divide_vocabulary()
        model.vocabulary = self.vocabulary
        self._localize()
        self.place_exchanges()

    def divide_vocabulary(self) -> VocabularyPart:
        """What is done with this rank's rows of the vocabulary."""
        return VocabularyPart(self.model.config.vocab_size, self.group)

    def place_exchanges(self) -> None:
        """Put exchanges into a model that has this rank's parts."""
        if hasattr(self.model, "embed"):  # not in the middle of a pipeline
            self.model.embed = VocabularyEmbedding(self.region, self.vocabulary, self.model.embed.weight)
        for name, module in self.model.named_modules():
            split = split_of_module(name)
            if split is Split.SEQUENCE:
                module.register_forward_hook(after(self.region.enter))
            elif split is Split.ROWWISE:
                module.register_forward_hook(after(self.region.leave))

    @torch.no_grad()
    def _localize(self) -> None:
        """Leave this rank's part of every parameter in the model: shapes alone, values come later."""
        for name, parameter in list(self.model.named_parameters()):
            local = self.layouts[name].part(parameter, self.rank, self.ranks).contiguous()
            owner, _, leaf = name.rpartition(".")
            own = nn.Parameter(local, requires_grad=parameter.requires_grad)
            setattr(self.model.get_submodule(owner), leaf, own)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of the whole parameter `name`, as a view."""
        return self.layouts[name].part(whole, self.rank, self.ranks)

    def is_replicated(self, name: str) -> bool:
        """Whether every rank holds the parameter `name` whole."""
        return self.layouts[name].dim is None

    def replicated(self) -> list[Tensor]:
        """The parameters that every rank holds whole."""
        return [parameter for name, parameter in self.model.named_parameters() if self.is_replicated(name)]

    def finish_backward(self, grads: Sequence[Tensor]) -> None:
        """Complete the gradients of what every rank holds: with the tokens divided, each has seen only its own."""
        if not self.region.sequence_parallel or not grads:
            return
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=self.group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def after(exchange: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
    """A forward hook that passes a module's output through an exchange."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> Tensor:
        return exchange(output)

    return hook
