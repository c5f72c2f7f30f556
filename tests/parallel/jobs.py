"""Small jobs for ranks."""

from __future__ import annotations

import io
import math
import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hope_train.checkpoint import writer
from hope_train.cli import run as hope
from hope_train.errors import UserError
from hope_train.evaluate.scoring import Scorer, Window
from hope_train.model.loss import IGNORED, chunked_cross_entropy, token_nll
from hope_train.parallel import collectives
from hope_train.parallel.data import DataParallel
from hope_train.parallel.layouts import Layouts
from hope_train.parallel.mesh import open_mesh
from hope_train.parallel.plan import part_of
from hope_train.parallel.team import Team
from hope_train.parallel.vocab import VocabularyPart, embed_part
from hope_train.train import loop
from hope_train.train.run import train_command
from hope_train.train.step import optimizer_step
from tests.parallel.cases import RandomBatches, make_config, open_engine


def ranks_and_sum() -> tuple[int, int, int]:
    """(rank, ranks, sum of ranks)."""
    if not dist.is_initialized():
        return 0, 1, 0
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(total)


def fail_on(rank: int) -> float:
    """One rank divides by zero."""
    return 1 / (dist.get_rank() - rank)


def hang() -> None:
    """Never ends."""

    def wait_for() -> None:
        time.sleep(1000)

    wait_for()


def _team() -> Team:
    return Team(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def together() -> tuple[str, ...]:
    """A user's mistake on rank 1, then another kind of error on rank 2: type and message of what is raised here."""
    team, heard = _team(), []

    def mistaken() -> None:
        if team.rank == 1:
            raise UserError("rank 1 has no disk")

    def broken() -> None:
        if team.rank == 2:
            raise ValueError("boom")

    for action in (mistaken, broken):
        try:
            team.together(action)
        except Exception as error:
            heard += [type(error).__name__, str(error)]
    return tuple(heard)


def found_and_said() -> tuple[Any, list[int], int]:
    """What rank 0 finds, the largest of ranks and of nothing, the sum of ranks."""
    team = _team()
    return team.on_first(lambda: {"from": team.rank}), team.largest([team.rank, 0]), team.total(team.rank)


def vocabulary(size: int, dtype: str, chunk: int) -> dict[str, float]:
    """Errors of everything that is done with a divided vocabulary, against the whole."""
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight = torch.randn(size, 6, generator=generator, dtype=torch.float64).to(kind)
    x = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64).to(kind)
    target = torch.randint(0, size, (2, 9), generator=generator)
    target[0, 3], target[1, 1], target[1, 2] = IGNORED, size - 1, 0
    rows = part_of(size, rank, ranks)
    part = VocabularyPart(size, group)

    whole_x, whole_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = chunked_cross_entropy(whole_x, whole_weight, target, chunk)
    (3 * expected).backward()
    own_x, own_weight = x.clone().requires_grad_(), weight[rows.start : rows.stop].clone().requires_grad_()
    found = part.sum_nll(collectives.copy_to_ranks(own_x, group), own_weight, target, chunk)
    (3 * found).backward()
    flat, scored = x.flatten(0, 1), target.flatten().clamp(min=0)
    tokens = torch.randint(0, size, (2, 5), generator=generator)
    embedded = embed_part(own_weight.detach(), tokens, rows)
    dist.all_reduce(embedded)

    def error(mine: Tensor, theirs: Tensor | None) -> float:
        assert theirs is not None
        assert mine.shape == theirs.shape
        return float((mine.double() - theirs.double()).abs().max())

    assert own_x.grad is not None
    assert own_weight.grad is not None
    assert whole_weight.grad is not None
    return {
        "loss": error(found, expected),
        "dx": error(own_x.grad, whole_x.grad),
        "dweight": error(own_weight.grad, whole_weight.grad[rows.start : rows.stop]),
        "nll": error(part.nll(flat, own_weight.detach(), scored, chunk), token_nll(flat, weight, scored, chunk)),
        "logits": error(part.logits(x, own_weight.detach()), x @ weight.mT),
        "embedding": error(embedded, torch.nn.functional.embedding(tokens, weight)),
    }


