"""Small pieces shared by all mixers. Shapes: B batch, T tokens, H heads, N head width, D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rope_tables(positions_T: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding (Su et al., arXiv 2104.09864), each [T, width / 2], made in float64."""
    exponent = torch.arange(0, width, 2, device=positions_T.device, dtype=torch.float64) / width
    angle_TK = positions_T.to(torch.float64)[:, None] * theta**-exponent
    return angle_TK.cos().to(dtype), angle_TK.sin().to(dtype)


def apply_rope(x_BHTN: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate the two halves of each head's width by the angles of its position."""
    first, second = x_BHTN.chunk(2, dim=-1)
    return torch.cat((first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK), dim=-1)


def document_ids(starts_BT: Tensor) -> Tensor:
    """Running number of the document each token belongs to, [B, T] int64, from the mask of first tokens."""
    return starts_BT.to(torch.int64).cumsum(1)


class SwiGLU(nn.Module):
    """down(silu(gate(norm x)) * up(norm x)) without the residual. `activation="gelu"` leaves the gate out."""

    def __init__(self, d_model: int, width: int, eps: float, activation: str = "swiglu") -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.up = nn.Linear(d_model, width, bias=False)
        self.gate = nn.Linear(d_model, width, bias=False) if activation == "swiglu" else None
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x_BTD: Tensor, delta: dict[str, Tensor] | None = None) -> Tensor:
        """The branch's output [B, T, D].

        `delta` adds weights per sequence: {"up": [B, F, D], "gate": …, "down": [B, D, F]}.
        """
        normed_BTD = self.norm(x_BTD)
        up_BTF = _project(self.up, normed_BTD, delta, "up")
        if self.gate is None:
            hidden_BTF = nn.functional.gelu(up_BTF)
        else:
            hidden_BTF = nn.functional.silu(_project(self.gate, normed_BTD, delta, "gate")) * up_BTF
        return _project(self.down, hidden_BTF, delta, "down")


def _project(layer: nn.Linear, x_BTI: Tensor, delta: dict[str, Tensor] | None, name: str) -> Tensor:
    y_BTO: Tensor = layer(x_BTI)
    if delta is not None and name in delta:
        y_BTO = y_BTO + torch.bmm(x_BTI, delta[name].mT)
    return y_BTO
