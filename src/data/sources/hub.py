"""Loads datasets from the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import config, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from data.errors import UserError
from data.sources.cache import cache_errors, system_error
from data.sources.tables import Table, select_columns

SECONDS = 10  # for the first contact with the Hub


def open_hub(name: str, split: str, subset: str | None) -> Table:
    """Load a dataset from the Hub, or from the cache of `datasets`.

    Raises:
        UserError: the dataset, subset or split does not exist, or cannot be downloaded.
    """
    with cache_errors():
        try:
            with _offline_if_unreachable(name):
                dataset = load_dataset(name, subset, split=split)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            if system_error(error):
                raise
            raise UserError(
                f"{name}: no such file or folder, and loading split {split!r} from the Hub failed "
                f"({type(error).__name__}: {error}). Check the name, the network and your login (`hf auth login`)."
            ) from error
    columns, notes = select_columns(dataset.features.arrow_schema)
    label = "/".join(filter(None, (name, subset, split)))
    fingerprint = f"{label}/{dataset._fingerprint}"
    return Table(label, dataset.select_columns(columns) if notes else dataset, fingerprint, notes=notes)


@contextmanager
def _offline_if_unreachable(name: str) -> Iterator[None]:
    """Use only cached datasets if there is no connection to the Hub; `datasets` would retry for 23 seconds first."""
    before = config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=SECONDS)
    except (HfHubHTTPError, ValueError):  # an answer; `load_dataset` reports it
        pass
    except Exception:  # no connection; the exception's class depends on the HTTP library
        config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
