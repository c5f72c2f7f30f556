"""The tensor-parallel plan carried out with megatron-core's layers, and megatron-core's groups as DeepSpeed's `mpu`.

What the plan divides by columns becomes a ColumnParallelLinear, by rows a RowParallelLinear, the embedding a
VocabParallelEmbedding; the loss is vocab_parallel_cross_entropy. Heads of memories are this rank's own tensors, as in
the native engine. Megatron-core's sequence parallelism needs CUDA and is not used.
"""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from functools import partialmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from hope_train.model.hope import HopeModel
from hope_train.model.loss import IGNORED
from hope_train.parallel.plan import Split, split_of_module
from hope_train.parallel.tensor import TensorParallel, after
from hope_train.parallel.vocab import VocabularyPart


def import_quietly() -> Any:
    """megatron.core, without its remarks on packages that it could use for what is not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core
    return megatron.core


def open_groups(tp: int, timeout: timedelta) -> None:
    """Make megatron-core's process groups, once for a process: tp ranks are neighbours, as on the mesh."""
    parallel_state = import_quietly().parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
            create_gloo_process_groups=False,
        )


def close_groups() -> None:
    """Forget them."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


class ModelParallelUnit:
    """Megatron-core's groups under the names that DeepSpeed asks for. parallel_state itself lacks some of them."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self._tensor: ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self._data: ProcessGroup = parallel_state.get_data_parallel_group()

    def get_model_parallel_group(self) -> ProcessGroup:
        """The ranks that hold one model between them."""
        return self._tensor

    def get_model_parallel_world_size(self) -> int:
        """How many."""
        return dist.get_world_size(self._tensor)

    def get_model_parallel_rank(self) -> int:
        """This one's number among them."""
        return dist.get_rank(self._tensor)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_data_parallel_group(self) -> ProcessGroup:
        """The ranks that see different samples and hold the same part of the model."""
        return self._data

    def get_data_parallel_world_size(self) -> int:
        """How many."""
        return dist.get_world_size(self._data)

    def get_data_parallel_rank(self) -> int:
        """This one's number among them."""
        return dist.get_rank(self._data)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers in the job."""
        return dist.get_process_group_ranks(self._data)


class MegatronParallel(TensorParallel):
    """As `TensorParallel`, with megatron-core's layers."""

    def __init__(self, model: HopeModel, mesh: DeviceMesh, sequence_parallel: bool = False) -> None:
        """As there; the tokens are never divided."""
        super().__init__(model, mesh, sequence_parallel=False)

    def divide_vocabulary(self) -> VocabularyPart:
        """The loss is megatron-core's; what only evaluations and decoding do is the native engine's."""
        return MegatronVocabulary(self.model.config.vocab_size, self.group)

    def place_exchanges(self) -> None:
        """Take megatron-core's layers, with this rank's parts as their weights, where the plan divides matrices."""
        from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel

        config = ModelParallelConfig(
            tensor_model_parallel_size=self.ranks, use_cpu_initialization=True, perform_initialization=False
        )
        group = parallel_state.get_tensor_model_parallel_group()
        columns, rows = linear_layers()
        common = {"config": config, "init_method": lambda weight: weight, "tp_group": group}

        def enter(x: Tensor) -> Tensor:
            entered: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=group)
            return entered

        for name, module in list(self.model.named_modules()):
            split = split_of_module(name)
            if split is Split.SEQUENCE:
                module.register_forward_hook(after(enter))
            elif split in (Split.COLWISE, Split.ROWWISE):
                assert isinstance(module, nn.Linear)
                inputs, outputs = module.in_features, module.out_features
                with torch.device("meta"):
                    if split is Split.COLWISE:
                        # The input's gradient is summed where it entered, once for all layers that read it.
                        layer = columns(
                            inputs, outputs, bias=False, gather_output=False, disable_grad_reduce=True, **common
                        )
                    else:
                        layer = rows(inputs, outputs, bias=False, input_is_parallel=True, skip_bias_add=False, **common)
                self._replace(name, module, layer)
                layer.register_forward_hook(after(lambda output: output[0]))
        with torch.device("meta"):
            embedding = tensor_parallel.VocabParallelEmbedding(
                self.model.config.vocab_size, self.model.config.d_model, **common
            )
        self._replace("embed", self.model.embed, embedding)

    def _replace(self, name: str, module: nn.Module, layer: Any) -> None:
        """Put a layer in the place of a module whose weight it takes over."""
        assert layer.weight.shape == module.weight.shape, name
        layer.weight = module.weight
        self.model.set_submodule(name, layer)


def linear_layers() -> tuple[type, type]:
    """Megatron-core's ColumnParallelLinear and RowParallelLinear, which follow torch's autocast on every device.

    Their product has a backward of its own, in which autocast is remembered on CUDA alone: without it, the gradient is
    in bf16 and the weight is not.
    """
    from megatron.core import tensor_parallel

    def product(layer: Any, plain: Any, **given: Any) -> Any:
        device = given["input"].device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            given |= {name: given[name].to(dtype) for name in ("input", "weight")}
        return plain(layer, **given)

    def following(base: Any) -> type:
        return type(base.__name__, (base,), {"_forward_impl": partialmethod(product, base._forward_impl)})

    return following(tensor_parallel.ColumnParallelLinear), following(tensor_parallel.RowParallelLinear)


class MegatronVocabulary(VocabularyPart):
    """Rows of a vocabulary that the ranks divide evenly."""

    def sum_nll(self, x_BTD: Tensor, weight_VD: Tensor, target_BT: Tensor, chunk: int) -> Tensor:
        """`chunked_cross_entropy`, by megatron-core. A chunk's logits are made again for backward, not kept."""
        x_MD, target_M = x_BTD.flatten(0, 1), target_BT.flatten()
        parts = [
            checkpoint(
                _part_nll,
                x_MD[first : first + chunk],
                weight_VD,
                target_M[first : first + chunk],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for first in range(0, len(x_MD), chunk)
        ]
        return torch.stack(parts).sum()


def _part_nll(x_CD: Tensor, weight_vD: Tensor, target_C: Tensor) -> Tensor:
    """Summed over the scored targets, fp32."""
    from megatron.core import tensor_parallel

    scored_C = target_C != IGNORED
    logits_C1v = nn.functional.linear(x_CD, weight_vD)[:, None]
    nll_C1 = tensor_parallel.vocab_parallel_cross_entropy(logits_C1v, target_C.where(scored_C, 0)[:, None])
    total: Tensor = (nll_C1[:, 0] * scored_C).sum()
    return total
