"""`hope launch cancel`, `requeue`, `resubmit`."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hope_train.errors import UserError
from launch.client import Slurm
from launch.parse import Job
from launch.places import BY_CANCEL, STOP, Places, find_run, submitted_jobs, tasks_of
from launch.request import read_request
from launch.submit import BASE, Wishes, submit


def active_jobs(slurm: Slurm, run: str, limit: int = 50) -> list[tuple[Places, Job]]:
    """The jobs of a run, or of all tasks of a sweep, that wait or run, the oldest first. Raises UserError for none."""
    home = find_run(run)
    found = []
    for places in tasks_of(home):
        jobs = [slurm.job(job.handle) for job in slurm.queue(submitted_jobs(places)[-limit:])]
        found += [(places, job) for job in jobs if job is not None and job.active]
    if not found:
        raise UserError(
            f"{home.run_dir} has no job that waits or runs: `hope launch history` says how it ended, `hope launch "
            "resubmit` submits it again"
        )
    return found


def cancel_command(run: str, now: bool, slurm: Slurm | None = None) -> int:
    """End a run's jobs, or a sweep's. Those that wait go at once; one that runs saves first, unless `now`.

    Raises UserError.
    """
    slurm = slurm or Slurm()
    running = []
    for places, job in active_jobs(slurm, run):
        if now or job.state != "RUNNING":
            places.note("cancelled", job=job.handle)
            slurm.cancel(job.handle)
            print(f"job {job.handle} is cancelled")
        else:
            running.append((places, job))
    for places, job in running:
        # Noted first: whatever ends the start from here on, it is not started again.
        places.note("cancelled", job=job.handle, saving=True)
        (places.run_dir / STOP).write_text(f"{BY_CANCEL}\n", encoding="utf-8")
        print(f"job {job.handle} saves and ends; `hope launch cancel --now {run}` does not wait for that")
    return 0


def requeue_command(run: str, slurm: Slurm | None = None) -> int:
    """Have the running job save and queue again, or release one that is held; of a sweep, every task's.

    Raises UserError.
    """
    slurm = slurm or Slurm()
    seen = set()
    for places, job in active_jobs(slurm, run):
        if places in seen:  # a later job of a chain waits for this one
            continue
        seen.add(places)
        if job.state == "RUNNING":
            slurm.signal_script(job.handle, "USR1")
            print(f"job {job.handle} saves and goes back to the queue")
        elif job.reason in ("JobHeldUser", "JobHeldAdmin", "job_requeued_in_held_state"):
            slurm.release(job.handle)
            print(f"job {job.handle} was held and is released")
        else:
            print(f"job {job.handle} is {job.state.lower()} already ({job.reason})")
    return 0


def resubmit_command(run: str, slurm: Slurm | None = None) -> int:
    """Submit again what was submitted last, with the configuration of then and the code of now, from the folder of
    then, against which relative paths count. One task of a sweep goes alone.

    Raises UserError.
    """
    places = find_run(run)
    folders = [Path(event["submission"]) for event in places.events() if event["event"] in ("submitted", "swept")]
    if not folders:
        raise UserError(f"{places.run_dir} was never submitted: use `hope launch submit`")
    found = {file.stem: read_request(file) for file in folders[-1].glob("request*.json")}
    if not found:
        raise UserError(f"{folders[-1]} has no request any more: use `hope launch submit`")
    names = sorted(found, key=lambda name: (len(name), name))  # request-10 comes after request-9
    name = next((name for name in names if Path(found[name].run_dir) == places.run_dir), names[0])
    request, source = found[name], found[name].source
    if source.get("local"):
        raise UserError(f"{places.run_dir} was run by `hope launch local`: the same command goes on")
    if name == "request":
        wishes = Wishes(request.config, chain=int(source["chain"]))
    else:
        alone = Path(request.run_dir) == places.run_dir
        array = name.rpartition("-")[2] if alone else source["array"]
        tasks = tuple(found[name].config for name in names)
        wishes = Wishes(str(folders[-1] / BASE), tasks=tasks, array=array, alone=alone)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(contextlib.chdir(request.working_directory))
        except OSError as error:
            raise UserError(
                f"{request.working_directory}, where it was submitted from, cannot be entered ({error.strerror}): use "
                "`hope launch submit`"
            ) from None
        return submit(wishes, request.site, slurm or Slurm())
