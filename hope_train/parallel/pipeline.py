"""Training over a pipeline: micro-batches through the parts of the model by a schedule of torch.distributed.pipelining.

What of torch's machinery is left out, and why: gradients are not scaled (the loss of a micro-batch is divided by the
tokens of the whole step, and a slow level's accumulator must not be divided again), shapes are given rather than
inferred (inferring runs the model), and a stage's module is a plain container, so that torch neither starts nor
gathers anything of a data-parallel level by itself.

Shapes: B rows of a micro-batch, T tokens, t of them on this rank, D width, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

from data_pipelines.batches import Batch
from hope_train.config.tree import RunConfig
from hope_train.parallel.micro import on_device
from hope_train.parallel.stages import StageModel
from hope_train.plan.stages import splits_backward

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}


class Part(nn.Module):
    """One part of the model as a stage's module: it holds the blocks, the model knows how to run them."""

    def __init__(self, model: StageModel, number: int, loss_chunk: int, low: bool) -> None:
        """low: run in bf16 autocast; only the forward is, as in the loop without a pipeline."""
        super().__init__()
        self.blocks = nn.ModuleList(model.blocks[name] for name in model.names[number])
        if number == 0:
            self.embed = model.embed
        if number == model.last_part:
            self.norm, self.head = model.norm, model.head or model.embed
        self._model = (model,)  # not a child
        self.number, self.is_last = number, number == model.last_part
        self.loss_chunk, self.low = loss_chunk, low
        self.sums: list[Tensor] = []
        """Of the last part: the micro-batches' summed negative log-likelihoods, in their order."""

    def forward(self, x: Tensor, starts_BT: Tensor | None = None, targets_BT: Tensor | None = None) -> Tensor:
        """Tokens [B, T] or the residual stream [B, t, D] -> the residual stream, or the summed loss (0-d)."""
        (model,) = self._model
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.low):
            result = model.run_part(self.number, x, starts_BT, targets_BT, self.loss_chunk)
        if self.is_last:
            self.sums.append(result.detach())
        return result


class Stage(PipelineStage):
    """A stage that says when a backward begins, and leaves everything else about gradients alone."""

    before_backward: Callable[[bool], None]
    """Called with whether the micro-batch has all its gradients after this one."""

    split: bool
    """Whether zbv's backward of the weights is apart from that of the inputs. If not, both are done where the schedule
    has that of the inputs, and nothing where it has that of the weights."""

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """As torch's for a module that is neither FSDP's nor DDP's, which sets nothing on it."""
        if not self.split and backward_type == "weight":
            return (), None
        if not self.split and backward_type == "input":
            backward_type, output = "full", bwd_kwargs["stage_output"]
            bwd_kwargs = {**bwd_kwargs, "stage_output": output[0] if self.is_last else output}
        self.before_backward(backward_type != "input")
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)


class Pipeline:
    """The parts of this rank and their schedule."""

    def __init__(self, config: RunConfig, model: StageModel, micro_batches: int) -> None:
        """micro_batches: per step, until a batch comes that has more or fewer."""
        self.config, self.model, self.group = config, model, model.group
        self._waiting = 0
        self._before: Callable[[bool], None] = lambda last: None
        self._plan(micro_batches)

    def _plan(self, micro_batches: int) -> None:
        """Stages and schedule for steps of so many micro-batches: torch fits both to the number, and neither has a
        state that outlives a step."""
        config, model, train = self.config, self.model, self.config.train
        self.micro_batches = micro_batches
        parameter = next(model.parameters())
        tokens_BT = torch.empty(train.micro_batch_size, train.context_length, dtype=torch.int64, device="meta")
        wide = torch.promote_types(parameter.dtype, torch.float32)
        stream = torch.empty(model.begin(tokens_BT), dtype=parameter.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        self.stages: list[Stage] = []
        self.last: Part | None = None
        """The last part, where it is here."""
        for number in model.parts:
            part = Part(model, number, train.loss_chunk, train.precision == "bf16")
            inputs, outputs = (tokens_BT if number == 0 else stream), (loss if part.is_last else stream)
            stage = Stage(part, number, model.last_part + 1, parameter.device, inputs, outputs, group=model.group)
            stage.split, stage.before_backward = splits_backward(config), self._before_backward
            self.stages.append(stage)
            self.last = part if part.is_last else self.last
        several = config.parallel.schedule in ("interleaved_1f1b", "zbv")
        self.schedule = SCHEDULES[config.parallel.schedule](
            self.stages if several else self.stages[0],
            n_microbatches=micro_batches,
            loss_fn=lambda nll, target, scored: nll / scored,
            scale_grads=False,
        )

    def _before_backward(self, completes: bool) -> None:
        self._waiting -= completes
        self._before(self._waiting == 0)

    def forward_backward(self, batch: Batch, scored: int, before_backward: Callable[[bool], None]) -> Tensor:
        """Gradients of the mean over `scored` tokens, from this rank's rows of a batch.

        Args:
            before_backward: is called before each backward of this rank, with whether it is the step's last.

        Returns:
            The micro-batches' summed negative log-likelihoods [M], on every rank of the pipeline.
        """
        if (count := len(batch.tokens) // self.config.train.micro_batch_size) != self.micro_batches:
            self._plan(count)
        self._waiting, self._before = len(self.stages) * self.micro_batches, before_backward
        tokens_NT, targets_NT, starts_NT = on_device(batch, self.stages[0].device)
        self.model.begin(tokens_NT)
        last = self.last
        more = {} if starts_NT is None else {"starts_BT": starts_NT}
        if last is not None:
            last.sums.clear()
            more["targets_BT"] = targets_NT
        self.schedule.step(
            *([tokens_NT] if 0 in self.model.parts else []),
            target=targets_NT if last is not None else None,
            return_outputs=False,
            loss_kwargs={"scored": max(scored, 1)},
            **more,
        )
        if last is not None:
            sums_M = torch.stack(last.sums)
        else:
            dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
            sums_M = torch.empty(self.micro_batches, dtype=dtype, device=tokens_NT.device)
        dist.broadcast(sums_M, group=self.group, group_src=self.model.last_rank)
        return sums_M

    def add_tied(self, weight: Tensor) -> None:
        """Complete the gradient of a tied matrix, of which the rank at the other end of the pipeline has a copy."""
        peer = self.model.tied_with
        assert peer is not None
        mine = torch.zeros_like(weight) if weight.grad is None else weight.grad.contiguous()
        theirs = torch.empty_like(mine)
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer),
                dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer),
            ]
        ):
            work.wait()
        weight.grad = mine + theirs  # the same bits on both ranks: a sum of two does not depend on the order
