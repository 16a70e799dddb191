"""Checks an artifact for missing or damaged files, tensors with wrong shapes or dtypes, and bad values.

Each function returns all faults of its kind, and each fault names its file or tensor. Functions that take a directory
read one tensor at a time, except for `read_tensors`, so that checking a large artifact needs little memory.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import UserError
from models.artifact import CONFIG, INDEX, WEIGHTS, decoder_faults, read_json, why_no_object
from models.draft_config import OPTIONAL

PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# dtype name in safetensors -> dtype name in config.json
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Header:
    """Header entry of a tensor in a safetensors file."""

    shape: tuple[int, ...]
    dtype: str  # name in config.json, or in safetensors if not in DTYPES
    file: str


def file_faults(directory: Path) -> list[str]:
    """Check that all files of an export exist and are readable, and that none contains pickled weights."""
    faults = [
        f"{path.relative_to(directory)}: pickled weights, which can run arbitrary code when loaded. Delete the file; "
        "weights must be in *.safetensors."
        for path in sorted(directory.rglob("*"))
        if path.suffix in PICKLED
    ]
    return loading_faults(directory) + faults + decoder_faults(directory)[0]


def loading_faults(directory: Path) -> list[str]:
    """Check what loading the drafter requires: config and weights exist, are readable and match the index."""
    reason = why_no_object(directory / CONFIG)
    return ([reason] if reason else []) + _weight_file_faults(directory)


def headers(directory: Path) -> dict[str, Header]:
    """Return the headers of all tensors by name. The files must have no `loading_faults`."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                tensor = file.get_slice(name)
                dtype = tensor.get_dtype()
                found[name] = Header(tuple(tensor.get_shape()), DTYPES.get(dtype, dtype), path.name)
    return found


def tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of all tensors, one at a time."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def shape_faults(
    found: dict[str, Header], expected: dict[str, tuple[int, ...]], optional: dict[str, tuple[int, ...]] | None
) -> list[str]:
    """Check the names and shapes of the tensors.

    Args:
        expected: shapes of the required tensors.
        optional: shapes of further tensors that an artifact may contain; if None, other tensors are not checked.
    """
    faults = [
        f"{name}: missing from the weights; expected shape {shape}. Export the drafter again."
        for name, shape in sorted(expected.items())
        if name not in found
    ]
    known = expected | (optional or {})
    for name, header in sorted(found.items()):
        if name not in known and optional is None:
            continue
        if name not in known:
            faults.append(f"{name}: unexpected tensor in {header.file}{_hint(name)}.")
        elif header.shape != known[name]:
            faults.append(f"{name}: has shape {header.shape} in {header.file}; expected {known[name]}.")
    return faults


def dtype_faults(found: dict[str, Header], promised: Any) -> list[str]:
    """Check that all tensors have the floating-point dtype stated in the config.

    Args:
        promised: `dtype` in config.json.
    """
    faults = [
        f"{name}: has dtype {header.dtype} in {header.file}; expected one of {', '.join(DTYPES.values())}."
        for name, header in sorted(found.items())
        if header.dtype not in DTYPES.values()
    ]
    counts = Counter(header.dtype for header in found.values()).most_common()
    if faults or not counts:
        return faults
    common = counts[0][0]
    if len(counts) > 1:
        other = [f"{name} is {header.dtype}" for name, header in sorted(found.items()) if header.dtype != common]
        return [f"mixed dtypes: {counts[0][1]} tensors are {common}, but {some(other)}. Export them in the same dtype."]
    if promised != common:
        return [f"{CONFIG}: dtype is {promised!r}, but the tensors are {common}. Set dtype to {common!r}."]
    return []


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Read all tensors by name. The files must have no `loading_faults`.

    Raises:
        UserError: a tensor cannot be read.
    """
    try:
        return dict(tensors(directory))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory}: the weights cannot be read ({error}). Copy or export them again.") from error


def unfit_faults(found: dict[str, Tensor]) -> list[str]:
    """Check that all of a drafter's tensors are finite and have a supported floating-point dtype."""
    other = sorted(name for name, tensor in found.items() if str(tensor.dtype)[6:] not in DTYPES.values())
    if other:
        return [f"{some(other)}: has dtype {found[other[0]].dtype}; expected one of {', '.join(DTYPES.values())}."]
    broken = sorted(name for name, tensor in found.items() if not tensor.isfinite().all())
    return [f"non-finite values in {some(broken)}. Training diverged, or the file was altered."] if broken else []


