"""Files into a repository on the hub, in one commit; every way in which that fails is a line of its own, without secrets."""

from __future__ import annotations

import contextlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from shortstack.artifacts.provenance import FILE_NAME
from shortstack.common.formatting import plain, size
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.publishing.push_contents import PushFile

_Result = TypeVar("_Result")
_WEIGHTS = (".safetensors", ".bin", ".index.json")


def upload(
    files: Sequence[PushFile], repository: str, *, public: bool, force: bool, progress: Progress
) -> tuple[str, bool, list[str]]:
    """Upload files; weights that were in the repository and are not among them are deleted in the same commit.

    Large files go first, one by one: those that have arrived are not sent again by the next try.

    Args:
        files: what to upload.
        repository: org/name; it is made where there is none.
        public: whether everybody may see it.
        force: replace a model that shortstack did not make.
        progress: shows how much has been sent.

    Returns:
        (address of the commit, whether the repository is private, what else was done).

    Raises:
        ShortstackError: no token, no permission, a name that is taken, a connection that was lost.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=_token(repository))
    private, before = _prepared(api, repository, public, force)
    new = {file.name for file in files}
    stale = [name for name in before if name.endswith(_WEIGHTS) and name not in new]
    additions = [CommitOperationAdd(file.name, file.content) for file in files]
    deletions = [CommitOperationDelete(name) for name in stale]
    sent = 0
    with _quiet_library(), progress.bar("push", sum(file.nbytes for file in files), "B") as advance:
        for file, addition in sorted(zip(files, additions, strict=True), key=lambda pair: -pair[0].nbytes):
            _asked(repository, lambda one=addition: api.preupload_lfs_files(repository, [one]), _sent(sent, files))  # type: ignore[misc]
            sent += 1
            advance(file.nbytes)
        message = f"Upload with shortstack {importlib.metadata.version('shortstack')}"
        commit = _asked(
            repository,
            lambda: api.create_commit(repository, [*additions, *deletions], commit_message=message),
            _sent(sent, files),
        )
    _check_arrived(api, repository, files)
    notes = [f"deleted there, as they are of another model: {', '.join(stale)}"] if stale else []
    if private and public:
        notes.append(f"{repository} was private before, and stays private: its settings on the hub make it public")
    return commit.commit_url, private, notes


def _token(repository: str) -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ShortstackError(f"{repository}: not pushed: HF_HUB_OFFLINE is set", hint="unset it to reach the hub")
    token = get_token()
    if token is None:
        raise ShortstackError(
            f"{repository}: not pushed: there is no token for the hub", hint="hf auth login, or set HF_TOKEN"
        )
    return token


def _prepared(api: Any, repository: str, public: bool, force: bool) -> tuple[bool, list[str]]:
    """(whether the repository is private, what is in it); it is made where there is none.

    Raises:
        ShortstackError: the hub refuses it, or what is there must not be replaced or shown.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    def existing() -> Any:
        try:
            return api.model_info(repository)
        except RepositoryNotFoundError:
            return None

    info = _asked(repository, existing)
    if info is None:
        _asked(repository, lambda: api.create_repo(repository, private=not public))
        return not public, []
    names = [sibling.rfilename for sibling in info.siblings or []]
    if not info.private and not public:
        raise ShortstackError(
            f"{repository}: exists and is public: everybody would see the files", hint="use --public, or another name"
        )
    if FILE_NAME not in names and any(name.endswith(_WEIGHTS) for name in names) and not force:
        raise ShortstackError(
            f"{repository}: holds a model that shortstack did not make (no {FILE_NAME} in it)",
            hint="choose another name, or --force to replace it",
        )
    return bool(info.private), names


def _check_arrived(api: Any, repository: str, files: Sequence[PushFile]) -> None:
    """Compare what the hub lists with what was sent."""
    info = _asked(repository, lambda: api.model_info(repository, files_metadata=True))
    there = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    for file in files:
        if there.get(file.name) != file.nbytes:
            found = "nothing" if there.get(file.name) is None else f"{there[file.name]} bytes"
            raise ShortstackError(
                f"{repository}: {file.nbytes} bytes of {file.name} were sent, but the hub has {found}",
                hint="run the same command again",
            )


def _sent(number: int, files: Sequence[PushFile]) -> str:
    return f" when {number} of {len(files)} files had been sent (of {size(sum(file.nbytes for file in files))})"


def _asked(repository: str, ask: Callable[[], _Result], when: str = "") -> _Result:
    """Ask the hub. What comes back as an error is told in words of our own: its texts may hold signed addresses."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return ask()
    except ShortstackError:
        raise
    except Exception as error:
        causes = _causes(error)
        status = next((s for cause in causes if (s := _status(cause)) is not None), None)
        if isinstance(error, ValueError) and "README.md" in str(error):
            lines = [line.strip("- ") for line in str(error).splitlines()[1:] if line.strip("- ")]
            message = f"the hub does not take the card: {plain('; '.join(lines))[:300]}"
            hint = "correct the metadata of README.md"
        elif status is not None:
            message, hint = _answer(status)
        elif any(isinstance(cause, (httpx.HTTPError, OSError, HfHubHTTPError)) for cause in causes):
            message = f"the connection to the hub was lost or refused{when}"
            hint = "run the same command again: what has arrived is not sent again"
        else:
            message, hint = f"the upload failed ({type(error).__name__}){when}", "run the same command again"
        # The cause is not chained: a traceback would show addresses that are signed.
        raise ShortstackError(f"{repository}: not pushed: {message}", hint=hint) from None


def _answer(status: int) -> tuple[str, str]:
    """What the hub means by a status, and what to do."""
    known = {
        401: ("the hub does not know the token (HTTP 401)", "hf auth login"),
        403: ("the token may not write there (HTTP 403)", "a token with write access, or a name of your own"),
        404: ("the hub has no such organisation or repository (HTTP 404)", "check the spelling"),
        409: (
            "the name is taken, by a data set, a space or a model that this token cannot see (HTTP 409)",
            "choose another name",
        ),
        413: ("a file is too large for the hub (HTTP 413)", "smaller shards"),
        429: (
            "the hub refuses further requests for now (HTTP 429)",
            "wait some minutes, then run the same command again",
        ),
    }
    if status >= 500:
        return f"the hub reports an internal error (HTTP {status})", "run the same command again later"
    return known.get(status, (f"the hub refused it (HTTP {status})", "check the name and the token"))


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Without the library's own bars and warnings, for as long as it uploads."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_on = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        try:
            yield
        finally:
            if were_on:
                enable_progress_bars()
