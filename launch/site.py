"""What a cluster is like, said once: the site file, and the options of one submission over it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hope_train.config.base import Section
from hope_train.config.load import dump_yaml, field_docs, merge, read_tree, validate
from hope_train.errors import UserError
from launch.parse import duration

SITE = "HOPE_SITE"
"""Environment: the site file to use, instead of those that are looked for."""


class Container(Section):
    """The image in which the ranks run."""

    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: srun's own --container-image. apptainer: `apptainer exec --nv` before the command."""

    image: str
    """A path or a reference of a registry."""

    mounts: tuple[str, ...] = ()
    """Folders seen inside, as `/outside:/inside`."""


class Health(Section):
    """What a node must have before training starts on it. One that does not is left out of the next start."""

    enabled: bool = True
    """Check at all."""

    timeout_s: float = Field(180.0, gt=0.0)
    """A node that has not answered by then is not healthy."""

    min_memory_gib: float = Field(1.0, ge=0.0)
    """Free main memory."""

    min_disk_gib: float = Field(1.0, ge=0.0)
    """Free space in each of `disks`."""

    disks: tuple[str, ...] = ("/tmp",)
    """Node-local folders that must be writable."""

    max_clock_skew_s: float = Field(30.0, gt=0.0)
    """Between a node's clock and the run directory's file system."""

    all_reduce: bool = True
    """Nodes sum a small tensor together (NCCL where there are GPUs, else gloo)."""

    command: str | None = None
    """Also run this on every node; an exit code other than 0 means that it is not healthy (`dcgmi diag -r 1`)."""


class Survival(Section):
    """What becomes of a job in trouble."""

    lead_s: int = Field(300, ge=1)
    """Seconds before the time limit at which the run is told to save and stop. It must cover a step and a save. Slurm
    may send its signal up to a minute early."""

    max_failures: int = Field(3, ge=0)
    """How often within a day a job is requeued after a crash, a hang, a sick node or a full disk. A second crash or
    hang with no checkpoint since the first ends the job whatever this says."""

    opening_s: float = Field(1800.0, gt=0.0)
    """Hang: no sign of life from the start of the ranks to the first step (tokenising, building, compiling)."""

    step_s: float = Field(600.0, gt=0.0)
    """Hang: no step for so long."""

    save_s: float = Field(600.0, gt=0.0)
    """Hang: a save whose files do not grow for so long."""

    evaluate_s: float = Field(3600.0, gt=0.0)
    """Hang: an evaluation of more than this."""

    disk_full_delay_s: int = Field(300, ge=0)
    """Seconds until a start is tried again when there was no space left."""


class Site(Section):
    """A cluster's habits and one submission's wishes; every field may stand in a site file."""

    partition: str | None = None
    """Slurm's partition. null: the cluster's default."""

    account: str | None = None
    """Whom the time is charged to."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that nodes must have."""

    reservation: str | None = None
    """A reservation to use."""

    exclude: str | None = None
    """Nodes to leave out."""

    nodes: str = "1"
    """How many, or a range such as 8-16: the run then adapts its data parallelism to what it gets."""

    time: str | None = None
    """Time limit, as Slurm writes it (`1-00:00:00`). null: the partition's longest."""

    gpus_per_node: int | None = Field(None, ge=0)
    """GPUs to ask for. null: all that a node of the partition has."""

    ranks_per_node: int | None = Field(None, ge=1)
    """Processes per node. null: one per GPU; one where there is none."""

    cpus_per_node: int | None = Field(None, ge=1)
    """CPUs to ask for. null: the whole node (--exclusive)."""

    memory: str = "0"
    """Main memory per node, as Slurm writes it; 0 is all of it."""

    extra: tuple[str, ...] = ()
    """Further options of sbatch, as they stand."""

    srun_extra: tuple[str, ...] = ()
    """Further options of srun, as they stand."""

    device: str | None = None
    """Kind of accelerator for the plan (`h200`). null: the plan is not asked whether the run fits."""

    launcher: Literal["torchrun", "srun"] = "torchrun"
    """Who starts the ranks of a node: torchrun, or srun one task for each."""

    shutdown_s: int = Field(300, ge=1)
    """How long torchrun waits for its ranks after a signal; it must cover a save (torchrun's own: 30 s)."""

    modules: tuple[str, ...] = ()
    """For `module load`."""

    setup: tuple[str, ...] = ()
    """Lines of bash, before the run."""

    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the job (NCCL_… and others)."""

    interface: str | None = None
    """Network interface between nodes, for NCCL and gloo (`ib0`, `^lo,docker`)."""

    container: Container | None = None
    """Run the ranks in an image."""

    python: str | None = None
    """Interpreter on the nodes. null: the one that submits."""

    template: str | None = None
    """A job script to use instead of ours (launch/job.sh.j2)."""

    shared: tuple[str, ...] = ()
    """Folders on file systems that all nodes see, where that cannot be told from the file system's type."""

    health: Health = Health()
    """The check of every node."""

    survive: Survival = Survival()
    """Requeue, hang, disk."""

    @field_validator("nodes", "memory", mode="before")
    @classmethod
    def _number_is_text(cls, given: Any) -> Any:
        return str(given) if isinstance(given, int) and not isinstance(given, bool) else given

    @field_validator("environment", mode="before")
    @classmethod
    def _numbers_are_text(cls, given: Any) -> Any:
        return {key: str(text) for key, text in given.items()} if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _check(self) -> Site:
        if self.time is not None and not duration(self.time):
            raise ValueError(f"time={self.time}: write it as Slurm does: 90 (minutes), 12:00:00, 2-00:00:00")
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.nodes)
        if match is None or int(match[1]) < 1 or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"nodes={self.nodes}: at least 1, and a range from less to more, as in 8-16")
        return self

    @property
    def node_range(self) -> tuple[int, int]:
        """(fewest, most) nodes."""
        low, _, high = self.nodes.partition("-")
        return int(low), int(high or low)


def site_files(start: Path) -> list[Path]:
    """The site files that count in folder `start`, the weakest first: the user's, then the repository's."""
    named = os.environ.get(SITE)
    if named:
        return [Path(named)]
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hope" / "site.yaml"
    found = [home] if home.is_file() else []
    for folder in (start, *start.parents):
        if (folder / "site.yaml").is_file():
            return [*found, folder / "site.yaml"]
        if (folder / ".git").exists():
            break
    return found


def site_command(file: str | None, docs: bool) -> int:
    """Print the resolved site as YAML, or with `docs` every field with its default and meaning. Raises UserError."""
    if not docs:
        print(dump_yaml(load_site(file, {})), end="")
        return 0
    for key, kind, default, text in field_docs(Site):
        print(f"{key} ({kind}; default {'none' if default is None else default})\n    {text}")
    return 0


def load_site(file: str | None, options: Mapping[str, Any]) -> Site:
    """The site file(s) with the options of one command line on top (those that are not None).

    Raises UserError for a file that is not there, unknown keys and bad values.
    """
    tree: dict[str, Any] = {}
    files = [Path(file)] if file else site_files(Path.cwd())
    for path in files:
        if not path.is_file():
            raise UserError(f"no site file {path}")
        tree = merge(tree, read_tree(path))
    found = validate(Site, tree, origin=", ".join(map(str, files)))
    given = {key: text for key, text in options.items() if text is not None and key != "survive"}
    survive = {key: text for key, text in (options.get("survive") or {}).items() if text is not None}
    if survive:
        given["survive"] = survive
    return validate(Site, merge(tree, given), origin="command line") if given else found
