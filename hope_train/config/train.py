"""The sections of the trainer: optimizer, schedule, training, evaluation, checkpoints, logging."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_train.config.base import Section
from hope_train.config.batches import BatchRampConfig, BatchSizes
from hope_train.config.rules import (
    MATRIX_ONLY,
    DeepMomentumConfig,
    DeltaMomentumConfig,
    DGDConfig,
    M3Config,
    MuonConfig,
    NewtonSchulzConfig,
    RuleName,
    SGDConfig,
    check_betas,
)


class ScheduleConfig(Section):
    """Learning rate over the run. Each CMS level follows the same shape over its OWN updates."""

    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: cosine to `min_ratio`, constant, or warm-up-stable-decay (linear decay at the end)."""

    warmup_tokens: int = Field(0, ge=0)
    """Length of the linear warm-up, in tokens."""

    min_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Final learning rate as a share of the peak (cosine and wsd)."""

    decay_fraction: float = Field(0.2, ge=0.0, le=1.0)
    """wsd: the share of the run over which the rate decays at the end."""


class OptimizerConfig(Section):
    """Update rule. Who steps when is the business of the levels, not of the rule."""

    name: RuleName = "adamw"
    """Rule of the matrices: the weights of linear layers. docs/optimizers.md has the equations."""

    lr: float = Field(4e-4, gt=0.0, le=1e6)
    """Peak learning rate (the paper's: 4e-4)."""

    matrix_lr_scale: float = Field(1.0, gt=0.0, le=1e6)
    """Factor on the learning rate of the matrices."""

    vectors: RuleName = "adamw"
    """Rule of vectors, scalars and convolution kernels: adamw or sgd."""

    embeddings: RuleName = "adamw"
    """Rule of the embedding and the output head: adamw or sgd."""

    memories: RuleName = "adamw"
    """Rule of the learned initial states of the memories: adamw or sgd."""

    betas: tuple[float, float] = (0.9, 0.95)
    """adamw: decay rates of the moments."""

    eps: float = Field(1e-8, gt=0.0)
    """AdamW's epsilon."""

    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled weight decay of matrices, the output head and convolution kernels. Norm gains, mixing weights, the
    embedding and memory states are not decayed."""

    fused: bool = False
    """adamw: use torch's fused kernel."""

    newton_schulz: NewtonSchulzConfig = NewtonSchulzConfig()
    """Orthogonalisation, for the rules that use it."""

    sgd: SGDConfig = SGDConfig()
    """Of the rule sgd."""

    muon: MuonConfig = MuonConfig()
    """Of the rule muon."""

    m3: M3Config = M3Config()
    """Of the rule m3."""

    delta_momentum: DeltaMomentumConfig = DeltaMomentumConfig()
    """Of the rule delta_momentum."""

    deep_momentum: DeepMomentumConfig = DeepMomentumConfig()
    """Of the rule deep_momentum."""

    dgd: DGDConfig = DGDConfig()
    """Of the rule dgd."""

    rest_from_period: int | None = Field(None, ge=2)
    """Moments of levels with this period or a longer one are in host memory (page-locked) between their updates, and
    on the device only while they are stepped. For GPUs; changes no result and no checkpoint. null: of none."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        check_betas(self.betas)
        for kind in ("vectors", "embeddings", "memories"):
            if (rule := getattr(self, kind)) in MATRIX_ONLY:
                raise ValueError(f"{kind}={rule}: {rule} is for the weights of linear layers; {kind} take adamw or sgd")
        return self


class TrainConfig(Section):
    """The loop."""

    context_length: int = Field(512, ge=2)
    """Tokens per sequence."""

    batch_tokens: int = Field(16384, ge=1)
    """Tokens per optimizer step over the whole job; a multiple of context_length."""

    batch_ramp: BatchRampConfig = BatchRampConfig()
    """Smaller batches at the beginning."""

    micro_batch_size: int = Field(4, ge=1)
    """Sequences per forward pass on one device; the rest is gradient accumulation."""

    tokens: int = Field(4_000_000, ge=1)
    """Length of the run in tokens, rounded up to whole steps."""

    clip_norm: float | None = Field(1.0, gt=0.0)
    """Largest gradient norm of each group of equal period. null: no clipping."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the matrix products; memory states, norms and the optimizer stay in fp32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""

    recompute: bool = False
    """Recompute each block's activations in backward instead of keeping them."""

    compile: Literal["none", "memory", "model"] = "none"
    """torch.compile: of the memories' chunk functions, or of whole blocks (around the loop over chunks, for Hope).
    Compiling takes a minute or two on a CPU and pays after some minutes of training."""

    compile_budget: float = Field(1.0, ge=0.0, le=1.0)
    """compile: share of the memories' activations kept for backward; the rest is computed again, cheapest first.
    (Where a whole chunk is one kernel, on AMD processors with AVX-512, nothing is kept, whatever this says.)"""

    loss_chunk: int = Field(1024, ge=1)
    """Tokens whose logits exist at a time in the cross-entropy."""

    deterministic: bool = False
    """Ask torch for deterministic kernels (exact resume on GPU; CPU is exact without)."""

    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads. null: torch's choice."""

    nan_patience: int = Field(5, ge=1)
    """Stop after this many steps in a row whose loss or gradient is not finite; such steps are not applied."""

    log_every: int = Field(1, ge=1)
    """Write a line of metrics every n steps."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.batch_tokens % (self.context_length * self.micro_batch_size):
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of context_length*micro_batch_size="
                f"{self.context_length}*{self.micro_batch_size}={self.context_length * self.micro_batch_size}"
            )
        self._check_ramp()
        return self

    def _check_ramp(self) -> None:
        ramp, step = self.batch_ramp, self.context_length * self.micro_batch_size
        if ramp.start_tokens is None or ramp.increment_tokens is None:
            return
        for name in ("start_tokens", "increment_tokens"):
            if (tokens := getattr(ramp, name)) % step:
                raise ValueError(
                    f"batch_ramp.{name}={tokens} is not a multiple of context_length*micro_batch_size="
                    f"{self.context_length}*{self.micro_batch_size}={step}"
                )
        grows = self.batch_tokens - ramp.start_tokens
        if grows <= 0:
            raise ValueError(
                f"batch_ramp.start_tokens={ramp.start_tokens} is not below batch_tokens={self.batch_tokens}: lower it, "
                "or set it to null"
            )
        if grows % ramp.increment_tokens:
            raise ValueError(
                f"batch_ramp.increment_tokens={ramp.increment_tokens} does not divide batch_tokens-start_tokens="
                f"{self.batch_tokens}-{ramp.start_tokens}={grows}: change one of them"
            )

    @property
    def batches(self) -> BatchSizes:
        """Sequences of every global batch."""
        rows, ramp = self.batch_tokens // self.context_length, self.batch_ramp
        if ramp.start_tokens is None or ramp.increment_tokens is None or ramp.over_tokens is None:
            return BatchSizes.constant(rows)
        start, increment = ramp.start_tokens // self.context_length, ramp.increment_tokens // self.context_length
        return BatchSizes.ramp(start, increment, rows, ramp.over_tokens, self.context_length)

    def steps_for(self, tokens: int) -> int:
        """Fewest optimizer steps that train on so many tokens."""
        return self.batches.batches_for(-(-tokens // self.context_length))

    def tokens_after(self, steps: int) -> int:
        """Tokens of the first `steps` global batches."""
        return self.batches.first_sample(steps) * self.context_length

    def tokens_in(self, batch: int) -> int:
        """Tokens of a global batch, counted from 0."""
        return self.batches.samples_of(batch)[1] * self.context_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_for(self.tokens)


class EvalConfig(Section):
    """WikiText perplexity and validation loss inside the loop."""

    every: int = Field(0, ge=0)
    """Evaluate every n steps (0: only at the end)."""

    wikitext: str | None = None
    """A folder with wiki.valid.raw / wiki.test.raw (.gz allowed), or `hub`. null: $HOPE_WIKITEXT, else none."""

    protocols: tuple[Literal["word", "token", "classic"], ...] = ("word",)
    """`word`: lm-evaluation-harness wikitext 2.0. `token`: windows of the joined text. `classic`: closed vocabulary."""

    stateful: bool = False
    """Also report word_ppl with the recurrent state carried across the windows of a page, as its own number."""

    pages: int | None = Field(None, ge=1)
    """Use only the first n pages inside the loop (the figure is then marked partial). null: all. The test split at the
    end of a run is always whole."""

    batch_size: int = Field(8, ge=1)
    """Windows per forward pass."""

    test_at_end: bool = True
    """Evaluate the test split when the run is complete."""

    validation_batches: int = Field(8, ge=0)
    """Micro-batches of held-out training text whose loss is reported."""


class CheckpointConfig(Section):
    """What is saved, how often, what is kept."""

    every: int = Field(0, ge=0)
    """Save every n steps (0: only at the end and on a signal)."""

    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep."""

    keep_every: int = Field(0, ge=0)
    """Also keep each checkpoint whose step is a multiple of this (0: none)."""

    async_save: bool = False
    """Write in the background while training goes on."""

    patience: int = Field(3, ge=1)
    """Stop when this many saves in a row have failed (a full disk); the checkpoints before them stay whole. The save
    that decides is never in the background."""

    levels: Literal["own", "all"] = "own"
    """`own`: a CMS level that has taken no update since it was last written is referred to, not written again; `all`:
    every save writes every level, so that no two checkpoints share a file."""

    stacked_gib: float = Field(32.0, ge=0.0)
    """With data parallelism, in saves off the schedule (a signal, the last one): what slow levels have collected is
    written for every rank apart, so that the same layout goes on as if nothing had been, up to this many GiB; beyond
    it the sum over the ranks is written."""


class LogConfig(Section):
    """Besides metrics.jsonl and eval.jsonl, which are always written."""

    wandb: bool = False
    """Weights & Biases; offline when there is no key or WANDB_MODE says so."""

    wandb_project: str = "hope-train"
    """Project name there."""

    tensorboard: bool = False
    """Write TensorBoard events into the run directory."""

    progress: bool = True
    """Show a progress bar when the output is a terminal."""
