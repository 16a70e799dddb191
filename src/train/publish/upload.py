"""Uploads the exported drafter to the Hugging Face Hub, and checks before training that the upload will be possible.

Authentication uses the standard login (HF_TOKEN or `hf auth login`) through huggingface_hub; this module never reads
the token itself.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from omegaconf import DictConfig

from data.errors import UserError
from models.artifact import CARD, CONFIG, FILES, read_config
from models.draft_config import FLEXDRAFT_KEYS, IDENTITY, DraftConfig, other_target
from models.export.config import own_faults
from models.export.download import is_repository_name
from models.export.recommendation import recommendation_faults
from models.export.weight_checks import file_faults, headers, value_faults
from train.publish.model_card import named

HARMLESS = {".gitattributes", CARD, "LICENSE"}  # files a repository may contain before the first upload


@dataclass(frozen=True)
class Destination:
    """Hub repository to upload a drafter to."""

    repository: str  # owner/name
    private: bool = True
    tag: str | None = None  # tag for the uploaded revision


def destination(config: DictConfig) -> Destination:
    """Return the upload destination configured in a run's settings."""
    return Destination(config.export.push_to_hub, config.export.private, config.export.tag)


def check_destination(to: Destination) -> None:
    """Check the destination without network access.

    Raises:
        UserError: the repository name or the tag is invalid, there is no login, or HF_HUB_OFFLINE is set.
    """
    if not isinstance(to.repository, str) or not is_repository_name(to.repository):
        raise UserError(f"push to {to.repository!r}: expected a Hub repository name (owner/name).")
    if to.tag is not None and not (isinstance(to.tag, str) and re.fullmatch(r"\w[\w.-]*", to.tag)):
        raise UserError(f"tag {to.tag!r}: expected letters, digits, '.', '_' and '-', e.g. v1.")
    if constants.is_offline_mode():
        raise UserError(
            f"push to {to.repository}: HF_HUB_OFFLINE is set. Unset it, or push from a machine with network access."
        )
    if get_token() is None:
        raise UserError(f"push to {to.repository}: not logged in to the Hub. Set HF_TOKEN, or run `hf auth login`.")


def check_access(to: Destination, target: dict[str, Any]) -> set[str]:
    """Check on the Hub that the drafter can be uploaded: token, owner, repository contents, tag.

    Args:
        target: `target_identity` of the drafter's target.

    Returns:
        The repository's files; empty if it does not exist yet.

    Raises:
        UserError: the upload is not possible, or the Hub is unreachable.
    """
    api, name = HfApi(), to.repository
    with _hub_errors(name, "Nothing was uploaded."):
        _check_owner(name, api.whoami())
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:
            return set()
        files = {file.rfilename for file in found.siblings or []}
        if files - HARMLESS:
            _check_content(name, found.sha, files, target)
        if to.tag in {tag.name for tag in api.list_repo_refs(name).tags}:
            raise UserError(f"{name} already has a tag {to.tag}. Choose a different one.")
    if bool(found.private) != to.private:
        is_, asked = ("private", "public") if found.private else ("public", "private")
        raise UserError(
            f"{name} already exists and is {is_}, not {asked}. Push as {is_}, or change the visibility in the "
            "repository's settings."
        )
    return files


def push(directory: Path, to: Destination) -> str:
    """Upload an exported drafter in one commit, and tag the commit if `to.tag` is set.

    Weights are uploaded before the commit and addressed by content, so a retry after an interruption skips what is
    already uploaded. Nothing is visible before the commit.

    Returns:
        The repository's URL.

    Raises:
        UserError: the artifact is incomplete, the upload is not permitted, or a Hub or network request failed.
    """
    check_destination(to)
    config = check_artifact(directory)
    there = check_access(to, {key: config.get(key) for key in IDENTITY})
    api, name = HfApi(), to.repository
    files = {file.relative_to(directory).as_posix(): file for part in FILES for file in sorted(directory.glob(part))}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, str(file)) for path, file in files.items() if path != CARD
    ]
    if CARD in files:
        operations.append(CommitOperationAdd(CARD, named(files[CARD].read_text(encoding="utf-8"), name).encode()))
    # Delete shards left over from an earlier, larger upload, which would make the artifact ambiguous.
    operations += [CommitOperationDelete(path) for path in sorted(there - files.keys()) if _is_ours(path)]
    with _hub_errors(name, "Nothing was published. Rerun the same command to resume the upload."):
        api.create_repo(name, private=to.private, exist_ok=True)
        commit = api.create_commit(name, operations, commit_message="FlexDraft drafter")
    if to.tag:
        with _hub_errors(
            name, f"The drafter was uploaded as {commit.oid}, but not tagged. Rerun the same command to tag it."
        ):
            api.create_tag(name, tag=to.tag, revision=commit.oid)
    return f"{api.endpoint}/{name}"


