"""Self-modifying Titans as a mixer (Eqs. 83-93): projections, convolution, five memories per head, output norm.

    x -> W_x -> causal depthwise convolution, SiLU -> z per head -> memories, asked with q = W_q x -> RMSNorm per head
    -> W_o

Everything between W_x / W_q and W_o is per head; the number of heads is read off the parameters, so that heads can be
split over devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hope_train.config.model import MemoryConfig, ModelConfig
from hope_train.memory import chunked
from hope_train.memory.rules import Init, initial_std, parameter_shapes


class MemoryInit(nn.Module):
    """The learned initial states, one parameter per box and layer, [H, …]: see `memory.rules.parameter_shapes`."""

    def __init__(self, config: MemoryConfig, heads: int, width: int) -> None:
        super().__init__()
        self.momentum_bias = config.momentum_bias
        for name, shape in parameter_shapes(config, heads, width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def tensors(self) -> Init:
        """By name, as the memory functions take them; fp32 at least."""
        return {name: p if p.dtype == torch.float64 else p.float() for name, p in self.named_parameters()}

    def init_parameter(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Fill `values` with the initial value of parameter `name`."""
        if name == "theta_logit":
            values.fill_(self.momentum_bias)
        else:
            values.normal_(0.0, initial_std(name, tuple(values.shape)), generator=generator)


@dataclass
class TitansState:
    """Between two tokens: the fast weights and the last inputs of the convolution. Constant in the context length."""

    memory: chunked.MemoryState
    conv_BDW: Tensor
    conv_document_BW: Tensor
    """Document of each input kept for the convolution, so that it does not reach across a boundary."""


class SelfModifyingTitans(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head, rules = config.d_model, config.head_dim, config.memory
        self.rules, self.head_dim, self.norm_eps = rules, head, config.norm_eps
        self.in_proj = nn.Linear(width, width, bias=False) if rules.in_proj else None
        self.q_proj = None if rules.adaptive_q else nn.Linear(width, width, bias=False)
        self.conv = (
            nn.Conv1d(width, width, rules.conv_width, groups=width, bias=False) if rules.conv_width > 1 else None
        )
        self.memory = MemoryInit(rules, config.n_heads, head)
        self.out_norm = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, width, bias=False)
        self.kernels = chunked.PLAIN

    def forward(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. With `starts_BT` memories and convolution start afresh at each document."""
        z_BTHN, q_BTHN = self.before(x_BTD, starts_BT)
        with torch.autocast(x_BTD.device.type, enabled=False):
            o_BTHN, _ = chunked.run(self.rules, z_BTHN, q_BTHN, self.memory.tensors(), starts_BT, None, self.kernels)
        return self.after(o_BTHN, x_BTD)

    def before(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The memories' inputs z and static queries q, [B, T, H, N] in fp32 at least."""
        y_BTD = x_BTD if self.in_proj is None else self.in_proj(x_BTD)
        z_BTD = nn.functional.silu(self._convolve(y_BTD, starts_BT))
        return self._heads(z_BTD), self._queries(x_BTD)

    def after(self, o_BTHN: Tensor, x_BTD: Tensor) -> Tensor:
        """Output norm per head and output projection, in the dtype of x."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            o_BTHN = nn.functional.rms_norm(o_BTHN, (self.head_dim,), eps=self.norm_eps)
            o_BTD = (o_BTHN.flatten(2) * self.out_norm).to(x_BTD.dtype)
        return self.out_proj(o_BTD)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> TitansState:
        """The state before the first token."""
        kept = self.rules.conv_width - 1
        width = self.out_norm.shape[0]
        return TitansState(
            chunked.initial_state(self.rules, self.memory.tensors(), batch),
            torch.zeros(batch, width, kept, device=device, dtype=dtype),
            torch.zeros(batch, kept, device=device, dtype=torch.int64),
        )

    def step(self, x_BTD: Tensor, state: TitansState, starts_BT: Tensor | None = None) -> tuple[Tensor, TitansState]:
        """The next T tokens after `state`, wherever in a chunk it stands."""
        y_BTD = x_BTD if self.in_proj is None else self.in_proj(x_BTD)
        batch, tokens = y_BTD.shape[:2]
        kept = self.rules.conv_width - 1
        joined_BSD = torch.cat((state.conv_BDW.mT.to(y_BTD.dtype), y_BTD), 1)
        last_B1 = state.conv_document_BW[:, -1:] if kept else torch.zeros(batch, 1, device=x_BTD.device).long()
        documents = last_B1.expand(batch, tokens) + (0 if starts_BT is None else starts_BT.to(torch.int64).cumsum(1))
        joined_BS = torch.cat((state.conv_document_BW, documents), 1)
        z_BTD = nn.functional.silu(self._convolve(joined_BSD, None, joined_BS, kept))
        with torch.autocast(x_BTD.device.type, enabled=False):
            o_BTHN, memory = chunked.run(
                self.rules, self._heads(z_BTD), self._queries(x_BTD), self.memory.tensors(), starts_BT, state.memory
            )
        cut = joined_BSD.shape[1] - kept
        # copies: a view would keep the whole prefill alive behind the last few tokens
        rest_BDW, documents_BW = joined_BSD[:, cut:].mT.clone(), joined_BS[:, cut:].clone()
        return self.after(o_BTHN, x_BTD), TitansState(memory, rest_BDW, documents_BW)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        wide = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
        return wide.unflatten(-1, (-1, self.head_dim))

    def _queries(self, x_BTD: Tensor) -> Tensor | None:
        return None if self.q_proj is None else self._heads(self.q_proj(x_BTD))

    def _convolve(
        self,
        y_BTD: Tensor,
        starts_BT: Tensor | None,
        document_BT: Tensor | None = None,
        kept: int = 0,
    ) -> Tensor:
        """Causal depthwise convolution over the tokens of the same document; the first `kept` rows are only context."""
        if self.conv is None:
            return y_BTD[:, kept:]
        weight_DW = self.conv.weight[:, 0]
        taps = weight_DW.shape[-1]
        if document_BT is None and starts_BT is not None:
            document_BT = starts_BT.to(torch.int64).cumsum(1)
        total = y_BTD[:, kept:] * weight_DW[:, -1]
        count = y_BTD.shape[1]
        for back in range(1, min(taps, count)):
            shifted = y_BTD[:, : count - back]
            if document_BT is not None:
                same_BT = document_BT[:, back:] == document_BT[:, : count - back]
                shifted = shifted * same_BT[..., None]
            shifted = nn.functional.pad(shifted, (0, 0, back, 0))[:, kept:]
            total = total + shifted * weight_DW[:, taps - 1 - back]
        return total
