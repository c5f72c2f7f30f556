"""What to change in a run that does not fit its devices (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hope_train.config.mesh import MeshSizes, resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.plan.devices import GIB, Device
from hope_train.plan.footprint import Footprint, training_footprint
from hope_train.plan.sharding import rank_shares

Change = Callable[[RunConfig], RunConfig]


def suggest(config: RunConfig, device: Device, mesh: MeshSizes) -> Iterator[str]:
    """Overrides from the cheapest in time to the dearest, added one after the other until every rank fits."""
    on_accelerator = device.name != "cpu"
    best, best_peak = config, fullest(config, mesh, on_accelerator).peak
    changed: dict[str, str] = {}
    for word, change in _cheaper(config, mesh, on_accelerator):
        candidate = change(best)
        try:
            sizes = resolve_mesh(candidate, mesh.world)
            footprint = fullest(candidate, sizes, on_accelerator)
        except UserError:  # this mesh does not divide the model or the batch
            continue
        if footprint.peak >= best_peak:
            continue
        best, best_peak = candidate, footprint.peak
        changed |= dict(pair.split("=") for pair in word.split())
        if changed.get("parallel.dp_shard") == "1":
            changed.pop("parallel.keep_gathered", None)  # without shards it says nothing
        words = " ".join(f"{key}={value}" for key, value in changed.items())
        if footprint.fits(device):
            yield f"try {words}, which needs {best_peak / GIB:.1f} GiB"
            return
    if changed:
        yield f"even with {words} it needs {best_peak / GIB:.1f} GiB"
    more = " (or more of them, with parallel.dp_shard, tp or pp)" if mesh.dp_shard * mesh.tp * mesh.pp == 1 else ""
    yield f"take a device with more memory{more}, a shorter train.context_length or a smaller model"


def fullest(config: RunConfig, mesh: MeshSizes, on_accelerator: bool) -> Footprint:
    """The footprint of the rank that needs most. Raises UserError for stages that do not fit the layers."""
    found = [training_footprint(config, on_accelerator, mesh, share) for share in rank_shares(config, mesh)]
    return max(found, key=lambda footprint: footprint.peak)


def _cheaper(config: RunConfig, mesh: MeshSizes, on_accelerator: bool) -> Iterator[tuple[str, Change]]:
    """(override, function that applies it)."""

    def section(name: str, **update: Any) -> Change:
        return lambda run: run.model_copy(update={name: getattr(run, name).model_copy(update=update)})

    def memory(every: int) -> Change:
        def apply(run: RunConfig) -> RunConfig:
            new = run.model.model_copy(update={"memory": run.model.memory.model_copy(update={"save_every": every})})
            return run.model_copy(update={"model": new})

        return apply

    if config.train.precision == "fp32" and on_accelerator:
        yield "train.precision=bf16", section("train", precision="bf16")
    if config.model.arch == "hope" and config.model.memory.save_every < 8:
        yield "model.memory.save_every=8", memory(8)
    if not config.train.recompute:
        yield "train.recompute=true", section("train", recompute=True)
    size = config.train.micro_batch_size
    while size > 1:
        size = next(smaller for smaller in range(size // 2, 0, -1) if config.train.micro_batch_size % smaller == 0)
        yield f"train.micro_batch_size={size}", section("train", micro_batch_size=size)
    if config.train.loss_chunk > 256:
        yield "train.loss_chunk=256", section("train", loss_chunk=256)
    yield from _finer(config, mesh, section)


def _finer(config: RunConfig, mesh: MeshSizes, section: Callable[..., Change]) -> Iterator[tuple[str, Change]]:
    """Meshes of as many ranks that split the model further: data-parallel copies first, then tensor parallelism."""
    parallel = config.parallel
    if mesh.pp > 1 and parallel.schedule == "gpipe":
        yield "parallel.schedule=1f1b", section("parallel", schedule="1f1b")
    for shard in _divisors(mesh.dp_replicate):
        size = mesh.dp_shard * shard
        replicate = mesh.dp_replicate // shard if isinstance(parallel.dp_replicate, int) else parallel.dp_replicate
        words = f"parallel.dp_shard={size}"
        if replicate != parallel.dp_replicate:
            words = f"parallel.dp_replicate={replicate} {words}"
        yield words, section("parallel", dp_shard=size, dp_replicate=replicate)
    if mesh.dp > 1 and parallel.keep_gathered != "never":
        yield "parallel.keep_gathered=never", section("parallel", keep_gathered="never")
    if isinstance(parallel.dp_replicate, int):
        return
    for factor in _divisors(mesh.dp):
        tp, shard = mesh.tp * factor, mesh.dp // factor
        if tp <= 8:  # a node, usually
            yield f"parallel.dp_shard={shard} parallel.tp={tp}", section("parallel", tp=tp, dp_shard=shard)


def _divisors(number: int) -> list[int]:
    return [size for size in range(2, number + 1) if number % size == 0]
