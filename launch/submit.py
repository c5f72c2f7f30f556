"""`hope launch submit`: check everything, keep what was submitted, and queue it."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_train.config.load import dump_yaml, load_config
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from launch.checks import Target, check_inputs, check_interpreter, check_layout, check_plan, check_shared, find_target
from launch.client import Slurm, SlurmError
from launch.places import BY_CANCEL, BY_SUPERVISOR, Places, forget_stop, register, submitted_jobs, write_json
from launch.request import Request
from launch.script import render
from launch.site import Site, load_site
from launch.snapshot import Snapshot, take_snapshot
from launch.sweep import array_option, sweep_overrides

BASE = "_base.yaml"
"""In a sweep's submission: what its tasks have in common. No run's name begins so."""


@dataclass(frozen=True)
class Wishes:
    """What one command line asks for, besides the fields of the site."""

    config: str
    overrides: tuple[str, ...] = ()
    site_file: str | None = None
    dependency: str | None = None
    chain: int = 1
    sweep: str | None = None
    grid: tuple[str, ...] = ()
    array: str | None = None
    tasks: tuple[str, ...] = ()
    """Configurations of a sweep that was submitted before, instead of `sweep` and `grid`."""

    alone: bool = False
    """One task of such a sweep: the sweep itself stays what it is."""

    dry_run: bool = False
    test_only: bool = False
    as_json: bool = False


def submit_command(wishes: Wishes, options: Mapping[str, Any], slurm: Slurm | None = None) -> int:
    """Submit a run, or a sweep. Returns the exit code. Raises UserError, and nothing is queued then.

    options: fields of the site that the command line sets; None: not set.
    """
    site = load_site(wishes.site_file, options)
    return submit(wishes, site, slurm or Slurm())


def submit(wishes: Wishes, site: Site, slurm: Slurm) -> int:
    """`submit_command` with the site known."""
    base = load_config(wishes.config, wishes.overrides)
    many = wishes.sweep is not None or bool(wishes.grid) or bool(wishes.tasks)
    if wishes.array is not None and not many:
        raise UserError("--array needs the runs of its tasks: name them with --sweep FILE or --grid key=a,b,c")
    if many and wishes.chain > 1:
        raise UserError("--chain and a sweep do not go together: tasks go on after a requeue by themselves")
    configs = sweep_configs(wishes, base) if many else [base]
    array, chosen = array_option(wishes.array, len(configs)) if many else (None, [0])
    home = Places(absolute(base))
    target = None if wishes.dry_run and shutil.which("sbatch") is None else find_target(slurm, site)
    check_interpreter(site)
    for task in chosen:
        with naming(task) if many else nullcontext():
            verdict, warnings = check_run(configs[task], site, slurm, target)
    if not many:
        refuse_if_complete(base)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)

    number = home.next_submission()
    folder = home.submission(number)
    dry = wishes.dry_run or wishes.test_only
    snapshot = take_snapshot(home.folder / "code", dry=dry)
    script = render(
        site,
        name=f"hope-{base.name}",
        submission=folder,
        run_dir=home.run_dir,
        working_directory=Path.cwd(),
        python=site.python or sys.executable,
        code=snapshot.folder,
        gpus_per_node=target.gpus_per_node if target else site.gpus_per_node or 0,
        time=target.time if target else site.time,
        dependency=dependency(wishes),
        array=array,
    )
    options = ("--kill-on-invalid-dep=yes",) if wishes.dependency else ()
    if wishes.dry_run:
        print(script, end="")
        return 0
    assert target is not None
    if wishes.test_only:
        return report_test(slurm, script, options, verdict)

    ensure(home.run_dir)
    jobs: list[str] = []
    try:
        if many:
            write_config(folder / BASE, base)
        for place, config in enumerate(configs):
            request = make_request(wishes, site, target, config, folder, snapshot)
            suffix = f"-{place}" if many else ""
            write_config(Path(request.config), config)
            write_json(folder / f"request{suffix}.json", request.model_dump(mode="json"))
        (folder / "job.sh").write_text(script, encoding="utf-8")
        slurm.test(str(folder / "job.sh"), *options)
        for _ in range(wishes.chain):
            jobs.append(slurm.submit(str(folder / "job.sh"), *options))
    except (OSError, UserError) as error:
        if jobs:  # of a chain, all or none
            slurm.cancel(*jobs)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{folder} cannot be written: {error.strerror or error}; nothing was queued") from None
        raise
    record(wishes, configs, chosen, home, number, jobs, many, snapshot)
    announce(wishes, [configs[task] for task in chosen], home, jobs, verdict, many)
    return 0


def check_run(config: RunConfig, site: Site, slurm: Slurm, target: Target | None) -> tuple[str, list[str]]:
    """One run of a submission. Returns the plan's verdict and warnings. Raises UserError."""
    verdict, warnings = "", ["there is no Slurm here: nothing is checked against a cluster"]
    check_shared(absolute(config), site)
    check_inputs(config, site, absolute(config))
    if target is not None:
        low, high = site.node_range
        check_layout(config, low, target.ranks_per_node, low != high)
        layout = check_layout(config, high, target.ranks_per_node, low != high)
        verdict, warnings = check_plan(config, site, layout)
    refuse_if_active(slurm, Places(absolute(config)), asked=target is not None)
    return verdict, warnings


