"""Writes and loads exported drafters (artifacts), and rejects those that do not fit the target."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
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
    INDEX,
    OWN_DECODER,
    WEIGHTS,
    read_config,
    sha256,
    write_object,
)
from models.draft import DraftModel
from models.draft_config import DraftConfig, other_target, target_identity
from models.export.config import artifact_config, config_faults, known_tokens
from models.export.download import artifact_directory
from models.export.fingerprint import KEY as FINGERPRINT
from models.export.fingerprint import OtherTarget, compare, fingerprint
from models.export.weight_checks import headers, read_tensors, shape_faults, some, unfit_faults
from models.export.weight_checks import loading_faults as file_loading_faults

MAX_SHARD_BYTES = 5 * 10**9


def export_draft(draft: DraftModel, directory: Path, dtype: torch.dtype, *, complete: bool = False) -> None:
    """Write the artifact, including the decoder for plain transformers. Equal weights produce identical bytes.

    Args:
        complete: also write the target's tensors in the draft layers. The public release's module declares but
            never uses them, and warns if they are missing.

    Raises:
        ValueError: a tensor has non-finite values in `dtype`.
    """
    parameters = (draft.shared_parameters() if complete else {}) | draft.own_parameters()
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in sorted(parameters.items())}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"Non-finite values in {some(broken)} ({dtype}). Training diverged; lower the learning rate.")
    config = artifact_config(draft.target.config, draft.config, dtype)
    config |= {FINGERPRINT: fingerprint(draft.target), DECODER_SHA256: sha256(OWN_DECODER)}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as new:
        _write(Path(new), config, tensors)
        # Remove the weights of an earlier export, which loaders would read as well.
        for stale in (*directory.glob("*.safetensors"), directory / INDEX):
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
    shutil.copymode(file.parent / CONFIG, file)  # safetensors makes files readable only by their owner


def load_draft(source: str | Path, target: PreTrainedModel, *, revision: str | None = None) -> DraftModel:
    """Load a drafter from an exported directory or a Hub id, for the target it was trained for.

    The exported values are cast to the target's dtype. The target's embeddings may have more rows than during training
    (resized or padded); calibrator and chain leave the logits of the added tokens unchanged. If the target's weights
    differ from the fingerprint in the artifact (`models.export.fingerprint`), an `OtherTarget` warning is issued.

    Raises:
        ValueError: the artifact is missing, damaged, or made for a different target.
    """
    if not isinstance(target, PreTrainedModel):
        raise UserError(
            f"The target is a {type(target).__name__}; expected a transformers model, as returned by load_target. For "
            "a PEFT model, pass target.merge_and_unload() or target.get_base_model(). The latter keeps LoRA active. "
            "Activated LoRA and adapter_names work only in PEFT's own generate."
        )
    directory = artifact_directory(source, revision=revision)
    config = _checked(directory, target)
    draft = DraftModel(target, DraftConfig.from_artifact(config))
    own = draft.own_parameters()
    shared = draft.shared_parameters().keys() - own.keys()
    tensors = {name: tensor for name, tensor in read_tensors(directory).items() if name not in shared}
    if faults := unfit_faults(tensors):
        raise UserError(f"{directory}: {' '.join(faults)}")
    load_draft_weights(own, _with_added_rows(tensors, own, draft.config.names()), source=str(directory))
    if FINGERPRINT in config:
        try:
            warning = compare(config[FINGERPRINT], target).warning()
        except ValueError as error:
            raise UserError(f"{directory / CONFIG}: {error}") from error
        if warning:
            warnings.warn(f"{directory}: {warning}", OtherTarget, stacklevel=2)
    return draft.requires_grad_(False).eval()


def _with_added_rows(tensors: dict[str, Tensor], own: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Pad the named tensors with zero rows for tokens that were added to the target."""
    added = {}
    for name in names:
        if name in tensors and tensors[name].shape[1:] == own[name].shape[1:] and len(tensors[name]) < len(own[name]):
            more = tensors[name].new_zeros(len(own[name]) - len(tensors[name]), *tensors[name].shape[1:])
            added[name] = torch.cat([tensors[name], more])
    return tensors | added


def _checked(directory: Path, target: PreTrainedModel) -> dict[str, Any]:
    """Check an artifact's files and config against the target, and return the config.

    Raises:
        UserError: the files or the config are damaged or do not fit the target.
    """
    config = read_config(directory)
    if faults := file_loading_faults(directory):
        raise UserError(f"{directory}: the drafter is incomplete. {' '.join(faults)}")
    identity = target_identity(target.config) | {"vocab_size": known_tokens(config, target.config)}
    if different := other_target(config, identity):
        raise UserError(f"{directory}: the drafter was trained for a target with {different}.")
    if faults := config_faults(config, target.config, complete=False):
        raise UserError(f"{directory}: damaged, or made for a different target. {' '.join(faults)}")
    # Check shapes before anything is allocated, since a wrong rank may be huge.
    expected = DraftConfig.from_artifact(config).tensors(config["hidden_size"], config["vocab_size"])
    if faults := shape_faults(headers(directory), expected, None):
        raise UserError(f"{directory}: the weights do not match {CONFIG}. {' '.join(faults)}")
    return config


@torch.no_grad()
def load_draft_weights(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into drafter parameters, e.g. `own_parameters()`, matching them by exported name.

    Raises:
        ValueError: names or shapes differ.
    """
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        listed = (f"{names[:4]}{f' and {len(names) - 4} more' * (len(names) > 4)}" for names in (missing, unexpected))
        raise UserError(
            "{}: missing tensors: {}; unexpected tensors: {}.".format(source, *listed).replace("[]", "none")
        )
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)}; expected {tuple(parameter.shape)}"
            raise UserError(f"{source}: {name} has shape {shapes}.")
        parameter.copy_(tensors[name])


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split tensors, in order, into shards of at most MAX_SHARD_BYTES. A larger tensor gets a shard to itself."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
