"""The model section: Hope, Hope-Attention and the Transformer++ baseline.

Sources: "Nested Learning" (arXiv 2512.24695, equations 70-97) and "Titans" (arXiv 2501.00663). What the
papers leave open is a field here; its docstring says "open" and the default is the one measured best.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_train.config.base import Section


class MemoryConfig(Section):
    """Self-modifying Titans (Eqs. 83-93): five fast-weight memories per head."""

    kind: Literal["mlp", "linear"] = "mlp"
    """`mlp`: M(z) = z + W1 s(W2 z). `linear`: M(z) = W z, cheaper and slightly weaker."""

    expansion: int = Field(1, ge=1)
    """Hidden width of each memory in units of the head width (e). Open."""

    activation: Literal["silu", "gelu", "relu"] = "silu"
    """Non-linearity s of the MLP memories. Open."""

    eta_max: float = Field(1.0, ge=0.0)
    """Largest write rate: eta = eta_max * sigmoid(M_eta z + eta_bias). 0 switches all writes off."""

    eta_bias: float = -2.0
    """Starting point of the write rate (-2: eta about 0.12). Open."""

    alpha_bias: float = 4.0
    """Starting point of the retention (4: alpha about 0.982). Open."""

    chunk_size: int = Field(64, ge=1)
    """Tokens per chunk of the main memory; gradients are taken at the chunk's first state."""

    generator_chunk_size: int = Field(64, ge=1)
    """Tokens per chunk of the memories that make k, v, eta and alpha. One chunk size must divide the other."""

    read: Literal["after", "before", "start"] = "after"
    """Which state answers q_t: M_t, M_{t-1}, or the chunk's first state (literal Eq. 90). Open."""

    decay_to: Literal["init", "zero"] = "init"
    """Where retention below 1 pulls the weights: the learned initial state, or zero (erases it). Open."""

    rank_one: Literal["both", "w2"] = "both"
    """Which MLP matrices get the rank-one factor of Eq. 88; W1 uses the Sherman-Morrison rate. Open."""

    loss_factor: float = 0.5
    """Factor of |M(k) - vhat|^2: 0.5 or 1. With 1 repeated keys amplify. Open."""

    normalize_q: bool = True
    """L2-normalise queries (published)."""

    normalize_v: bool = True
    """L2-normalise values. Without it training diverges. Open."""

    clamp: float | None = Field(2.0, gt=0.0)
    """At a chunk's end, |W|_F of each fast matrix is held to this many times |W_init|_F. null: no clamp. Open."""

    momentum: bool = False
    """S_t = theta S_{t-1} - eta grad with theta = sigmoid(learned scalar per head). Open."""

    momentum_bias: float = 0.0
    """Starting point of theta's logit, where `momentum` is on."""

    adaptive_q: bool = False
    """Read q from a sixth memory instead of the static projection. Open."""

    in_proj: bool = True
    """A projection W_x before the heads are sliced (ours, needed for tensor parallelism); false slices x."""

    conv_width: int = Field(4, ge=1)
    """Window of the causal depthwise convolution in front of the memories. 1 leaves it out."""

    save_every: int = Field(1, ge=1)
    """Keep every n-th chunk state for backward and recompute the others. 1 keeps all."""

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        big, small = max(self.chunk_size, self.generator_chunk_size), min(self.chunk_size, self.generator_chunk_size)
        if big % small:
            raise ValueError(
                f"chunk_size={self.chunk_size} and generator_chunk_size={self.generator_chunk_size}: "
                "one must divide the other"
            )
        if self.loss_factor not in (0.5, 1.0):
            raise ValueError(f"loss_factor={self.loss_factor}: it is 0.5 or 1")
        if self.kind == "linear" and self.expansion != 1:
            raise ValueError("expansion applies to MLP memories only; leave it at 1 for kind=linear")
        if self.kind == "linear" and self.rank_one != "both":
            raise ValueError("rank_one applies to MLP memories only; leave it at 'both' for kind=linear")
        return self


