"""The whole configuration of a run: one typed, documented tree."""

from __future__ import annotations

from pydantic import Field, model_validator

from hope_train.config.base import Section
from hope_train.config.data import DataConfig
from hope_train.config.model import ModelConfig
from hope_train.config.parallel import ParallelConfig
from hope_train.config.train import CheckpointConfig, EvalConfig, LogConfig, OptimizerConfig, TrainConfig


class RunConfig(Section):
    """Everything a run is. The resolved tree is saved in the run directory as config.yaml."""

    name: str = Field("hope", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run."""

    dir: str = "runs/{name}"
    """Run directory; `{name}` is filled in."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds the initial weights and the order of the data."""

    model: ModelConfig = ModelConfig.model_construct()
    """Architecture and sizes."""

    data: DataConfig = DataConfig()
    """Text and tokenizer."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and learning rate."""

    train: TrainConfig = TrainConfig()
    """The loop."""

    parallel: ParallelConfig = ParallelConfig()
    """The mesh of devices."""

    eval: EvalConfig = EvalConfig()
    """Evaluation."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""

    log: LogConfig = LogConfig()
    """Extra loggers."""

    @model_validator(mode="before")
    @classmethod
    def _need_model(cls, values: object) -> object:
        if isinstance(values, dict) and "model" not in values:
            raise ValueError("the configuration has no `model` section")
        return values

    @property
    def run_dir(self) -> str:
        """The run directory with the name filled in."""
        return self.dir.replace("{name}", self.name)
