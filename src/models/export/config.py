"""Builds and checks the `config.json` of an exported drafter."""

from typing import Any, TypeGuard, cast

import torch
from transformers import PretrainedConfig

from models.artifact import CONFIG
from models.draft_config import (
    ENABLED,
    EXTRAS,
    FLEXDRAFT_KEYS,
    IDENTITY,
    IDS,
    RANK,
    DraftConfig,
    draft_settings,
    expectation,
)
from models.families import layer_kinds, layer_windows

# Entries that must equal the target's, if its architecture has them.
SHARED: tuple[str, ...] = (
    "model_type",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
SHARED += ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
BUILT = ("attention_bias", "hidden_act", "intermediate_size")  # must also equal the target's, but may be missing
ROPE = ("rope_theta", "rope_parameters", "rope_scaling")  # transformers 5 reads rope_parameters, 4.57 the other two


def artifact_config(target: PretrainedConfig, draft: DraftConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Build `config.json`: the target's architecture with L layers, plus the keys needed for drafting."""
    config = target.to_dict()
    config |= {"num_target_layers": target.num_hidden_layers, "num_hidden_layers": draft.num_layers}
    config |= {"layer_types": layer_kinds(target)[-draft.num_layers :], "block_size": draft.block_size}
    config["dtype"] = str(dtype).removeprefix("torch.")
    settings = draft.settings(target.num_hidden_layers)
    config.update({key: settings for key in FLEXDRAFT_KEYS})
    config |= _rope_of_4_57(config.get("rope_parameters") or {})
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]  # its name in transformers 4.57
    for key in ("_name_or_path", "architectures", "transformers_version", "quantization_config"):
        config.pop(key, None)
    return config


def _rope_of_4_57(rope: dict[str, Any]) -> dict[str, Any]:
    """Convert transformers 5's `rope_parameters` to the keys that transformers 4.57 reads."""
    local = {}
    if "sliding_attention" in rope:  # parameters per layer type (Gemma 3)
        local = {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return local
    kind = rope.get("rope_type", "default")
    if kind == "longrope":  # 4.57 accepts no other keys
        scaling = {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    else:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if kind != "default":
        local["rope_scaling"] = scaling
    return {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope} | local


def config_faults(config: dict[str, Any], target: PretrainedConfig, *, complete: bool = True) -> list[str]:
    """Compare a config with the one an export for this target would write, and return all mismatches.

    Args:
        complete: whether to also reject missing entries that loading here does not need (the public release lacks
            some), and missing RoPE keys (which vary between transformers releases).
    """
    faults = own_faults(config)
    draft = DraftConfig(num_layers=1, block_size=2, calibrator_rank=0) if faults else DraftConfig.from_artifact(config)
    expected = artifact_config(target, draft, torch.float32) | {"vocab_size": known_tokens(config, target)}
    reasons = dict.fromkeys(SHARED + BUILT, "the target's value. Was the drafter trained for a different target?")
    reasons["num_target_layers"] = "the target's number of layers."
    if not faults:
        reasons |= _reasons_of_layers(draft, expected)
        faults += _ids_faults(config, draft, target) + _block_faults(draft, target)
    for key, reason in reasons.items():
        compared = key in config or key in IDENTITY or (complete and key not in BUILT)
        if key in expected and compared and config.get(key) != expected[key]:
            faults.append(_differs(key, config.get(key), expected[key], reason))
    faults += _rope_faults(config, expected, complete)
    return faults + _pair_faults(config, complete)


def own_faults(config: dict[str, Any]) -> list[str]:
    """Return the problems in the drafter settings that can be found without loading the target."""
    settings = draft_settings(config)
    if settings is None:
        return [
            f"{CONFIG}: not a FlexDraft drafter; expected {FLEXDRAFT_KEYS[0]} or {FLEXDRAFT_KEYS[1]} to be an object."
        ]
    ids, enabled = settings.get(IDS), settings.get(ENABLED)
    rank: Any = settings.get(RANK)
    values = {"block_size": config.get("block_size")} | {key: settings.get(key, off) for key, off in EXTRAS.items()}
    wanted = {key: (value, expectation(key, value)) for key, value in values.items()}
    wanted[RANK] = rank, expectation("calibrator_rank", rank)
    wanted[ENABLED] = enabled, None if isinstance(enabled, bool) else "true or false"
    listed = isinstance(ids, list) and ids and all(_is_int(i) for i in ids)
    wanted[IDS] = ids, None if listed else "a list with the indices of the target's last layers"
    faults = [f"{CONFIG}: {key} is {value!r}; expected {text}." for key, (value, text) in wanted.items() if text]
    if not wanted[RANK][1] and not wanted[ENABLED][1] and enabled != (rank > 0):
        expected = ">= 1 with a calibrator" if enabled else "0 without a calibrator"
        faults.append(f"{CONFIG}: {ENABLED} is {str(enabled).lower()}, but {RANK} is {rank}; expected {expected}.")
    return faults


def known_tokens(config: dict[str, Any], target: PretrainedConfig) -> int:
    """Return the `vocab_size` the artifact should have. It may be smaller than that of a resized or padded target."""
    size, rows = config.get("vocab_size"), cast(int, target.vocab_size)
    return size if _is_int(size) and 0 < size < rows else rows


def _differs(key: str, value: Any, expected: Any, why: str) -> str:
    return f"{CONFIG}: {key} is {value!r}; expected {expected!r}, {why}"


def _pair_faults(config: dict[str, Any], complete: bool) -> list[str]:
    """Check that both keys hold the same drafter settings. Unless `complete`, one of the keys is enough."""
    present = [key for key in FLEXDRAFT_KEYS if isinstance(config.get(key), dict)]
    if len(present) == 1 and complete:
        [absent] = set(FLEXDRAFT_KEYS) - set(present)
        return [f"{CONFIG}: {absent} is missing or not an object, but some readers need it. Copy {present[0]} to it."]
    if len(present) < 2:
        return []
    first, second = (config[key] for key in FLEXDRAFT_KEYS)
    different = [key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]
    names = " and ".join(FLEXDRAFT_KEYS)
    return [f"{CONFIG}: {names} differ in {', '.join(different)}. Make them equal."] if different else []


def _reasons_of_layers(draft: DraftConfig, expected: dict[str, Any]) -> dict[str, str]:
    """Return the entries that describe the draft layers, each with the reason for its expected value."""
    reasons = {"num_hidden_layers": f"the length of {IDS}."}
    reasons["layer_types"] = f"those of the target's last {draft.num_layers} layers."
    return reasons | (
        {"sliding_window": "the target's value."} if "sliding_attention" in expected["layer_types"] else {}
    )


def _ids_faults(config: dict[str, Any], draft: DraftConfig, target: PretrainedConfig) -> list[str]:
    """Check that the draft layers are the target's last layers, in order."""
    found, expected = ((draft_settings(config) or {})[IDS], draft.settings(target.num_hidden_layers)[IDS])
    return [] if found == expected else [_differs(IDS, found, expected, "the target's last layers.")]


def _block_faults(draft: DraftConfig, target: PretrainedConfig) -> list[str]:
    limits = {window: "sliding window" for window in layer_windows(target) if window is not None}
    limits |= {target.max_position_embeddings: "context length"}
    if draft.block_size <= min(limits):
        return []
    most = f"at most {min(limits)}, the target's {limits[min(limits)]}"
    return [f"{CONFIG}: block_size is {draft.block_size}; expected {most}."]


def _rope_faults(config: dict[str, Any], expected: dict[str, Any], complete: bool) -> list[str]:
    """Check that all RoPE entries equal those an export would write."""
    faults = []
    for key in ROPE:
        found, wanted = config.get(key), expected.get(key)
        if key not in config and (not complete or (key == "rope_parameters" and "rope_theta" in (wanted or {}))):
            continue
        if wanted is None and (not found or _is_default(found)):
            continue
        if (found if complete else _filled(found, wanted)) != wanted:
            faults.append(
                _differs(key, found, wanted, "the target's value. Other values rotate positions by the wrong angles.")
            )
    return faults


def _filled(found: Any, own: Any) -> Any:
    """Return an artifact's setting with missing keys filled in from the target and unknown keys dropped.

    Needed because transformers releases add keys to the RoPE parameters and remove others.
    """
    if not isinstance(found, dict) or not isinstance(own, dict):
        return found
    return {key: _filled(found[key], value) if key in found else value for key, value in own.items()}


def _is_default(rope: Any) -> bool:
    return isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
