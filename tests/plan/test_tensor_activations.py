"""Activations of a tensor-parallel rank against what autograd keeps of the engine's model on it."""

from __future__ import annotations

import pytest
import torch

from hope_train.config.mesh import resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.parallel.engine import build_engine
from hope_train.parallel.mesh import Mesh
from hope_train.plan.footprint import training_footprint
from hope_train.plan.sharding import rank_shares
from tests.plan.fake_ranks import fake_mesh

LEVELS = {"levels": [{"width": 96}, {"width": 64, "period": 4, "activation": "gelu"}, {"width": 32, "period": 8}]}
MODELS = {
    "hope": {"arch": "hope", "cms": LEVELS},
    "hope-adaptive-q": {"arch": "hope", "cms": LEVELS, "memory": {"adaptive_q": True}},
    "hope_attention": {"arch": "hope_attention", "cms": LEVELS},
    "transformer_pp": {"arch": "transformer_pp", "mlp_width": 320},
}


def measured(config, tp):
    """Bytes of distinct storages kept per layer, parameters and casts of them left out."""

    def total(layers):
        run = config.model_copy(update={"model": config.model.model_copy(update={"n_layers": layers})})
        with fake_mesh((1, 1, 1, tp)) as mesh:
            model = build_engine(run, Mesh(resolve_mesh(run, tp), torch.device("cpu"), mesh)).model
            known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
            matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
            sizes = {tuple(p.shape) for p in matrices} | {tuple(p.mT.shape) for p in matrices}
            seen: dict[int, tuple[int, torch.Tensor]] = {}

            def pack(tensor):
                key = tensor.untyped_storage().data_ptr()
                if key not in known and not (tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in sizes):
                    seen[key] = (tensor.untyped_storage().nbytes(), tensor)  # kept alive: no address is used twice
                return tensor

            tokens = torch.zeros(config.train.micro_batch_size, config.train.context_length, dtype=torch.int64)
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"),
            ):
                kept = model.hidden(tokens)
            assert kept.requires_grad
            return sum(size for size, _ in seen.values())

    return total(2) - total(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(2, True), (4, True), (4, False)], ids=["tp2", "tp4", "tp4-whole-tokens"]
)
@pytest.mark.parametrize("name", list(MODELS))
def test_activations_are_what_autograd_keeps(name, tp, sequence_parallel, precision):
    config = RunConfig.model_validate(
        {
            "model": {"d_model": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 64, **MODELS[name]},
            "train": {"context_length": 128, "batch_tokens": 256, "micro_batch_size": 2, "precision": precision},
            "parallel": {"tp": tp, "sequence_parallel": sequence_parallel},
        }
    )
    mesh = resolve_mesh(config, tp)
    items = training_footprint(config, True, mesh, rank_shares(config, mesh)[0]).items
    planned = sum(item.bytes for item in items if item.name.startswith("activations")) / config.model.n_layers
    assert planned == pytest.approx(measured(config, tp), rel=0.06)
