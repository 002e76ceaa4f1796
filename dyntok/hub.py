"""The way to a checkpoint: a folder on this machine, or a repository on the Hugging Face hub, in the hub client's own cache.

Not here: what a checkpoint holds (`checkpoint.py`).
"""

import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dyntok.checkpoint import CONFIG_NAME, INDEX_NAME, WEIGHTS, read_header
from dyntok.errors import CheckpointError

_WANTED = {"allow_patterns": [CONFIG_NAME, "model*.safetensors", INDEX_NAME, "README.md"], "ignore_patterns": ["*/*"]}


@dataclass(frozen=True)
class Origin:
    """Where a tokenizer came from, so that files which it does not need at once can be fetched when it does.

    name_or_path: an existing folder, else a repository `org/name`. The other fields are options of the hub's client.
    """

    name_or_path: str | os.PathLike
    revision: str | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    force_download: bool = False

    @property
    def path(self) -> Path | None:
        """The folder, where it is one on this machine."""
        path = Path(os.path.expanduser(self.name_or_path))
        return path if path.is_dir() else None

    def file(self, name: str) -> Path:
        """One file by its path in the repository. Raises `CheckpointError` that says the ways out."""
        if self.path is not None:
            if not (self.path / name).is_file():
                raise CheckpointError(f"{self.path} has no {name}; copy it there, from where the rest of the folder came")
            return self.path / name
        return self._from_hub(name, lambda options: huggingface_hub.hf_hub_download(self.name_or_path, name, **options))

    def folder(self, name: str) -> Path:
        """All files below one folder of the repository. Raises `CheckpointError`."""
        if self.path is None:
            patterns = {"allow_patterns": [f"{name}/*"]}
            snapshot = self._from_hub(name, lambda options: huggingface_hub.snapshot_download(self.name_or_path, **patterns, **options))
            found = snapshot / name
        else:
            found = self.path / name
        if not found.is_dir():
            raise CheckpointError(f"{self.name_or_path} has no folder {name}, which this needs")
        return found

    def _from_hub(self, name: str, fetch) -> Path:
        options = {"revision": self.revision, "local_files_only": self.local_files_only, "token": self.token}
        try:
            return Path(fetch(options | {"cache_dir": self.cache_dir, "force_download": self.force_download}))
        except Exception as error:  # as in `resolve`
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise CheckpointError(f"{self.name_or_path} on the hub has no {name}") from error
            raise CheckpointError(_hub_trouble(str(self.name_or_path), self.revision, self.local_files_only, error)) from error


def resolve(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
) -> Path:
    """The folder of a checkpoint: an existing folder as it is, else the hub repository `org/name`, downloaded into the hub's cache.

    Fetches config.json first and the weights only when it is a dyntok checkpoint. Raises `CheckpointError`, which says the ways out.
    """
    path = os.path.expanduser(name_or_path)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or not isinstance(name_or_path, str):
        raise CheckpointError(f"{path} is {'a file' if os.path.exists(path) else 'not there'}; expected the folder of a checkpoint")
    options = {"local_files_only": local_files_only, "token": token, "cache_dir": cache_dir, "force_download": force_download}
    try:
        folder = Path(huggingface_hub.snapshot_download(name_or_path, revision=revision, allow_patterns=[CONFIG_NAME], **options))
        if not (folder / CONFIG_NAME).is_file():
            raise CheckpointError(f"it has no {CONFIG_NAME}, so it is no dyntok checkpoint")
        read_header(folder)
        commit = folder.name  # a branch may have moved since config.json was fetched
        return Path(huggingface_hub.snapshot_download(name_or_path, revision=commit, **_WANTED, **options))
    except CheckpointError as error:
        raise CheckpointError(f"{name_or_path} on the hub can't be used: {error}") from error
    except Exception as error:  # from the hub's client, whose HTTP library, and so its errors, change between versions
        raise CheckpointError(_hub_trouble(name_or_path, revision, local_files_only, error)) from error


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a dyntok checkpoint",
) -> str:
    """Sends the checkpoint in `folder` and its README.md, in one commit, to a hub repository that is made if need be.

    Takes the place of a checkpoint there; other files stay. Returns the address of the commit, or of the pull request.
    Raises `CheckpointError`.
    """
    names = [path.name for path in Path(folder).iterdir() if path.name in (CONFIG_NAME, "README.md") or WEIGHTS.fullmatch(path.name)]
    try:
        api = huggingface_hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # weights in another number of shards would be taken for the new ones
        stale = [name for name in api.list_repo_files(repo_id, revision=branch) if WEIGHTS.fullmatch(name) and name not in names]
        operations = [huggingface_hub.CommitOperationDelete(name) for name in stale]
        operations += [huggingface_hub.CommitOperationAdd(name, Path(folder) / name) for name in names]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=branch, create_pr=create_pr)
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
    return f"no folder {name!r} on this machine; {looked_for}: {why}. The path of a checkpoint's folder works without the hub."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"
