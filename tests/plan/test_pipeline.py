"""Bubbles and micro-batches in flight against torch's own schedules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from hope_train.config.mesh import micro_batches, resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.plan.pipeline import heads_in_flight, in_flight, layers_in_flight, pipeline_bubble
from hope_train.plan.sharding import rank_shares
from hope_train.plan.stages import splits_backward

CLASSES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "zbv": schedules.ScheduleZBVZeroBubble,
}


def stage(index, stages, ranks):
    """What a schedule needs to know of a stage to order its work."""
    sizes = {"stage_index": index, "num_stages": stages, "group_size": ranks, "group_rank": 0}
    return SimpleNamespace(**sizes, has_backward=False, submod=None, is_first=index == 0, is_last=index == stages - 1)


def config_of(schedule, pp, count, recompute=False):
    return RunConfig.model_validate(
        {
            "model": {"arch": "transformer_pp", "mlp_width": 8, "n_layers": 16},
            "parallel": {"pp": pp, "schedule": schedule},
            "train": {
                "context_length": 16,
                "batch_tokens": 16 * count,
                "micro_batch_size": 1,
                "recompute": recompute,
            },
        }
    )


def orders(schedule, pp, count):
    """Rank -> the computations of a step in torch's order: (kind, part, micro-batch)."""
    several = schedule in ("interleaved_1f1b", "zbv")
    parts = 2 * pp if several else pp
    if several:
        numbers = [0, parts - 1] if schedule == "zbv" else [0, pp]
        found = CLASSES[schedule]([stage(number, parts, pp) for number in numbers], count).pipeline_order
    else:
        found = CLASSES[schedule](stage(0, parts, pp), count)._get_pipeline_order()
    assert found is not None
    computations = {}
    for rank, order in found.items():
        actions = [action for action in order if action is not None and action.computation_type.value in "FIBW"]
        kinds = [action.computation_type.value for action in actions]
        numbers = [action.microbatch_index for action in actions]
        if schedule == "1f1b":  # torch's listing counts later ranks' forwards from 1; they run in order, from 0
            numbers = [kinds[:place].count(kind) for place, kind in enumerate(kinds)]
        parts_ = [action.stage_index for action in actions]
        computations[rank] = list(zip(kinds, parts_, numbers, strict=True))
    return computations


def most_in_flight(actions):
    held = most = 0
    for kind, _, _ in actions:
        held += (kind == "F") - (kind in ("B", "W"))  # W: the weights' gradient, after which nothing is needed
        most = max(most, held)
    return most


@pytest.mark.parametrize("count", [2, 4, 6, 8, 12])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("schedule", list(CLASSES))
def test_micro_batches_in_flight_are_those_of_torchs_schedule(schedule, pp, count):
    config = config_of(schedule, pp, count)
    try:
        real_orders = orders(schedule, pp, count)
    except ValueError:  # what torch refuses, the plan refuses
        with pytest.raises(UserError, match=f"parallel.schedule={schedule}"):
            resolve_mesh(config, pp)
        return
    mesh = resolve_mesh(config, pp)
    assert micro_batches(config, mesh) == count
    for rank, actions in real_orders.items():
        planned, real = in_flight(config, mesh, rank), most_in_flight(actions)
        if schedule == "zbv":
            assert real <= planned <= real + pp  # a bound: the first rank reaches it
        else:
            assert planned == real


def test_some_micro_batches_cannot_be_run():
    for schedule, pp, count in (("1f1b", 4, 2), ("interleaved_1f1b", 2, 7)):
        config = config_of(schedule, pp, count)
        with pytest.raises(UserError, match=rf"parallel\.schedule={schedule} .*{count} micro-batches"):
            resolve_mesh(config, pp)


def idle_share(schedule, pp, count, times):
    """Carry torch's order out with every computation taking `times[kind]`, messages none: idle over working time."""
    actions = orders(schedule, pp, count)
    last = max(part for order in actions.values() for _, part, _ in order)
    done: dict[tuple[str, int, int], float] = {}
    clock, places = dict.fromkeys(actions, 0.0), dict.fromkeys(actions, 0)

    def ready(kind, part, batch):
        """When what a computation needs is there; None: not known yet."""
        if kind == "F":
            return 0.0 if part == 0 else done.get(("F", part - 1, batch))
        if kind == "W":
            return done.get(("I", part, batch))
        return done.get(("F", part, batch)) if part == last else done.get(("I", part + 1, batch))

    while any(places[rank] < len(order) for rank, order in actions.items()):
        moved = False
        for rank, order in actions.items():
            while places[rank] < len(order):
                kind, *key = order[places[rank]]
                start = ready("I" if kind == "B" else kind, *key)
                if start is None:
                    break
                clock[rank] = max(clock[rank], start) + times[kind]
                done["I" if kind == "B" else kind, *key] = clock[rank]
                places[rank], moved = places[rank] + 1, True
        assert moved, "the order waits for itself"
    work = max(sum(times[kind] for kind, _, _ in order) for order in actions.values())
    return max(clock.values()) / work - 1


@pytest.mark.parametrize("count", [8, 16, 32])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", list(CLASSES))
def test_bubbles_are_those_of_torchs_schedule_carried_out(schedule, pp, count, recompute):
    """Forward 1, weights' gradients 1, inputs' gradients 1 or with recomputation 2; zbv with recomputation makes both
    where it has those of the inputs."""
    config = config_of(schedule, pp, count, recompute)
    times = {"F": 1.0, "I": 1.0 + recompute, "W": 1.0, "B": 2.0 + recompute}
    if schedule == "zbv" and not splits_backward(config):
        times.update(I=times["B"], W=0.0)
    planned = pipeline_bubble(config, resolve_mesh(config, pp)).overhead
    found = idle_share(schedule, pp, count, times)
    if schedule == "zbv":
        assert planned == pytest.approx(found, abs=1.5 / count)
    else:
        assert planned == pytest.approx(found)


def test_a_share_of_all_time():
    bubble = pipeline_bubble(config_of("1f1b", 4, 9), resolve_mesh(config_of("1f1b", 4, 9), 4))
    assert bubble.share == pytest.approx(3 / 12)
    assert "2104.04473" in bubble.formula


def test_a_model_in_one_piece_has_no_pipeline():
    config = config_of("zbv", 1, 4)
    mesh = resolve_mesh(config, 1)
    (share,) = rank_shares(config, mesh)
    assert pipeline_bubble(config, mesh).overhead == 0
    assert in_flight(config, mesh, 0) == heads_in_flight(config, mesh) == 1
    assert layers_in_flight(config, mesh, share) == 16


def test_gpipe_holds_every_loss():
    config = config_of("gpipe", 2, 6)
    assert heads_in_flight(config, resolve_mesh(config, 2)) == 6
