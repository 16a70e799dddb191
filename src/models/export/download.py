"""Resolves a drafter's name to a local directory, downloading it from the Hugging Face Hub if necessary."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


def artifact_directory(source: str | Path, *, revision: str | None = None) -> Path:
    """Return the directory of an artifact: `source` if it is a directory, else a snapshot of the Hub repository.

    Files in the Hub cache are not downloaded again. `revision` is a branch, tag or commit of the repository; it must be
    None for a local directory. Authentication uses the standard Hub login.

    Raises:
        ValueError: `source` is neither a directory nor an accessible repository, or a directory with a `revision`.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a local directory; revision={revision} requires a Hub repository.")
        return Path(source)
    name = str(source)
    if not is_repository_name(name):
        raise ValueError(f"{name}: no such directory, and not a Hub repository name (owner/name).")
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision))
    except GatedRepoError as error:
        raise ValueError(f"{name}: access to this repository is restricted. Request access on its Hub page.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: neither a local directory nor a Hub repository that you have access to. If it is private, set "
            "HF_TOKEN or run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name}: revision {revision} does not exist in this repository.") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name}{at}: no such directory, not in the local cache, and the Hub is unreachable (no network, or "
            "HF_HUB_OFFLINE is set)."
        ) from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"{name}{at}: the download from the Hub failed. {error}") from error


def is_repository_name(name: str) -> bool:
    """Return whether `name` is a valid Hub repository id of the form `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1