def value_faults(directory: Path) -> tuple[list[str], list[str]]:
    """Check that all values are finite.

    Returns:
        Faults, and a warning if there are all-zero tensors, which may be untrained.
    """
    faults, zeros = [], []
    for name, tensor in tensors(directory):
        bad = (~tensor.isfinite()).nonzero()
        if len(bad):
            place = tuple(bad[0].tolist())
            faults.append(
                f"{name}: {len(bad)} of {tensor.numel()} values are not finite, the first at {list(place)}: "
                f"{tensor[place].item()}. Training diverged, or the file was altered; export an earlier checkpoint."
            )
        if not name.endswith(".bias") and not tensor.any():
            zeros.append(name)
    idle = [part.name for part, _ in OPTIONAL if any(part.owns(name) for name in zeros)]
    effect = f" ({', '.join(f'the {name} has no effect' for name in idle)})" if idle else ""
    return faults, [f"all zeros, possibly untrained: {some(zeros)}{effect}."] if zeros else []


def foreign_tensors(directory: Path, own: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the artifact's tensors that differ from the target's tensors of the same name.

    Args:
        own: the target's tensors by exported name; other tensors are not compared.
    """
    return [name for name, tensor in tensors(directory) if name in own and not _same(tensor, own[name])]


def _same(tensor: Tensor, own: Tensor) -> bool:
    """Compare in the coarser of the two dtypes, since either the artifact or the loaded target may be rounded."""
    coarser = max(tensor.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(tensor.to(coarser), own.to("cpu", coarser))


def _weight_file_faults(directory: Path) -> list[str]:
    present = {path.name for path in directory.glob("*.safetensors")}
    faults = [fault for name in sorted(present) if (fault := _unreadable(directory / name))]
    if not (directory / INDEX).exists():
        if WEIGHTS not in present:
            found = f"found only {some(sorted(present))}" if present else "found no *.safetensors"
            return [*faults, f"{WEIGHTS} and {INDEX}: missing; {found}. Copy or export the complete directory again."]
        stray = sorted(present - {WEIGHTS})
        return faults + [f"{name}: unexpected weights in addition to {WEIGHTS}. Delete the file." for name in stray]
    index = read_json(directory / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        return [*faults, f"{INDEX}: expected JSON with a weight_map from tensors to files. Export the drafter again."]
    return faults + _index_faults(directory, places, present)


def _index_faults(directory: Path, places: dict[str, str], present: set[str]) -> list[str]:
    """Check that the index matches the tensors in the files."""
    files = set(places.values())
    faults = [f"{file}: missing, but {INDEX} lists tensors in it. Copy the file." for file in sorted(files - present)]
    faults += [f"{file}: unexpected weights, not in {INDEX}. Delete the file." for file in sorted(present - files)]
    for file in sorted(file for file in files & present if not _unreadable(directory / file)):
        with safe_open(directory / file, "pt") as opened:
            held = set(opened.keys())
        promised = {name for name, place in places.items() if place == file}
        faults += [
            f"{name}: missing from {file}, where {INDEX} lists it. Copy or export the file again."
            for name in sorted(promised - held)
        ]
        faults += [
            f"{name}: found in {file}, but {INDEX} does not list it there. Copy or export the files again."
            for name in sorted(held - promised)
        ]
    return faults


def _unreadable(path: Path) -> str | None:
    """Return why a safetensors file is unreadable, or None if its header is valid and matches the file length."""
    try:
        with safe_open(path, "pt"):
            return None
    except (SafetensorError, OSError) as error:
        if not path.is_file() or not os.access(path, os.R_OK):
            return f"{path.name}: not a readable file ({error}). Copy or export it again."
        promised, size = _promised_bytes(path), path.stat().st_size
        if promised is None:
            return f"{path.name}: no safetensors header in {size} bytes ({error}). Copy or export it again."
        kind = "truncated" if size < promised else "damaged"
        return f"{path.name}: {kind}; it has {size} bytes, but its header describes {promised}. Copy it again."


def _promised_bytes(path: Path) -> int | None:
    """Return the file length that a safetensors header implies, or None if the header is unreadable.

    The file starts with the header length (8 bytes) and the header, which is JSON with the byte offsets of each tensor.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length + 8 > path.stat().st_size:
            return None
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            return 8 + length + max(ends, default=0)
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            return None


def _hint(name: str) -> str:
    if part := next((part for part, _ in OPTIONAL if part.owns(name)), None):
        return f"; {CONFIG} does not enable the {part.name} ({part.setting})"
    return "; an artifact contains only the drafter's own tensors"


def some(names: list[str], most: int = 4) -> str:
    """Format a list of names as text: the first `most` names, followed by the number of names left out."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