def exchanges() -> list[bool]:
    """Each exchange and the one that autograd goes back through are each other's transposes: <A x, y> = <x, A' y>."""
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    whole, divided = (2, 4 * ranks, 3), (2, 4, 3)
    found = []
    for exchange, before in (
        (collectives.copy_to_ranks, whole),
        (collectives.sum_over_ranks, whole),
        (collectives.gather_tokens, divided),
        (collectives.scatter_sum, whole),
    ):
        x = torch.randn(before, generator=generator, dtype=torch.float64, requires_grad=True)
        out = exchange(x, group)
        y = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        # What is whole on every rank afterwards has one gradient, the same on every rank.
        if exchange is collectives.sum_over_ranks:
            dist.broadcast(y, 0)
        out.backward(y)
        assert x.grad is not None
        if exchange is collectives.copy_to_ranks:
            # the same x on every rank: its gradient is the sum of what the ranks make of it
            total = y.clone()
            dist.all_reduce(total)
            found.append(torch.equal(x.grad, total))
            continue
        sides = torch.stack(((out.detach() * y).sum(), (x.detach() * x.grad).sum()))
        if exchange is collectives.sum_over_ranks:
            sides[0] /= ranks  # every rank has the whole sum
        dist.all_reduce(sides)
        found.append(bool(torch.isclose(sides[0], sides[1], rtol=1e-12, atol=1e-12)))
    return found


def train_run(config: str, overrides: list[str], resume: str = "auto") -> tuple[int | None, str]:
    """`hope train` on these ranks: the exit code, or None and the user's mistake."""
    try:
        return train_command(config, overrides, resume, force_config=False, as_json=False), ""
    except UserError as error:
        return None, f"{type(error).__name__}: {error}"


def interrupted_run(config: str, overrides: list[str], rank: int, at: int) -> tuple[int | None, str]:
    """`train_run` in which one rank alone gets a SIGTERM before its step number `at`."""
    plain = loop.take_step

    def step(run: Any, index: int, measure: bool) -> Any:
        if index + 1 == at and run.engine.mesh.team.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(run, index, measure)

    loop.take_step = step
    try:
        return train_run(config, overrides)
    finally:
        loop.take_step = plain


def taken_over_run(config: str, overrides: list[str], at: int) -> tuple[int | None, str]:
    """`train_run` whose directory another process takes at step `at`, while only the first rank can see it."""
    plain = loop.take_step

    def step(run: Any, index: int, measure: bool) -> Any:
        if index + 1 == at and run.engine.mesh.team.leads:
            (run.run_dir / "incarnation.json").write_text('{"id": "somebody-else"}')
        return plain(run, index, measure)

    loop.take_step = step
    try:
        return train_run(config, overrides)
    finally:
        loop.take_step = plain


def taken_over_save(config: str, overrides: list[str], at: int, stage: str) -> tuple[int | None, str]:
    """`train_run` whose directory another process takes in the middle of the save of step `at`: before it is put in
    place, or between that and the removal of older ones.
    """
    plain_manifest, plain_publish = writer.write_manifest, writer.CheckpointWriter._publish

    def take(folder: Path) -> None:
        if folder.name.startswith(f"step_{at:08d}"):
            (folder.parents[1] / "incarnation.json").write_text('{"id": "somebody-else"}')

    def write_manifest(work: Path, *arguments: Any) -> Any:
        manifest = plain_manifest(work, *arguments)
        if stage == "publish":
            take(work)
        return manifest

    def publish(self: Any, work: Path, final: Path) -> None:
        plain_publish(self, work, final)
        if stage == "prune":
            take(final)

    writer.write_manifest, writer.CheckpointWriter._publish = write_manifest, publish  # type: ignore[method-assign]
    try:
        return train_run(config, overrides)
    finally:
        writer.write_manifest, writer.CheckpointWriter._publish = plain_manifest, plain_publish  # type: ignore[method-assign]


