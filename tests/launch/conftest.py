"""A Slurm of the tests' own: a real controller and four nodes on this machine. No behaviour of Slurm's is imitated."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.slurm_bench import Bench, Cluster, slurm_is_here


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Started once; skipped where Slurm is not installed or this is not root, and failing there in CI."""
    if not slurm_is_here():
        why = "Slurm is not installed here, or this is not root: make setup-slurm"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{why}; it is required here")
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="hope-slurm-"))  # sockets need short paths
    found = Cluster(folder)
    try:
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def bench(cluster: Cluster) -> Iterator[Bench]:
    """A corpus, a tokenizer and a configuration for runs on the cluster."""
    folder = Path(tempfile.mkdtemp(prefix="hope-bench-"))
    try:
        yield Bench(folder, cluster)
    finally:
        cluster.settle()
        shutil.rmtree(folder, ignore_errors=True)
