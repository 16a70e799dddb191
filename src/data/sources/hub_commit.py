"""Which commit of a model on the Hub is used: what its name stands for may move."""

from transformers.utils.hub import cached_file, extract_commit_hash


def commit_of(repository: str, revision: str | None) -> str:
    """The commit of the config file that transformers takes, downloaded if it is not in the cache.

    Raises:
        OSError: there is no such model, or its config cannot be had.
        ValueError: the cache does not say which commit it holds.
    """
    file = cached_file(repository, "config.json", revision=revision)
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise ValueError(f"{file}: the Hub's cache does not name its commit; give the directory of the model instead.")
    return commit
