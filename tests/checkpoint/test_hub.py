"""Hub ids, against a server on the loopback that speaks the hub's protocol: real processes, the real client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shortstack.families.open_model import open_checkpoint
from shortstack.inspection.info import info
from tests.hub_server import COMMITS, serving

Built = Callable[..., Path]


@pytest.fixture(scope="module")
def hub(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str], Path]]:
    folder = tmp_path_factory.mktemp("hub")
    both = Path(shutil.copytree(built("llama", shard_bytes=40_000), folder / "both"))
    (both / "pytorch_model.bin").write_bytes(b"another form of the weights")
    (both / "tf_model.h5").write_bytes(b"and another")
    (both / "modeling_own.py").write_text("raise SystemExit")
    unknown = Path(shutil.copytree(both, folder / "unknown"))
    (unknown / "config.json").write_text('{"model_type": "never_heard_of", "num_hidden_layers": 6}')
    empty = folder / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("no config here")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(both / "tokenizer.json", tokenizer)
    shutil.copy(both / "tokenizer_config.json", tokenizer)
    repositories = {"org/model": both, "org/unknown": unknown, "org/empty": empty, "org/tokenizer": tokenizer}
    with serving(repositories) as (endpoint, requests):
        yield endpoint, requests, both


def shortstack(endpoint: str, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", **environment,
    }  # fmt: skip
    variables.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "shortstack", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


def test_only_the_files_that_are_needed(hub: tuple[str, list[str], Path], tmp_path: Path) -> None:
    endpoint, requests, model = hub
    requests.clear()
    done = shortstack(endpoint, tmp_path / "home", "plan", "org/model", "--blocks", "1")
    assert done.returncode == 0, done.stderr
    fetched = {request.rpartition("/")[2] for request in requests if request.startswith("GET org/model/resolve")}
    assert fetched == {path.name for path in model.iterdir()} - {"pytorch_model.bin", "tf_model.h5", "modeling_own.py"}
    again = len(requests)
    offline = shortstack(endpoint, tmp_path / "home", "plan", "org/model", "--blocks", "1", HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout
    assert len(requests) == again


@pytest.mark.slow
def test_a_tokenizer_alone_comes_from_the_hub(hub: tuple[str, list[str], Path], built: Built, tmp_path: Path) -> None:
    """A repository without a model; of one with a model, no weights. Then from the cache, without the hub."""
    endpoint, requests, _ = hub
    bare = Path(shutil.copytree(built("llama"), tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    command = ["score", str(bare), "--samples", "1", "--seq-len", "8", "--quiet", "--json", "--tokenizer"]
    for source in ("org/tokenizer", "org/model"):
        requests.clear()
        done = shortstack(endpoint, tmp_path / "home", *command, source)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["calibration"]["tokenizer"]["source"] == source
        assert not [request for request in requests if "safetensors" in request and "index" not in request]
    again = len(requests)
    offline = shortstack(endpoint, tmp_path / "home", *command, "org/tokenizer", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(requests) == again
    unreachable = shortstack("http://127.0.0.1:9", tmp_path / "home", *command, "org/tokenizer")
    assert unreachable.returncode == 0, unreachable.stderr
    nothing = shortstack(endpoint, tmp_path / "home", *command, "org/empty")
    assert "--tokenizer org/empty: no tokenizer in the directory" in nothing.stderr
    missing = shortstack(endpoint, tmp_path / "home", *command, "org/missing")
    assert "org/missing: no such directory, and the hub has no such tokenizer" in missing.stderr.replace(
        "file", "directory"
    )


def test_info_reads_headers_and_downloads_no_weights(hub: tuple[str, list[str], Path], tmp_path: Path) -> None:
    endpoint, requests, model = hub
    requests.clear()
    done = shortstack(endpoint, tmp_path / "home", "info", "org/model", "--json")
    assert done.returncode == 0, done.stderr
    ranged = {request.rpartition("/")[2] for request in requests if request.startswith("RANGE")}
    assert ranged == {path.name for path in model.glob("*.safetensors")}
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    found, expected = json.loads(done.stdout), info(str(model)).to_json()
    told = {"source", "directory", "fingerprint"}
    assert {key: value for key, value in found.items() if key not in told} == {
        key: value for key, value in expected.items() if key not in told
    }
    assert found["fingerprint"] == ""
    assert shortstack(endpoint, tmp_path / "home", "plan", "org/model", "--blocks", "1").returncode == 0
    here = shortstack(endpoint, tmp_path / "home", "info", "org/model", "--json")
    assert json.loads(here.stdout)["fingerprint"] == expected["fingerprint"]


def test_prune_and_score_from_the_hub(hub: tuple[str, list[str], Path], tmp_path: Path) -> None:
    endpoint, _, _ = hub
    windows = tmp_path / "w.jsonl"
    windows.write_text('{"input_ids": [1, 5, 9, 12]}\n' * 2)
    scores, out = tmp_path / "s.json", tmp_path / "p"
    options = ["--data", str(windows), "--samples", "2", "--out", str(scores), "--quiet"]
    assert shortstack(endpoint, tmp_path / "home", "score", "org/model@v2", *options).returncode == 0
    options = ["--scores", str(scores), "--remove", "2", "--out", str(out)]
    done = shortstack(endpoint, tmp_path / "home", "prune", "org/model@v2", *options)
    assert done.returncode == 0, done.stderr
    pruned = open_checkpoint(out)
    assert pruned.depth == 4
    assert pruned.provenance is not None
    assert pruned.provenance["source"] == "org/model@v2"
    assert pruned.provenance["revision"] == COMMITS["v2"]


@pytest.mark.fault(85)
@pytest.mark.parametrize(
    ("model", "says", "environment"),
    [
        ("org/unauthorized", "org/unauthorized: no such directory, and the hub has no such model, or wants a token", {}),
        ("org/gated", "org/gated: the hub asks for permission first (HTTP 403)", {}),
        ("org/forbidden", "org/forbidden: the hub refuses access (HTTP 403)", {}),
        ("org/missing", "org/missing: no such directory, and the hub has no such model (HTTP 404)", {}),
        ("org/busy", "org/busy: the hub refuses further requests for now (HTTP 429)", {}),
        pytest.param(
            "org/broken", "org/broken: the hub reports an internal error (HTTP 500)", {}, marks=pytest.mark.slow
        ),  # the client tries again for half a minute
        ("org/model@nothing", "org/model@nothing: the hub has the model, but no such revision (HTTP 404)", {}),
        ("org/empty", "org/empty: the hub's copy has no config.json (HTTP 404)", {}),
        ("org/slow", "the hub did not answer in time", {"HF_ENDPOINT": "SLOW", "HF_HUB_ETAG_TIMEOUT": "1"}),
        ("org/elsewhere", "org/elsewhere: no such directory, and the hub could not be reached", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        ("org/model", "org/model: no such directory, and HF_HUB_OFFLINE is set", {"HF_HUB_OFFLINE": "1"}),
    ],
)  # fmt: skip
def test_every_refusal_has_a_line_of_its_own(
    hub: tuple[str, list[str], Path], tmp_path: Path, model: str, says: str, environment: dict[str, str]
) -> None:
    endpoint, _, _ = hub
    if environment.get("HF_ENDPOINT") == "SLOW":
        environment = {**environment, "HF_ENDPOINT": f"{endpoint}/slow"}
    done = shortstack(endpoint, tmp_path / "home", "info", model, **environment)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.fault(34)
def test_an_unknown_family_is_refused_before_its_weights_are_downloaded(
    hub: tuple[str, list[str], Path], tmp_path: Path
) -> None:
    endpoint, requests, _ = hub
    done = shortstack(
        endpoint, tmp_path / "home", "prune", "org/unknown", "--blocks", "1", "--out", str(tmp_path / "p")
    )
    assert done.returncode == 1
    assert "never_heard_of" in done.stderr
    assert not [request for request in requests if "org/unknown" in request and request.endswith(".safetensors")]


@pytest.mark.fault(85)
@pytest.mark.parametrize("model", ["./models/vicuna", "/no/such/place", "~/nowhere", "beside/vicuna", "a/b/c"])
def test_a_mistyped_path_is_not_asked_of_the_hub(
    hub: tuple[str, list[str], Path], tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, requests, _ = hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside").mkdir()
    before = len(requests)
    done = shortstack(endpoint, tmp_path / "home", "info", model)
    assert done.returncode == 1
    assert "no such directory" in done.stderr
    assert "hub" not in done.stderr.splitlines()[0]
    assert len(requests) == before


@pytest.mark.fault(84)
def test_no_token_in_what_is_said_or_written(hub: tuple[str, list[str], Path], tmp_path: Path) -> None:
    endpoint, _, _ = hub
    token = "hf_" + "abcdefghijklmnop" * 2
    out = tmp_path / "p"
    done = shortstack(
        endpoint, tmp_path / "home", "prune", "org/model", "--blocks", "1", "--out", str(out), HF_TOKEN=token
    )
    assert done.returncode == 0, done.stderr
    written = b"".join(path.read_bytes() for path in out.iterdir())
    assert token.encode() not in written
    assert token not in done.stdout + done.stderr
