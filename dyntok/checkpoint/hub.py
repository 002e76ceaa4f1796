"""The way to a checkpoint: a folder on this machine, or a repository on the Hugging Face hub.

Files of the hub are kept in its client's own cache. Not here: what a checkpoint holds (`format.py`).
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from typing_extensions import TypedDict

from dyntok.checkpoint.format import CONFIG_NAME, IMAGES_NAME, INDEX_NAME, WEIGHTS, read_header
from dyntok.errors import CheckpointError

_WANTED = (CONFIG_NAME, "model*.safetensors", INDEX_NAME, "README.md")


@dataclass(frozen=True)
class Origin:
    """Where a tokenizer comes from, so that files which it does not need at once can be fetched when it does.

    name_or_path: an existing folder, else a repository `org/name`. The other fields are options of the hub's client.
    """

    name_or_path: str | os.PathLike
    revision: str | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike | None = None
    force_download: bool = False
    path: Path | None = field(init=False, default=None)  # the folder, where it is one on this machine

    def __post_init__(self) -> None:
        if not isinstance(self.name_or_path, str | os.PathLike):
            raise CheckpointError(f"{self.name_or_path!r} is no checkpoint; expected a folder or a name, 'org/name'")
        path = os.path.expanduser(self.name_or_path)
        if os.path.isdir(path):
            object.__setattr__(self, "path", Path(path).absolute())  # decided once: the working directory may change

    @property
    def name(self) -> str:
        """Returns the last part of the folder's path, or the repository `org/name`."""
        return str(self.name_or_path) if self.path is None else self.path.name

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"token": None}  # never into a file

    def resolve(self) -> tuple[Path, "Origin"]:
        """Returns the folder of a dyntok checkpoint, and its origin with the commit pinned.

        A checkpoint on the hub is copied to the hub client's cache.

        Fetches config.json first and the weights only when it is a dyntok checkpoint. Raises `CheckpointError`, which
        says the ways out.
        """
        if self.path is not None:
            return self.path, self
        name = self.name_or_path
        if os.path.exists(os.path.expanduser(name)) or not isinstance(name, str):
            what = "a file" if os.path.exists(os.path.expanduser(name)) else "not there"
            raise CheckpointError(f"{os.path.expanduser(name)} is {what}; expected the folder of a checkpoint")
        try:
            folder = self._snapshot([CONFIG_NAME])
            if not (folder / CONFIG_NAME).is_file():
                raise CheckpointError(f"it has no {CONFIG_NAME}, so it is no dyntok checkpoint")
            read_header(folder)
            pinned = self.pinned(folder / CONFIG_NAME)  # a branch may move while files are fetched
            return pinned._snapshot(_WANTED, ignore_patterns=["*/*"]), pinned
        except CheckpointError as error:
            raise CheckpointError(f"{name} on the hub can't be used: {error}") from error
        except (
            Exception
        ) as error:  # from the hub's client, whose HTTP library, and so its errors, change between versions
            raise CheckpointError(_hub_trouble(name, self.revision, self.local_files_only, error)) from error

    def pinned(self, file: Path) -> "Origin":
        """Returns the same origin at the commit of `file`, which was fetched from it."""
        if self.path is not None:
            return self
        parts = file.parts
        commit = parts[len(parts) - parts[::-1].index("snapshots")]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return Origin(**values | {"revision": commit})

    def file(self, name: str) -> Path:
        """Returns one file, by its path in the repository. Raises `CheckpointError`, which says what to do."""
        if self.path is not None:
            if not (self.path / name).is_file():
                raise CheckpointError(
                    f"{self.path} has no {name}; copy it there, from where the rest of the folder came"
                )
            return self.path / name
        options = {"force_download": self.force_download, **self._options}
        return self._asked(name, lambda: Path(huggingface_hub.hf_hub_download(str(self.name_or_path), name, **options)))

    def folder(self, name: str, patterns: Sequence[str] = ("*",)) -> Path:
        """Returns a folder of the repository with the files that match the patterns. Raises `CheckpointError`."""
        if self.path is None:
            found = self._asked(name, lambda: self._snapshot([f"{name}/{pattern}" for pattern in patterns])) / name
        else:
            found = self.path / name
        if not found.is_dir():
            why = (
                "; it is not in the local cache, download it once without local_files_only"
                if self.local_files_only
                else ""
            )
            raise CheckpointError(f"{self.name_or_path} has no folder {name}, which this needs{why}")
        return found

    @property
    def _options(self) -> dict[str, Any]:
        names = ("revision", "local_files_only", "token", "cache_dir")
        return {name: getattr(self, name) for name in names}

    def _snapshot(self, allow_patterns: Sequence[str], **more: Any) -> Path:
        options = {
            **self._options,
            "force_download": self.force_download,
            "allow_patterns": list(allow_patterns),
            **more,
        }
        return Path(huggingface_hub.snapshot_download(str(self.name_or_path), **options))

    def _asked(self, name: str, fetch: Callable[[], Path]) -> Path:
        try:
            return fetch()
        except Exception as error:  # as in `resolve`
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise CheckpointError(f"{self.name_or_path} on the hub has no {name}") from error
            raise CheckpointError(
                _hub_trouble(str(self.name_or_path), self.revision, self.local_files_only, error)
            ) from error


