"""The hub: when it cannot be reached, and the loader itself on local folders in the hub's formats."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipelines import hub
from data_pipelines.documents import Document
from data_pipelines.hub import hub_reachable, read_hub
from hope_train.errors import UserError


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "_probed", {})
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def local_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`owner/name` as a folder of the working directory, which `datasets` reads as it would the hub's files."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    rows = ["first\r\n", "", "second  ", "third"]
    pyarrow.parquet.write_table(pyarrow.table({"body": rows, "n": [1, 2, 3, 4]}), folder / "train-00000.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["held"], "n": [5]}), folder / "test-00000.parquet")
    monkeypatch.chdir(tmp_path)
    return "owner/name"


def read(name: str, split: str = "train", field: str = "body", streaming: bool = False) -> list[Document]:
    return list(read_hub(name, split=split, revision=None, text_field=field, streaming=streaming, timeout=1.0))


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_in_the_hubs_layout(
    local_set: str, monkeypatch: pytest.MonkeyPatch, streaming: bool, online: bool
) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda timeout: online)
    assert read(local_set, streaming=streaming) == [
        Document("owner/name/train:1", "first\r\n"),
        Document("owner/name/train:3", "second  "),
        Document("owner/name/train:4", "third"),
    ]
    assert read(local_set, "test", streaming=streaming) == [Document("owner/name/test:1", "held")]


def test_jsonl_in_the_hubs_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "lines").mkdir(parents=True)
    lines = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(3))
    (tmp_path / "owner" / "lines" / "train.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hub_reachable", lambda timeout: True)
    assert [document.text for document in read("owner/lines", field="text")] == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("streaming", [True, False])
def test_wrong_columns_splits_and_configs_are_named(
    local_set: str, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda timeout: True)
    with pytest.raises(UserError, match=r"owner/name: no column 'text'; set text_field to one of: body, n"):
        read(local_set, field="text", streaming=streaming)
    with pytest.raises(UserError, match="column 'n' is not text but int"):
        read(local_set, field="n", streaming=streaming)
    with pytest.raises(UserError, match=r"owner/name \(split dev\): .*dev"):
        read(local_set, "dev", streaming=streaming)
    with pytest.raises(UserError, match=r"owner/name:other.*other"):
        read(local_set + ":other", streaming=streaming)


def test_a_hub_out_of_reach_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # Nothing listens there: refused at once.
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9 gave no answer \(asked for 1 s at most\) .*data\.sources\.N\.path"
    ) as error:
        read("nobody/has-this")
    assert "\n" not in str(error.value)


def test_the_network_switch_is_put_back(local_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(hub, "hub_reachable", lambda timeout: False)
    switches = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    read(local_set)
    assert [switch.HF_HUB_OFFLINE for switch in switches] == before


def test_offline_variables_save_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_probe", lambda address, timeout: pytest.fail("probed"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_reachable(1.0)
    with pytest.raises(UserError, match="is switched off by the environment and the local cache has no usable copy"):
        read("nobody/has-this")


def test_a_hub_that_takes_the_connection_and_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert not hub_reachable(0.2)


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every HEAD with the status given as the fixture's parameter, and what it was asked."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("answering", [200, 404], indirect=True)
def test_any_answer_is_an_answer_and_is_asked_for_once(
    answering: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = answering
    monkeypatch.setenv("HF_ENDPOINT", address + "/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert hub_reachable(10.0)
    assert hub_reachable(10.0)
    assert len(asked) == 1