def score(arch: str, windows: int, dtype: str = "float64", **options: Any) -> list[list[float]]:
    """Scores of windows of many lengths, and of streams, shared over the ranks."""
    engine = open_engine(make_config(arch, **options), dtype)
    scorer = Scorer(engine.model, torch.device("cpu"), eot_id=0, batch_size=2, chunk=7, shares=engine.shares())
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 67, 3 + 5 * number) for number in range(windows)]
    found = [
        scorer.windows([Window(0, text, len(text) - 1) for text in texts]),
        scorer.streams(texts, length=6),
    ]
    engine.close()
    return found


def data_sums(bucket_bytes: int) -> dict[str, Any]:
    """Two backwards, the second one armed, of parameters of all kinds; what was summed, and when."""
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shapes = {"unused": (7,), "first": (3, 4), "second": (4,), "third": (2, 2), "slow": (5,)}
    parameters = {name: torch.ones(shape, requires_grad=True) for name, shape in shapes.items()}
    slow = parameters["slow"]
    sets = {"core": [p for name, p in parameters.items() if name != "slow"], "level_0": [slow]}
    data = DataParallel(sets, {"core": 1, "level_0": 2}, group, [parameters["second"]], bucket_bytes)

    def loss() -> Tensor:
        used = [parameters[name] for name in ("first", "second", "third", "slow")]
        return torch.stack([(number + 1 + rank) * p.square().sum() for number, p in enumerate(used)]).sum()

    data.begin()
    data.before_backward(last=False)
    loss().backward()
    idle = sum(data.step.calls.values())
    data.before_backward(last=True)
    loss().backward()
    early = data.step.calls.get("core", 0)
    data.finish()
    total = sum(range(ranks))
    errors = {}
    for number, name in enumerate(("first", "second", "third")):
        grad = parameters[name].grad
        assert grad is not None
        # twice the gradient 2 (number + 1 + rank) of ones, summed over the ranks
        errors[name] = float((grad - 4 * ((number + 1) * ranks + total)).abs().max())
    assert slow.grad is not None
    return {
        "errors": errors,
        "slow": slow.grad.tolist(),
        "own slow": [4.0 * (4 + rank)] * 5,
        "unused": parameters["unused"].grad,
        "idle": idle,
        "early": early,
        "bytes": data.step.bytes,
        "calls": data.step.calls,
    }


def loss_traffic(size: int, chunk: int) -> list[int]:
    """Numbers that each exchange of a loss over 18 positions, forward and backward, hands over."""
    group = dist.group.WORLD
    assert group is not None
    part = VocabularyPart(size, group)
    sent: list[int] = []
    plain = collectives.all_gather

    def count(parts: Tensor, own: Tensor, **options: Any) -> Any:
        sent.append(own.numel())
        return plain(parts, own, **options)

    collectives.all_gather = count
    try:
        x = torch.randn(2, 9, 6, requires_grad=True)
        weight = torch.randn(len(part.rows), 6, requires_grad=True)
        part.sum_nll(x, weight, torch.zeros(2, 9, dtype=torch.int64), chunk).backward()
    finally:
        collectives.all_gather = plain
    return sent