class PushOptions(TypedDict, total=False):
    """Options of an upload to the hub, as its client has them."""

    private: bool | None
    token: str | bool | None
    branch: str | None
    create_pr: bool
    commit_message: str


def checkpoint_files(folder: Path, subfolders: Sequence[str] = ()) -> list[str]:
    """Returns the files of the checkpoint in a folder, its README.md, and what belongs to it in these subfolders."""
    known = (CONFIG_NAME, IMAGES_NAME, "README.md")
    names = [path.name for path in folder.iterdir() if path.name in known or WEIGHTS.fullmatch(path.name)]
    below = [path for name in subfolders for path in sorted((folder / name).rglob("*"))]
    return names + [path.relative_to(folder).as_posix() for path in below if path.suffix in (".json", ".safetensors")]


def upload(
    folder: Path,
    repo_id: str,
    names: Sequence[str],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a dyntok checkpoint",
) -> str:
    """Sends files of `folder` to a hub repository, in one commit.

    The repository is made if needed. Weights of dyntok in the same places are replaced, other files stay.

    Returns the address of the commit or of the pull request. Raises `CheckpointError`.
    """
    places = {os.path.dirname(name) for name in names if WEIGHTS.fullmatch(os.path.basename(name))}
    try:
        api = huggingface_hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # weights in another number of shards would be taken for the new ones
        stale = [
            name
            for name in api.list_repo_files(repo_id, revision=branch)
            if os.path.dirname(name) in places and WEIGHTS.fullmatch(os.path.basename(name)) and name not in names
        ]
        operations: list[Any] = [huggingface_hub.CommitOperationDelete(name) for name in stale]
        operations += [huggingface_hub.CommitOperationAdd(name, folder / name) for name in names]
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=branch, create_pr=create_pr
        )
    except Exception as error:  # as in `resolve`
        raise CheckpointError(f"can't upload {folder} to the hub as {repo_id!r}: {_first_line(error)}") from error
    return commit.pr_url or commit.commit_url


def _hub_trouble(name: str, revision: str | None, local_files_only: bool, error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return f"{name!r} is neither a folder on this machine nor the name of a hub repository, such as 'org/name'"
    looked_for = f"looked for the hub repository {name!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, GatedRepoError):
        why = "it is gated; ask for access on its page, then pass token=... or run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        why = "it does not exist or is private; check the name, pass token=... or run `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        why = "it has no such revision"
    elif local_files_only:
        why = "it is not in the local cache, or not all of it; download it once without local_files_only"
    elif isinstance(error, LocalEntryNotFoundError):
        why = "the hub can't be reached and the local cache does not hold it; check the connection and HF_HUB_OFFLINE"
    else:
        why = _first_line(error)
    return (
        f"no folder {name!r} on this machine; {looked_for}: {why}. "
        "The path of a checkpoint's folder works without the hub."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"
