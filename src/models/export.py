"""The artifact that the inference side loads: writing it, reading it back, refusing what does not fit."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from models.draft import DraftModel
from models.families import layer_kinds
from models.fingerprint import KEY as FINGERPRINT
from models.fingerprint import compare, fingerprint
from models.hub import artifact_directory
from models.selection import Selection

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
# Both hold the same settings: the public release's code reads the first, its published checkpoint carries the second.
FLEXDRAFT_KEYS = ("flexdraft_config", "dflash_config")

RECOMMENDED = "recommended_decoding"  # within both
DECODER = Path("custom_generate", "generate.py")  # where transformers looks for it


def artifact_config(draft: DraftModel) -> dict[str, Any]:
    """`config.json`: the target's architecture with L layers, and what the inference side asks for beyond it."""
    config = draft.target.config.to_dict()
    last = slice(draft.split_layer, None)
    config["num_target_layers"] = config["num_hidden_layers"]
    config["num_hidden_layers"] = len(draft.layers)
    config["layer_types"] = layer_kinds(draft.target.config)[last]
    config["block_size"] = draft.block_size
    config["dtype"] = str(draft.mask_embedding.dtype).removeprefix("torch.")
    settings = {
        "target_layer_ids": list(range(draft.split_layer, config["num_target_layers"])),
        "enable_anchor_bias_logits": draft.anchor_bias_mlp is not None,
        "anchor_bias_rank": draft.calibrator_rank,
    }
    # Beyond the public contract: its readers pass over these keys, and over the tensors.
    if draft.bonus_slot is not None:
        settings["bonus_slot"] = True
    if draft.chain_rank:
        settings["chain_rank"] = draft.chain_rank
    config.update({key: settings for key in FLEXDRAFT_KEYS})
    config |= _rope_of_4_57(config.get("rope_parameters") or {})
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]  # as 4.57 calls them
    for key in ("_name_or_path", "architectures", "transformers_version", "quantization_config"):
        config.pop(key, None)
    return config


def extras(settings: dict[str, Any]) -> dict[str, Any]:
    """What a drafter has beyond the paper's by the settings of its `config.json`, as arguments of `DraftModel`."""
    return {key: settings.get(key, absent) for key, absent in (("bonus_slot", False), ("chain_rank", 0))}


def _rope_of_4_57(rope: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4.57 reads in place of the `rope_parameters` of 5."""
    local = {}
    if "sliding_attention" in rope:  # by kind of layer: Gemma 3
        local = {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return local
    kind = rope.get("rope_type", "default")
    if kind == "longrope":  # no other key is taken there
        scaling = {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    else:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if kind != "default":
        local["rope_scaling"] = scaling
    return {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope} | local


def export_draft(draft: DraftModel, directory: Path, dtype: torch.dtype, *, complete: bool = False) -> None:
    """Write the artifact, and beside it the code with which plain transformers decodes. The same weights give the same
    bytes.

    Args:
        complete: whether to write the target's tensors too that the public release's module owns, but never runs; it
            warns without them.

    Raises:
        ValueError: a tensor holds a value that is not finite.
    """
    parameters = (draft.shared_parameters() if complete else {}) | draft.own_parameters()
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in sorted(parameters.items())}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{', '.join(broken)}: not finite in {dtype}. Training diverged; lower the learning rate.")
    config = artifact_config(draft) | {"dtype": str(dtype).removeprefix("torch.")}
    config[FINGERPRINT] = fingerprint(draft.target)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / DECODER).parent.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).parent / DECODER, directory / DECODER)
    shards = _shards(tensors)
    if len(shards) == 1:
        _save(tensors, directory / WEIGHTS)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _save(shard, directory / name)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copymode(file.parent / CONFIG, file)  # safetensors lets nobody else read it


def recommend(directory: Path, settings: dict[str, Any] | None) -> None:
    """Write down in an artifact's config which arguments of `decoding.generate` suit a device; None: nothing is known.

    Readers that do not know the key pass over it.
    """
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    for key in FLEXDRAFT_KEYS:
        config[key].pop(RECOMMENDED, None)
        if settings:
            config[key][RECOMMENDED] = settings
    temporary = directory / f".{CONFIG}.tmp"
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, directory / CONFIG)


def recommended(source: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """What an artifact (directory or Hub id) recommends as arguments of `decoding.generate`; nothing if unmeasured."""
    directory = artifact_directory(source, revision=revision)
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    found = next(config[key] for key in FLEXDRAFT_KEYS if key in config).get(RECOMMENDED)
    if not found:
        return {}
    selection = Selection(found["selection"], found["threshold"])
    return {"parallel_rows": found["parallel_rows"], "selection": selection, "calibrate": found["calibrate"]}


def without_recommendation(directory: Path) -> dict[str, Any]:
    """An artifact's config as it was exported."""
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    for key in FLEXDRAFT_KEYS:
        config[key].pop(RECOMMENDED, None)
    return config


def load_draft(source: str | Path, target: PreTrainedModel, *, revision: str | None = None) -> DraftModel:
    """The drafter of an exported directory or Hub id, for the target that it was trained for.

    Its parameters keep the exported values, in the target's dtype. Warns if the target's weights are not those that the
    drafter was trained for, by the fingerprint in the artifact (`models.fingerprint`).

    Raises:
        ValueError: no artifact there, or one for another target.
    """
    directory = artifact_directory(source, revision=revision)
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        settings = next(config[key] for key in FLEXDRAFT_KEYS if key in config)
    except (OSError, StopIteration) as error:
        raise ValueError(
            f"{directory}: no exported drafter there ({CONFIG} with {FLEXDRAFT_KEYS[0]} expected)."
        ) from error
    layers = settings["target_layer_ids"]
    expected = {
        "model_type": target.config.model_type,
        "num_target_layers": target.config.num_hidden_layers,
        "hidden_size": target.config.hidden_size,
        "vocab_size": target.config.vocab_size,
    }
    for key, value in expected.items():
        if config.get(key) != value:
            raise ValueError(
                f"{directory}: drafter for a target with {key}={config.get(key)}, but this one has {value}."
            )
    rank = settings["anchor_bias_rank"] if settings["enable_anchor_bias_logits"] else 0
    draft = DraftModel(
        target,
        num_layers=len(layers),
        block_size=config["block_size"],
        calibrator_rank=rank,
        **extras(settings),
    )
    own = draft.own_parameters()
    shared = draft.shared_parameters().keys() - own.keys()
    tensors = {name: tensor for name, tensor in _read_tensors(directory).items() if name not in shared}
    load_draft_weights(own, tensors, source=str(directory))
    if FINGERPRINT in config and (warning := compare(config[FINGERPRINT], target).warning()):
        warnings.warn(f"{directory}: {warning}", stacklevel=2)
    return draft.requires_grad_(False).eval()


@torch.no_grad()
def load_draft_weights(own: dict[str, Tensor], tensors: dict[str, Tensor], *, source: str) -> None:
    """Copy tensors under their exported names into parameters of a drafter, such as its `own_parameters()`.

    Raises:
        ValueError: names or shapes differ.
    """
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"{source}: tensors missing: {missing or 'none'}; unexpected: {unexpected or 'none'}.")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            raise ValueError(f"{source}: {name} has shape {shapes}.")
        parameter.copy_(tensors[name])


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    if not (directory / INDEX).exists():
        return load_file(directory / WEIGHTS)
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors.update(load_file(directory / shard))
    return tensors


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """In the order of names, as few shards as the greatest size allows."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
