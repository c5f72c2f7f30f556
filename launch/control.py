"""`hope launch cancel`, `requeue`, `resubmit`."""

from __future__ import annotations

from pathlib import Path

from hope_train.errors import UserError
from launch.client import Slurm
from launch.parse import Job
from launch.places import Places, find_run, submitted_jobs
from launch.request import read_request
from launch.submit import Wishes, submit
from launch.supervise import STOP


def active_jobs(slurm: Slurm, places: Places, limit: int = 50) -> list[Job]:
    """The jobs of a run that wait or run, the oldest first."""
    found = [slurm.job(job.handle) for job in slurm.queue(submitted_jobs(places)[-limit:])]
    return [job for job in found if job is not None and job.active]


def cancel_command(run: str, now: bool, slurm: Slurm | None = None) -> int:
    """End a run's jobs. Those that wait go at once; one that runs saves first, unless `now`. Raises UserError."""
    slurm, places = slurm or Slurm(), find_run(run)
    jobs = active_jobs(slurm, places)
    if not jobs:
        raise UserError(f"{places.run_dir} has no job that waits or runs")
    for job in jobs:
        if now or job.state != "RUNNING":
            slurm.cancel(job.handle)
            places.note("cancelled", job=job.handle)
            print(f"job {job.handle} is cancelled")
    running = [job for job in jobs if not now and job.state == "RUNNING"]
    if running:
        (places.run_dir / STOP).write_text("cancelled\n", encoding="utf-8")
        places.note("cancelled", job=running[0].handle, saving=True)
        print(f"job {running[0].handle} saves and ends; `hope launch cancel --now {run}` does not wait for that")
    return 0


def requeue_command(run: str, slurm: Slurm | None = None) -> int:
    """Have the running job save and queue again, or release one that is held. Raises UserError."""
    slurm, places = slurm or Slurm(), find_run(run)
    jobs = active_jobs(slurm, places)
    if not jobs:
        raise UserError(f"{places.run_dir} has no job that waits or runs: `hope launch resubmit` submits it again")
    job = jobs[0]
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
    """Submit again what was submitted last, with the configuration of then and the code of now.

    Raises UserError.
    """
    places = find_run(run)
    folders = [Path(event["submission"]) for event in places.events() if event["event"] in ("submitted", "swept")]
    if not folders:
        raise UserError(f"{places.run_dir} was never submitted: use `hope launch submit`")
    requests = sorted(folders[-1].glob("request*.json"))
    if not requests:
        raise UserError(f"{folders[-1]} has no request any more: use `hope launch submit`")
    request = read_request(requests[0])
    source = request.source
    if source.get("local"):
        raise UserError(f"{places.run_dir} was run by `hope launch local`: the same command goes on")
    wishes = Wishes(
        config=request.config if len(requests) == 1 else str(source["config"]),
        overrides=() if len(requests) == 1 else tuple(source["overrides"]),
        chain=int(source["chain"]),
        sweep=source["sweep"],
        grid=tuple(source["grid"]),
        array=source["array"],
    )
    return submit(wishes, request.site, slurm or Slurm())
