"""Finds the commit hash of a Hub model. Runs record it because branches and tags can move."""

from transformers.utils.hub import cached_file, extract_commit_hash


def commit_of(repository: str, revision: str | None) -> str:
    """Return the commit hash of the config.json that transformers loads, downloading the file if it is not cached.

    Raises:
        OSError: the model does not exist, or its config.json is not available.
        ValueError: the cache path does not contain a commit hash.
    """
    file = cached_file(repository, "config.json", revision=revision)
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise ValueError(f"{file}: the cache path contains no commit hash. Use a local model directory instead.")
    return commit
