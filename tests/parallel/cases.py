"""Small models, and ten training steps of them on a mesh: what the ranks of the tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipelines.batches import Batch
from hope_train.checkpoint.fence import Fence
from hope_train.checkpoint.spread import live_state, run_state
from hope_train.checkpoint.store import newest_whole
from hope_train.checkpoint.writer import CheckpointWriter, Facts
from hope_train.config.load import validate
from hope_train.config.tree import RunConfig
from hope_train.parallel.engine import Engine, build_engine
from hope_train.parallel.mesh import open_mesh
from hope_train.train import randomness
from hope_train.train.session import load_progress
from hope_train.train.step import optimizer_step

STEPS = 10
LEVELS = [{"width": 24, "period": 1}, {"width": 16, "period": 2}, {"width": 32, "period": 4, "activation": "gelu"}]
MODELS: dict[str, dict[str, Any]] = {
    "hope": {
        "arch": "hope",
        "memory": {"chunk_size": 8, "generator_chunk_size": 4, "momentum": True, "momentum_bias": 1.0},
        "cms": {"levels": LEVELS},
    },
    "hope_attention": {"arch": "hope_attention", "cms": {"levels": LEVELS, "variant": "independent"}},
    "transformer_pp": {"arch": "transformer_pp", "mlp_width": 48},
    "hope_nested": {
        "arch": "hope",
        "memory": {"chunk_size": 8, "generator_chunk_size": 8, "kind": "linear", "adaptive_q": True, "conv_width": 1},
        "cms": {"levels": LEVELS, "variant": "nested"},
    },
}


def make_config(
    arch: str, tied: bool = False, vocab: int = 67, optimizer: dict[str, Any] | None = None, **parallel: Any
) -> RunConfig:
    """Two layers of four heads, 4 micro-batches of one or more rows of 16 tokens, clipping always active."""
    tree = {
        "seed": 5,
        "model": {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": vocab,
            "tie_embeddings": tied,
            "init_std": 0.1,
            **MODELS[arch],
        },
        "optimizer": {"lr": 0.003, "schedule": {"kind": "cosine", "warmup_tokens": 256}, **(optimizer or {})},
        "train": {
            "context_length": 16,
            "batch_tokens": 128,
            "micro_batch_size": 2,
            "tokens": 128 * STEPS,
            "clip_norm": 0.02,
            "loss_chunk": 10,
            "device": "cpu",
        },
        "parallel": {"check_collectives": True, **parallel},
    }
    return validate(RunConfig, tree)


class RandomBatches:
    """Global batch i, documents and unscored targets in it, as a function of i alone."""

    def __init__(self, config: RunConfig) -> None:
        self.vocab, self.length = config.model.vocab_size, config.train.context_length
        self.batch_sequences = config.train.batch_tokens // self.length

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> Batch:
        generator = np.random.default_rng(index)
        tokens = generator.integers(0, self.vocab, (self.batch_sequences, self.length + 1))
        starts = generator.random((self.batch_sequences, self.length)) < 0.1
        starts[:, 0] = True
        targets = tokens[:, 1:].copy()
        targets[generator.random(targets.shape) < 0.15] = -100
        share = self.batch_sequences // ranks
        rows = slice(rank * share, (rank + 1) * share)
        return Batch(tokens[rows, :-1].copy(), targets[rows], starts[rows])

    def window_numbers(self, first: int, count: int) -> np.ndarray:
        return np.arange(first, first + count)


def open_engine(config: RunConfig, dtype: str) -> Engine:
    """As a run does, in any type."""
    return build_engine(config, open_mesh(config, torch.device("cpu")), getattr(torch, dtype))


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, whatever the layout; `fold` has been called where it matters."""
    state = run_state(engine)
    return {
        f"{name}/{key}": (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
        for name, part in state.items()
        for key, tensor in part.items()
    }


def train(
    arch: str,
    dtype: str,
    steps: int = STEPS,
    fold_at: int = 0,
    recompute: bool = False,
    precision: str = "fp32",
    **options: Any,
) -> dict[str, Any]:
    """Ten steps; the initial and the final state, and a report of every step."""
    config = make_config(arch, **options)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    engine = open_engine(config, dtype)
    engine.model.recompute = recompute
    engine.optimizer.materialize_state()
    source: Any = RandomBatches(config)
    initial = whole_state(engine)
    reports, losses = [], []
    for index in range(steps):
        loss, report, _ = optimizer_step(engine, source, config.train, index, measure=True)
        losses.append(loss)
        reports.append({**report.metrics(), "loss": loss})
        if index + 1 == fold_at:
            engine.optimizer.fold()
            engine.optimizer.unfold()
    engine.optimizer.fold()
    return {
        "initial": initial,
        "final": whole_state(engine),
        "reports": reports,
        "traffic": None if engine.data is None else engine.data.run.bytes,
    }


def counted(arch: str, steps: int) -> dict[str, Any]:
    """Steps whose reductions of gradients are counted by what `all_reduce` is called with."""
    config = make_config(arch)
    engine = open_engine(config, "float32")
    source: Any = RandomBatches(config)
    carried: list[int] = []
    plain = dist.all_reduce

    def count(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.dtype == torch.float32:
            carried[-1] += tensor.numel() * 4
        return plain(tensor, *arguments, **options)

    dist.all_reduce = count
    try:
        for index in range(steps):
            carried.append(0)
            optimizer_step(engine, source, config.train, index, measure=False)
    finally:
        dist.all_reduce = plain
    assert engine.data is not None
    return {
        "traffic": engine.data.run.bytes,
        "sizes": engine.data.sizes,
        "periods": engine.data.periods,
        "carried": carried,
    }


def reduced_twice() -> str:
    """A level is reduced at a step where it is not due: what the check says."""
    config = make_config("hope_attention")
    engine = open_engine(config, "float32")
    source: Any = RandomBatches(config)
    engine.optimizer.materialize_state()
    ranks, plain = engine.optimizer.ranks, engine.finish_backward

    def meddle() -> None:
        plain()
        ranks.reduce_accumulators("level_1", [torch.zeros(3)])

    engine.finish_backward = meddle  # type: ignore[method-assign]
    try:
        optimizer_step(engine, source, config.train, 0, measure=False)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@torch.no_grad()
def decode(arch: str, **options: Any) -> list[torch.Tensor]:
    """Logits of a whole forward of 7 tokens, of a prefill of 4 and of 3 single tokens after it."""
    config = make_config(arch, **options)
    model = open_engine(config, "float64").model.eval()
    tokens_BT = torch.randint(0, config.model.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    found = [model(tokens_BT)]
    state = model.initial_state(2)
    logits_BTV, state = model.step(tokens_BT[:, :4], state)
    found.append(logits_BTV)
    for place in range(4, 7):
        logits_BTV, state = model.step(tokens_BT[:, place : place + 1], state)
        found.append(logits_BTV)
    return found


def save(folder: str, arch: str, steps: int, stack: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    """Train some steps and write a checkpoint; what it should hold. `stack`: each rank's accumulators apart."""
    config = make_config(arch, **options)
    engine = open_engine(config, "float32")
    source: Any = RandomBatches(config)
    for index in range(steps):
        optimizer_step(engine, source, config.train, index, measure=False)
    fence = engine.mesh.team.on_first(lambda: Fence.take(Path(folder)))
    writer = CheckpointWriter(fence, keep_last=9)
    facts = Facts(
        step=steps,
        tokens=0,
        config=config.model_dump(mode="json"),
        tokenizer="none",
        data={},
        trainer={"random": randomness.capture(), "refused": 0},
    )
    own = {"own": own_accumulators(engine)} if stack else {}
    if stack:
        writer.save(run_state(engine, stack=True), facts, rows=engine.mesh.sizes.dp)
    engine.optimizer.fold()
    if not stack:
        writer.save(run_state(engine), facts)
    expected = whole_state(engine) | own
    if engine.mesh.team.leads:
        fence.release()
    return expected


def own_accumulators(engine: Engine) -> torch.Tensor:
    """What this rank itself has collected, as one vector."""
    state = live_state(engine)
    found = [t for part in state.values() for key, t in part.items() if key.startswith("optimizer.accumulator.")]
    return torch.cat([torch.zeros(0), *(tensor.reshape(-1) for tensor in found)])


def load(folder: str, arch: str, **options: Any) -> dict[str, torch.Tensor]:
    """What an engine holds that has read the newest checkpoint; `own`: its accumulators before they are summed."""
    config = make_config(arch, **options)
    engine = open_engine(config, "float32")
    found = newest_whole(Path(folder), print)
    assert found is not None
    load_progress(*found, engine)
    own = own_accumulators(engine)
    engine.optimizer.fold()
    return whole_state(engine) | {"own": own}

    return whole_state(engine)


def worked_on(arch: str, **options: Any) -> tuple[int, int]:
    """(matrices that this rank has orthogonalised in a step, matrices that were due)."""
    config = make_config(arch, **options)
    engine = open_engine(config, "float32")
    source: Any = RandomBatches(config)
    _, report, _ = optimizer_step(engine, source, config.train, 0, measure=False)
    wholes = getattr(engine.optimizer.rule, "wholes")  # noqa: B009  (the protocol does not know it)
    due = [
        name
        for group in engine.optimizer.param_groups
        for name in group["param_names"]
        if group["rule"] == "muon" and report.sets[group["set"]].due
    ]
    return wholes.worked_on, len(due)