def not_finite(rank: int, name: str) -> list[tuple[bool, int, int]]:
    """Three steps; in the second one, one rank's gradient of one parameter is infinite. (applied, steps, skipped)."""
    config = make_config("hope_attention", check_collectives=True)
    engine = open_engine(config, "float64")
    source: Any = RandomBatches(config)
    plain, found = engine.finish_backward, []
    before: dict[str, Tensor] = {}

    def meddle() -> None:
        plain()
        if len(found) == 1 and dist.get_rank() == rank:
            grad = engine.model.get_parameter(name).grad
            assert grad is not None
            grad.fill_(float("inf"))

    engine.finish_backward = meddle  # type: ignore[method-assign]
    for index in range(3):
        before = {key: p.detach().clone() for key, p in engine.model.named_parameters()}
        _, report, windows = optimizer_step(engine, source, config.train, index, measure=False)
        same = all(torch.equal(p, before[key]) for key, p in engine.model.named_parameters())
        assert same != report.applied, "a refused step changes nothing"
        assert len(windows) == (0 if report.applied else source.sizes.sizes[-1])
        found.append((report.applied, report.step, report.skipped))
    return found


def zero_not_finite(rank: int, name: str, **options: Any) -> list[tuple[bool, int, int, bool]]:
    """As `not_finite` under DeepSpeed: (applied, steps, skipped, gradient norm is finite) of three steps."""
    config = make_config("hope_attention", **options)
    engine = open_engine(config, "float32")
    source: Any = RandomBatches(config)
    parameter, found = engine.model.get_parameter(name), []
    for index in range(3):
        before = {key: p.clone() for key, p in engine.weights().items()}
        hook = None
        if index == 1 and dist.get_rank() == rank:
            hook = parameter.register_hook(lambda grad: grad * float("inf"))
        _, report, windows = optimizer_step(engine, source, config.train, index, measure=False)
        if hook is not None:
            hook.remove()
        same = all(torch.equal(p, before[key]) for key, p in engine.weights().items())
        assert same != report.applied, "a refused step changes nothing"
        assert len(windows) == (0 if report.applied else source.sizes.sizes[-1])
        found.append((report.applied, report.step, report.skipped, math.isfinite(report.grad_norm)))
    engine.close()
    return found


def command(arguments: list[str]) -> tuple[int, str, str]:
    """`hope …` on these ranks: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = hope(arguments)
    return code, out.getvalue(), err.getvalue()


def eval_run(arguments: list[str]) -> tuple[int, str, str]:
    """`hope eval` on these ranks: exit code, stdout, stderr."""
    return command(["eval", *arguments])


def places() -> dict[str, Any]:
    """Where each of 4 ranks stands with tp 2."""
    mesh = open_mesh(make_config("hope", tp=2), torch.device("cpu"))

    def members(dimension: str) -> list[int] | None:
        group = mesh.group(dimension)
        return None if group is None else dist.get_process_group_ranks(group)

    return {
        "data": mesh.data_rank,
        "tp": mesh.coordinate("tp"),
        "tp group": members("tp"),
        "dp group": members("dp_replicate"),
        "shard group": members("dp_shard"),
    }


def wrapped_in_host_memory() -> list[tuple[list[int], float]]:
    """Tensors in host memory, though the mesh is of another kind of device, cut once and cut twice: the whole's shape,
    and what is seen in the rank's own part after the whole's local part has been written to."""
    ranks = dist.get_world_size()
    square = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("tp", "dp_shard"))
    both = DeviceMesh.from_group(square.get_all_groups(), "cuda", mesh=square.mesh, mesh_dim_names=("tp", "dp_shard"))
    tensor = DeviceMesh.from_group(square.get_group("tp"), "cuda")
    shard = DeviceMesh.from_group(square.get_group("dp_shard"), "cuda")
    found = []
    for meshes, shape in (((tensor, None, None), (6, 2)), ((tensor, shard, both), (3 * ranks, 2))):
        local = torch.zeros(3, 2)
        whole = Layouts({"x": shape}, {"x": 0}, *meshes).wrap({"x": local})["x"]
        assert isinstance(whole, DTensor)
        with torch.no_grad():
            whole.to_local().fill_(dist.get_rank() + 1.0)
        found.append((list(whole.shape), float(local.sum())))
    return found
