"""A hub that stalls, drops, truncates and goes away, on a server of this machine: tried again, or a clear stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines.conftest import make_texts
from tests.data_pipelines.hub_server import Hub, running

ROOT = Path(__file__).resolve().parents[2]

# Small blocks, so that a file takes many requests; without the library's own retries, so that ours are seen.
BATCHES = 40

PROGRAM = """
import functools, json, sys, hashlib
import huggingface_hub.hf_file_system as library
library.http_backoff = functools.partial(library.http_backoff, max_retries=0)
from data_pipelines import hub_files
hub_files._BLOCK = hub_files._BUFFER = 4096
from data_pipelines.batches import open_data
from data_pipelines.streams import merge_metrics
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig
from hope_train.errors import UserError
data, batches, state = json.loads(sys.argv[1])
train = TrainConfig(context_length=64, batch_tokens=64 * 8, micro_batch_size=1, tokens=64 * 8)
out = {"batches": {}}
bundle = open_data(DataConfig.model_validate(data), train, 3, 400)
bundle.train.restore(state)
try:
    for index in range(*batches):
        out["batches"][index] = hashlib.sha256(bundle.train.batch(index).tokens.tobytes()).hexdigest()
except UserError as error:
    out["error"] = str(error)
out["metrics"] = merge_metrics([bundle.train.metrics()])
out["state"] = bundle.train.state(len(out["batches"]) * 8)
out["identity"] = bundle.identity
print(json.dumps(out))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Many files of 5 documents: a file once open is read in few requests, so it takes many to meet every fault."""
    folder = tmp_path / "hub"
    folder.mkdir()
    texts = make_texts(1000, words=60)
    for number in range(200):
        table = pyarrow.table({"text": texts[5 * number : 5 * (number + 1)], "n": list(range(5))})
        name = f"train-0000{number:03d}.parquet"
        pyarrow.parquet.write_table(table, folder / name, row_group_size=5, compression="NONE")
    with running(folder) as hub:
        yield hub


TOKENISE = """
import functools, json, sys
from pathlib import Path
import huggingface_hub.hf_file_system as library
library.http_backoff = functools.partial(library.http_backoff, max_retries=0)
from data_pipelines import tokenising
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
data, out, until = json.loads(sys.argv[1])
write = tokenising._write_shard
def writing(number):
    if number == until:
        raise OSError(28, "No space left on device")
    return write(number)
tokenising._write_shard = writing
try:
    manifest = tokenising.tokenise(DataConfig.model_validate(data), Tokenizer(data["tokenizer"]), Path(out), 1)
    print(json.dumps({"commits": manifest["commits"], "splits": manifest["splits"], "retries": manifest["retries"]}))
except Exception as error:
    print(json.dumps({"error": str(error)}))
"""


def run(
    hub: Hub,
    tokenizer: Tokenizer,
    tmp_path: Path,
    batches: tuple[int, int] = (0, BATCHES),
    state: Any = None,
    **more: Any,
) -> dict[str, Any]:
    data = {
        "mode": "streaming",
        "sources": [{"hub": "owner/name"}],
        "tokenizer": tokenizer.path,
        "validation_fraction": 0.0,
        "cache_dir": str(tmp_path / "cache"),
        "retries": 3,
        "retry_seconds": 0.05,
        "hub_timeout": 5.0,
        "stream": {"lanes": 2, "workers": 0, "shuffle_documents": 16},
        **more,
    }
    return command(hub, tmp_path, PROGRAM, [data, batches, state or {}])


def command(hub: Hub, tmp_path: Path, program: str, argument: list[Any]) -> dict[str, Any]:
    """What a program prints last, in a process of its own that knows no hub but this."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        environment.pop(name, None)
    arguments = [sys.executable, "-c", program, json.dumps(argument)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(200)
def test_faults_that_pass_change_nothing(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    calm = run(hub, tokenizer, tmp_path)
    assert len(calm["batches"]) == BATCHES
    assert calm["metrics"]["retries"] == 0
    hub.skip, hub.between = 6, 3
    hub.faults = ["drop", "truncate", "break", "error", "stall", "drop", "truncate"]
    rough = run(hub, tokenizer, tmp_path)
    assert rough["batches"] == calm["batches"]
    assert rough["metrics"]["retries"] == 7
    assert hub.faults == []
    assert {name: count for name, count in rough["metrics"].items() if name != "retries"} == {
        name: count for name, count in calm["metrics"].items() if name != "retries"
    }


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_hub_that_stays_away_is_a_clear_stop_from_which_all_goes_on(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    calm = run(hub, tokenizer, tmp_path)
    hub.skip, hub.faults = hub.asked["content"] * 2 // 3, ["always drop"]
    stopped = run(hub, tokenizer, tmp_path)
    done = len(stopped["batches"])
    assert 0 < done < BATCHES
    assert "train-0000" in stopped["error"]
    assert "tried 4 times" in stopped["error"]
    assert "\n" not in stopped["error"]
    assert stopped["metrics"]["retries"] >= 3
    hub.faults = []
    rest = run(hub, tokenizer, tmp_path, batches=(done, BATCHES), state=stopped["state"])
    assert {**stopped["batches"], **rest["batches"]} == calm["batches"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_new_commit_is_another_identity(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    before = run(hub, tokenizer, tmp_path, (0, 1))["identity"]
    hub.commit = "f" * 40
    assert run(hub, tokenizer, tmp_path, (0, 1))["identity"]["files"] != before["files"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_token_set_of_the_hub_is_gone_on_with_at_its_commit(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = {"sources": [{"hub": "owner/name"}], "tokenizer": tokenizer.path}
    data = {**source, "validation_fraction": 0.1, "retries": 3, "retry_seconds": 0.05}
    for path in sorted(hub.folder.iterdir())[20:]:
        path.unlink()
    first = hub.commit
    whole = command(hub, tmp_path, TOKENISE, [data, str(tmp_path / "whole"), None])
    hub.skip, hub.between, hub.faults = 2, 2, ["drop", "truncate"]
    assert "No space left" in command(hub, tmp_path, TOKENISE, [data, str(tmp_path / "set"), 12])["error"]
    assert hub.faults == []
    hub.commit = "f" * 40
    assert command(hub, tmp_path, TOKENISE, [data, str(tmp_path / "set"), None]) == {**whole, "retries": 2}
    assert (whole["commits"], whole["retries"]) == ([first], 0)
    assert command(hub, tmp_path, TOKENISE, [data, str(tmp_path / "new"), None])["commits"] == ["f" * 40]
