"""A loopback server that speaks what `shortstack push` uses of the hub: cards, repositories, uploads, commits, refusals."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml

TOKEN = "hf_" + "Secret0Secret1Secret2" * 2
_HUB_ID = re.compile(r"(?:[\w-]+/)?[\w.-]+")  # the hub's own pattern for a data set in a model-index
_RELATIONS = ("adapter", "merge", "quantized", "finetune")


@dataclass
class Repository:
    """One repository on the server.

    Attributes:
        private: as it was made.
        files: committed: name -> bytes.
        commits: how many there were.
    """

    private: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """What the server holds and what it does.

    Attributes:
        repositories: by "model org/name".
        objects: uploaded large files by sha256, whether committed or not.
        requests: as they come in, with the bytes of uploads that arrived.
        cut_after: uploads whose connection is cut before the answer, once so many have arrived; None for none.
        forbidden: organisations where nobody may write.
        loses: files that it does not list although they were committed.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    cut_after: int | None = None
    forbidden: tuple[str, ...] = ("closed",)
    loses: tuple[str, ...] = ()

    def uploads(self) -> int:
        """How many large files have arrived."""
        return sum(request.startswith("PUT") for request in self.requests)


def card_errors(content: str) -> list[str]:
    """What the hub finds wrong with the metadata of a model's card."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["no metadata"]
    errors = []
    bases = data.get("base_model", [])
    errors += [
        f'"base_model" {one!r}' for one in ([bases] if isinstance(bases, str) else bases) if not _HUB_ID.fullmatch(one)
    ]
    if data.get("base_model_relation", "finetune") not in _RELATIONS:
        errors.append('"base_model_relation" must be one of ' + ", ".join(_RELATIONS))
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    for model in data.get("model-index", []):
        for result in [*model.get("results", []), *([] if "name" in model else [{}])]:
            dataset = result.get("dataset", {})
            if not _HUB_ID.fullmatch(str(dataset.get("type", "/"))):
                errors.append(f'"model-index.dataset.type" with value {dataset.get("type")!r}')
            if not dataset.get("name") or not result.get("task", {}).get("type"):
                errors.append('"model-index" lacks a name')
            errors += ['"metrics" lacks value'] * any(
                metric.get("value") is None for metric in result.get("metrics", [])
            )
    return errors


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_HEAD(self) -> None:
            self._send(200, b"")

        def do_GET(self) -> None:
            parts = self._parts("GET")
            kind, name = parts[1].removesuffix("s"), "/".join(parts[2:4])
            found = hub.repositories.get(f"{kind} {name}")
            if found is None:
                return self._refuse(404, "RepoNotFound")
            siblings = [
                {"rfilename": file, "size": len(data), "lfs": _lfs(file, data)}
                for file, data in sorted(found.files.items())
                if file not in hub.loses
            ]
            return self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": f"{found.commits:040x}",
                    "private": found.private,
                    "siblings": siblings,
                }
            )

        def do_POST(self) -> None:
            parts = self._parts("POST")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if parts[-1] == "validate-yaml":
                errors = [{"message": text} for text in card_errors(json.loads(body)["content"])]
                return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._refuse(401)
            if parts[-1] == "create":
                return self._create(json.loads(body))
            if parts[-1] == "batch":
                return self._batch(json.loads(body))
            name = "/".join(parts[2:4])
            if name.split("/")[0] in hub.forbidden:
                return self._refuse(403)
            if "preupload" in parts:
                wanted = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in wanted]
                return self._json({"files": modes})
            return self._commit(name, [json.loads(line) for line in body.splitlines()])

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._parts("PUT")
            if hub.cut_after is not None and hub.uploads() > hub.cut_after:
                self.close_connection = True
                self.connection.close()
                return None
            hub.objects[hashlib.sha256(data).hexdigest()] = data
            return self._send(200, b"")

        def _create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] in hub.forbidden:
                return self._refuse(403)
            if any(key.split()[1] == name for key in hub.repositories):
                return self._refuse(409)
            hub.repositories[f"model {name}"] = Repository(private=asked.get("visibility") == "private")
            return self._json({"url": f"{hub.endpoint}/{name}", "name": name})

        def _batch(self, asked: dict[str, Any]) -> None:
            objects = []
            for one in asked["objects"]:
                place = {"upload": {"href": f"{hub.endpoint}/upload/{one['oid']}?signature={TOKEN}"}}
                objects.append({**one} if one["oid"] in hub.objects else {**one, "actions": place})
            self._json({"transfer": "basic", "objects": objects})

        def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            repository = hub.repositories[f"model {name}"]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository.files[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del repository.files[value["path"]]
            repository.commits += 1
            oid = f"{repository.commits:040x}"
            self._json({"commitUrl": f"{hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

        def _parts(self, method: str) -> list[str]:
            path = urlsplit(self.path).path.strip("/")
            hub.requests.append(f"{method} {path}")
            return path.split("/")

        def _json(self, record: object, status: int = 200) -> None:
            self._send(status, json.dumps(record).encode(), "application/json")

        def _refuse(self, status: int, code: str = "") -> None:
            self._send(status, b'{"error": "refused"}', "application/json", {"X-Error-Code": code} if code else {})

        def _send(
            self, status: int, data: bytes, kind: str = "text/plain", headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


def _mode(name: str) -> str:
    return "lfs" if name.endswith((".safetensors", ".png", "tokenizer.json")) else "regular"


def _lfs(name: str, data: bytes) -> dict[str, Any] | None:
    if _mode(name) == "regular":
        return None
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
