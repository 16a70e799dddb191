"""Write and load the exported drafter (the artifact), and reject one that does not fit the target."""

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from data.errors import UserError
from models.artifact import (
    CONFIG,
    DECODER,
    DECODER_SHA256,
    FLEXDRAFT_KEYS,
    INDEX,
    OWN_DECODER,
    WEIGHTS,
    draft_settings,
    extras,
    read_config,
    sha256,
    write_object,
)
from models.draft import DraftModel
from models.export.config_checks import calibrator_rank, known_tokens, loading_faults
from models.export.download import artifact_directory
from models.export.fingerprint import KEY as FINGERPRINT
from models.export.fingerprint import OtherTarget, compare, fingerprint
from models.export.weight_checks import headers, read_tensors, some, unfit_faults
from models.export.weight_checks import loading_faults as file_loading_faults
from models.families import layer_kinds

MAX_SHARD_BYTES = 5 * 10**9


def artifact_config(draft: DraftModel) -> dict[str, Any]:
    """Build `config.json`: the target's architecture with L layers, and the keys that drafter inference needs."""
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
    # Beyond the public contract: other readers ignore these keys and their tensors.
    if draft.bonus_slot is not None:
        settings["bonus_slot"] = True
    if draft.chain_rank:
        settings["chain_rank"] = draft.chain_rank
    config.update({key: settings for key in FLEXDRAFT_KEYS})
    config |= _rope_of_4_57(config.get("rope_parameters") or {})
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]  # name in transformers 4.57
    for key in ("_name_or_path", "architectures", "transformers_version", "quantization_config"):
        config.pop(key, None)
    return config


def _rope_of_4_57(rope: dict[str, Any]) -> dict[str, Any]:
    """Convert the `rope_parameters` of transformers 5 to the keys of transformers 4.57."""
    local = {}
    if "sliding_attention" in rope:  # per layer type: Gemma 3
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


def export_draft(draft: DraftModel, directory: Path, dtype: torch.dtype, *, complete: bool = False) -> None:
    """Write the artifact, including the code with which plain transformers decodes. Equal weights give equal bytes.

    Args:
        complete: also write the target's tensors that the public release's module owns but never runs; it warns if
            they are missing.

    Raises:
        ValueError: a tensor is not finite.
    """
    parameters = (draft.shared_parameters() if complete else {}) | draft.own_parameters()
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in sorted(parameters.items())}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{some(broken)}: not finite in {dtype}. Training diverged; lower the learning rate.")
    config = artifact_config(draft) | {"dtype": str(dtype).removeprefix("torch.")}
    config |= {FINGERPRINT: fingerprint(draft.target), DECODER_SHA256: sha256(OWN_DECODER)}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as new:
        _write(Path(new), config, tensors)
        for stale in (*directory.glob("*.safetensors"), directory / INDEX):  # loaders would read an earlier one
            stale.unlink(missing_ok=True)
        for file in [file for file in Path(new).rglob("*") if file.is_file()]:
            place = directory / file.relative_to(new)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config, decoder code and weights into an empty directory."""
    write_object(directory / CONFIG, config)
    (directory / DECODER).parent.mkdir()
    shutil.copyfile(OWN_DECODER, directory / DECODER)
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
    shutil.copymode(file.parent / CONFIG, file)  # safetensors creates files readable by the owner only


def load_draft(source: str | Path, target: PreTrainedModel, *, revision: str | None = None) -> DraftModel:
    """Load the drafter from an exported directory or Hub id, for the target that it was trained for.

    The exported values are cast to the target's dtype. The target's embeddings may have more rows than in training
    (resized, padded); the calibrator and the chain do not change the logits of those tokens. Warn if the target's
    weights differ from those in training, according to the fingerprint in the artifact (`models.export.fingerprint`).

    Raises:
        ValueError: the artifact is missing, damaged, or made for another target.
    """
    if not isinstance(target, PreTrainedModel):
        raise UserError(
            f"The target is a {type(target).__name__}; expected a model of transformers, as load_target gives. Of a "
            "PEFT model, take target.merge_and_unload(), or target.get_base_model(), in which LoRA stays active. "
            "Activated LoRA and adapter_names do not: by PEFT they act in its own generate alone."
        )
    directory = artifact_directory(source, revision=revision)
    config, settings = _checked(directory, target)
    draft = DraftModel(
        target,
        num_layers=len(settings["target_layer_ids"]),
        block_size=config["block_size"],
        calibrator_rank=calibrator_rank(settings),
        **extras(settings),
    )
    own = draft.own_parameters()
    shared = draft.shared_parameters().keys() - own.keys()
    tensors = {name: tensor for name, tensor in read_tensors(directory).items() if name not in shared}
    if faults := unfit_faults(tensors):
        raise UserError(f"{directory}: {' '.join(faults)}")
    load_draft_weights(own, _with_added_rows(tensors, own), source=str(directory))
    if FINGERPRINT in config:
        try:
            warning = compare(config[FINGERPRINT], target).warning()
        except ValueError as error:
            raise UserError(f"{directory / CONFIG}: {error}") from error
        if warning:
            warnings.warn(f"{directory}: {warning}", OtherTarget, stacklevel=2)
    return draft.requires_grad_(False).eval()


def _with_added_rows(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pad the output layers of calibrator and chain with zero rows for tokens that were added to the target."""
    added = {}
    for name in [f"{part}.2.{kind}" for part in ("anchor_bias_mlp", "chain_mlp") for kind in ("weight", "bias")]:
        if name in tensors and name in own and len(tensors[name]) < len(own[name]):
            more = tensors[name].new_zeros(len(own[name]) - len(tensors[name]), *tensors[name].shape[1:])
            added[name] = torch.cat([tensors[name], more])
    return tensors | added


