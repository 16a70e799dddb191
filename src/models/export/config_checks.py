"""Checks of an artifact's config.json against the artifact contract and the target's config."""

from itertools import pairwise
from typing import Any

from transformers import PretrainedConfig

from models.artifact import CONFIG, FLEXDRAFT_KEYS, draft_settings, extras
from models.families import layer_kinds, layer_windows

# Keys that must equal the target's, if its architecture has them.
SHARED = ("model_type", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SHARED += ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
# Keys that must equal the target's if the artifact has them: the public release builds its module with them.
REQUIRED = ("model_type", "hidden_size", "vocab_size")  # required keys of SHARED
BUILT = ("attention_bias", "hidden_act", "intermediate_size")
RANK, ENABLED, IDS = "anchor_bias_rank", "enable_anchor_bias_logits", "target_layer_ids"


def config_faults(config: dict[str, Any], target: PretrainedConfig) -> list[str]:
    """Return all contradictions of a config to the contract, to the target or within the config."""
    faults = _architecture_faults(config, target) + _settings_faults(config) + _differing(config)
    settings = draft_settings(config)
    if settings is not None:
        faults += _layer_faults(config, settings, target) + _calibrator_faults(settings)
        faults += _extra_faults(settings)
    return faults + _block_faults(config, target) + _rope_faults(config, target)


def loading_faults(config: dict[str, Any], target: PretrainedConfig) -> list[str]:
    """Return the contradictions of a config to the target or within the config that would change the loaded drafter.

    Less strict than `config_faults`: keys that only other readers need may be missing, as in the public release.
    """
    settings = draft_settings(config) or {}
    ids = settings.get(IDS)
    number = len(ids) if isinstance(ids, list) else 0
    own = target.to_dict()
    defaults = {key: own[key] for key in SHARED if key in own and key not in REQUIRED}
    defaults |= {"num_hidden_layers": number, "layer_types": layer_kinds(target)[-number:]}
    defaults |= {"sliding_window": own.get("sliding_window")}
    rope = {key: _filled(config.get(key, value), value) for key, value in _rope_of(target).items()}
    complete = defaults | config | rope | dict.fromkeys(FLEXDRAFT_KEYS, settings)
    return config_faults(complete, target) + _differing(config)


def own_faults(config: dict[str, Any]) -> list[str]:
    """Return the contradictions to the contract or within the config that can be found without the target."""
    settings = draft_settings(config)
    if settings is None:
        return _settings_faults(config)
    faults = _ids_faults(settings.get(IDS)) + _calibrator_faults(settings) + _extra_faults(settings)
    size = config.get("block_size")
    return faults if _is_int(size) and size >= 2 else [*faults, _block_size_fault(size)]


def _filled(found: Any, own: Any) -> Any:
    """Fill keys that are missing from an artifact's setting with the target's values, and drop other keys.

    Releases of transformers add keys to the RoPE parameters and remove others.
    """
    if not isinstance(found, dict) or not isinstance(own, dict):
        return found
    return {key: _filled(found[key], value) if key in found else value for key, value in own.items()}


def known_tokens(config: dict[str, Any], target: PretrainedConfig) -> int:
    """Return the `vocab_size` expected of the artifact, which may be below that of a resized or padded target."""
    size = config.get("vocab_size")
    return size if _is_int(size) and 0 < size < target.vocab_size else target.vocab_size


def calibrator_rank(settings: dict[str, Any]) -> int:
    """Rank of the calibrator; 0 without a calibrator."""
    return settings[RANK] if settings[ENABLED] else 0


def _differs(key: str, value: Any, expected: Any, why: str) -> str:
    return f"{CONFIG}: {key} is {value!r}; expected {expected!r}, {why}"


def _architecture_faults(config: dict[str, Any], target: PretrainedConfig) -> list[str]:
    own = target.to_dict() | {"vocab_size": known_tokens(config, target)}
    return [
        _differs(key, config.get(key), own[key], "the target's. Was it made for another target?")
        for key in SHARED + tuple(key for key in BUILT if key in config)
        if key in own and config.get(key) != own[key]
    ]


def _settings_faults(config: dict[str, Any]) -> list[str]:
    first, second = FLEXDRAFT_KEYS
    absent = [key for key in FLEXDRAFT_KEYS if not isinstance(config.get(key), dict)]
    if len(absent) == 2:
        return [f"{CONFIG}: neither {first} nor {second} is an object there. This is no FlexDraft drafter."]
    if absent:
        other = first if absent == [second] else second
        return [f"{CONFIG}: {absent[0]} is missing or no object; readers look for either. Copy {other} to it."]
    return []


def _differing(config: dict[str, Any]) -> list[str]:
    first, second = FLEXDRAFT_KEYS
    if not all(isinstance(config.get(key), dict) for key in FLEXDRAFT_KEYS):
        return []
    keys = sorted(config[first].keys() | config[second].keys())
    different = [key for key in keys if config[first].get(key) != config[second].get(key)]
    if different:
        return [f"{CONFIG}: {first} and {second} differ in {', '.join(different)}. They must be equal: correct one."]
    return []


def _layer_faults(config: dict[str, Any], settings: dict[str, Any], target: PretrainedConfig) -> list[str]:
    """Check that the draft layers are the target's last layers, in order."""
    total, ids = target.num_hidden_layers, settings.get(IDS)
    faults = []
    if config.get("num_target_layers") != total:
        faults.append(
            _differs("num_target_layers", config.get("num_target_layers"), total, "the number of the target's layers.")
        )
    if wrong := _ids_faults(ids):
        return faults + wrong
    if any(after != before + 1 for before, after in pairwise(ids)):
        faults.append(f"{CONFIG}: {IDS} is {ids}; expected consecutive numbers.")
    elif ids[-1] != total - 1 or ids[0] < 0:
        faults.append(f"{CONFIG}: {IDS} is {ids}; expected the last of the target's layers, which end at {total - 1}.")
    if config.get("num_hidden_layers") != len(ids):
        faults.append(_differs("num_hidden_layers", config.get("num_hidden_layers"), len(ids), f"the length of {IDS}."))
    kinds = layer_kinds(target)[-len(ids) :]
    if config.get("layer_types") != kinds:
        why = f"the target's last {len(ids)} layers'."
        faults.append(_differs("layer_types", config.get("layer_types"), kinds, why))
    window = getattr(target, "sliding_window", None)
    if "sliding_attention" in kinds and config.get("sliding_window") != window:
        faults.append(_differs("sliding_window", config.get("sliding_window"), window, "the target's."))
    return faults


def _ids_faults(ids: Any) -> list[str]:
    if isinstance(ids, list) and ids and all(_is_int(i) for i in ids):
        return []
    return [f"{CONFIG}: {IDS} is {ids!r}; expected a list of the target's last layers' numbers."]


def _calibrator_faults(settings: dict[str, Any]) -> list[str]:
    enabled, rank = settings.get(ENABLED), settings.get(RANK)
    faults = []
    if not isinstance(enabled, bool):
        faults.append(f"{CONFIG}: {ENABLED} is {enabled!r}; expected true or false.")
    if not _is_int(rank) or rank < 0:
        faults.append(f"{CONFIG}: {RANK} is {rank!r}; expected a number of 0 or more.")
    if not faults and enabled != (rank > 0):
        expected = "1 or more with a calibrator" if enabled else "0 without a calibrator"
        faults.append(f"{CONFIG}: {ENABLED} is {str(enabled).lower()}, but {RANK} is {rank}; expected {expected}.")
    return faults


def _extra_faults(settings: dict[str, Any]) -> list[str]:
    """Check the optional settings beyond the public contract."""
    found, faults = extras(settings), []
    if not isinstance(found["bonus_slot"], bool):
        faults.append(f"{CONFIG}: bonus_slot is {found['bonus_slot']!r}; expected true or false.")
    if not _is_int(found["chain_rank"]) or found["chain_rank"] < 0:
        faults.append(f"{CONFIG}: chain_rank is {found['chain_rank']!r}; expected a number of 0 or more.")
    return faults


def _block_faults(config: dict[str, Any], target: PretrainedConfig) -> list[str]:
    size = config.get("block_size")
    if not _is_int(size) or size < 2:
        return [_block_size_fault(size)]
    windows = [window for window in layer_windows(target) if window is not None]
    if windows and size > min(windows):
        return [f"{CONFIG}: block_size is {size}; expected at most {min(windows)}, the target's sliding window."]
    if size > target.max_position_embeddings:
        positions = target.max_position_embeddings
        return [f"{CONFIG}: block_size is {size}; expected at most {positions}, the target's positions."]
    return []


def _rope_faults(config: dict[str, Any], target: PretrainedConfig) -> list[str]:
    """Check that all RoPE keys equal the target's.

    Transformers 5 reads `rope_parameters`, or `rope_theta` and `rope_scaling` without it; 4.57 reads the latter two.
    """
    expected, by_kind = _rope_of(target), "rope_theta" not in (getattr(target, "rope_parameters", None) or {})
    if by_kind:  # per layer type, which 4.57 has no common key for
        config = config | {"rope_parameters": config.get("rope_parameters") or {}}
    elif "rope_parameters" not in config:
        expected.pop("rope_parameters")
    scaling = config.get("rope_scaling")
    if "rope_scaling" not in expected and not by_kind and scaling and not _is_default(scaling):
        expected["rope_scaling"] = None
    return [
        _differs(key, config.get(key), value, "the target's. Positions would be turned by other angles.")
        for key, value in expected.items()
        if config.get(key) != value
    ]


def _rope_of(target: PretrainedConfig) -> dict[str, Any]:
    """Return the RoPE keys and values that an artifact of this target must have."""
    own = getattr(target, "rope_parameters", None) or {}
    if "rope_theta" not in own:
        return {"rope_parameters": own}
    expected = {"rope_theta": own["rope_theta"], "rope_parameters": own}
    if not _is_default(own):
        expected["rope_scaling"] = {key: value for key, value in own.items() if key != "rope_theta"}
    return expected


def _is_default(rope: Any) -> bool:
    return isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"


def _block_size_fault(size: Any) -> str:
    return f"{CONFIG}: block_size is {size!r}; expected a number of 2 or more, since slot 0 is never drafted."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
