"""What is looked at before anything is queued: each mistake is one line that says what to change."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from launch.client import Node, Partition, Slurm
from launch.layout import Layout, elastic_layout, fixed_layout
from launch.parse import counted, duration, show_duration
from launch.site import Site

SHARED_TYPES = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "wekafs", "panfs", "orangefs", "pvfs", "afs", "cifs")
"""Beginnings of the names of file systems that several machines see."""

EARLY_S = 60
"""Slurm may send a signal before the time limit by so much earlier than it was asked to."""


@dataclass(frozen=True)
class Target:
    """Where a submission goes, checked."""

    partition: Partition
    nodes: tuple[Node, ...]
    """All of the partition."""

    gpus_per_node: int
    ranks_per_node: int
    time: str | None


def find_target(slurm: Slurm, site: Site) -> Target:
    """The partition and its nodes, with everything that the submission wants of them checked. Raises UserError."""
    partition = choose_partition(slurm.partitions(), site.partition)
    everything = {node.name: node for node in slurm.nodes()}
    nodes = tuple(everything[name] for name in partition.nodes if name in everything)
    _, high = site.node_range
    most = min(len(nodes), partition.max_nodes or len(nodes))
    if high > most:
        raise UserError(
            f"partition {partition.name} has {counted(most, 'node')}, --nodes asks for {site.nodes}: ask for {most} at "
            "most, or name another --partition"
        )
    there = max((node.gpus for node in nodes), default=0)
    gpus = there if site.gpus_per_node is None else site.gpus_per_node
    if gpus > there:
        raise UserError(
            f"nodes of partition {partition.name} have {there} GPUs, --gpus-per-node asks for {gpus}: ask for {there} "
            "at most"
        )
    if site.cpus_per_node is not None and site.cpus_per_node > max((node.cpus for node in nodes), default=0):
        most_cpus = max((node.cpus for node in nodes), default=0)
        raise UserError(
            f"nodes of partition {partition.name} have {most_cpus} CPUs, cpus_per_node={site.cpus_per_node} is more"
        )
    ranks = site.ranks_per_node or max(gpus, 1)
    return Target(partition, nodes, gpus, ranks, check_time(partition, site))


def choose_partition(partitions: list[Partition], name: str | None) -> Partition:
    """The partition of this name, or the default one. Raises UserError."""
    names = [partition.name for partition in partitions]
    if name is None:
        for partition in partitions:
            if partition.default:
                return partition
        raise UserError(f"this cluster has no default partition: name one with --partition ({', '.join(names)})")
    for partition in partitions:
        if partition.name == name:
            if not partition.up:
                raise UserError(f"partition {name} is not up: choose another of {', '.join(names)}, or wait")
            return partition
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"there is no partition {name}{hint}: this cluster has {', '.join(names)}")


def check_layout(config: RunConfig, nodes: int, ranks_per_node: int, elastic: bool) -> Layout:
    """The layout on so many nodes. Raises UserError that names them."""
    try:
        if elastic:
            return elastic_layout(config, nodes, ranks_per_node)
        return fixed_layout(config, nodes, ranks_per_node)
    except UserError as error:
        where = f"{counted(nodes, 'node')} of {counted(ranks_per_node, 'rank')}"
        raise UserError(f"the mesh does not fit {where}: {error}") from None


def check_time(partition: Partition, site: Site) -> str | None:
    """The time limit to ask for. Raises UserError for one beyond the partition's, or too short to save in."""
    longest = partition.max_time_s
    if site.time is None:
        time, seconds = (None, None) if longest is None else (show_duration(longest), longest)
    else:
        time, seconds = site.time, duration(site.time)
    if seconds is None:
        return time
    if longest is not None and seconds > longest:
        raise UserError(
            f"--time {site.time} is longer than partition {partition.name} allows ({show_duration(longest)}): ask for "
            "less; runs that need more go on after a requeue by themselves"
        )
    lead = site.survive.lead_s
    if seconds <= lead + EARLY_S:
        raise UserError(
            f"a time limit of {show_duration(seconds)} leaves no time to train: the run saves {lead} s before its end "
            f"(survive.lead_s), and Slurm may say so {EARLY_S} s earlier: raise --time above "
            f"{show_duration(lead + EARLY_S)}, or lower survive.lead_s if a save takes less"
        )
    return time


def check_shared(run_dir: Path, site: Site, mounts: str | None = None) -> None:
    """Refuse a run directory that only this machine sees: another start of the job would not find it.

    mounts: the text of /proc/mounts. Raises UserError.
    """
    if any(run_dir.is_relative_to(Path(os.path.expandvars(place)).expanduser().resolve()) for place in site.shared):
        return
    place, kind = file_system(run_dir, mounts)
    if kind is None or kind.startswith(SHARED_TYPES):
        return
    raise UserError(
        f"run directory {run_dir} is on {place} ({kind}), a disk of this machine alone: choose a dir= that all nodes "
        f"see, or list its folder under `shared` in the site file if they do"
    )


def check_interpreter(site: Site) -> None:
    """Refuse to send the nodes an interpreter without torch: that of a login node. Raises UserError."""
    if site.python is None and site.container is None and importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{sys.executable} has no torch, and the nodes would run it: name theirs as `python` in the site file"
        )


def check_inputs(config: RunConfig, site: Site, run_dir: Path) -> None:
    """Refuse local text and a tokenizer that are not there: the ranks would find that out after their time in the
    queue. Not looked at: paths inside a container, and those of a run that has begun. Raises UserError.
    """
    if site.container is not None or (run_dir / "config.yaml").is_file():
        return
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer is not set: name a SentencePiece model; `hope data tokenizer train` makes one")
    given = {"data.tokenizer": config.data.tokenizer}
    for number, source in enumerate(config.data.sources):
        given[f"data.sources.{number}"] = source.path or source.indexed or config.data.tokenizer
    for key, text in given.items():
        if not Path(text).expanduser().exists() and not Path(f"{text}.idx").expanduser().exists():  # a pair's prefix
            raise UserError(f"{key}: {text} is not there; the nodes look for it there too (relative paths: from here)")


def file_system(path: Path, mounts: str | None = None) -> tuple[str, str | None]:
    """(mount point, type) of the file system under a path that need not exist; (/, None) where it cannot be told."""
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "/", None
    best: tuple[str, str | None] = ("/", None)
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        if path.is_relative_to(point) and (best[1] is None or len(point) >= len(best[0])):
            best = (point, fields[2])
    return best


def check_plan(config: RunConfig, site: Site, layout: Layout) -> tuple[str, list[str]]:
    """`hope plan`'s verdict and warnings for a layout; (``, []) where the site names no device.

    Raises UserError where the run does not fit the device.
    """
    if site.device is None:
        return "", []
    from hope_train.plan.costs import make_plan

    sized = config
    if isinstance(config.parallel.dp_replicate, int):
        parallel = config.parallel.model_copy(update={"dp_replicate": layout.sizes.dp_replicate})
        sized = config.model_copy(update={"parallel": parallel})
    plan = make_plan(sized, site.device, layout.ranks)
    if not plan.fits:
        hint = f"; {plan.suggestions[0]}" if plan.suggestions else ""
        raise UserError(f"the run {plan.verdict}{hint} (`hope plan` says more)")
    speed = f"{plan.speed.tokens_per_s:,.0f} tokens/s, {plan.speed.days:,.1f} days (planned, not measured)"
    return f"{plan.verdict}; {speed}", list(plan.warnings)
