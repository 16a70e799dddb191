"""Target fingerprint: sampled weights, stored in the artifact, that distinguish the target from related models.

It stores a few values of a few tensors instead of a hash, so that the same model is recognized in another dtype,
sharded, with padded embeddings or quantized, and so that the distance to a fine-tuned variant can be measured. Values
are read through the forward of modules, so the internals of quantized or adapted modules do not matter.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

KEY = "target_fingerprint"  # in config.json
LAYERS = 8  # number of sampled layers, evenly spaced
TOKENS = tuple(range(3, 91, 11))  # rows of embeddings and head, below any padding; taken modulo the vocabulary size
POINTS = 4  # sampled rows and columns per matrix
SAME = 0.005  # maximum relative distance of an unchanged tensor; dtype casts stay below 0.004
QUANTIZED = 0.4  # likewise for the median over quantized tensors; 4-bit weights give about 0.1
UNRELATED = 0.7  # independent tensors of the same scale have distance 1.4
# Relative distance -> lost fraction of the gain in tokens per step, measured (docs/guide/families.md).
LOSS = ((0.1, 0.12), (0.25, 0.3), (0.5, 0.6), (UNRELATED, 0.9))


class OtherTarget(UserWarning):
    """Warning: the drafter was trained for a target with other weights."""


@dataclass(frozen=True)
class Comparison:
    """Distance between a target and the one that the drafter was trained for."""

    distance: float  # root mean square of the relative distances of the changed tensors
    changed: tuple[str, ...]  # names of tensors that differ beyond rounding
    compared: int  # number of compared tensors

    def warning(self) -> str | None:
        """Return the warning text; None if this is the drafter's target or no tensor could be compared."""
        if not self.changed:
            return None
        found = f"{len(self.changed)} of {self.compared} sampled tensors differ from the target that the drafter was "
        found += f"trained for (relative distance {self.distance:.1%}, first {self.changed[0]})"
        if self.distance > UNRELATED:
            return f"{found}: other weights. Almost no drafts will be accepted; load the drafter's target."
        loss = next((lost for limit, lost in LOSS if self.distance <= limit), LOSS[-1][1])
        return (
            f"{found}: a fine-tuned variant, or an adapter. The output stays lossless, but drafting gains up to "
            f"{loss:.0%} less. Train a drafter for this target, or load the original target."
        )


@torch.no_grad()
def fingerprint(target: PreTrainedModel) -> dict[str, str]:
    """Return the sampled values per module name, as text with 5 significant digits."""
    return {name: " ".join(f"{value:.5g}" for value in _sample(target, name)) for name in _names(target)}


@torch.no_grad()
def compare(stored: Any, target: PreTrainedModel) -> Comparison:
    """Compare a target with the fingerprint of an artifact. Modules missing from the target are skipped.

    Raises:
        ValueError: `stored` is not a fingerprint.
    """
    fine: dict[str, float] = {}
    coarse: dict[str, float] = {}
    for name, expected in _parsed(stored).items():
        module = _module(target, name)
        if module is None:
            continue
        distance = _distance(torch.tensor(expected), torch.tensor(_sample(target, name)))
        (fine if _is_plain(module) else coarse)[name] = distance
    changed = [name for name, distance in fine.items() if not distance <= SAME]
    if coarse and not median(coarse.values()) <= QUANTIZED:
        changed += list(coarse)
    squares = [(fine | coarse)[name] ** 2 for name in changed]
    distance = (sum(squares) / len(squares)) ** 0.5 if squares else 0.0
    return Comparison(distance, tuple(changed), len(fine) + len(coarse))


def _names(target: PreTrainedModel) -> list[str]:
    """Names of the sampled modules: embeddings, head, final norm, and all projections and norms of some layers."""
    last = len(target.model.layers) - 1
    names = ["embed_tokens", "lm_head", "norm"]
    for i in sorted({round(k * last / (LAYERS - 1)) for k in range(LAYERS)}):
        names += [f"layers.{i}.{n}" for n, m in target.model.layers[i].named_modules() if _is_matrix(m) or _is_norm(m)]
    return names


def _module(target: PreTrainedModel, name: str) -> nn.Module | None:
    if name == "embed_tokens":
        return target.get_input_embeddings()
    if name == "lm_head":
        return target.get_output_embeddings()
    try:
        found = target.model.get_submodule(name)
    except AttributeError:
        return None
    return found if _is_matrix(found) or _is_norm(found) else None


def _sample(target: PreTrainedModel, name: str) -> list[float]:
    """Sample a few values of a module, in a fixed order."""
    module: Any = _module(target, name)  # attributes of modules have no useful types
    device = cast(Tensor, target.get_input_embeddings().weight).device
    if _is_norm(module):
        values = module.weight[_spread(len(module.weight), 2 * POINTS)]
    elif name == "embed_tokens":
        embedded = module(torch.tensor(TOKENS, device=device) % module.weight.shape[0])
        values = embedded[:, _spread(embedded.shape[-1])]
    else:
        rows = torch.tensor(TOKENS) % module.out_features if name == "lm_head" else _spread(module.out_features)
        values = _entries(module, rows, _spread(module.in_features), target.dtype, device)
    return values.float().flatten().tolist()


def _entries(module: Any, rows: Tensor, columns: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return entries [rows, columns] of a module's matrix, by multiplication unless it is a plain `nn.Linear`."""
    if type(module) is nn.Linear and _is_plain(module):
        return module.weight[rows[:, None].to(module.weight.device), columns.to(module.weight.device)]
    large = 2.0**10 if dtype == torch.float16 else 2.0**16  # large enough that the bias does not round the entries away
    probes = torch.zeros(len(columns) + 1, module.in_features, dtype=dtype, device=device)
    probes[range(len(columns)), columns] = large  # the last probe is zero: it returns the bias
    outcome = module(probes).float()
    return (outcome[:-1, rows] - outcome[-1:, rows]).T / large


def _spread(size: int, count: int = POINTS) -> Tensor:
    return torch.arange(count) * (size - 1) // (count - 1)


def _is_matrix(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point() and not _is_matrix(module)


def _is_plain(module: nn.Module) -> bool:
    """Return whether all tensors of a module are plain floats, that is, not quantized."""
    tensors = [*module.parameters(), *module.buffers()]
    plain = (Tensor, nn.Parameter)
    return bool(tensors) and all(type(t) in plain and t.is_floating_point() and t.element_size() > 1 for t in tensors)


def _distance(expected: Tensor, found: Tensor) -> float:
    """Relative L2 distance of two tensors: 0 if equal, about 1.4 if independent, infinite if the shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    scale = float((expected.square().sum() + found.square().sum()).div(2).sqrt())
    return float((expected - found).norm()) / scale if scale else 0.0


def _parsed(stored: Any) -> dict[str, list[float]]:
    try:
        return {name: [float(value) for value in text.split()] for name, text in stored.items()}
    except (AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{KEY} is not a fingerprint ({error}); expected module names with numbers.") from error
