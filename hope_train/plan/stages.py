"""Which layers go to which pipeline stage: consecutive parts of nearly equal cost (no torch).

The engine cuts the model with `stage_layers`, and the plan counts with it, so that both speak of the same stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hope_train.config.parallel import ParallelConfig
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.plan.flops import count_flops

FP32_WEIGHT = 10.0
"""Cost of a multiply-add of the memories, which stay in fp32, in units of a bf16 one.

Data sheets say 4 (L40S) to 30 (B200), 15 for an H100; what is balanced is whole layers, so that a rough figure does.
"""


def part_count(parallel: ParallelConfig) -> int:
    """Consecutive parts that the layers are cut into: one per stage, more where a rank holds several."""
    if parallel.pp == 1:
        return 1
    if parallel.schedule == "interleaved_1f1b":
        return parallel.pp * parallel.stages_per_rank
    return parallel.pp * (2 if parallel.schedule == "zbv" else 1)


def rank_of_part(part: int, parallel: ParallelConfig) -> int:
    """The pipeline rank that holds part number `part`, as torch.distributed.pipelining lays them out.

    interleaved_1f1b goes round; zbv goes down the ranks and up again (a V: rank 0 holds the first and the last).
    """
    if parallel.schedule == "zbv" and parallel.pp > 1:
        return min(part, 2 * parallel.pp - 1 - part)
    return part % parallel.pp


def parts_of_rank(rank: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """The parts that pipeline rank `rank` holds, in the order of the layers."""
    return tuple(part for part in range(part_count(parallel)) if rank_of_part(part, parallel) == rank)


def splits_backward(config: RunConfig) -> bool:
    """Whether zbv can do the gradients of the weights apart from, and after, those of the inputs.

    torch.distributed.pipelining walks the graph for it. Through Hope's memories that goes over the same functions again
    and again (measured: 2.8 times the whole backward, in a model of width 256), recomputation and compiled functions
    can be gone through once, and FSDP2 acts on whole backwards. There the schedule keeps its order, and the gradients
    of the weights are made together with those of the inputs.
    """
    train, parallel = config.train, config.parallel
    plain = not train.recompute and train.compile == "none" and parallel.dp_shard == 1
    return parallel.schedule == "zbv" and plain and config.model.arch != "hope"


def stage_layers(config: RunConfig) -> tuple[int, ...]:
    """Layers of every part from the first to the last: `parallel.layers_per_stage`, or balanced by cost. All of them
    without a pipeline.

    Raises UserError when there are fewer layers than parts, or the layers given do not add up.
    """
    layers, parallel = config.model.n_layers, config.parallel
    parts = part_count(parallel)
    given = parallel.layers_per_stage
    if given is None or parallel.pp == 1:
        layer, head = training_costs(config)
        return balanced([layer] * layers, parts, last=head)
    if len(given) != parts:
        raise UserError(
            f"parallel.layers_per_stage={list(given)} has {len(given)} entries: parallel.pp={parallel.pp} with "
            f"parallel.schedule={parallel.schedule} makes {parts} parts"
        )
    if sum(given) != layers:
        raise UserError(
            f"parallel.layers_per_stage={list(given)} adds up to {sum(given)} layers: model.n_layers={layers}"
        )
    return given


def training_costs(config: RunConfig) -> tuple[float, float]:
    """Cost per token of one layer and of the output head with the loss, forward, backward and recomputation.

    In bf16 multiply-adds (FLOPs); the embedding, a look-up, costs nothing. The head is not recomputed.
    """
    flops = count_flops(config.model, config.train)
    weight = FP32_WEIGHT if config.train.precision == "bf16" else 1.0
    memory = 3 * flops.by_part().get("memory", 0.0) + flops.recompute_memory / flops.n_layers
    everything = 3 * flops.layer + flops.recompute / flops.n_layers
    return everything - memory + weight * memory, 3 * flops.head


def balanced(costs: Sequence[float], parts: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Cut `costs` (one per layer) into `parts` consecutive parts of at least one layer each.

    `first` and `last` are what the first part has to do besides (embedding) and the last one (norm, head, loss). The
    largest cost of a part is as small as it can be; among such cuts the one with the smallest sum of squares is
    taken, and of equal ones the one whose later parts are shorter.

    Raises UserError when there are fewer layers than parts.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        raise UserError(
            f"{count} layers cannot be cut into {parts} pipeline parts: lower parallel.pp or parallel.stages_per_rank, "
            "or raise model.n_layers"
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def part_cost(part: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] + (first if part == 0 else 0.0) + (last if part == parts - 1 else 0.0)

    def best(limit: float | None) -> list[list[tuple[float, int]]]:
        """[part][stop] -> (value of the best cut of the first `stop` layers into part + 1 parts, where it starts).

        The value is the largest cost, or with a limit on that the sum of squares.
        """
        table: list[list[tuple[float, int]]] = []
        for part in range(parts):
            row = [(float("inf"), -1)] * (count + 1)
            for stop in range(part + 1, count - (parts - part - 1) + 1):
                for start in [0] if part == 0 else range(part, stop):
                    cost = part_cost(part, start, stop)
                    before = table[part - 1][start][0] if part else 0.0
                    if limit is None:
                        value = max(before, cost)
                    else:
                        value = before + cost * cost if cost <= limit else float("inf")
                    # Later starts win among equals (up to rounding): the remainder goes to the earlier parts.
                    if value < float("inf") and value <= row[stop][0] * (1 + 1e-12):
                        row[stop] = (value, start)
            table.append(row)
        return table

    smallest = best(None)[-1][count][0]
    table = best(smallest * (1 + 1e-9))
    cuts, stop = [count], count
    for part in reversed(range(parts)):
        stop = table[part][stop][1]
        cuts.append(stop)
    cuts.reverse()
    return tuple(after - before for before, after in pairwise(cuts))
