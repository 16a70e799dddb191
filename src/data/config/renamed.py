"""Renamed settings. Old names are rejected with a hint at the new ones, but accepted in settings saved by old runs."""

from typing import Any

KEYS = {
    "rows_per_step": "global_batch_size",
    "rows_per_pass": "micro_batch_size",
    "row_length": "max_seq_len",
    "overlong": "truncation",
    "warmup_share": "warmup_ratio",
    "final_lr_share": "min_lr_ratio",
    "told_share": "bonus_slot_fraction",
    "share_of_peak": "mfu",
    "recompute": "activation_checkpointing",
}
GROUPS = {"speed": "runtime"}  # top-level groups


def current_name(path: str) -> str:
    """Return the current name of a setting, e.g. `speed.recompute` -> `runtime.activation_checkpointing`."""
    first, *rest = path.split(".")
    return ".".join([GROUPS.get(first, first), *(KEYS.get(key, key) for key in rest)])


def with_current_names(settings: Any) -> Any:
    """Return a copy of nested settings from an earlier version, with all keys changed to their current names."""
    if not isinstance(settings, dict):
        return settings
    return {KEYS.get(key, key): with_current_names(value) for key, value in settings.items()}
