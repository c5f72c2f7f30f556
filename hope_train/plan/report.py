"""`hope plan`: the plan as tables, or as one JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hope_train.config.load import load_config
from hope_train.config.train import TrainConfig
from hope_train.plan.check import SHOWN, dry_run
from hope_train.plan.costs import Plan, make_plan
from hope_train.plan.devices import GIB
from hope_train.plan.flops import CONVENTION

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def plan_command(
    config: str,
    overrides: list[str],
    device: str = "h200",
    devices: int = 1,
    as_json: bool = False,
    mfu: float | None = None,
    interconnect: str | None = None,
    with_dry_run: bool = False,
) -> int:
    """Print the plan of the run in file `config`. Returns 0, also when it does not fit: that is an answer.

    with_dry_run: also build chosen ranks without storage (needs torch); 1 is returned when they are not as planned.

    Raises UserError for a bad configuration, an unknown device or interconnect (with the nearest names), a mesh that
    devices, model or batch do not fit.
    """
    plan = make_plan(load_config(config, overrides), device, devices, mfu, interconnect)
    check = None
    if with_dry_run:
        check = dry_run(plan)
    code = 1 if check is not None and check.differences else 0
    if as_json:
        print(json.dumps(plan.to_dict() | ({} if check is None else {"dry_run": vars(check)})))
        return code
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_parameters(plan))
    console.print(_flops(plan))
    console.print(_memory(plan))
    if plan.devices > 1:
        console.print(_ranks(plan))
        console.print(_communication(plan))
    _time(plan, console)
    style = "bold green" if plan.fits else "bold red"
    console.print(plan.verdict, style=style, soft_wrap=True)
    for line in plan.suggestions:
        console.print(f"  {line}", soft_wrap=True, markup=False)
    for line in plan.warnings:
        console.print(f"warning: {line}", style="yellow", soft_wrap=True, markup=False)
    if check is not None:
        console.print(check.verdict, style="bold red" if check.differences else None, soft_wrap=True)
        for line in check.differences[:SHOWN]:
            console.print(f"  {line}", soft_wrap=True, markup=False)
    return code


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table as RichTable

    table = RichTable(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table(f"{plan.config.name}: parameters", "component", "parameters", "share", "steps every", "updates")
    by_name = {f"cms level {level.index}": level for level in plan.levels}
    steps = plan.config.train.total_steps
    for name, count in plan.components.items():
        level = by_name.get(name)
        period, updates = (level.period, level.updates) if level else (1, steps)
        table.add_row(name, f"{count:,}", f"{count / plan.parameters:.1%}", f"{period:,}", f"{updates:,}")
    table.add_section()
    table.add_row("total", f"{plan.parameters:,}", "", "", f"{steps:,} steps")
    return table


def _flops(plan: Plan) -> Table:
    flops = plan.flops
    title = f"FLOPs per token at context {plan.config.train.context_length:,} ({CONVENTION})"
    table = _table(title, "one layer, forward", "MFLOP")
    for term in flops.layer_terms:
        table.add_row(f"{term.part}: {term.name}", f"{term.flops / 1e6:,.3f}")
    table.add_section()
    table.add_row("one layer", f"{flops.layer / 1e6:,.1f}")
    table.add_row(f"all {flops.n_layers} layers and the head, forward", f"{flops.forward / 1e6:,.1f}")
    table.add_row("training", f"{flops.training / 1e6:,.1f}")
    if flops.recompute:
        table.add_row("recomputation, apart", f"{flops.recompute / 1e6:,.1f}")
    return table


def _memory(plan: Plan) -> Table:
    train = plan.config.train
    batch = f"{train.micro_batch_size} sequences of {train.context_length:,} tokens"
    rank = f"pipeline rank {plan.fullest.share.rank}, the fullest" if plan.mesh.pp > 1 else "one device"
    table = _table(f"memory of {rank}, {batch}, {train.precision}", "held", "GiB")
    for item in plan.footprint.items:
        if not item.transient and not item.on_host:
            table.add_row(item.name, _gib(item.bytes))
    table.add_section()
    for item in plan.footprint.items:
        if item.transient:
            table.add_row(f"largest of: {item.name}", _gib(item.bytes))
    table.add_section()
    table.add_row("peak", _gib(plan.footprint.peak))
    for item in plan.footprint.items:
        if item.on_host:
            table.add_row(f"(in host memory instead: {item.name})", _gib(item.bytes))
    what = "recurrent state" if plan.config.model.arch == "hope" else "keys and values"
    table.add_row(f"(inference: {what} of one sequence, fp32)", _gib(plan.state_bytes))
    return table


def _ranks(plan: Plan) -> Table:
    title = f"mesh {plan.mesh}, {plan.micro_batches} micro-batches per step, {plan.interconnect.name}"
    table = _table(title, "pipeline rank", "layers", "parameters", "kept gathered", "in flight", "cost", "peak GiB")
    for rank in plan.ranks:
        share = rank.share
        layers = "+".join(str(layers) for _, layers in share.parts)
        ends = "".join(
            f", {name}" for name, held in (("embedding", share.has_embedding), ("head", share.has_head)) if held
        )
        table.add_row(
            f"{share.rank}{ends}",
            layers,
            f"{rank.parameters:,}",
            ", ".join(f"level {level}" for level in rank.kept) or "-",
            str(rank.in_flight),
            f"{rank.cost:.2f}",
            _gib(rank.footprint.peak),
        )
    return table


def _communication(plan: Plan) -> Table:
    """Of the pipeline rank that communicates most, whatever the kind."""
    rank = max(plan.ranks, key=lambda rank: sum(flow.wire for flow in rank.flows))
    where = f" of pipeline rank {rank.share.rank}, the busiest," if plan.mesh.pp > 1 else " of one device"
    title = f"communication{where} per step, averaged over a cycle of the periods"
    table = _table(title, "kind", "operation", "ranks", "calls", "MiB", "MiB, all due", "MiB on the wire", "over")
    for flow in rank.flows:
        table.add_row(
            f"{flow.kind}: {flow.name}",
            flow.operation,
            str(flow.ranks),
            f"{flow.calls:,.2f}".rstrip("0").rstrip("."),
            _mib(flow.payload),
            _mib(flow.worst),
            _mib(flow.wire),
            plan.interconnect.link(plan.mesh, flow.dim).name,
        )
    if plan.mesh.dp > 1:
        table.caption = f"data-parallel gradient bytes: {plan.gradient_ratio:.1%} of those with all periods 1"
        table.caption_justify = "left"
    return table


def _mib(count: float) -> str:
    return f"{count / 2**20:,.2f}"


def _time(plan: Plan, console: Console) -> None:
    speed, train = plan.speed, plan.config.train
    per_step = train.batch_tokens / speed.tokens_per_s
    console.print(
        f"{plan.devices} x {plan.device.title}: {speed.tokens_per_s:,.0f} tokens/s, {per_step:,.2f} s per step, "
        f"{_duration(speed.days)} for {train.tokens:,} tokens, MFU {speed.mfu:.1%}, bound by {speed.bound}",
        soft_wrap=True,
    )
    if len(train.batches.sizes) > 1:
        console.print(_ramp(train), soft_wrap=True)
    if plan.devices > 1:
        share = {"computing": speed.busy_seconds, "bubble": speed.bubble_seconds, "exposed": speed.exposed_seconds}
        text = ", ".join(f"{name} {seconds / speed.step_seconds:.1%}" for name, seconds in share.items())
        bubble = f"; bubble: {plan.bubble.formula}" if plan.mesh.pp > 1 else ""
        console.print(f"of a step: {text} communication{bubble}", soft_wrap=True)
    console.print(f"assumed, not measured: {'; '.join(speed.assumptions)}", style="dim", soft_wrap=True)


def _ramp(train: TrainConfig) -> str:
    """The growing batches in a line; speed and step are those of a full one."""
    *growing, (_, steps) = train.batches.counted(train.total_steps)
    first, last = (train.tokens_in(step) for step in (0, train.total_steps - 1))
    small = sum(count for _, count in growing)
    return (
        f"batches grow from {first:,} to {last:,} tokens over the first {small:,} steps ({train.tokens_after(small):,} "
        f"tokens); {steps:,} of {train.total_steps:,} steps have {last:,}; the time of the run counts them as they are"
    )


def _gib(count: int) -> str:
    return f"{count / GIB:,.3f}" if count < 10 * GIB else f"{count / GIB:,.1f}"


def _duration(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    hours = days * 24
    return f"{hours:,.1f} hours" if hours >= 2 else f"{hours * 60:,.1f} minutes"
