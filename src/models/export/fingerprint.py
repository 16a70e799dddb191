"""Target fingerprint: sampled weights, stored in the artifact, that distinguish the target from related models.

It consists of a few values from a few tensors rather than a hash, so that the same model is still recognized in a
different dtype, sharded, quantized or with padded embeddings, and the distance to a fine-tuned variant can be measured.
Quantized and adapted modules are sampled through their forward pass, so their internals do not matter.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

KEY = "target_fingerprint"  # in config.json
LAYERS = 8  # number of sampled layers, evenly spaced
TOKENS = tuple(range(3, 91, 11))  # sampled rows of embeddings and head, below any padding; modulo the vocabulary size
POINTS = 4  # sampled rows and columns per matrix
SAME = 0.005  # maximum relative distance of an unchanged tensor; casting the dtype stays below 0.004
QUANTIZED = 0.4  # maximum median distance of unchanged quantized tensors; 4-bit weights are at about 0.1
UNRELATED = 0.7  # larger distances mean unrelated weights; independent tensors are at about 1.4
# (maximum relative distance, fraction of the gain in tokens per step that is lost up to it); docs/guide/families.md
LOSS = ((0.1, 0.12), (0.25, 0.3), (0.5, 0.6), (UNRELATED, 0.9))


class OtherTarget(UserWarning):
    """Issued when the drafter was trained for a target with different weights."""


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a target with the one that a drafter was trained for."""

    distance: float  # root mean square of the relative distances of the changed tensors
    changed: tuple[str, ...]  # names of the tensors that differ by more than rounding
    compared: int  # number of compared tensors

    def warning(self) -> str | None:
        """Return a warning if the target differs from the one the drafter was trained for.

        Return None if it matches or no tensor could be compared.
        """
        if not self.changed:
            return None
        found = f"{len(self.changed)} of {self.compared} sampled tensors differ from the target the drafter was "
        found += f"trained for (relative distance {self.distance:.1%}; first: {self.changed[0]})"
        if self.distance > UNRELATED:
            return f"{found}: unrelated weights. Almost no drafts will be accepted; load the drafter's target."
        loss = next((lost for limit, lost in LOSS if self.distance <= limit), LOSS[-1][1])
        return (
            f"{found}: probably a fine-tuned variant or an adapter. The output stays lossless, but drafting gains up "
            f"to {loss:.0%} less. Train a drafter for this target, or load the original target."
        )


@torch.no_grad()
def fingerprint(target: PreTrainedModel) -> dict[str, str]:
    """Return the sampled values by module name, formatted with 5 significant digits."""
    return {name: " ".join(f"{value:.5g}" for value in _sample(target, name)) for name in _names(target)}


@torch.no_grad()
def compare(stored: Any, target: PreTrainedModel) -> Comparison:
    """Compare a target with an artifact's fingerprint. Modules the target does not have are skipped.

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
    """Return the sampled modules' names: embeddings, head, final norm, and all projections and norms in some layers."""
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
    """Return a few values of a module's weight, in a fixed order."""
    module: Any = _module(target, name)  # module attributes have no useful static types
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
    """Return entries [rows, columns] of a module's matrix. Unless it is a plain `nn.Linear`, run its forward pass."""
    if type(module) is nn.Linear and _is_plain(module):
        return module.weight[rows[:, None].to(module.weight.device), columns.to(module.weight.device)]
    large = 2.0**10 if dtype == torch.float16 else 2.0**16  # so large that adding the bias does not round it away
    probes = torch.zeros(len(columns) + 1, module.in_features, dtype=dtype, device=device)
    probes[range(len(columns)), columns] = large  # the last probe is zero and returns the bias
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
    """Return whether all tensors in a module are plain floats, i.e. not quantized."""
    tensors = [*module.parameters(), *module.buffers()]
    plain = (Tensor, nn.Parameter)
    return bool(tensors) and all(type(t) in plain and t.is_floating_point() and t.element_size() > 1 for t in tensors)


def _distance(expected: Tensor, found: Tensor) -> float:
    """Return the relative L2 distance: 0 if equal, about 1.4 if independent, infinite if the shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    scale = float((expected.square().sum() + found.square().sum()).div(2).sqrt())
    return float((expected - found).norm()) / scale if scale else 0.0


def _parsed(stored: Any) -> dict[str, list[float]]:
    try:
        return {name: [float(value) for value in text.split()] for name, text in stored.items()}
    except (AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{KEY} is not a fingerprint ({error}); expected module names mapped to numbers.") from error
