"""Drafters and targets by name: a local directory as it is, a repository of the Hugging Face Hub downloaded once."""

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
    """The directory of an artifact: `source` if it is one, else a local copy of the repository `owner/name`.

    What was downloaded before is not downloaded again. `revision` is a branch, tag or commit of the repository, and
    has no meaning for a local directory. The token is that of the standard login.

    Raises:
        ValueError: neither a directory nor a repository that can be read, or a revision of a local directory.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a local directory; revision={revision} is for a repository of the Hub.")
        return Path(source)
    name = str(source)
    if not is_repository_name(name):
        raise ValueError(f"{name}: no such directory, and no name of a repository of the Hub (owner/name) either.")
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision))
    except GatedRepoError as error:
        raise ValueError(f"{name}: access to this repository has to be asked for on its page of the Hub.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: no such directory, and no such repository on the Hub for this login. "
            "A private one needs a token of its owner: HF_TOKEN, or `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name}: this repository has no revision {revision}.") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name}{at}: no such directory, not downloaded before, and the Hub is out of reach (no network, or "
            "HF_HUB_OFFLINE is set)."
        ) from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"{name}{at}: not downloaded from the Hub. {error}") from error


def is_repository_name(name: str) -> bool:
    """Whether this may be the name of somebody's repository: `owner/name`, with the characters that the Hub allows."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1
