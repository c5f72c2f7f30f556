"""The language model: embedding -> [mixer -> CMS] x n -> norm -> head, for Hope and its two relatives.

Written for one device: tensor, pipeline and data parallelism are applied from outside. Blocks live in a
ModuleDict under their global number, so that a pipeline stage can hold some of them under their own names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hope_train.config.model import ModelConfig
from hope_train.model.attention import Attention
from hope_train.model.cms import CMS
from hope_train.model.layers import SwiGLU
from hope_train.model.loss import IGNORED, WHOLE_VOCABULARY, row_logits_nll, row_sums
from hope_train.model.self_modifying import SelfModifyingTitans


@dataclass
class ModelState:
    """What decoding carries from token to token: one mixer state per block."""

    blocks: dict[str, Any]


class Block(nn.Module):
    """x + mixer(norm x), then the CMS (Eqs. 94-97) or, for the baseline, a SwiGLU MLP. Pre-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer: SelfModifyingTitans | Attention = (
            SelfModifyingTitans(config) if config.arch == "hope" else Attention(config)
        )
        if config.arch == "transformer_pp":
            assert config.mlp_width is not None
            self.mlp: SwiGLU | None = SwiGLU(config.d_model, config.mlp_width, config.norm_eps)
            self.cms: CMS | None = None
        else:
            self.mlp, self.cms = None, CMS(config.d_model, config.cms, config.norm_eps)

    def forward(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.feed_forward(x_BTD + self.mixer(self.mixer_norm(x_BTD), starts_BT))

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The mixer's state before the first token."""
        return self.mixer.initial_state(batch, device, dtype)

    def step(self, x_BTD: Tensor, state: Any, starts_BT: Tensor | None = None) -> tuple[Tensor, Any]:
        """The next tokens after `state`."""
        y_BTD, state = self.mixer.step(self.mixer_norm(x_BTD), state, starts_BT)
        return self.feed_forward(x_BTD + y_BTD), state

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """The second half of the block, its residual included."""
        if self.cms is not None:
            return self.cms(x_BTD)
        assert self.mlp is not None
        return x_BTD + self.mlp(x_BTD)


class HopeModel(nn.Module):
    """See the module's docstring. `recompute` keeps only each block's input for backward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.vocabulary = WHOLE_VOCABULARY
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleDict({str(number): Block(config) for number in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def head_weight_VD(self) -> Tensor:
        """The output matrix: the head's, or the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def named_blocks(self) -> Iterator[tuple[str, Block]]:
        """The blocks this module holds, under their global numbers."""
        for name, block in self.blocks.items():
            assert isinstance(block, Block)
            yield name, block

    def hidden(self, tokens_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Token numbers [B, T] -> final hidden states [B, T, D], normalised."""
        return self.norm(self.run_blocks(self.blocks, self.embed(tokens_BT), starts_BT))

    def run_blocks(self, names: Iterable[str], x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """The residual stream [B, T, D] through these blocks, one after the other."""
        for name in names:
            block = self.blocks[name]
            if self.recompute and self.training and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, starts_BT, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, starts_BT)
        return x_BTD

    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Token numbers [B, T] -> logits [B, T, V]. `starts_BT` (bool) marks first tokens of documents: memory resets
        there."""
        return self.vocabulary.logits(self.hidden(tokens_BT, starts_BT), self.head_weight_VD)

    def loss(
        self, tokens_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor | None = None, chunk: int = 1024
    ) -> tuple[Tensor, Tensor]:
        """(sum of negative log-likelihoods in nats, number of scored targets), both 0-d. Targets of -100 are not
        scored."""
        x_BTD = self.hidden(tokens_BT, starts_BT)
        total = self.vocabulary.sum_nll(x_BTD, self.head_weight_VD, targets_BT, chunk)
        return total, (targets_BT != IGNORED).sum()

    def row_nll(
        self, tokens_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor | None = None, chunk: int = 1024
    ) -> Tensor:
        """Negative log-likelihood (nats) summed over each row's scored targets, [B] in float64; not for training."""
        return self.hidden_nll(self.hidden(tokens_BT, starts_BT), targets_BT, chunk)

    def hidden_nll(self, x_BTD: Tensor, targets_BT: Tensor, chunk: int) -> Tensor:
        """`row_nll` of final hidden states."""
        scored_BT = targets_BT != IGNORED
        nll_M = self.vocabulary.nll(x_BTD[scored_BT], self.head_weight_VD, targets_BT[scored_BT], chunk)
        return row_sums(nll_M, scored_BT)

    def initial_state(self, batch: int) -> ModelState:
        """The state before the first token."""
        weight = next(self.parameters())
        blocks = dict(self.named_blocks())
        return ModelState(
            {name: block.initial_state(batch, weight.device, weight.dtype) for name, block in blocks.items()}
        )

    def step(self, tokens_BT: Tensor, state: ModelState, starts_BT: Tensor | None = None) -> tuple[Tensor, ModelState]:
        """Logits [B, T, V] of the next T >= 1 tokens after `state`, and the state after them.

        Equal to the full forward over the concatenation, wherever it is split. Hope's state has a constant size.
        """
        x_BTD, after = self.step_blocks(self.blocks, self.embed(tokens_BT), state, starts_BT)
        return self.vocabulary.logits(self.norm(x_BTD), self.head_weight_VD), ModelState(after)

    def step_blocks(
        self, names: Iterable[str], x_BTD: Tensor, state: ModelState, starts_BT: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """As `run_blocks`, for the next tokens after `state`; and these blocks' states after them."""
        after: dict[str, Any] = {}
        for name in names:
            block = self.blocks[name]
            assert isinstance(block, Block)
            x_BTD, after[name] = block.step(x_BTD, state.blocks[name], starts_BT)
        return x_BTD, after

    def step_nll(self, tokens_BT: Tensor, targets_BT: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """`row_nll` of the next tokens after `state`, and the state after them."""
        logits_BTV, state = self.step(tokens_BT, state)
        return row_logits_nll(logits_BTV, targets_BT), state

    def compile_memory(self, budget: float = 1.0) -> None:
        """Run the memories' chunk functions through torch.compile (no effect on attention). See `memory.compiled`."""
        from hope_train.memory.compiled import compiled_kernels  # imports the compiler

        for block in self.blocks.values():
            if isinstance(block.mixer, SelfModifyingTitans):
                block.mixer.kernels = compiled_kernels(budget)

    def compile_blocks(self, budget: float = 1.0) -> None:
        """`compile_memory`, and everything around the loop over chunks compiled too; attention blocks whole."""
        self.compile_memory(budget)
        for block in self.blocks.values():
            if isinstance(block.mixer, SelfModifyingTitans):
                # the loop over chunks stays Python's: unrolled it would be one graph of hundreds of chunks
                for part, name in ((block.mixer, "before"), (block.mixer, "after"), (block, "feed_forward")):
                    setattr(part, name, torch.compile(getattr(part, name)))
            else:
                block.compile()  # in place: parameters keep their names

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter from `seed`, in the order of their names, whatever device they live on."""
        parameters = dict(self.named_parameters())
        for name, values in self.initial_values(seed):
            parameters[name].copy_(values)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Name and initial value (fp32, on the CPU) of each parameter, one at a time; the weights may be on `meta`."""
        generator = torch.Generator().manual_seed(seed)
        residual = 1.0 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")  # where the generator is
            last = name.rsplit(".", 1)[-1]
            if ".memory." in name:
                memory = self.get_submodule(name.rsplit(".", 1)[0])
                memory.init_parameter(last, values, generator)  # type: ignore[operator]
            elif parameter.ndim == 1:
                values.fill_(1.0)
            else:
                std = self.config.init_std
                if name.endswith("conv.weight"):
                    std = 1.0 / math.sqrt(parameter.shape[-1])
                elif name.endswith(("out_proj.weight", "down.weight")):
                    std *= residual
                values.normal_(0.0, std, generator=generator)
            yield name, values


def build_model(config: ModelConfig, seed: int = 0) -> HopeModel:
    """The model with its initial weights, on the default device (weights are left empty on `meta`)."""
    model = HopeModel(config)
    if not model.embed.weight.is_meta:
        model.init_weights(seed)
    return model
