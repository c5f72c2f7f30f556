"""Small models, and ten training steps of them on a mesh: what the ranks of the tests run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.pipelining._utils import InferenceMode

from data_pipelines.batches import Batch
from hope_train.checkpoint.fence import Fence
from hope_train.checkpoint.spread import live_state, run_state
from hope_train.checkpoint.store import newest_whole
from hope_train.checkpoint.writer import CheckpointWriter, Facts
from hope_train.config.load import validate
from hope_train.config.mesh import MeshSizes
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.model.hope import build_model
from hope_train.optim import kinds
from hope_train.optim.wholes import Job
from hope_train.parallel.engine import Engine
from hope_train.parallel.engines import build_engine
from hope_train.parallel.fragments import Fragment
from hope_train.parallel.mesh import DIMENSIONS, Mesh, open_mesh
from hope_train.parallel.micro import on_device
from hope_train.parallel.wholes import MeshWholes, mesh_wholes, spread_of
from hope_train.plan.sharding import rank_shares
from hope_train.plan.traffic import rank_flows
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
    arch: str,
    tied: bool = False,
    vocab: int = 67,
    layers: int = 2,
    micro: int = 2,
    rows: int = 8,
    optimizer: dict[str, Any] | None = None,
    ramp: Sequence[int] = (),
    lr: float = 0.003,
    model: dict[str, Any] | None = None,
    **parallel: Any,
) -> RunConfig:
    """Some layers of four heads, micro-batches of `micro` of `rows` rows of 16 tokens, clipping always active.

    ramp: rows of the first batch, what they grow by, and over how many rows. model: keys that are otherwise.
    """
    names = ("start_tokens", "increment_tokens", "over_tokens")
    tree = {
        "seed": 5,
        "model": {
            "d_model": 32,
            "n_layers": layers,
            "n_heads": 4,
            "vocab_size": vocab,
            "tie_embeddings": tied,
            "init_std": 0.1,
            **MODELS[arch],
            **(model or {}),
        },
        "optimizer": {"lr": lr, "schedule": {"kind": "cosine", "warmup_tokens": 256}, **(optimizer or {})},
        "train": {
            "context_length": 16,
            "batch_tokens": 16 * rows,
            "micro_batch_size": micro,
            "batch_ramp": {name: 16 * rows for name, rows in zip(names, ramp, strict=False)},
            "tokens": 16 * rows * STEPS,
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
        self.sizes = config.train.batches

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> Batch:
        generator, (_, count) = np.random.default_rng(index), self.sizes.samples_of(index)
        tokens = generator.integers(0, self.vocab, (count, self.length + 1))
        starts = generator.random((count, self.length)) < 0.1
        starts[:, 0] = True
        targets = tokens[:, 1:].copy()
        targets[generator.random(targets.shape) < 0.15] = -100
        share = count // ranks
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
    mine = {f"{name}/{key}": full(tensor).clone() for name, part in state.items() for key, tensor in part.items()}
    if (pipeline := engine.mesh.group("pp")) is None:
        return mine
    stages: list[dict[str, torch.Tensor]] = [{}] * engine.mesh.sizes.pp
    dist.all_gather_object(stages, mine, group=pipeline)
    whole: dict[str, torch.Tensor] = {}
    for held in stages:
        for name, tensor in held.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), f"{name} differs between stages"
    return whole


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of which a tensor is a part on each rank."""
    if not isinstance(tensor, Fragment):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    whole, copies = torch.zeros(tensor.shape, dtype=tensor.dtype), torch.zeros(tensor.shape, dtype=torch.int64)
    for chunk in tensor.__create_chunk_list__():
        place = tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[place] = tensor.__get_tensor_shard__(MetadataIndex("", chunk.offsets))
        copies[place] = 1
    everywhere = [(whole, copies)]
    if dist.is_initialized():
        everywhere = [everywhere[0]] * dist.get_world_size()
        dist.all_gather_object(everywhere, (whole, copies))
    assert torch.stack([held for _, held in everywhere]).sum(0).min() > 0, "every number is on some rank"
    for other, held in everywhere:
        whole = torch.where(held > 0, other, whole)
    for other, held in everywhere:
        assert torch.equal(torch.where(held > 0, other, whole), whole), "copies are alike"
    return whole