def refuse_if_complete(config: RunConfig) -> None:
    """A job for a run that is at its end would do nothing (nor does such a task of a sweep). Raises UserError."""
    places, steps = Places(absolute(config)), config.train.total_steps
    if places.is_complete(steps):
        raise UserError(
            f"{places.run_dir} is complete, step {steps} of {steps}: choose another name= or dir= for a new run"
        )


def absolute(config: RunConfig) -> Path:
    """A run's directory, wherever it is looked at from."""
    return Path(config.run_dir).expanduser().resolve()


def sweep_configs(wishes: Wishes, base: RunConfig) -> list[RunConfig]:
    """The run of every task: the base's name and directory with the task's number behind them."""
    if wishes.tasks:
        return [load_config(task) for task in wishes.tasks]
    found = []
    for number, more in enumerate(sweep_overrides(wishes.sweep, wishes.grid)):
        name = f"name={base.name}-{number}"
        place = [] if "{name}" in base.dir else [f"dir={base.dir}-{number}"]
        with naming(number, more):
            found.append(load_config(wishes.config, [*wishes.overrides, name, *place, *more]))
    folders = [absolute(config) for config in found]
    if len(set(folders)) < len(folders):
        raise UserError("tasks of the sweep share a run directory: leave name= and dir= out of the sweep")
    return found


@contextmanager
def naming(task: int, what: Sequence[str] = ()) -> Iterator[None]:
    """A mistake in here is that of a task of a sweep."""
    try:
        yield
    except UserError as error:
        raise UserError(f"task {task} of the sweep{f' ({shlex.join(what)})' if what else ''}: {error}") from None


def refuse_if_active(slurm: Slurm, places: Places, asked: bool = True) -> None:
    """Raises UserError where a job of this run waits or runs already."""
    for found in slurm.queue(submitted_jobs(places)[-50:]) if asked else ():
        if found.active:
            job = found.handle
            raise UserError(
                f"run {places.run_dir} has job {job} already ({found.state.lower()}): `hope launch cancel {job}` ends "
                "it, another name= makes another run"
            )


def dependency(wishes: Wishes) -> str | None:
    """Slurm's --dependency: the user's, and that jobs of a chain wait for each other."""
    parts = [wishes.dependency] if wishes.dependency else []
    if wishes.chain > 1:
        parts.append("singleton")
    return ",".join(parts) or None


def make_request(
    wishes: Wishes, site: Site, target: Target, config: RunConfig, folder: Path, snapshot: Snapshot
) -> Request:
    """What the job of one run reads."""
    run_dir = absolute(config)
    low, high = site.node_range
    return Request(
        run_dir=str(run_dir),
        config=str(folder / f"{config.name}.yaml"),
        site=site,
        submission=str(folder),
        working_directory=str(Path.cwd()),
        gpus_per_node=target.gpus_per_node,
        ranks_per_node=target.ranks_per_node,
        elastic=low != high,
        chain=wishes.chain > 1,
        code=snapshot.facts,
        source={
            "config": wishes.config,
            "overrides": list(wishes.overrides),
            "chain": wishes.chain,
            "sweep": wishes.sweep,
            "grid": list(wishes.grid),
            "array": wishes.array,
        },
    )


def write_config(path: Path, config: RunConfig) -> None:
    """The resolved configuration, with the run directory spelled out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(config.model_copy(update={"dir": str(absolute(config))})), encoding="utf-8")


def ensure(folder: Path) -> None:
    """Raises UserError where the run directory cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run directory {folder} cannot be made: {error.strerror or error}") from None


def report_test(slurm: Slurm, script: str, options: Sequence[str], verdict: str) -> int:
    """`--test-only`: when Slurm would start the job."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        print(slurm.test(file.name, *options))
    if verdict:
        print(verdict)
    return 0


def record(
    wishes: Wishes,
    configs: Sequence[RunConfig],
    chosen: Sequence[int],
    home: Places,
    number: int,
    jobs: Sequence[str],
    many: bool,
    snapshot: Snapshot,
) -> None:
    """Note the submission in the run directory (or each task's) and in the user's list."""
    for place in chosen:
        config = configs[place]
        places = Places(absolute(config))
        names = [f"{job}_{place}" for job in jobs] if many else list(jobs)
        forget_stop(places.run_dir, BY_SUPERVISOR, BY_CANCEL)  # orders to a start that could not obey any more
        for job in names:
            places.note("submitted", job=job, submission=str(home.submission(number)), code=snapshot.facts)
        register(places.run_dir, config.name, names)
    if many and not wishes.alone:
        tasks = [str(absolute(configs[place])) for place in chosen]
        home.note("swept", jobs=list(jobs), submission=str(home.submission(number)), tasks=tasks)
    register(home.run_dir, load_config(wishes.config, wishes.overrides).name, list(jobs))


def announce(
    wishes: Wishes, configs: Sequence[RunConfig], home: Places, jobs: Sequence[str], verdict: str, many: bool
) -> None:
    """What was queued, and how to follow it."""
    if wishes.as_json:
        print(json.dumps({"jobs": list(jobs), "run_dir": str(home.run_dir), "runs": [c.name for c in configs]}))
        return
    what = f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {', '.join(jobs)}, one after the other"
    print(f"{what} queued" + (f": an array of {len(configs)} runs" if many else ""))
    print(f"run directory {home.run_dir}")
    if verdict:
        print(verdict)
    print(f"follow it: hope launch status {jobs[0]}; hope launch logs -f {jobs[0]}")


__all__ = ["SlurmError", "Wishes", "submit", "submit_command"]
