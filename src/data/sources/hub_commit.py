"""Commit hash of a Hub model, recorded because branches and tags may move."""

from transformers.utils.hub import cached_file, extract_commit_hash


def commit_of(repository: str, revision: str | None) -> str:
    """Return the commit hash of the config file that transformers loads, downloading it if it is not cached.

    Raises:
        OSError: the model does not exist, or its config is not available.
        ValueError: the cache path does not contain a commit hash.
    """
    file = cached_file(repository, "config.json", revision=revision)
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise ValueError(f"{file}: no commit hash in the cache path. Use a local directory of the model instead.")
    return commit
