"""Hub ids: find a checkpoint in huggingface_hub's cache, or download the files that are needed and no others."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from shortstack.checkpoint.downloads import shown_download
from shortstack.checkpoint.headers import INDEX, PICKLED_INDEX, PICKLED_SINGLE, SINGLE, TensorInfo
from shortstack.common.assets import ASSETS
from shortstack.common.phases import is_watched
from shortstack.common.process_state import logging_at
from shortstack.errors import ShortstackError, UsageError, did_you_mean, first_line

EMBEDDED_MODEL = ASSETS / "model"
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?)(?:@(?P<revision>[\w][\w./-]*))?")
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md", "*.tiktoken")
_WEIGHTS = (SINGLE, "model-*.safetensors", PICKLED_SINGLE, "pytorch_model-*.bin")
_Result = TypeVar("_Result")


def locate(
    source: str,
    *,
    before_weights: Callable[[Path], object] = lambda _: None,
    weights: bool = True,
    what: Literal["model", "tokenizer"] = "model",
) -> Path:
    """The directory that a MODEL argument means; a hub id is downloaded, or found in the hub cache.

    Args:
        source: a directory, a hub id with an optional `@revision`, or `embedded`.
        before_weights: called with the directory of a hub id when it holds config.json and no weights yet; what it
            raises ends the download.
        weights: download a hub id's weights too; without, only what is small.
        what: what is wanted; a tokenizer may lie where no model does.

    Raises:
        ShortstackError: nothing is there; for a hub id, what the hub answered.
    """
    if source == "embedded":
        return EMBEDDED_MODEL
    if not source.strip():  # as a path, it would be the working folder
        raise UsageError(
            f"{source!r} is not the name of a {what}", hint="give a directory, a hub id such as org/name, or embedded"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ShortstackError(f"{source}: is a file, expected a {what}'s directory or a hub id")
    if "/" not in source and (near := did_you_mean(source, ["embedded"], otherwise="")):
        raise ShortstackError(f"{source}: no such directory", hint=near)
    found = parse_hub_id(source)
    if found is None or looks_like_a_path(source):
        raise ShortstackError(f"{source}: no such directory", hint=f"give a {what}'s directory, a hub id, or embedded")
    if what == "tokenizer":
        return _downloaded_tokenizer(source, *found)
    return _downloaded(source, *found, before_weights, weights)


def parse_hub_id(source: str) -> tuple[str, str | None] | None:
    """(name, revision or None) of `org/name@revision`; None for what is no hub id."""
    match = _HUB_ID.fullmatch(source)
    return (match.group("name"), match.group("revision")) if match and ".." not in source else None


def is_not_downloaded(directory: Path, name: str) -> bool:
    """Whether a directory is a snapshot in the hub cache, and a file one that `locate` does not download."""
    wanted = (*_SMALL_FILES, *_WEIGHTS)
    return directory.parent.name == "snapshots" and not any(fnmatch.fnmatch(name, pattern) for pattern in wanted)


def remote_headers(source: str, directory: Path) -> tuple[dict[str, TensorInfo], dict[Path, dict[str, str]]]:
    """Tensors and files of a hub id as `read_weights` gives them, read off the headers on the hub: kilobytes.

    Args:
        source: the hub id, with an optional `@revision`.
        directory: its snapshot in the cache, which the files would lie in.

    Raises:
        ShortstackError: the hub's copy has no safetensors, or what the hub answered.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    name, _, revision = source.partition("@")
    try:
        found = asked(source, lambda: HfApi().get_safetensors_metadata(name, revision=revision or None))
    except (NotASafetensorsRepoError, SafetensorsParsingError, KeyError, ValueError) as error:
        raise ShortstackError(f"{source}: {first_line(error)}", hint="download it, and give its directory") from None
    tensors = {}
    for file, metadata in found.files_metadata.items():
        for tensor, info in metadata.tensors.items():
            start, end = info.data_offsets
            tensors[tensor] = TensorInfo(tensor, info.dtype, tuple(info.shape), directory / file, start, end - start)
    return tensors, {directory / file: dict(metadata.metadata) for file, metadata in found.files_metadata.items()}


def looks_like_a_path(source: str) -> bool:
    """`models/vicuna` beside a folder `models` is a mistyped path, not something to ask the hub for."""
    first, _, rest = source.partition("/")
    return source.startswith(("/", ".", "~")) or (bool(rest) and Path(first).is_dir())


def _downloaded(
    source: str, name: str, revision: str | None, before_weights: Callable[[Path], object], weights: bool
) -> Path:
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    # The library says each of its retries; what it comes to in the end is said here, once.
    with logging_at("huggingface_hub", logging.WARNING if is_watched() else logging.ERROR):
        fetch = functools.partial(hf_hub_download, name, "config.json", revision=revision)
        if constants.HF_HUB_OFFLINE:
            return Path(asked(source, fetch)).parent  # what else must be there is checked when it is read
        unreachable = unreachable_hub()
        if unreachable is not None:  # the library would try for half a minute
            with contextlib.suppress(Exception):
                return Path(fetch(local_files_only=True)).parent
            message, hint = _no_answer(unreachable)
            raise ShortstackError(f"{source}: {message}", hint=hint)
        config = Path(asked(source, fetch))
        before_weights(config.parent)
        sizes = asked(source, lambda: file_sizes(name, revision))
        chosen = _weight_patterns(source, list(sizes))  # also where they are not wanted now: nothing there is an error
        patterns = [*_SMALL_FILES, *(chosen if weights or chosen[0].endswith(".bin") else [])]
        missing = sum(
            nbytes
            for file, nbytes in sizes.items()
            if any(fnmatch.fnmatch(file, pattern) for pattern in patterns) and not (config.parent / file).exists()
        )
        with shown_download(source, missing) as shown:
            whole = functools.partial(snapshot_download, name, revision=revision, allow_patterns=patterns, **shown)
            return Path(asked(source, whole))


