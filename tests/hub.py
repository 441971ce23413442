"""A small server that speaks the part of the Hugging Face hub's protocol that a download needs, and misbehaves on demand.

Answers `/api/datasets/NAME/revision/REV`, `/api/datasets/NAME/tree/REV` (in pages) and `/datasets/NAME/resolve/REV/FILE` with
ranges and redirects, as the hub does. A fault is a function of (handler, data) that answers instead, once for each time it is
planted.
"""
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".bin", ".model", ".jsonl")  # kept in LFS, and so with a sha256


def describe(root: Path, path: Path) -> dict:
    """A file as the hub's tree lists it."""
    data = path.read_bytes()
    entry = {"type": "file", "path": path.relative_to(root).as_posix(), "size": len(data),
             "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if path.suffix in LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class Handler(BaseHTTPRequestHandler):
    """One request."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms a request

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, url = self.server.hub, urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        hub.requests.append((unquote(url.path), self.headers.get("Range", "")))
        if fault := hub.take_fault(url.path):
            return fault(self, hub.root / "/".join(parts[5:]))
        if parts[:2] == ["api", "datasets"] and parts[2:4] == hub.name.split("/"):
            return self.tree(url) if parts[4] == "tree" else self.answer(200, json.dumps({"id": hub.name, "sha": COMMIT}).encode())
        if parts[0] == "datasets" and parts[3:5] == ["resolve", COMMIT]:
            return self.answer(302, Location=f"/cdn/x/x/x/x/{'/'.join(parts[5:])}")  # as the hub sends to its storage
        return self.content(hub.root / "/".join(parts[5:])) if parts[0] == "cdn" else self.answer(404, X_Error_Code="RepoNotFound")

    def tree(self, url) -> None:
        """Two entries a page: the hub has 1,000."""
        files = [describe(self.server.hub.root, p) for p in sorted(self.server.hub.root.rglob("*")) if p.is_file()]
        at = int(parse_qs(url.query).get("cursor", ["0"])[0])
        link = f'<{self.server.hub.url}{url.path}?recursive=True&cursor={at + 2}>; rel="next"'
        self.answer(200, json.dumps(files[at:at + 2]).encode(), **({"Link": link} if at + 2 < len(files) else {}))

    def content(self, path: Path) -> None:
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        data, wanted = path.read_bytes(), self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        spread = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        self.answer(206 if wanted else 200, data[start:], **spread)


class Hub:
    """The server of one data set, which is a folder. `requests`: (path, range) of each request so far."""

    def __init__(self, root: Path, name: str = "owner/name"):
        self.root, self.name, self.requests, self.faults = root, name, [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def plant(self, end: str, fault, times: int = 1) -> None:
        """The next `times` requests whose path ends so get the fault."""
        self.faults += [(end, fault)] * times

    def take_fault(self, path: str):
        for i, (end, fault) in enumerate(self.faults):
            if path.endswith(end):
                del self.faults[i]
                return fault
        return None

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [path.split("/", 6)[-1] for path, _ in self.requests if path.startswith("/cdn/")]


def cut(handler: Handler, path: Path) -> None:
    """The first half of what was asked for, under the length of the whole; then the connection closes."""
    data = path.read_bytes()
    start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(data) - start))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    handler.end_headers()
    handler.wfile.write(data[start:start + (len(data) - start) // 2])
    handler.close_connection = True


def wrong(handler: Handler, path: Path) -> None:
    """As many bytes as there should be, the last one another."""
    data = path.read_bytes()
    handler.answer(200, data[:-1] + bytes([data[-1] ^ 1]))


def busy(handler: Handler, path: Path) -> None:
    """Too many requests."""
    handler.answer(429, Retry_After="0")


def missing(handler: Handler, path: Path) -> None:
    """Listed, but not there."""
    handler.answer(404, X_Error_Code="EntryNotFound")
