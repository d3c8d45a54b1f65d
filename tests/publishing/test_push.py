"""`shortstack push` against a hub on the loopback: the real client, every refusal, and nothing that must stay here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from shortstack.cli.app import run
from shortstack.errors import ShortstackError, UsageError
from shortstack.inspection.check import check
from shortstack.pruning.prune import prune
from shortstack.publishing.push import push
from tests.hub_push_server import TOKEN, Hub, Repository, serving

Built = Callable[..., Path]
SECRETS = {
    "token.txt": "abc", ".env": "A=b", "id_rsa": "abc", "hub_credentials.json": "{}", "server.pem": "abc",
    "my-secrets.yaml": "a: b",
}  # fmt: skip
STAYS = {
    ".cache/huggingface/x": "hidden", "model.safetensors.tmp": "a temporary file",
    ".p.shortstack.lock": "a temporary file", "adapter/adapter_model.safetensors": "an adapter",
    "adapter_config.json": "an adapter", "notes.txt": "shortstack.json does not name it",
    "logs/train.log": "shortstack.json does not name it",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def made(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards, pruned twice, of a model in somebody's folder."""
    folder = tmp_path_factory.mktemp("ann")
    prune(str(built("llama", shard_bytes=40_000)), blocks="1", out=folder / "p0", quiet=True)
    prune(str(folder / "p0"), blocks="2", out=folder / "p", quiet=True)
    return folder / "p"


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(made, tmp_path / "p"))


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and generating is what tests of `check` are about."""
    monkeypatch.setattr("shortstack.inspection.check.check_running", lambda *_, **__: None)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_is_the_default_and_asks_nobody(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = {name: (model / name).read_bytes() for name in names(model)}
    result = push(model, "org/name", quiet=True)
    assert hub.requests == []
    assert result.exit_code == 0
    assert {file.name for file in result.contents.files} == before.keys()
    assert {name: (model / name).read_bytes() for name in names(model)} == before
    shown = result.to_text()
    sizes = {file.name: file.nbytes for file in result.contents.files}
    assert all(name in shown for name in sizes)
    for what in ("card", "secrets", "recorded hashes", "generat"):
        assert what in shown, what
    assert f"shortstack push {model} org/name --yes" in shown
    assert "a private repository" in shown
    assert json.loads(json.dumps(result.to_json()))["dry_run"] is True


@pytest.mark.usefixtures("quick_check")
def test_commands_in_the_text_can_be_pasted(model: Path, quick_check: None) -> None:
    spaced = Path(shutil.move(model, model.parent / "a model"))
    shown = push(spaced, "org/name", quiet=True).to_text()
    assert f"shortstack push '{spaced}' org/name --yes" in shown
    (spaced / "README.md").unlink()
    assert f"shortstack card '{spaced}' writes it" in push(spaced, "org/name", quiet=True).to_text()


def test_all_files_in_one_commit_private_with_no_path_and_the_name_in_the_card(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    (model / "LICENSE").write_text("do as you like")
    record = json.loads((model / "shortstack.json").read_text())
    record["steps"][0] |= {
        "data": {"source": "/home/ann/texts/mine.txt"},
        "says": "read ~/ann/more.txt",
        "adapter": "runs/a",
    }
    (model / "retraining.json").write_text(
        json.dumps({"models": {"after": {"parameters": 1, "figures": {"ppl:/home/ann/t": 2.0}}}})
    )
    for added in ("retraining.json", "LICENSE"):
        record["files"][added] = hashlib.sha256((model / added).read_bytes()).hexdigest()
    (model / "shortstack.json").write_text(json.dumps(record))
    result = push(model, "org/name", yes=True, quiet=True)
    there = hub.repositories["model org/name"]
    assert (there.private, there.commits, result.private) == (True, 1, True)
    assert there.files.keys() == names(model)
    for name in names(model) - {"README.md", "shortstack.json", "retraining.json"}:
        assert there.files[name] == (model / name).read_bytes()
    card = ModelCard(there.files["README.md"].decode())
    assert 'from_pretrained("org/name")' in card.text
    assert "ORG/NAME" not in card.text
    for data in there.files.values():
        assert str(model.parent).encode() not in data
        assert b"/ann" not in data
    record = json.loads(there.files["shortstack.json"])
    assert "/" not in record["source"] + "".join(step["source"] for step in record["steps"])
    assert record["steps"][0]["data"]["source"] == "mine.txt"
    assert record["steps"][0]["adapter"] == "a"
    assert record["files"]["README.md"] == hashlib.sha256(there.files["README.md"]).hexdigest()
    assert result.url.startswith(hub.endpoint)
    downloaded = tmp_path / "downloaded"
    for name, data in there.files.items():
        (downloaded / name).parent.mkdir(parents=True, exist_ok=True)
        (downloaded / name).write_bytes(data)
    found = {finding.what: finding.status for finding in check(str(downloaded), quiet=True).findings}
    assert found["recorded hashes"] == "ok"


@pytest.mark.usefixtures("quick_check")
def test_public_when_said(hub: Hub, model: Path) -> None:
    result = push(model, "org/name", yes=True, public=True, quiet=True)
    assert hub.repositories["model org/name"].private is result.private is False
    assert push(model, "org/name", yes=True, public=True, quiet=True).notes == []
    hub.repositories["model org/name"].private = True
    assert "stays private" in push(model, "org/name", yes=True, public=True, quiet=True).to_text()


@pytest.mark.usefixtures("quick_check")
def test_again_and_over_an_older_one(hub: Hub, model: Path) -> None:
    push(model, "org/name", yes=True, quiet=True)
    there = hub.repositories["model org/name"]
    there.files["model-00009-of-00009.safetensors"] = b"of another model"
    there.files["extra.md"] = b"theirs"
    sent = hub.uploads()
    result = push(model, "org/name", yes=True, quiet=True)
    assert hub.uploads() == sent  # what is there is not sent again
    assert "model-00009-of-00009.safetensors" not in there.files
    assert there.files["extra.md"] == b"theirs"
    assert "deleted there" in result.to_text()


@pytest.mark.fault(113)
@pytest.mark.usefixtures("quick_check")
def test_cut_off_in_the_middle_and_resumed(hub: Hub, model: Path) -> None:
    hub.cut_after = 1
    with pytest.raises(
        ShortstackError, match=r"connection to the hub was lost or refused when 1 of \d+ files"
    ) as caught:
        push(model, "org/name", yes=True, quiet=True)
    assert "not sent again" in caught.value.hint
    there = hub.repositories["model org/name"]
    assert (there.files, there.commits, len(hub.objects)) == ({}, 0, 1)  # nothing of it shows
    hub.cut_after, before = None, set(hub.objects)
    hub.requests.clear()
    push(model, "org/name", yes=True, quiet=True)
    assert there.files.keys() == names(model)
    assert hub.uploads() == len(hub.objects) - len(before) > 0


@pytest.mark.usefixtures("quick_check")
def test_what_the_hub_has_is_compared_with_what_was_sent(hub: Hub, model: Path) -> None:
    hub.loses = ("config.json",)
    with pytest.raises(ShortstackError, match=r"bytes of config.json were sent, but the hub has nothing"):
        push(model, "org/name", yes=True, quiet=True)


@pytest.mark.fault(113)
@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize(
    ("repository", "says"),
    [
        ("closed/name", "the token may not write there (HTTP 403)"),
        ("taken/data", "the name is taken, by a data set, a space or a model that this token cannot see (HTTP 409)"),
        ("open/public", "exists and is public"),
        ("open/foreign", "holds a model that shortstack did not make"),
        ("closed/there", "the token may not write there (HTTP 403)"),
    ],
)
def test_refusals_of_the_hub(hub: Hub, model: Path, repository: str, says: str) -> None:
    hub.repositories |= {
        "dataset taken/data": Repository(),
        "model open/public": Repository(private=False),
        "model open/foreign": Repository(files={"model.safetensors": b""}),
        "model closed/there": Repository(),
    }
    before = {name: dict(one.files) for name, one in hub.repositories.items()}
    with pytest.raises(ShortstackError) as caught:
        push(model, repository, yes=True, quiet=True)
    assert says in caught.value.message
    assert caught.value.hint
    assert {name: one.files for name, one in hub.repositories.items()} == before
    assert hub.uploads() == 0


@pytest.mark.usefixtures("quick_check")
def test_force_replaces_a_model_of_another_maker(hub: Hub, model: Path) -> None:
    hub.repositories["model open/foreign"] = Repository(files={"pytorch_model.bin": b"", "shared.md": b""})
    push(model, "open/foreign", yes=True, force=True, quiet=True)
    assert hub.repositories["model open/foreign"].files.keys() == names(model) | {"shared.md"}


@pytest.mark.fault(113)
@pytest.mark.usefixtures("quick_check")
def test_no_token_a_wrong_one_and_no_network(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "another" * 6)
    with pytest.raises(ShortstackError, match="does not know the token"):
        push(model, "org/name", yes=True, quiet=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.requests.clear()
    with pytest.raises(ShortstackError, match="there is no token for the hub") as caught:
        push(model, "org/name", yes=True, quiet=True)
    assert "hf auth login" in caught.value.hint
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ShortstackError, match="connection to the hub was lost or refused"):
        push(model, "org/name", yes=True, quiet=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ShortstackError, match="HF_HUB_OFFLINE is set"):
        push(model, "org/name", yes=True, quiet=True)


@pytest.mark.fault(114)
@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("fault", ["weights", "config", "missing", "card", "no card", "path", "token", "key"])
def test_a_damaged_folder_is_not_pushed(hub: Hub, model: Path, fault: str) -> None:
    card, shard = model / "README.md", sorted(model.glob("*.safetensors"))[0]
    if fault == "weights":
        shard.write_bytes(shard.read_bytes()[:-8] + b"\1" * 8)
    elif fault == "config":
        (model / "config.json").write_text((model / "config.json").read_text() + " ")
    elif fault == "missing":
        (model / "tokenizer_config.json").unlink()
    elif fault == "card":
        card.write_text("---\ntags: [\n---\n")
    elif fault == "no card":
        card.unlink()
    elif fault == "path":
        source = json.loads((model / "shortstack.json").read_text())["source"]
        card.write_text(card.read_text() + f"made of {source}")
    else:
        card.write_text(card.read_text() + {"token": TOKEN, "key": "-----BEGIN RSA PRIVATE KEY-----"}[fault])
    dry = push(model, "org/name", quiet=True)
    failed = [finding.says for finding in dry.findings if finding.status == "fail"]
    assert dry.exit_code == 1
    assert failed
    assert "it cannot be pushed like this" in dry.to_text()
    with pytest.raises(ShortstackError, match="not pushed"):
        push(model, "org/name", yes=True, quiet=True)
    assert hub.requests == []
    assert TOKEN not in dry.to_text() + json.dumps(dry.to_json())


@pytest.mark.fault(114)
@pytest.mark.usefixtures("quick_check")
def test_what_is_a_secret_or_no_part_of_the_checkpoint_stays_here(hub: Hub, model: Path) -> None:
    for name, text in [*SECRETS.items(), *((name, "x") for name in STAYS)]:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    record = json.loads((model / "shortstack.json").read_text())  # a companion of the dense model that was copied along
    record["files"]["token.txt"] = hashlib.sha256(b"abc").hexdigest()
    (model / "shortstack.json").write_text(json.dumps(record))
    result = push(model, "org/name", yes=True, quiet=True)
    left = result.contents.left_out
    assert left.keys() == SECRETS.keys() | STAYS.keys()
    assert all("secret" in left[name] for name in SECRETS)
    assert all(left[name].startswith(why) for name, why in STAYS.items())
    there = hub.repositories["model org/name"].files
    assert not there.keys() & left.keys()
    assert "token.txt" not in json.loads(there["shortstack.json"])["files"]
    assert all(name in result.to_text() for name in left)


def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.md").write_text("private")
    (model / "extra.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(ShortstackError, match="link"):
        push(model, "org/name", quiet=True)


@pytest.mark.usefixtures("quick_check")
def test_a_card_that_the_hub_does_not_take(hub: Hub, model: Path) -> None:
    card = model / "README.md"
    card.write_text(card.read_text().replace("tags:", "base_model_relation: pruned\ntags:", 1))
    with pytest.raises(ShortstackError, match=r'the hub does not take the card: "base_model_relation" must be one of'):
        push(model, "org/name", yes=True, quiet=True)
    assert hub.repositories["model org/name"].commits == 0


@pytest.mark.parametrize("name", ["name", "org/name@v2", "../x", "org/name/more", "/org/name", "org/na me", ""])
def test_names_that_are_no_repository(model: Path, name: str) -> None:
    with pytest.raises(UsageError, match="expected the name of a repository"):
        push(model, name, quiet=True)


def test_folders_that_shortstack_did_not_make(built: Built, tmp_path: Path) -> None:
    for folder in (built("llama"), tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ShortstackError, match="not a checkpoint that shortstack made"):
            push(folder, "org/name", quiet=True)


@pytest.mark.fault(84)
@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("fault", ["none", "cut", "forbidden", "card"])
def test_the_token_appears_nowhere(
    hub: Hub, model: Path, fault: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the token nor a signed address, in outputs, errors, tracebacks, logs and what is pushed."""
    caplog.set_level("DEBUG")
    hub.cut_after = 0 if fault == "cut" else None
    if fault == "card":
        card = model / "README.md"
        card.write_text(card.read_text().replace("tags:", "base_model_relation: pruned\ntags:", 1))
    repository = "closed/name" if fault == "forbidden" else "org/name"
    arguments = ["push", str(model), repository, "--yes", "--json"]
    assert run(arguments) == (0 if fault == "none" else 1)
    shown = "".join(capfd.readouterr())
    try:
        run(["--debug", *arguments])
    except ShortstackError:
        shown += traceback.format_exc()
    shown += "".join(capfd.readouterr())
    assert TOKEN not in shown
    assert "signature" not in shown
    assert TOKEN not in "".join(
        record.getMessage() for record in caplog.records if record.name.startswith("shortstack")
    )
    assert all(TOKEN.encode() not in data for one in hub.repositories.values() for data in one.files.values())
    assert all(TOKEN.encode() not in path.read_bytes() for path in model.rglob("*") if path.is_file())
    assert os.environ["HF_TOKEN"] == TOKEN
