"""Recommended decoding arguments, which the evaluation writes to a file in the export directory."""

from pathlib import Path
from typing import Any

from data.errors import UserError
from models.artifact import (
    CONFIG,
    EARLIER_RECOMMENDATION,
    RECOMMENDATION,
    draft_settings,
    read_config,
    read_json,
    read_object,
    why_no_object,
    write_object,
)
from models.decoding.selection import Selection
from models.export.download import artifact_directory

FIX = "Evaluate again, or delete the recommendation."


def recommend(directory: Path, settings: dict[str, Any] | None) -> None:
    """Write the recommended arguments for `decoding.generate`. None removes those from an earlier evaluation.

    Raises:
        UserError: the directory is not an exported drafter.
    """
    read_config(directory)
    if settings:
        write_object(directory / RECOMMENDATION, settings)
    else:
        (directory / RECOMMENDATION).unlink(missing_ok=True)


def recommended(source: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Return the recommended `decoding.generate` arguments for a directory or Hub id; empty if there are none.

    Raises:
        ValueError: the artifact is missing or its recommendation is unreadable.
    """
    found = read_recommendation(artifact_directory(source, revision=revision))
    if not found:
        return {}
    selection = Selection(found["selection"], found["threshold"])
    return {"parallel_rows": found["parallel_rows"], "selection": selection, "calibrate": found["calibrate"]}


def read_recommendation(directory: Path) -> dict[str, Any]:
    """Read an artifact's recommendation; empty if there is none.

    Raises:
        UserError: the directory is not an exported drafter, or its recommendation is unreadable.
    """
    read_config(directory)
    if faults := recommendation_faults(directory):
        raise UserError(f"{directory}: {' '.join(faults)}")
    return _find(directory)[1] or {}


def recommendation_faults(directory: Path) -> list[str]:
    """Return the faults in an artifact's recommendation. A missing recommendation is not a fault."""
    place, found = _find(directory)
    if place == RECOMMENDATION and (reason := why_no_object(directory / place, FIX)):
        return [reason]
    if found is None:
        return []
    try:
        Selection(found["selection"], found["threshold"])
        rows, calibrate = found["parallel_rows"], found["calibrate"]
        if type(rows) is not int or rows < 0 or not isinstance(calibrate, bool):
            raise ValueError(
                f"parallel_rows is {rows!r} (expected an integer >= 0), calibrate is {calibrate!r} (expected true or "
                "false)"
            )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
        return [f"{place} is invalid: {reason}. {FIX}"]
    return []


def _find(directory: Path) -> tuple[str, Any]:
    """Return the recommendation's location (config.json in exports by earlier versions) and its content, if any."""
    if (directory / RECOMMENDATION).exists():
        return RECOMMENDATION, read_json(directory / RECOMMENDATION)
    settings = draft_settings(read_object(directory / CONFIG)) or {}
    return f"{CONFIG}: {EARLIER_RECOMMENDATION}", settings.get(EARLIER_RECOMMENDATION)
