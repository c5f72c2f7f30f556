"""What ranks hold, counted tensor by tensor on built models."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from hope_train.config.mesh import MeshSizes, resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.levels.build import build_optimizer
from hope_train.levels.schedule import level_of
from hope_train.model.hope import build_model
from hope_train.parallel.dry_run import build_ranks
from hope_train.parallel.engine import build_engine
from hope_train.parallel.mesh import Mesh
from hope_train.plan.footprint import memory_state_bytes, training_footprint
from hope_train.plan.parameters import parameter_count
from hope_train.plan.sharding import padded_shard, rank_shares
from tests.plan.fake_ranks import fake_mesh


def run_config(parallel=None, train=None, **model):
    sizes = {"d_model": 24, "n_layers": 5, "n_heads": 4, "vocab_size": 37, "arch": "hope"}
    levels = [{"width": 8}, {"width": 16, "period": 2}, {"width": 24, "period": 4}]
    base = {"context_length": 16, "batch_tokens": 16 * 48, "micro_batch_size": 1}
    return RunConfig.model_validate(
        {
            "model": sizes | {"cms": {"levels": levels}} | model,
            "parallel": parallel or {},
            "train": base | (train or {}),
        }
    )


def items(config, mesh, rank=0):
    share = rank_shares(config, mesh)[rank]
    return {item.name: item.bytes for item in training_footprint(config, True, mesh, share).items}


def lasting(config, mesh, rank=0):
    share = rank_shares(config, mesh)[rank]
    return sum(item.bytes for item in training_footprint(config, True, mesh, share).items if not item.transient)


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_tensor_parallel_rank_holds_the_engines_tensors(tp, variant):
    levels = [{"width": 8}, {"width": 16, "period": 2}, {"width": 24, "period": 4}]
    config = run_config({"tp": tp}, cms={"variant": variant, "levels": levels})
    sizes = resolve_mesh(config, 2 * tp)
    with fake_mesh((1, 2, 1, tp)) as mesh:
        engine = build_engine(config, Mesh(sizes, torch.device("cpu"), mesh))
        engine.optimizer.materialize_state()
        held: dict[str, int] = {}
        for state in engine.optimizer.state.values():
            for key, tensor in state.items():
                held[key] = held.get(key, 0) + tensor.nbytes
        weights = {name: p.nbytes for name, p in engine.model.named_parameters()}
    planned = items(config, sizes)
    assert planned["parameters (fp32)"] == planned["gradients (fp32)"] == sum(weights.values())
    assert planned["AdamW moments (fp32)"] == held["exp_avg"] + held["exp_avg_sq"]
    assert planned["accumulators of slow levels (fp32)"] == held["accumulator"]
    assert planned.get("initial states of nested levels (fp32)", 0) == held.get("anchor", 0)


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved_1f1b", "zbv"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_pipeline_rank_holds_the_engines_tensors(rank, schedule):
    config = run_config({"pp": 2, "tp": 2, "schedule": schedule})
    sizes = resolve_mesh(config, 4)
    with fake_mesh((2, 1, 1, 2), rank=2 * rank) as mesh:
        engine = build_engine(config, Mesh(sizes, torch.device("cpu"), mesh))
        built = {name: tuple(p.shape) for name, p in engine.model.named_parameters()}
        optimized = {name for group in engine.optimizer.param_groups for name in group["param_names"]}
    assert built == rank_shares(config, sizes)[rank].shapes
    assert optimized == built.keys()
    (held,) = build_ranks(config, sizes, [(rank, 0, 0, 0)])
    assert held.shapes == built


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_stages_hold_every_parameter_once_and_a_tied_one_at_both_ends(schedule, tied):
    config = run_config({"pp": 2, "schedule": schedule}, tie_embeddings=tied)
    mesh = resolve_mesh(config, 2)
    with torch.device("meta"):
        built = {name: p.numel() for name, p in build_model(config.model).named_parameters()}
    found = [name for share in rank_shares(config, mesh) for name in share.shapes]
    assert set(found) == built.keys()
    twice = {name for name in found if found.count(name) > 1}
    assert twice == ({"embed.weight"} if tied and schedule != "zbv" else set())


@pytest.mark.parametrize("shard", [2, 3, 4, 48])
def test_a_shard_is_torchs_with_its_padding(shard):
    for shape in [(37, 24), (24,), (4, 6, 24), (1,), (3,)]:
        chunks = torch.chunk(torch.empty(shape, device="meta"), shard)
        assert padded_shard(shape, shard) == chunks[0].numel()
    assert padded_shard((37, 24), 1) == 37 * 24


@pytest.mark.parametrize("keep", ["auto", "always", "never"])
def test_sharded_ranks_hold_shards_whole_accumulators_and_what_is_kept(keep):
    config = run_config({"dp_shard": 4, "keep_gathered": keep, "keep_gathered_gib": 1e-9})
    mesh = resolve_mesh(config, 4)
    shard: dict[int | None, int] = {}
    whole: dict[int | None, int] = {}
    with torch.device("meta"):
        for name, p in build_model(config.model).named_parameters():
            level = level_of(name)
            shard[level] = shard.get(level, 0) + math.prod(p.shape[1:]) * math.ceil(p.shape[0] / 4)
            whole[level] = whole.get(level, 0) + p.numel()
    planned = items(config, mesh)
    assert planned["parameters (fp32)"] == 4 * sum(shard.values())
    assert planned["AdamW moments (fp32)"] == 8 * sum(shard.values())
    assert planned["accumulators of slow levels (fp32)"] == 4 * (whole[1] + whole[2])
    kept = {name: size for name, size in planned.items() if "kept gathered" in name}
    if keep == "always":
        assert list(kept.values()) == [4 * whole[1], 4 * whole[2]]
    else:  # auto has no room here
        assert kept == {}
    gradients = planned["whole gradients of the core and of levels of period 1 (fp32)"]
    assert gradients == 4 * (whole[None] + whole[0])


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"dp_shard": 8}, {"dp_shard": 4}),
        ({"dp_shard": 4}, {"dp_shard": 1}),
        ({"tp": 4}, {"tp": 2}),
        ({"tp": 2}, {"tp": 1}),
        ({"tp": 4}, {"tp": 4, "sequence_parallel": False}),
        ({"pp": 5}, {"pp": 1}),
        ({"dp_shard": 4, "keep_gathered": "never"}, {"dp_shard": 4, "keep_gathered": "always"}),
        ({"pp": 2}, {"pp": 2, "schedule": "gpipe"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_finer_mesh_needs_less(small, large, recompute):
    # Large enough that weights outweigh the two blocks that sharding gathers at a time.
    model = {"d_model": 64, "n_layers": 20, "vocab_size": 256}
    needs = []
    for parallel in (small, large):
        config = run_config(parallel, {"recompute": recompute}, **model)
        world = parallel.get("pp", 1) * parallel.get("tp", 1) * parallel.get("dp_shard", 1)
        mesh = resolve_mesh(config, world)
        needs.append(max(lasting(config, mesh, rank) for rank in range(mesh.pp)))
    assert needs[0] < needs[1]


def test_the_last_stage_holds_the_loss_and_the_first_the_most_activations():
    config = run_config({"pp": 5})
    mesh = resolve_mesh(config, 5)
    ranks = [items(config, mesh, rank) for rank in range(5)]
    assert ["logits of one chunk" in held for held in ranks] == [False] * 4 + [True]
    sums = [sum(size for name, size in held.items() if name.startswith("activations")) for held in ranks]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] == 5 * sums[-1]


def test_a_mesh_of_one_is_the_plan_of_one_device():
    config = run_config({"pp": 2, "tp": 2})
    alone = run_config()
    assert training_footprint(config) == training_footprint(alone)
    assert items(alone, MeshSizes()) == {item.name: item.bytes for item in training_footprint(alone).items}
    assert items(alone, MeshSizes())["parameters (fp32)"] == 4 * parameter_count(alone.model)


def test_fast_weights_are_those_of_the_model():
    config = run_config({"tp": 2}, {"micro_batch_size": 3})
    mesh = resolve_mesh(config, 2)
    model = build_model(config.model)
    state = model.initial_state(3)
    now = [group.now for block in state.blocks.values() for group in block.memory.groups]
    count = sum(tensor.nbytes for tensors in now for tensor in tree_leaves(tensors))
    assert memory_state_bytes(config, mesh, rank_shares(config, mesh)[0]) == count / 2


def test_the_optimizer_on_one_device_is_whole():
    config = run_config()
    model = build_model(config.model)
    optimizer = build_optimizer(model.named_parameters(), config)
    optimizer.materialize_state()
    moments = sum(state["exp_avg"].nbytes for state in optimizer.state.values())
    assert items(config, MeshSizes())["AdamW moments (fp32)"] == 2 * moments