class CMSLevelConfig(Section):
    """One level of the Continuum Memory System (Eqs. 70-71): y = x + W_down s(W_up norm(x))."""

    width: int = Field(ge=1)
    """Hidden width of the level's MLP."""

    period: int = Field(1, ge=1, lt=2**63)
    """C^(l): the level takes one optimizer step every this many training steps."""

    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Gated SiLU, or GELU without a gate. Open."""

    lr_scale: float = Field(1.0, gt=0.0, le=1e6)
    """Factor on the learning rate of this level."""

    warmup_updates: int | None = Field(None, ge=0)
    """Warm-up counted in the level's OWN updates. null: the run's warm-up divided by the period, at least 1."""


class CMSConfig(Section):
    """The chain of levels that takes the place of the Transformer's MLP (Eqs. 70-74)."""

    variant: Literal["sequential", "nested", "independent"] = "sequential"
    """`sequential` (73): composition. `nested` (72): a level returns to its initial state whenever the next slower
    one updates. `independent` (74): learned weighted sum of the levels on the same input."""

    levels: tuple[CMSLevelConfig, ...] = Field((), max_length=16)
    """From the fastest to the slowest."""

    nested_rate: float = Field(0.1, ge=0.0, le=1.0)
    """`nested`: at a reset the initial state first moves this share of the way to where the level had got to. Open."""

    @model_validator(mode="after")
    def _check(self) -> CMSConfig:
        if self.variant == "nested":
            for fast, slow in zip(self.levels, self.levels[1:], strict=False):
                if slow.period % fast.period or slow.period == fast.period:
                    raise ValueError(
                        f"variant=nested needs every period to be a proper multiple of the one before: "
                        f"{[level.period for level in self.levels]}"
                    )
        return self


class ModelConfig(Section):
    """Architecture and sizes. Nothing here knows how the model is spread over devices."""

    arch: Literal["hope", "hope_attention", "transformer_pp"] = "hope"
    """`hope`: self-modifying Titans + CMS. `hope_attention`: attention + CMS. `transformer_pp`: the baseline."""

    d_model: int = Field(256, ge=1)
    """Width of the residual stream."""

    n_layers: int = Field(4, ge=1, le=10_000)
    """Number of blocks."""

    n_heads: int = Field(4, ge=1)
    """Heads of the memories or of attention; the head width is d_model / n_heads."""

    vocab_size: int = Field(4096, ge=2)
    """Must equal the tokenizer's number of pieces."""

    tie_embeddings: bool = False
    """Use one matrix for the embedding and the output head."""

    norm_eps: float = Field(1e-6, gt=0.0)
    """Epsilon of every RMSNorm."""

    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of initial projections; those that write to the residual stream: / sqrt(2 n_layers)."""

    rope_theta: float = Field(10000.0, gt=0.0)
    """Base of the rotary embedding (attention only)."""

    mlp_width: int | None = Field(None, ge=1)
    """Hidden width of the SwiGLU MLP (transformer_pp only)."""

    memory: MemoryConfig = MemoryConfig()
    """Self-modifying Titans (arch=hope only)."""

    cms: CMSConfig = CMSConfig()
    """Continuum Memory System (hope and hope_attention)."""

    @property
    def head_dim(self) -> int:
        """Width of one head (n)."""
        return self.d_model // self.n_heads

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        if self.arch != "hope" and self.head_dim % 2:
            raise ValueError(f"head width {self.head_dim} must be even for rotary embeddings")
        if self.arch == "transformer_pp":
            if self.mlp_width is None:
                raise ValueError("arch=transformer_pp needs mlp_width")
            if self.cms.levels:
                raise ValueError("arch=transformer_pp has no CMS: remove cms.levels")
        else:
            if not self.cms.levels:
                raise ValueError(f"arch={self.arch} needs at least one entry in cms.levels")
            if self.mlp_width is not None:
                raise ValueError(f"arch={self.arch} has no plain MLP: remove mlp_width, use cms.levels")
        return self