def file_sizes(name: str, revision: str | None, *, repo_type: str = "model") -> dict[str, int]:
    """Every file of a repository on the hub, with its bytes."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    listed = HfApi().list_repo_tree(name, recursive=True, revision=revision, repo_type=repo_type)
    return {entry.path: entry.size for entry in listed if isinstance(entry, RepoFile)}


def _downloaded_tokenizer(source: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    with logging_at("huggingface_hub", logging.WARNING if is_watched() else logging.ERROR):
        fetch = functools.partial(snapshot_download, name, revision=revision, allow_patterns=[*_SMALL_FILES])
        unreachable = None if constants.HF_HUB_OFFLINE else unreachable_hub()
        if unreachable is not None:
            with contextlib.suppress(Exception):
                return Path(fetch(local_files_only=True))
            message, hint = _no_answer(unreachable)
            raise ShortstackError(f"{source}: {message}", hint=hint)
        return Path(asked(source, fetch, what="tokenizer"))


def unreachable_hub() -> Exception | None:
    """Why no connection to the hub can be made, or None where one can."""
    import httpx
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (httpx.ConnectError, httpx.TimeoutException) as error:
        return error
    except httpx.HTTPError:
        return None  # it answers, if not well: the library knows what to do
    return None


def _weight_patterns(source: str, files: list[str]) -> list[str]:
    """The weight files that count: safetensors where there are any, never two forms of the same weights."""
    safetensors, pickled = (
        (SINGLE, INDEX, "model-*.safetensors"),
        (PICKLED_SINGLE, PICKLED_INDEX, "pytorch_model-*.bin"),
    )
    for single, index, shards in (safetensors, pickled):
        if index in files:
            return [shards]
        if single in files:
            return [single]
    raise ShortstackError(
        f"{source}: the hub's copy has no weights ({SINGLE}, {INDEX} or {PICKLED_SINGLE})",
        hint="look at its files on the hub: it may hold an adapter or another format",
    )


def asked(source: str, ask: Callable[[], _Result], *, what: str = "model") -> _Result:
    """Ask the hub; every way in which it can fail is a line of its own.

    Args:
        source: what errors call the requested thing.
        ask: the call.
        what: the kind of thing, as errors name it.
    """
    import httpx
    from huggingface_hub import errors

    try:
        return ask()
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        httpx.HTTPError,
    ) as error:
        message, hint = _answer(error)
    except OSError as error:
        message, hint = _no_answer(error)
    if what != "model":
        message, hint = (
            text.replace("no such directory", "no such file").replace("model", what) for text in (message, hint)
        )
    raise ShortstackError(f"{source}: {message}", hint=hint) from None


# What the hub answered -> (what that means, what to do). The first class that fits counts.
_ANSWERS = (
    ("GatedRepoError", None, "the hub asks for permission first (HTTP 403)", "accept its terms on the hub; hf auth login"),
    ("RevisionNotFoundError", None, "the hub has the model, but no such revision (HTTP 404)", "check the revision after @"),
    ("RemoteEntryNotFoundError", None, "the hub's copy has no config.json (HTTP 404)", "is this a transformers model?"),
    ("HfHubHTTPError", 401, "no such directory, and the hub has no such model, or wants a token for it (HTTP 401)",
     "check the spelling; hf auth login"),
    ("HfHubHTTPError", 404, "no such directory, and the hub has no such model (HTTP 404)", "check the spelling"),
    ("HfHubHTTPError", 403, "the hub refuses access (HTTP 403)", "check that your token may read this model"),
    ("HfHubHTTPError", 429, "the hub refuses further requests for now (HTTP 429)",
     "wait some minutes; a token raises the limit"),
)  # fmt: skip


def _answer(error: Exception) -> tuple[str, str]:
    from huggingface_hub import errors

    # A file that is neither there nor in the cache is an error of its own; what the hub answered is its cause.
    answered = next((cause for cause in _causes(error) if _status(cause) is not None), None)
    status = _status(answered) if answered is not None else None
    for name, code, message, hint in _ANSWERS:
        fits = isinstance(error, getattr(errors, name)) or name == "HfHubHTTPError"
        if fits and code in (None, status):
            return message, hint
    if status is None:
        return _no_answer(error)
    if status >= 500:
        return f"the hub reports an internal error (HTTP {status})", "try again later"
    return f"the hub refused it (HTTP {status})", "check the id, or your token"


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def _no_answer(error: BaseException) -> tuple[str, str]:
    import httpx
    from huggingface_hub import constants

    causes = _causes(error)
    if constants.HF_HUB_OFFLINE:
        return (
            "no such directory, and HF_HUB_OFFLINE is set and the hub cache does not hold it",
            "unset HF_HUB_OFFLINE, or check the spelling",
        )
    if any(isinstance(cause, httpx.TimeoutException) for cause in causes):
        return "the hub did not answer in time", "try again; HF_HUB_ETAG_TIMEOUT (seconds) raises the limit"
    return (
        f"no such directory, and the hub could not be reached ({type(causes[-1]).__name__})",
        "check the path, or the network",
    )
