"""The job script: one template, filled in. Users may bring their own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from hope_train.errors import UserError
from launch.site import Site

TEMPLATE = Path(__file__).with_name("job.sh.j2")


def render(
    site: Site,
    *,
    name: str,
    submission: Path,
    run_dir: Path,
    working_directory: Path,
    python: str,
    code: Path | None,
    gpus_per_node: int,
    time: str | None,
    dependency: str | None = None,
    array: str | None = None,
) -> str:
    """The script of a submission. Raises UserError for a template that cannot be used."""
    import jinja2

    source = Path(site.template) if site.template else TEMPLATE
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"job template {source} cannot be read: {error.strerror or error}") from None
    engine = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    engine.filters["quote"] = lambda value: shlex.quote(str(value))
    try:
        script = engine.from_string(text).render(
            directives=directives(site, name, submission, run_dir, gpus_per_node, time, dependency, array),
            name=name,
            run_dir=run_dir,
            submission=submission,
            working_directory=working_directory,
            python=python,
            code=code,
            modules=site.modules,
            setup=site.setup,
            environment=environment(site),
            site=site,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"job template {source}: {error}") from None
    if not script.startswith("#!"):
        raise UserError(f"job template {source}: its first line must be #! and an interpreter, as in #!/bin/bash")
    return script


def directives(
    site: Site,
    name: str,
    submission: Path,
    run_dir: Path,
    gpus_per_node: int,
    time: str | None,
    dependency: str | None,
    array: str | None,
) -> list[str]:
    """sbatch's options, one a line."""
    output = "job-%A_%a.out" if array else "job-%j.out"
    options: dict[str, Any] = {
        "job-name": name,
        "comment": f"hope:{run_dir}",
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "exclude": site.exclude,
        "nodes": site.nodes,
        # With a range this would have Slurm give the fewest nodes, whatever is free.
        "ntasks-per-node": 1 if site.node_range[0] == site.node_range[1] else None,
        "cpus-per-task": site.cpus_per_node,
        "mem": site.memory,
        "gpus-per-node": gpus_per_node or None,
        "time": time,
        "dependency": dependency,
        "array": array,
        "output": str(submission).replace("%", "%%") + f"/{output}",
        "signal": f"B:USR1@{site.survive.lead_s}",
    }
    lines = [f"--{key}={_quoted(str(value))}" for key, value in options.items() if value is not None]
    # Restarts append to the output of their job. A node that fails sends the job back to the queue.
    lines += ["--open-mode=append", "--requeue"]
    if site.cpus_per_node is None:
        lines.append("--exclusive")
    return [*lines, *site.extra]


def _quoted(value: str) -> str:
    """As sbatch reads it: what follows a space would be another option."""
    return f'"{value}"' if re.search(r"\s", value) else value


def environment(site: Site) -> dict[str, str]:
    """The variables of a job: the site's own over ours."""
    ours = {"PYTHONUNBUFFERED": "1"}
    if site.interface:
        ours |= {"NCCL_SOCKET_IFNAME": site.interface, "GLOO_SOCKET_IFNAME": site.interface.lstrip("^=").split(",")[0]}
        if site.interface.startswith("^"):  # gloo knows no exclusion
            del ours["GLOO_SOCKET_IFNAME"]
    return ours | site.environment
