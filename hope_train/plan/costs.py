"""The plan of a run on a kind of device: parameters, FLOPs, memory, time, and whether it fits (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hope_train.config.mesh import MeshSizes, micro_batches, micro_batches_of, resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.levels.schedule import LevelPlan
from hope_train.plan.devices import GIB, Device, find_device
from hope_train.plan.flops import CONVENTION, FlopCount, count_flops
from hope_train.plan.footprint import (
    Footprint,
    memory_state_bytes,
    shard_numbers,
    state_bytes_per_sequence,
    training_footprint,
    usable_bytes,
)
from hope_train.plan.interconnect import Interconnect, find_interconnect
from hope_train.plan.parameters import counts_by_component, level_counts, parameter_count
from hope_train.plan.pipeline import Bubble, in_flight, pipeline_bubble
from hope_train.plan.sharding import RankShare, rank_shares
from hope_train.plan.speed import Speed, expected_speed
from hope_train.plan.stages import part_count, training_costs
from hope_train.plan.suggest import suggest
from hope_train.plan.traffic import Flow, gradient_ratio, kept_levels, rank_flows


@dataclass(frozen=True)
class Level:
    """A CMS level in the run."""

    index: int
    period: int
    parameters: int
    updates: int
    """Optimizer steps it takes in the whole run."""

    warmup_updates: int


@dataclass(frozen=True)
class Rank:
    """What the ranks at one place of the pipeline hold and communicate. Sizes are those of the one that holds most."""

    share: RankShare
    parameters: int
    """Owned between steps: after tensor, pipeline and data parallelism, padding included."""

    kept: tuple[int, ...]
    """Levels that stay gathered between their updates."""

    in_flight: int
    """Micro-batches (of one part each) whose activations it holds at a time, at most."""

    cost: float
    """Computing for a token, over the mean of all ranks: 1 where the stages are balanced."""

    footprint: Footprint
    state_bytes: int
    """Fast weights of one micro-batch."""

    flows: tuple[Flow, ...]


@dataclass(frozen=True)
class Plan:
    """Everything `hope plan` says."""

    config: RunConfig
    device: Device
    interconnect: Interconnect
    mesh: MeshSizes
    ranks: tuple[Rank, ...]
    """By place in the pipeline; one where there is none."""

    bubble: Bubble
    micro_batches: int
    """Of one data-parallel rank in a step."""

    gradient_ratio: float
    """Data-parallel gradient bytes over those with all periods 1, averaged over a cycle."""

    parameters: int
    components: dict[str, int]
    levels: tuple[Level, ...]
    flops: FlopCount
    state_bytes: int
    """Of one sequence at inference, after `train.context_length` tokens."""

    speed: Speed
    fits: bool
    suggestions: tuple[str, ...]
    """Overrides that would make it fit, with what it would need then."""

    warnings: tuple[str, ...]

    @property
    def devices(self) -> int:
        """All of them."""
        return self.mesh.world

    @property
    def fullest(self) -> Rank:
        """The rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.footprint.peak)

    @property
    def footprint(self) -> Footprint:
        """Of the rank that needs most."""
        return self.fullest.footprint

    @property
    def verdict(self) -> str:
        """One line."""
        name, total = self.device.name, f"{self.device.memory_gib:.0f}"
        article = "an" if name[0] in "ahlmr" else "a"  # an h200, an l40s, an rtx4090, a b200
        usable = usable_bytes(self.device) / GIB
        where = f"pipeline rank {self.fullest.share.rank} " if self.mesh.pp > 1 else ""
        need = f"{where}needs {self.footprint.peak / GIB:.1f} GiB, {article} {name} has {total} ({usable:.1f} usable)"
        return f"fits: {need}" if self.fits else f"does not fit: {need}"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: plain numbers, bytes, seconds and FLOPs."""
        train = self.config.train
        return {
            "name": self.config.name,
            "arch": self.config.model.arch,
            "parameters": {
                "total": self.parameters,
                "components": self.components,
                "levels": [vars(level) for level in self.levels],
            },
            "flops_per_token": {
                "convention": CONVENTION,
                "context_length": train.context_length,
                "forward": self.flops.forward,
                "training": self.flops.training,
                "recompute": self.flops.recompute,
                "layer_forward": self.flops.layer,
                "layer_terms": [vars(term) for term in self.flops.layer_terms],
            },
            "memory": {
                "peak_bytes": self.footprint.peak,
                "items": [vars(item) for item in self.footprint.items],
                "state_bytes_per_sequence": self.state_bytes,
            },
            "device": {
                "name": self.device.name,
                "count": self.devices,
                "memory_bytes": self.device.memory_bytes,
                "usable_bytes": usable_bytes(self.device),
                "peak_flops": self.device.peak(train.precision),
            },
            "mesh": {
                "pp": self.mesh.pp,
                "dp_replicate": self.mesh.dp_replicate,
                "dp_shard": self.mesh.dp_shard,
                "tp": self.mesh.tp,
                "world": self.mesh.world,
                "micro_batches": self.micro_batches,
                "interconnect": self.interconnect.name,
            },
            "ranks": [_rank_dict(rank) for rank in self.ranks],
            "pipeline": {
                "schedule": self.config.parallel.schedule if self.mesh.pp > 1 else None,
                "bubble_share": self.bubble.share,
                "formula": self.bubble.formula,
            },
            "gradient_traffic_ratio": self.gradient_ratio,
            "speed": {
                "step_seconds": self.speed.step_seconds,
                "busy_seconds": self.speed.busy_seconds,
                "bubble_seconds": self.speed.bubble_seconds,
                "exposed_communication_seconds": self.speed.exposed_seconds,
                "communication_seconds": dict(self.speed.communication_seconds),
                "tokens_per_s": self.speed.tokens_per_s,
                "days": self.speed.days,
                "mfu": self.speed.mfu,
                "bound": self.speed.bound,
                "assumptions": list(self.speed.assumptions),
            },
            "steps": train.total_steps,
            "batches": [
                {"tokens": rows * train.context_length, "steps": steps}
                for rows, steps in train.batches.counted(train.total_steps)
            ],
            "fits": self.fits,
            "verdict": self.verdict,
            "suggestions": list(self.suggestions),
            "warnings": list(self.warnings),
        }


def _rank_dict(rank: Rank) -> dict[str, Any]:
    return {
        "pp": rank.share.rank,
        "parts": [{"part": part, "layers": layers} for part, layers in rank.share.parts],
        "layers": rank.share.layers,
        "embedding": rank.share.has_embedding,
        "head": rank.share.has_head,
        "parameters": rank.parameters,
        "kept_gathered": list(rank.kept),
        "in_flight": rank.in_flight,
        "cost": rank.cost,
        "peak_bytes": rank.footprint.peak,
        "items": [vars(item) for item in rank.footprint.items],
        "memory_state_bytes": rank.state_bytes,
        "communication": [{**vars(flow), "wire": flow.wire} for flow in rank.flows],
    }


def make_plan(
    config: RunConfig, device: str = "h200", devices: int = 1, mfu: float | None = None, interconnect: str | None = None
) -> Plan:
    """The plan of `config` on `devices` devices called `device`, spread as its section `parallel` says.

    interconnect: name of the links (`nvlink4+ib-ndr`); None: what the device usually comes with.

    Raises UserError for an unknown device or interconnect, a mesh that the devices, the model or the batch do not fit,
    an MFU outside (0, 1].
    """
    kind = find_device(device, devices)
    links = find_interconnect(interconnect, kind)
    if devices < 1:
        raise UserError(f"devices={devices}: at least 1 is needed")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu}: must be above 0 and at most 1")
    mesh = resolve_mesh(config, devices)
    bubble = pipeline_bubble(config, mesh)
    ranks = plan_ranks(config, mesh, kind.name != "cpu")
    shares = tuple(rank.share for rank in ranks)
    fits = all(rank.footprint.fits(kind) for rank in ranks)
    plan = LevelPlan.from_config(config)
    counts = level_counts(config.model)
    flops = count_flops(config.model, config.train)
    speed = expected_speed(config, flops, kind, mesh, shares, links, mfu)
    return Plan(
        config=config,
        device=kind,
        interconnect=links,
        mesh=mesh,
        ranks=ranks,
        bubble=bubble,
        micro_batches=micro_batches(config, mesh),
        gradient_ratio=gradient_ratio(config, shares),
        parameters=parameter_count(config.model),
        components=counts_by_component(config.model),
        levels=tuple(
            Level(part.level, part.period, counts[part.level], part.total_updates, part.warmup_updates)
            for part in plan.sets
            if part.level is not None
        ),
        flops=flops,
        state_bytes=state_bytes_per_sequence(config.model, config.train.context_length),
        speed=speed,
        fits=fits,
        suggestions=() if fits else tuple(suggest(config, kind, mesh)),
        warnings=(*plan.warnings(), *_slow(speed, config), *_thin(config, mesh), *_other_engine(config)),
    )


def plan_ranks(config: RunConfig, mesh: MeshSizes, on_accelerator: bool = True) -> tuple[Rank, ...]:
    """What every pipeline rank of a mesh holds and communicates. Raises UserError for stages that do not fit."""
    layer, head = training_costs(config)
    shares = rank_shares(config, mesh)
    mean = (config.model.n_layers * layer + head) / mesh.pp
    return tuple(
        Rank(
            share=share,
            parameters=sum(shard_numbers(mesh, share).values()),
            kept=kept_levels(config, share),
            in_flight=in_flight(config, mesh, share.rank),
            cost=(share.layers * layer + share.has_head * head) / mean,
            footprint=training_footprint(config, on_accelerator, mesh, share),
            state_bytes=memory_state_bytes(config, mesh, share),
            flows=rank_flows(config, mesh, share),
        )
        for share in shares
    )


def _other_engine(config: RunConfig) -> list[str]:
    if config.parallel.engine == "native":
        return []
    return [
        f"memory, traffic and speed are those of parallel.engine=native: {config.parallel.engine} shards otherwise, "
        "and reduces every gradient at every step"
    ]


def _thin(config: RunConfig, mesh: MeshSizes) -> Iterator[str]:
    counts, parts = micro_batches_of(config, mesh), part_count(config.parallel)
    if (count := counts[0]) < parts:
        name = "train.batch_tokens" if len(counts) == 1 else "train.batch_ramp.start_tokens"
        yield (
            f"{count} micro-batches cannot fill {parts} pipeline parts: lower train.micro_batch_size or parallel.pp, "
            f"or raise {name}"
        )


def _slow(speed: Speed, config: RunConfig) -> Iterator[str]:
    if speed.bound == "kernel launches":
        compiled = "" if config.train.compile != "none" else " or set train.compile=memory"
        yield f"kernel launches bound the speed: raise train.micro_batch_size{compiled}"
