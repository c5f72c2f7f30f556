"""DeepSpeed's configuration from the run's, and a user's own file under it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hope_train.config.deepspeed import NOT_OURS, NOT_OURS_OF_ZERO, DeepSpeedConfig, merged, required
from hope_train.config.mesh import MeshSizes, resolve_mesh
from hope_train.errors import UserError
from tests.parallel.cases import make_config


def tree(**settings: Any) -> dict[str, Any]:
    return required(DeepSpeedConfig(**settings), micro_batch_size=2, micro_batches=3, data_ranks=4)


def with_file(folder: Path, theirs: Any, **settings: Any) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs), encoding="utf-8")
    return merged(DeepSpeedConfig(config=str(path), **settings), tree(**settings))


def test_batch_clipping_and_stage_are_the_run_s() -> None:
    found = merged(DeepSpeedConfig(stage=2), tree(stage=2))
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (24, 3)
    assert found["gradient_clipping"] == 0.0, "clipping is by period, and not DeepSpeed's"
    assert found["zero_optimization"] == {"stage": 2, "compute_grad_norm": False}
    assert "optimizer" not in found


def test_offload_is_to_host_memory() -> None:
    zero = tree(stage=3, offload_optimizer=True, offload_parameters=True)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}
    assert "offload_optimizer" not in tree(stage=3)["zero_optimization"]


def test_a_file_adds_what_nobody_else_decides(tmp_path: Path) -> None:
    theirs = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0,
        "steps_per_print": 7,
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "stage3_prefetch_bucket_size": 1000,
        },
    }
    found = with_file(tmp_path, theirs, stage=3, offload_optimizer=True)
    assert found["train_batch_size"] == 24
    assert found["steps_per_print"] == 7
    zero = found["zero_optimization"]
    assert zero["overlap_comm"] is True
    assert zero["stage3_prefetch_bucket_size"] == 1000
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_auto_leaves_it_to_the_run_or_to_deepspeed(tmp_path: Path) -> None:
    theirs = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": "auto",
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "sequence_parallel_size": 1,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "zero_hpz_partition_size": 1},
    }
    assert with_file(tmp_path, theirs, stage=2) == merged(DeepSpeedConfig(stage=2), tree(stage=2))


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"train_batch_size": 25}, "train_batch_size is 25.*24.*train.batch_tokens"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu.*train.micro_batch_size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping.*train.clip_norm"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2.*parallel.deepspeed.stage"),
        ({"zero_optimization": {"sub_group_size": 5}}, "zero_optimization.sub_group_size is 5"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "parallel.deepspeed.offload_optimizer=true"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device=nvme is not supported"),
        ({"zero_optimization": True}, "zero_optimization is an object"),
        ({"prescale_gradients": True}, "prescale_gradients is True"),
        *(({key: {"enabled": True}}, f"{key} cannot be used") for key in NOT_OURS),
        *(({"zero_optimization": {key: {"x": 2}}}, f"zero_optimization.{key} cannot") for key in NOT_OURS_OF_ZERO),
        *(({key: True}, f"{key} cannot be used") for key in NOT_OURS),
        *(({"zero_optimization": {key: True}}, f"zero_optimization.{key} cannot") for key in NOT_OURS_OF_ZERO),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum'"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is False"),
        ("{", "is not JSON"),
        ("[]", "is an object"),
    ],
)
def test_a_contradiction_is_refused_by_name(tmp_path: Path, theirs: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        with_file(tmp_path, theirs, stage=3)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parallel\.deepspeed\.config=.*No such file"):
        merged(DeepSpeedConfig(config=str(tmp_path / "none.json")), tree())


@pytest.mark.parametrize(
    ("world", "options", "named"),
    [
        (2, {"pp": 2, "layers": 2, "schedule": "gpipe"}, "no pipelines.*parallel.engine=native"),
        (2, {"dp_shard": 2}, "parallel.deepspeed.stage"),
        (2, {"tp": 2, "vocab": 67}, "model.vocab_size=67 has no 2 equal parts"),
        (1, {"optimizer": {"name": "muon"}}, "muon cannot work on them"),
        (1, {"optimizer": {"memories": "sgd"}}, "sgd cannot work on them"),
        (1, {"optimizer": {"matrix_lr_scale": 2.0}}, "matrix_lr_scale"),
        (1, {"check_collectives": True}, "parallel.check_collectives"),
        (1, {"deepspeed": {"stage": 0, "offload_optimizer": True}}, "offload_optimizer=true needs ZeRO"),
        (1, {"deepspeed": {"stage": 2, "offload_parameters": True}}, "offload_parameters=true needs"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(world: int, options: dict[str, Any], named: str) -> None:
    config = make_config("hope", engine="deepspeed", **{"check_collectives": False, **options})
    with pytest.raises(UserError, match=named):
        resolve_mesh(config, world)
    resolve_mesh(config, world, training=False)  # a checkpoint of such a run is measured all the same


def test_tokens_are_never_divided() -> None:
    # 16 tokens on 3 ranks would be refused under the native engine's sequence parallelism.
    config = make_config("transformer_pp", engine="deepspeed", check_collectives=False, tp=2, vocab=68)
    assert config.parallel.sequence_parallel
    assert resolve_mesh(config, 2) == MeshSizes(tp=2)
