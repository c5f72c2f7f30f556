"""The plan of a run on a kind of device: parameters, FLOPs, memory, time, and whether it fits (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.levels.schedule import LevelPlan
from hope_train.plan.devices import GIB, Device, find_device
from hope_train.plan.flops import CONVENTION, FlopCount, count_flops
from hope_train.plan.footprint import (
    Footprint,
    state_bytes_per_sequence,
    training_footprint,
    usable_bytes,
)
from hope_train.plan.parameters import counts_by_component, level_counts, parameter_count
from hope_train.plan.speed import Speed, expected_speed

Change = Callable[[RunConfig], RunConfig]


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
class Plan:
    """Everything `hope plan` says."""

    config: RunConfig
    device: Device
    devices: int
    parameters: int
    components: dict[str, int]
    levels: tuple[Level, ...]
    flops: FlopCount
    footprint: Footprint
    state_bytes: int
    """Of one sequence at inference, after `train.context_length` tokens."""

    speed: Speed
    fits: bool
    suggestions: tuple[str, ...]
    """Overrides that would make it fit, with what it would need then."""

    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One line."""
        name, total = self.device.name, f"{self.device.memory_gib:.0f}"
        article = "an" if name[0] in "ahlmr" else "a"  # an h200, an l40s, an rtx4090, a b200
        usable = usable_bytes(self.device) / GIB
        need = f"needs {self.footprint.peak / GIB:.1f} GiB, {article} {name} has {total} ({usable:.1f} usable)"
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
            "speed": {
                "tokens_per_s": self.speed.tokens_per_s,
                "days": self.speed.days,
                "mfu": self.speed.mfu,
                "bound": self.speed.bound,
                "assumptions": list(self.speed.assumptions),
            },
            "fits": self.fits,
            "verdict": self.verdict,
            "suggestions": list(self.suggestions),
            "warnings": list(self.warnings),
        }


def make_plan(config: RunConfig, device: str = "h200", devices: int = 1, mfu: float | None = None) -> Plan:
    """The plan of `config` on `devices` devices called `device`, each holding the whole model.

    Raises UserError for an unknown device, a batch that cannot be shared out, an MFU outside (0, 1].
    """
    kind = find_device(device)
    _check(config, devices, mfu)
    footprint = training_footprint(config, kind.name != "cpu")
    fits = footprint.fits(kind)
    plan = LevelPlan.from_config(config)
    counts = level_counts(config.model)
    flops = count_flops(config.model, config.train)
    speed = expected_speed(config, flops, kind, devices, mfu)
    return Plan(
        config=config,
        device=kind,
        devices=devices,
        parameters=parameter_count(config.model),
        components=counts_by_component(config.model),
        levels=tuple(
            Level(part.level, part.period, counts[part.level], part.total_updates, part.warmup_updates)
            for part in plan.sets
            if part.level is not None
        ),
        flops=flops,
        footprint=footprint,
        state_bytes=state_bytes_per_sequence(config.model, config.train.context_length),
        speed=speed,
        fits=fits,
        suggestions=() if fits else tuple(_suggest(config, kind)),
        warnings=(*plan.warnings(), *_slow(speed, config)),
    )


def _check(config: RunConfig, devices: int, mfu: float | None) -> None:
    train = config.train
    if devices < 1:
        raise UserError(f"devices={devices}: at least 1 is needed")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu}: must be above 0 and at most 1")
    share = devices * train.micro_batch_size * train.context_length
    if train.batch_tokens % share:
        raise UserError(
            f"train.batch_tokens={train.batch_tokens} cannot be shared by {devices} devices: it is not a multiple of "
            f"devices*micro_batch_size*context_length={devices}*{train.micro_batch_size}*{train.context_length}={share}"
        )


def _slow(speed: Speed, config: RunConfig) -> Iterator[str]:
    if speed.bound == "kernel launches":
        compiled = "" if config.train.compile != "none" else " or set train.compile=memory"
        yield f"kernel launches bound the speed: raise train.micro_batch_size{compiled}"


def _suggest(config: RunConfig, device: Device) -> Iterator[str]:
    """Overrides from the cheapest in time to the dearest, added one after the other until the run fits."""
    on_accelerator = device.name != "cpu"
    best, best_peak = config, training_footprint(config, on_accelerator).peak
    words: list[str] = []
    for word, change in _cheaper(config, on_accelerator):
        candidate = change(best)
        footprint = training_footprint(candidate, on_accelerator)
        if footprint.peak >= best_peak:
            continue
        best, best_peak = candidate, footprint.peak
        words = [old for old in words if old.split("=")[0] != word.split("=")[0]] + [word]
        if footprint.fits(device):
            yield f"try {' '.join(words)}, which needs {best_peak / GIB:.1f} GiB"
            return
    if words:
        yield f"even with {' '.join(words)} it needs {best_peak / GIB:.1f} GiB"
    yield "take a device with more memory, a shorter train.context_length or a smaller model"


def _cheaper(config: RunConfig, on_accelerator: bool) -> Iterator[tuple[str, Change]]:
    """(override, function that applies it)."""

    def train(**update: Any) -> Change:
        return lambda run: run.model_copy(update={"train": run.train.model_copy(update=update)})

    def memory(every: int) -> Change:
        def apply(run: RunConfig) -> RunConfig:
            new = run.model.model_copy(update={"memory": run.model.memory.model_copy(update={"save_every": every})})
            return run.model_copy(update={"model": new})

        return apply

    if config.train.precision == "fp32" and on_accelerator:
        yield "train.precision=bf16", train(precision="bf16")
    if config.model.arch == "hope" and config.model.memory.save_every < 8:
        yield "model.memory.save_every=8", memory(8)
    if not config.train.recompute:
        yield "train.recompute=true", train(recompute=True)
    size = config.train.micro_batch_size
    while size > 1:
        size = next(smaller for smaller in range(size // 2, 0, -1) if config.train.micro_batch_size % smaller == 0)
        yield f"train.micro_batch_size={size}", train(micro_batch_size=size)
    if config.train.loss_chunk > 256:
        yield "train.loss_chunk=256", train(loss_chunk=256)