def check_artifact(directory: Path) -> dict[str, Any]:
    """Check that an export is complete, with all tensors readable and finite, and return its config.

    Does not load the target; `python -m models.verify` also checks that the drafter fits it.

    Raises:
        UserError: the directory is not a complete export.
    """
    if faults := file_faults(directory):
        raise UserError(f"{directory}: the drafter is incomplete. {' '.join(faults)}")
    config = read_config(directory)
    if faults := own_faults(config) + recommendation_faults(directory):
        raise UserError(f"{directory}: {' '.join(faults)}")
    draft = DraftConfig.from_artifact(config)
    expected = {*draft.names(), *(f"layers.{i}.self_attn.o_proj.weight" for i in range(draft.num_layers))}
    if missing := sorted(expected - headers(directory).keys()):
        raise UserError(
            f"{directory}: the drafter is incomplete. Missing tensors: {', '.join(missing)}. Export it again."
        )
    if faults := value_faults(directory)[0]:
        raise UserError(f"{directory}: {' '.join(faults)}")
    return config


def _is_ours(path: str) -> bool:
    """Return whether a repository file is part of a drafter. The model card is excluded: it may have been edited."""
    return path != CARD and any(fnmatch(path, part) and path.count("/") == part.count("/") for part in FILES)


def _check_owner(name: str, login: dict[str, Any]) -> None:
    owners = [login["name"], *(organization["name"] for organization in login.get("orgs", []))]
    if name.split("/")[0] not in owners:
        raise UserError(
            f"push to {name}: your account can write only to repositories owned by {' or '.join(owners)}. Choose one "
            "of those owners."
        )
    if login.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"push to {name}: the token is read-only. Create a token with write access in the Hub's settings."
        )


def _check_content(name: str, revision: str | None, files: set[str], target: dict[str, Any]) -> None:
    config: dict[str, Any] = {}
    if CONFIG in files:
        text = Path(hf_hub_download(name, CONFIG, revision=revision)).read_text(encoding="utf-8")
        with suppress(ValueError):
            config = json.loads(text)
    if not any(key in config for key in FLEXDRAFT_KEYS):
        raise UserError(
            f"{name} contains something other than a FlexDraft drafter. Choose a different repository name."
        )
    if different := other_target(config, target):
        raise UserError(
            f"{name} already holds a drafter for a different target: {different}. Choose a different repository name, "
            "or check model.target."
        )


@contextmanager
def _hub_errors(name: str, state: str) -> Iterator[None]:
    """Convert Hub and network errors to a UserError with a fix. `state` describes what has been done so far.

    Raises:
        UserError: the Hub or the network failed.
    """
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "the Hub rejected the token. Set a different HF_TOKEN, or run `hf auth login`.",
            403: "the token has no write access to this repository. Create one that does in the Hub's settings.",
        }
        reason = reasons.get(status) or f"the Hub rejected the request. {error}"
        raise UserError(f"push to {name}: {reason} {state}") from error
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # connection errors and failed uploads
        raise UserError(
            f"push to {name}: the Hub is unreachable, or the connection failed. {_cause(error)} {state}"
        ) from error


def _cause(error: BaseException) -> str:
    """Return the messages of an error and its cause on one line."""
    texts = dict.fromkeys(str(one) for one in (error, error.__cause__) if one)
    return " ".join(texts).replace("\n", " ")
