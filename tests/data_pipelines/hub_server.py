"""A hub of one data set on this machine, that can be told to misbehave."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server serves, what it was asked, and the faults it has yet to make."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = COMMIT
        self.asked: Counter[str] = Counter()
        self.faults: list[str] = []
        """For the next requests for a file's content, in turn: stall, drop, truncate, error; `always drop` for ever."""
        self.skip = 0
        """Requests for contents to answer well before the faults begin."""
        self.between = 0
        """Good answers between two faults."""
        self.address = ""

    def next_fault(self) -> str:
        if self.skip > 0:
            self.skip -= 1
            return ""
        if not self.faults:
            return ""
        if self.faults[0].startswith("always "):
            return self.faults[0].removeprefix("always ")
        self.skip = self.between
        return self.faults.pop(0)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            hub.asked["POST"] += 1
            paths = asked.get("paths", [])
            self.send(json.dumps([self.entry(p) for p in paths if (hub.folder / p).exists()]).encode(), {})

        def entry(self, path: str) -> dict[str, Any]:
            if (hub.folder / path).is_dir():
                return {"type": "directory", "path": path, "size": 0, "oid": "d" * 40}
            size = (hub.folder / path).stat().st_size
            return {"type": "file", "path": path, "size": size, "oid": "f" * 40}

        def answer(self, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            files = sorted(p.relative_to(hub.folder).as_posix() for p in hub.folder.rglob("*") if p.is_file())
            if found := re.fullmatch(r"/datasets/owner/name/resolve/[^/]+/(.+)", path):
                self.content(found[1], body)
            elif found := re.fullmatch(r"/api/datasets/owner/name(?:/revision/([^/]+))?", path):
                info = {
                    "id": "owner/name",
                    "sha": found[1] if re.fullmatch("[0-9a-f]{40}", found[1] or "") else hub.commit,
                    "private": False,
                    "siblings": [{"rfilename": name} for name in files],
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
                self.send(json.dumps(info).encode(), {}, body)
            elif re.match(r"/api/datasets/owner/name/tree/", path):
                below = path.split("/tree/", 1)[1].partition("/")[2]
                found_there = (hub.folder / below).glob("**/*" if "recursive=true" in self.path.lower() else "*")
                entries = [self.entry(p.relative_to(hub.folder).as_posix()) for p in sorted(found_there)]
                self.send(json.dumps(entries).encode(), {}, body)
            elif path == "/":
                self.send(b"hub", {}, body)
            else:
                hub.asked[f"404 {path}"] += 1
                self.missing()

        def missing(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def content(self, name: str, body: bool) -> None:
            if not (hub.folder / name).is_file():
                self.missing()
                return
            raw = (hub.folder / name).read_bytes()
            headers = {"ETag": '"e"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
            status, part = 200, raw
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                status, part = 206, raw[int(wanted[1]) : int(wanted[2]) + 1]
                headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(raw)}"
            fault = ""
            if body:
                hub.asked["content"] += 1
                fault = hub.next_fault()
            if fault:
                hub.asked[fault] += 1
            if fault == "stall":
                time.sleep(3.0)
            if fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault == "error":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "truncate":  # Half of it, as if that were all.
                part = part[: len(part) // 2]
            if fault == "break":  # Half of it, and then nothing more.
                self.send(part[: len(part) // 2], headers, body, status, len(part))
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send(part, headers, body, status)

        def send(
            self, content: bytes, headers: dict[str, str], body: bool = True, status: int = 200, length: int = -1
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content) if length < 0 else length)}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


@contextmanager
def running(folder: Path) -> Iterator[Hub]:
    """A hub that serves data set `owner/name` from a folder."""
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