def train(
    arch: str,
    dtype: str,
    steps: int = STEPS,
    fold_at: int = 0,
    recompute: bool = False,
    precision: str = "fp32",
    compiled: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Ten steps; the initial and the final state, and a report of every step."""
    config = make_config(arch, **options)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    engine = open_engine(config, dtype)
    engine.model.recompute = recompute
    if compiled:
        engine.model.compile_memory()
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
    found = {
        "held": list(engine.model.blocks),
        "initial": initial,
        "final": whole_state(engine),
        "reports": reports,
        "traffic": None if engine.data is None else engine.data.run.bytes,
    }
    engine.close()
    return found


def counted(arch: str, steps: int, **options: Any) -> dict[str, Any]:
    """Steps whose reductions of gradients are counted by what `all_reduce` is called with."""
    config = make_config(arch, **options)
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


def unexpected(gathered: bool = False, **parallel: Any) -> str:
    """A level is reduced (or gathered) at a step where it is not due: what the check says."""
    config = make_config("hope_attention", **parallel)
    engine = open_engine(config, "float32")
    source: Any = RandomBatches(config)
    engine.optimizer.materialize_state()
    ranks, plain = engine.optimizer.ranks, engine.finish_backward

    def meddle() -> None:
        plain()
        if gathered:
            ranks.changed(["level_1"])
        else:
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
    engine.close()
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
    read = whole_state(engine) | {"own": own}
    engine.close()
    return read


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


def parts_and_back(sizes: dict[str, int], limit: int) -> tuple[int, dict[str, float]]:
    """Work on random matrices through the seam; matrices this rank has worked on, and the largest errors."""
    mesh_sizes = MeshSizes(**{"tp": 1, "dp_shard": 1, "dp_replicate": 1, **sizes})
    shapes = [(6, 4), (3, 8), (6, 4), (6, 4), (2, 2), (10, 4), (3, 8)]
    dims = [0, 1, 1, 0, 1, 0, 1]
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    mesh = Mesh(mesh_sizes, torch.device("cpu"))
    spread = mesh_wholes({}, mesh, lambda name: ((), None))
    places = [
        dict(zip(DIMENSIONS, place, strict=True))
        for place in product(*(range(getattr(mesh_sizes, dimension)) for dimension in DIMENSIONS))
    ]
    spreads = {}
    for whole, shape, dim in zip(full, shapes, dims, strict=True):
        found = spread_of(shape, dim if mesh_sizes.tp > 1 else None, places, mesh_sizes)
        spreads[whole[0][found.parts[spread.rank]].clone()] = found
    wholes = MeshWholes(spread.group, spreads, spread.copies, mesh.device)
    states = [whole[0, :1, :3].clone() for whole in full]

    def work(parts: list[torch.Tensor], kept: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        first, second = parts
        return [first @ second.mT @ first, second + 1], [2 * kept[0]]

    def local(number: int, entry: int) -> torch.Tensor:
        return full[number][entry][list(spreads.values())[number].parts[wholes.rank]]

    numbers = {parameter: number for number, parameter in enumerate(spreads)}
    jobs = [
        Job(parameter, lambda number=number: [local(number, 0), local(number, 1)], [states[number]])  # type: ignore[misc]
        for parameter, number in numbers.items()
    ]
    errors = {"parts": 0.0, "wholes": 0.0, "mean squares": 0.0}
    seen = []
    usual, kinds.BATCH_BYTES = kinds.BATCH_BYTES, limit
    try:
        finished = list(wholes.each(jobs, work, results=2))
    finally:
        kinds.BATCH_BYTES = usual
    for done in finished:
        number = numbers[done.job.parameter]
        seen.append(number)
        first, second, _ = full[number]
        place = list(spreads.values())[number].parts[wholes.rank]
        for mine, whole in zip(done.parts, (first @ second.mT @ first, second + 1), strict=True):
            errors["parts"] = max(errors["parts"], float((mine - whole[place]).abs().sum()))
        errors["wholes"] = max(errors["wholes"], float((done.wholes[0] - 2 * states[number]).abs().max()))
    assert sorted(seen) == list(range(len(shapes)))
    means = wholes.mean_squares(list(spreads), [local(number, 2) for number in range(len(full))])
    for mean, whole in zip(means, full, strict=True):
        errors["mean squares"] = max(errors["mean squares"], float((mean - whole[2].square().mean()).abs()))
    return wholes.worked_on, {name: 0.0 if error < 1e-12 else error for name, error in errors.items()}


def refusal(folder: str, arch: str, **options: Any) -> str:
    """What `load` says of a checkpoint of another model."""
    try:
        load(folder, arch, **options)
    except UserError as error:
        return str(error)
    return "nothing"


def backward_onto_ones(**options: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By parameter: its gradient after the very first backward if it was ones before, after another backward on top,
    and that of one process."""
    config = make_config("transformer_pp", **options)
    engine = open_engine(config, "float64")
    batch = RandomBatches(config).batch(0)
    scored = int((batch.targets >= 0).sum())
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.forward_backward(batch, scored, config.train)
    assert engine.pipeline is not None
    # otherwise torch would have run the model once to learn its shapes
    assert all(stage._inference_mode is InferenceMode.STATIC for stage in engine.pipeline.stages)
    first = {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
    engine.forward_backward(batch, scored, config.train)
    second = {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
    plain = build_model(config.model, config.seed).double()
    nll, _ = plain.loss(*on_device(batch, torch.device("cpu")))
    (nll / scored).backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return {name: (grad, second[name], grads[name]) for name, grad in first.items()}


def sent(arch: str, **options: Any) -> dict[str, Any]:
    """Bytes and messages of one step from part to part, and what the plan says that this rank sends."""
    config = make_config(arch, **options)
    engine = open_engine(config, "float32")
    assert engine.pipeline is not None
    found = {"activations": [0, 0], "gradients of activations": [0, 0]}

    def count(plain: Any, kind: str) -> Any:
        def ops(number: int) -> Any:
            made = plain(number)
            for op in made:
                found[kind][0] += op.tensor.nbytes
                found[kind][1] += 1
            return made

        return ops

    for stage in engine.pipeline.stages:
        stage.get_fwd_send_ops = count(stage.get_fwd_send_ops, "activations")
        stage.get_bwd_send_ops = count(stage.get_bwd_send_ops, "gradients of activations")
    source: Any = RandomBatches(config)
    optimizer_step(engine, source, config.train, 0, measure=False)
    sizes = engine.mesh.sizes
    flows = rank_flows(config, sizes, rank_shares(config, sizes)[engine.mesh.coordinate("pp")])
    planned = {flow.name: [flow.payload, flow.calls] for flow in flows if flow.name in found and flow.calls}
    return {"found": {kind: sums for kind, sums in found.items() if sums[1]}, "planned": planned}