def _checked(directory: Path, target: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check files and config of an artifact against the target. Return the config and the drafter settings in it.

    Raises:
        UserError: the files or the config are damaged or do not fit the target.
    """
    config = read_config(directory)
    if faults := file_loading_faults(directory):
        raise UserError(f"{directory}: no whole drafter. {' '.join(faults)}")
    expected = {
        "model_type": target.config.model_type,
        "num_target_layers": target.config.num_hidden_layers,
        "hidden_size": target.config.hidden_size,
        "vocab_size": known_tokens(config, target.config),
    }
    for key, value in expected.items():
        if config.get(key) != value:
            raise UserError(
                f"{directory}: drafter for a target with {key}={config.get(key)}, but this one has {value}."
            )
    if faults := loading_faults(config, target.config):
        raise UserError(f"{directory}: not for this target, or damaged. {' '.join(faults)}")
    settings = draft_settings(config)
    # Check before allocation: a wrong rank may be huge.
    found, ranks = headers(directory), {"anchor_bias_mlp": calibrator_rank(settings)}
    ranks["chain_mlp"] = extras(settings)["chain_rank"]
    for name, rank in ranks.items():
        bias = found.get(f"{name}.0.bias")
        if rank and bias is None:
            raise UserError(f"{directory}: tensors missing: ['{name}.0.bias'], of {CONFIG}'s rank {rank}.")
        if rank and bias.shape != (rank,):
            raise UserError(f"{directory}: {name}.0.bias has shape {bias.shape}, expected {(rank,)} by {CONFIG}.")
    return config, settings


@torch.no_grad()
def load_draft_weights(own: dict[str, Tensor], tensors: dict[str, Tensor], *, source: str) -> None:
    """Copy tensors into the drafter parameters of the same exported names, such as `own_parameters()`.

    Raises:
        ValueError: names or shapes differ.
    """
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        listed = (f"{names[:4]}{f' and {len(names) - 4} more' * (len(names) > 4)}" for names in (missing, unexpected))
        raise UserError("{}: tensors missing: {}; unexpected: {}.".format(source, *listed).replace("[]", "none"))
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            raise UserError(f"{source}: {name} has shape {shapes}.")
        parameter.copy_(tensors[name])


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split tensors, in order, into shards of at most MAX_SHARD_BYTES. A larger tensor gets a separate shard."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
