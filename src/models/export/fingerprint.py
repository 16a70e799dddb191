"""A fingerprint of the target in the artifact: sampled weights that tell a drafter's target from its relatives.

A few values of a few tensors are stored, not a hash, so that the same model in another dtype, sharded, with padded
embeddings or quantised is recognised, and so that the distance to a fine-tuned relative can be measured. Values are
read from modules by what they compute: it does not matter what the modules of a quantised or adapted target are made
of.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

KEY = "target_fingerprint"  # in config.json
LAYERS = 8  # layers sampled, spread evenly
TOKENS = tuple(range(3, 91, 11))  # rows of embeddings and head, below any padding; modulo a smaller vocabulary
POINTS = 4  # rows and columns sampled of a matrix
SAME = 0.005  # relative distance of a tensor up to which it is the same: casts between dtypes stay below 0.004
QUANTISED = 0.4  # likewise of a quantised tensor; 4 bits make about 0.1
UNRELATED = 0.7  # of two independent tensors of one scale it is 1.4
# Relative distance -> share of the gain in tokens per step that is lost, measured (docs/guide/families.md).
LOSS = ((0.1, 0.12), (0.25, 0.3), (0.5, 0.6), (UNRELATED, 0.9))


class OtherTarget(UserWarning):
    """A drafter was loaded for weights that it was not trained for."""


@dataclass(frozen=True)
class Comparison:
    """How far a target is from the one that a drafter was trained for."""

    distance: float  # relative, root mean square over the tensors that changed
    changed: tuple[str, ...]  # names of tensors that differ by more than their dtype explains
    compared: int  # tensors

    def warning(self) -> str | None:
        """What to warn of; None if this is the drafter's target, or nothing could be compared."""
        if not self.changed:
            return None
        found = f"{len(self.changed)} of {self.compared} sampled tensors differ from those of the target that the "
        found += f"drafter was trained for (relative distance {self.distance:.1%}, first {self.changed[0]})"
        if self.distance > UNRELATED:
            return f"{found}: other weights. Expect next to no accepted drafts; load the drafter's own target."
        loss = next((share for limit, share in LOSS if self.distance <= limit), LOSS[-1][1])
        return (
            f"{found}: a fine-tuned relative, or an adapter. The output stays this target's own; expect up to "
            f"{loss:.0%} less gain from drafting. Train a drafter for this target, or load the original one."
        )


@torch.no_grad()
def fingerprint(target: PreTrainedModel) -> dict[str, str]:
    """Sampled values by the name of a module, as text with 5 significant digits."""
    return {name: " ".join(f"{value:.5g}" for value in _sample(target, name)) for name in _names(target)}


@torch.no_grad()
def compare(stored: Any, target: PreTrainedModel) -> Comparison:
    """A target against the fingerprint of an artifact. Modules that only one of them has are passed over.

    Raises:
        ValueError: `stored` is no fingerprint.
    """
    fine, coarse = {}, {}
    for name, expected in _parsed(stored).items():
        module = _module(target, name)
        if module is None:
            continue
        distance = _distance(torch.tensor(expected), torch.tensor(_sample(target, name)))
        (fine if _is_plain(module) else coarse)[name] = distance
    changed = [name for name, distance in fine.items() if not distance <= SAME]
    if coarse and not median(coarse.values()) <= QUANTISED:
        changed += list(coarse)
    squares = [(fine | coarse)[name] ** 2 for name in changed]
    distance = (sum(squares) / len(squares)) ** 0.5 if squares else 0.0
    return Comparison(distance, tuple(changed), len(fine) + len(coarse))


def _names(target: PreTrainedModel) -> list[str]:
    """What is sampled: embeddings, head, and of some layers all projections and norms."""
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
    """A few values of a module, in a fixed order."""
    module = _module(target, name)
    device = target.get_input_embeddings().weight.device
    if _is_norm(module):
        values = module.weight[_spread(len(module.weight), 2 * POINTS)]
    elif name == "embed_tokens":
        embedded = module(torch.tensor(TOKENS, device=device) % module.weight.shape[0])
        values = embedded[:, _spread(embedded.shape[-1])]
    else:
        rows = torch.tensor(TOKENS) % module.out_features if name == "lm_head" else _spread(module.out_features)
        values = _entries(module, rows, _spread(module.in_features), target.dtype, device)
    return values.float().flatten().tolist()


def _entries(module: nn.Module, rows: Tensor, columns: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns] of the matrix that a module multiplies with; of one that is not plain, by multiplying."""
    if type(module) is nn.Linear and _is_plain(module):
        return module.weight[rows[:, None].to(module.weight.device), columns.to(module.weight.device)]
    large = 2.0**10 if dtype == torch.float16 else 2.0**16  # so that a large bias does not round the rest away
    probes = torch.zeros(len(columns) + 1, module.in_features, dtype=dtype, device=device)
    probes[range(len(columns)), columns] = large  # the last stays zero: its outcome is the bias
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
    """Whether its tensors are plain floats; others are quantised in some way."""
    tensors = [*module.parameters(), *module.buffers()]
    plain = (Tensor, nn.Parameter)
    return bool(tensors) and all(type(t) in plain and t.is_floating_point() and t.element_size() > 1 for t in tensors)


def _distance(expected: Tensor, found: Tensor) -> float:
    """Of two tensors relative to their scale: 0 for equal ones, about 1.4 for independent ones."""
    if expected.shape != found.shape:
        return float("inf")
    scale = float((expected.square().sum() + found.square().sum()).div(2).sqrt())
    return float((expected - found).norm()) / scale if scale else 0.0


def _parsed(stored: Any) -> dict[str, list[float]]:
    try:
        return {name: [float(value) for value in text.split()] for name, text in stored.items()}
    except (AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{KEY} is no fingerprint ({error}); expected names of modules with numbers.") from error
