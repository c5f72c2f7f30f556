"""A submission as it is kept in the run directory: what the job reads when it starts, and what resubmits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from hope_train.config.base import Section
from hope_train.config.load import load_config, validate
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from launch.places import Places, read_json
from launch.site import Site


class Request(Section):
    """One run's part of a submission."""

    run_dir: str
    """Absolute."""

    config: str
    """The resolved configuration that the ranks read."""

    site: Site
    """What the cluster is like, and what was asked for."""

    submission: str
    """The folder of the submission."""

    working_directory: str
    """From which relative paths of the configuration count."""

    gpus_per_node: int = 0
    ranks_per_node: int = 1

    elastic: bool = False
    """The number of nodes may vary from start to start."""

    chain: bool = False
    """The next job of the chain goes on: at the time limit this one ends instead of being requeued."""

    code: dict[str, Any] = Field(default_factory=dict)
    """What the snapshot says of itself."""

    source: dict[str, Any] = Field(default_factory=dict)
    """The command that was given: configuration file, overrides, chain, dependency, sweep."""

    def load(self) -> RunConfig:
        """The run's configuration. Raises UserError."""
        return load_config(self.config)

    @property
    def places(self) -> Places:
        """The run's folders."""
        return Places(Path(self.run_dir))


def read_request(path: Path) -> Request:
    """Raises UserError for a file that is none."""
    tree = read_json(path)
    if not tree:
        raise UserError(f"{path} is no request of a job")
    return validate(Request, tree, origin=str(path))
