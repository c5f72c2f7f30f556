"""`hope launch …`: parses, imports what the command needs, and calls one function."""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer(help="Submit runs to Slurm, follow them, stop them; or run several ranks here.", no_args_is_help=True)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file such as configs/hope_tiny.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of the configuration.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, a run's name, or a job's id.")]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
Text = Annotated[str | None, typer.Option(show_default=False)]
SiteFile = Annotated[
    str | None,
    typer.Option(
        "--site", metavar="FILE", help="Site file. Default: site.yaml here or above, ~/.config/hope/site.yaml."
    ),
]


def _options(**given: Any) -> dict[str, Any]:
    """Fields of the site that were set on the command line."""
    lead, failures = given.pop("lead", None), given.pop("max_failures", None)
    return {**given, "survive": {"lead_s": lead, "max_failures": failures}}


@app.command("submit")
def submit(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[
        str | None, typer.Option(metavar="N|MIN-MAX", help="Nodes; with a range data parallelism adapts.")
    ] = None,
    partition: Text = None,
    account: Text = None,
    qos: Text = None,
    time: Annotated[str | None, typer.Option(help="Time limit, as Slurm writes it. Default: the longest.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="Default: all that a node has.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Default: one per GPU.")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="Default: the whole node.")] = None,
    memory: Annotated[str | None, typer.Option(help="Main memory per node. Default: all.")] = None,
    exclude: Annotated[str | None, typer.Option(metavar="NODES", help="Nodes to leave out.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that nodes must have.")] = None,
    reservation: Text = None,
    dependency: Annotated[str | None, typer.Option(help="As sbatch takes it: afterok:123.")] = None,
    chain: Annotated[int, typer.Option(min=1, max=1000, help="So many jobs one after the other.")] = 1,
    sweep: Annotated[str | None, typer.Option(metavar="FILE", help="An array: a run per line of overrides.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B", help="An array: the product of these; may be repeated.")
    ] = None,
    array: Annotated[str | None, typer.Option(help="Which tasks of the sweep, and how many at a time: 0-5%2.")] = None,
    device: Annotated[str | None, typer.Option(help="Kind of accelerator, for the plan: h200, h100, ...")] = None,
    launcher: Annotated[str | None, typer.Option(metavar="torchrun|srun", help="Who starts the ranks.")] = None,
    template: Annotated[str | None, typer.Option(metavar="FILE", help="Your own job script.")] = None,
    lead: Annotated[int | None, typer.Option(min=1, help="Seconds before the time limit at which to save.")] = None,
    max_failures: Annotated[int | None, typer.Option(min=0, help="Requeues after failures, per day.")] = None,
    site: SiteFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script; queue nothing.")] = False,
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Ask Slurm when it would start; queue nothing.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Check a run against the cluster and queue it."""
    from hope_train.config.arguments import check_overrides
    from launch.submit import Wishes, submit_command

    wishes = Wishes(
        config=config,
        overrides=tuple(check_overrides(overrides, config)),
        site_file=site,
        dependency=dependency,
        chain=chain,
        sweep=sweep,
        grid=tuple(grid or ()),
        array=array,
        dry_run=dry_run,
        test_only=test_only,
        as_json=as_json,
    )
    options = _options(
        nodes=nodes,
        partition=partition,
        account=account,
        qos=qos,
        time=time,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        cpus_per_node=cpus_per_node,
        memory=memory,
        exclude=exclude,
        constraint=constraint,
        reservation=reservation,
        device=device,
        launcher=launcher,
        template=template,
        lead=lead,
        max_failures=max_failures,
    )
    return submit_command(wishes, options)


@app.command("status")
def status(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories, names or job ids.")],
    as_json: Json = False,
) -> int:
    """Where a run is: queue, restarts, step, speed, perplexity, newest checkpoint, estimated end."""
    from launch.status import status_command

    return status_command(runs, as_json)


@app.command("logs")
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it is written, over restarts.")] = False,
    node: Annotated[str | None, typer.Option(help="That node's. Default: rank 0's.")] = None,
    start: Annotated[str | None, typer.Option(metavar="JOB.RESTART", help="That start's. Default: the newest.")] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines from the end.")] = 50,
) -> int:
    """What a run prints."""
    from launch.logs import logs_command

    return logs_command(run, follow, node, start, lines)


@app.command("cancel")
def cancel(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="At once, without saving.")] = False,
) -> int:
    """Have a run save and end; it is not requeued."""
    from launch.control import cancel_command

    return cancel_command(run, now)


@app.command("requeue")
def requeue(run: Run) -> int:
    """Have a run save, leave its nodes and queue again; or let a held job go."""
    from launch.control import requeue_command

    return requeue_command(run)


@app.command("resubmit")
def resubmit(run: Run) -> int:
    """Submit a run again, as it was submitted last."""
    from launch.control import resubmit_command

    return resubmit_command(run)


@app.command("history")
def history(run: Run, as_json: Json = False) -> int:
    """Every start of a run: where it began and ended, and why."""
    from launch.status import history_command

    return history_command(run, as_json)


@app.command("site")
def site(
    file: SiteFile = None,
    docs: Annotated[bool, typer.Option("--docs", help="Explain every field.")] = False,
) -> int:
    """Print what the site files say together, or what may stand in one."""
    from launch.site import site_command

    return site_command(file, docs)


@app.command("local")
def local(
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    site: SiteFile = None,
    max_failures: Annotated[int | None, typer.Option(min=0, help="Restarts after failures, per day.")] = None,
) -> int:
    """The same supervision on this machine, without Slurm."""
    from hope_train.config.arguments import check_overrides
    from launch.local import local_command

    return local_command(config, check_overrides(overrides, config), ranks, site, _options(max_failures=max_failures))
