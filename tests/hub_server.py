"""A loopback server that speaks what shortstack uses of the hub's protocol: revisions, trees, files, refusals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMITS = {"main": "a" * 40, "v2": "b" * 40, "refs/convert/parquet": "c" * 40}
# repository -> (status, the hub's error code)
REFUSALS = {
    "org/unauthorized": (401, ""),
    "org/gated": (403, "GatedRepo"),
    "org/forbidden": (403, ""),
    "org/missing": (404, "RepoNotFound"),
    "org/busy": (429, ""),
    "org/broken": (500, ""),
}


@contextlib.contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve directories as repositories; gives the endpoint and the list of requests, as they come in."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repositories, requests))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(repositories: dict[str, Path], requests: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_POST(self) -> None:
            """Which of some paths there are, and what they are (`paths-info`)."""
            asked = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()).get("paths", [])
            parts = urlsplit(self.path).path.strip("/").split("/")
            requests.append(f"POST {'/'.join(parts)}")
            folder = repositories.get("/".join(parts[1:4]))
            if folder is None or "paths-info" not in parts:
                return self._refuse(404, "RepoNotFound")
            found = [_entry(folder / path, path) for path in asked if (folder / path).exists()]
            return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body=True)

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            if path == "slow":
                time.sleep(3)
            if path in ("", "slow"):
                return self._send(200, b"", {}, body=False)
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            api = parts[0] == "api"
            if api:
                parts = parts[1:] if parts[1] == "datasets" else parts[2:]
            length = 3 if parts[:1] == ["datasets"] else 2
            name, parts = "/".join(parts[:length]), parts[length:]
            if name in REFUSALS:
                return self._refuse(*REFUSALS[name])
            if name not in repositories:
                return self._refuse(404, "RepoNotFound")
            revision = parts[1] if len(parts) > 1 else "main"
            commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
            if commit is None:
                return self._refuse(404, "RevisionNotFound")
            if api:
                below = "/".join(parts[2:])
                return self._describe(repositories[name], parts[0] if parts else "revision", commit, name, below)
            return self._file(repositories[name], "/".join(parts[2:]), commit, body)

        def _describe(self, folder: Path, what: str, commit: str, name: str, below: str) -> None:
            if what == "tree":
                if not (folder / below).is_dir():
                    return self._refuse(404, "EntryNotFound")
                recursive = "recursive=true" in urlsplit(self.path).query.lower()
                inside = sorted((folder / below).rglob("*") if recursive else (folder / below).iterdir())
                found: object = [_entry(path, str(path.relative_to(folder))) for path in inside]
            else:
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                names = {path: str(path.relative_to(folder)) for path in files}
                found = {
                    "id": name,
                    "modelId": name,
                    "sha": commit,
                    "siblings": [{"rfilename": names[p]} for p in files],
                }
            return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body=True)

        def _file(self, folder: Path, name: str, commit: str, body: bool) -> None:
            path = folder / name
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            data, status = path.read_bytes(), 200
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted:
                start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
                data, status = data[start : end + 1], 206
                requests.append(f"RANGE {start}-{end} {folder.name}/{name}")
            return self._send(status, data, headers, body=body)

        def _refuse(self, status: int, code: str) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": "refused"} if code else {}
            if status == 429:
                headers["Retry-After"] = "0"
            self._send(status, b"{}", headers, body=self.command != "HEAD")

        def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(data)

    return Handler


def _entry(path: Path, name: str) -> dict[str, object]:
    """A file or folder as the hub's tree shows it."""
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
