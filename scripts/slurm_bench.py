"""A Slurm cluster of one's own to try runs on: started, broken, brought back; runs submitted to it and watched."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.client import Slurm
from launch.places import Places, read_json, read_lines

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 40, 10
"""Steps of a run, and between two scheduled saves."""

LONG = ("train.tokens=76800",)
"""For scenarios in which Slurm itself takes its time: 300 steps."""

WAIT_S = 240.0
"""How long anything is waited for before a scenario has failed."""

WORDS = ("river", "stone", "lamp", "green", "walked", "under", "seven", "quietly", "the", "a", "of", "into", "x =")


class Failed(AssertionError):
    """A scenario did not go as it should."""


class Cluster:
    """A Slurm of this process's own."""

    def __init__(self, folder: Path, nodes: int = 4, port: int | None = None) -> None:
        """Start it in `folder`, which must lie where /tmp-like paths are short. Raises CalledProcessError."""
        self.folder = folder
        base = port or 10000 + os.getpid() % 600 * 16  # below the ports at which jobs meet
        self._script("start", str(nodes), BASE_PORT=str(base))
        os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
        self.slurm = Slurm(30.0)

    def _script(self, action: str, *arguments: str, **environment: str) -> None:
        command = [str(ROOT / "scripts" / "slurm_cluster.sh"), action, str(self.folder), *arguments]
        subprocess.run(command, check=True, timeout=90, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)

    def kill_node(self, node: str) -> None:
        """`kill -9` of the node's daemon. What runs on the node goes on, as orphans."""
        os.kill(int((self.folder / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Bring a node's daemon back."""
        self._script("node", node)

    def settle(self) -> None:
        """All jobs ended, all nodes idle."""
        with suppress(Exception):
            self.slurm.call("scancel", "--quiet", "-u", os.environ.get("USER", "root"))
        for node in self.slurm.nodes():
            if not (self.folder / "run" / f"slurmd.{node.name}.pid").exists() or "DOWN" in node.state:
                with suppress(subprocess.SubprocessError):
                    self.start_node(node.name)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            states = {node.name: node.state for node in self.slurm.nodes()}
            if all(state == "IDLE" for state in states.values()):
                return
            for name, state in states.items():
                if "DOWN" in state or "DRAIN" in state:
                    with suppress(Exception):
                        self.slurm.call("scontrol", "update", f"NodeName={name}", "State=RESUME")
            time.sleep(0.5)

    def stop(self) -> None:
        """End everything of this cluster."""
        with suppress(subprocess.SubprocessError):
            self._script("stop")


def slurm_is_here() -> bool:
    """Whether a cluster can be started on this machine by this user."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return os.getuid() == 0 and all(shutil.which(name, path=path) for name in ("slurmctld", "slurmd", "munged"))


class Bench:
    """A folder with a corpus, a tokenizer, a site file and the runs of one cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        """Makes them. The model is hope_tiny with a vocabulary of 300; steps of 256 tokens take tenths of a second."""
        from data_pipelines.tokenizer_training import train_tokenizer

        self.folder, self.cluster = folder, cluster
        rng = random.Random(0)
        texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(20, 60))) + "\n" for _ in range(200)]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenizer = train_tokenizer(texts, folder / "tiny.model", 300)
        tree = {
            "base": str(ROOT / "configs" / "hope_tiny.yaml"),
            "dir": str(folder / "runs" / "{name}"),
            "data": {
                "sources": [{"path": str(folder / "text.jsonl")}],
                "tokenizer": tokenizer.path,
                "cache_dir": str(folder / "cache"),
            },
            "model": {"vocab_size": 300},
            "parallel": {"tp": 2},
            "train": {
                "context_length": 64,
                "batch_tokens": 256,
                "micro_batch_size": 4,
                "tokens": STEPS * 256,
                "device": "cpu",
                "threads": 1,
            },
            "eval": {"every": 0, "validation_batches": 1},
            "checkpoint": {"every": EVERY},
            "log": {"progress": False},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
        self.site: dict[str, Any] = {
            "shared": [str(folder)],
            "nodes": "2",
            "cpus_per_node": 2,
            "memory": "2000M",
            "gpus_per_node": 0,
            "time": "20",
            "environment": {"OMP_NUM_THREADS": "1"},
            "health": {"timeout_s": 90, "all_reduce": False},
            "survive": {"step_s": 12, "opening_s": 120, "save_s": 60, "disk_full_delay_s": 2, "lead_s": 30},
        }

    def hope(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`hope …` from this folder."""
        environment = {key: text for key, text in os.environ.items() if key != "HOPE_WIKITEXT"}
        environment |= {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(self.folder / "state"), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "hope_train.cli", *arguments],
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=4 * WAIT_S,
                check=False,
                env=environment,
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(str(error)) from None
        if check and done.returncode != 0:
            raise Failed(f"hope {' '.join(arguments)}: {done.stderr}{done.stdout}")
        return done

    def submit(self, name: str, *arguments: str, site: dict[str, Any] | None = None) -> Run:
        """Submit run `name`; `site` is laid over the site file."""
        tree = {**self.site, **(site or {})}
        tree["survive"] = {**self.site["survive"], **tree["survive"]}
        (self.folder / f"{name}.site.yaml").write_text(yaml.safe_dump(tree))
        done = self.hope(
            *("launch", "submit", "run.yaml", f"name={name}", "--site", f"{name}.site.yaml", "--json", *arguments)
        )
        told = json.loads(done.stdout)
        return Run(self, Path(told["run_dir"]), told["jobs"])

    def reference(self, seed: int, *overrides: str) -> Path:
        """The run directory of an uninterrupted run of this seed on the same layout; made once."""
        name = "-".join(["reference", str(seed), *(text.replace("=", "") for text in overrides)])
        run_dir = self.folder / "runs" / name
        if not (run_dir / "STOPPED.json").exists():
            self.hope("launch", "local", "run.yaml", f"name={name}", f"seed={seed}", "--ranks", "2", *overrides)
        return run_dir


@dataclass
class Run:
    """A submitted run."""

    bench: Bench
    run_dir: Path
    jobs: list[str]

    @property
    def places(self) -> Places:
        """Its launch folder."""
        return Places(self.run_dir)

    @property
    def slurm(self) -> Slurm:
        """The cluster's."""
        return self.bench.cluster.slurm

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl as it is now."""
        return read_lines(self.run_dir / "metrics.jsonl")

    def step(self) -> int:
        """The last step that was logged."""
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in self.places.events() if event["event"] == kind]

    def wait(self, what: str, true: Callable[[], Any], seconds: float = WAIT_S) -> Any:
        """Wait until something is so. Raises Failed with everything that was said."""
        deadline = time.monotonic() + seconds
        while not (found := true()):
            if time.monotonic() > deadline:
                raise Failed(f"waited {seconds:.0f} s for: {what}\n{self.everything()}")
            time.sleep(0.1)
        return found

    def reach(self, step: int) -> None:
        """Wait until a step is logged."""
        self.wait(f"step {step}", lambda: self.step() >= step)

    def complete(self) -> None:
        """Wait until the run says that it is, and its job has left."""
        stopped = self.run_dir / "STOPPED.json"
        self.wait("the end of the run", lambda: read_json(stopped).get("reason") == "completed")
        self.wait("the end of its jobs", lambda: not any(self.state(job) for job in self.jobs))

    def state(self, job: str) -> str | None:
        """A job's state while it waits or runs."""
        found = self.slurm.job(job)
        return found.state if found is not None and found.active else None

    def rank(self, number: int, start: str | None = None) -> dict[str, Any]:
        """Where a rank of the newest start is."""
        start = start or str(self.events("started")[-1]["start"])
        return read_json(self.places.start(start) / "ranks" / f"{number}.json")

    def everything(self) -> str:
        """For a failure: events, logs, queue."""
        texts = [json.dumps(event) for event in self.places.events()]
        for file in sorted(self.places.folder.glob("**/*.log")) + sorted(self.places.folder.glob("**/*.out")):
            texts.append(f"== {file.relative_to(self.run_dir)}\n{file.read_text(errors='replace')[-3000:]}")
        with suppress(Exception):
            texts += [self.slurm.call("scontrol", "-o", "show", "job"), self.slurm.call("sinfo", "-N", "-l")]
        return "\n".join(texts)


def same_checkpoint(one: Path, other: Path) -> bool:
    """Whether the last checkpoints of two runs hold the same: parameters, moments, accumulators, counters."""
    command = [sys.executable, "-m", "hope_train.cli", "checkpoint", "diff", str(one), str(other), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    if done.returncode not in (0, 1):
        raise Failed(done.stderr)
    return done.returncode == 0


@contextmanager
def bench_in(folder: Path) -> Iterator[Bench]:
    """A cluster and a bench below `folder`, ended afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder / "slurm")
    try:
        yield Bench(folder, cluster)
    finally:
        cluster.stop()
