"""LoRA adapters (arXiv 2106.09685, via PEFT): Attention Tuning trains low-rank updates instead of full projections.

PEFT's modules wrap the target's projections, which are shared and frozen, not copied. Later stages do not depend on
LoRA: `LoraDraft.merged` returns an ordinary `DraftModel`.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.artifact import CONFIG, write_object
from models.draft import DraftModel, shallow_copy
from models.draft_config import ATTENTION_TUNING, DraftConfig, other_target, target_identity
from models.export.artifact_io import artifact_config, load_draft_weights

WEIGHTS, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's file names
NAME = "default"  # adapter name in PEFT's modules
PREFIX = "base_model.model."  # prefix of PEFT's tensor names


@dataclass(frozen=True)
class Lora:
    """Settings in conf/adapter/lora.yaml. The update is `alpha / rank * B A`, with A [rank, in] and B [out, rank]."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | None = None  # linear projections of the attention module; None selects all

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be >= 1.")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}: must be > 0.")

    def projectors(self, attention: nn.Module) -> list[str]:
        """Return the names of the projections that receive an update.

        Raises:
            ValueError: `target_modules` is empty or names something other than a linear projection of the attention, or
                `rank` exceeds the smallest dimension of a projection.
        """
        known = [name for name, child in attention.named_children() if isinstance(child, nn.Linear)]
        chosen = known if self.target_modules is None else list(self.target_modules)
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(
                f"target_modules={chosen}: expected one or more of {', '.join(known)}, or null for all of them."
            )
        least = min(min(getattr(attention, name).weight.shape) for name in chosen)
        if self.rank > least:
            raise ValueError(
                f"rank={self.rank}: expected at most {least}, the smallest dimension of the adapted projections."
            )
        return [name for name in known if name in chosen]


class LoraDraft(DraftModel):
    """Drafter for Attention Tuning whose projections are the target's plus low-rank updates.

    B is initialized to 0, so training starts from the target. Query and key norms are trainable copies, as in full
    tuning; biases are shared with the target.
    """

    def __init__(
        self, target: PreTrainedModel, lora: Lora, config: DraftConfig, *, dtype: torch.dtype | None = None
    ) -> None:
        """Build a LoRA drafter on top of a target.

        Args:
            config: as in `DraftModel`; parts trained in stage 2 are ignored.
            dtype: dtype of the trained parameters, also used to merge updates into the weights; defaults to the
                target's.

        Raises:
            ValueError: as in `DraftModel` and `Lora.projectors`.
        """
        from peft import LoraConfig, inject_adapter_in_model  # imported lazily, since it takes seconds

        super().__init__(target, config.uncalibrated(), dtype=dtype)
        self.lora_config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated as int, but PEFT computes with floats
            target_modules=lora.projectors(self.layers[0].get_submodule("self_attn")),
            inference_mode=True,  # stored in the saved config, so that the adapter loads for inference
        )
        inject_adapter_in_model(self.lora_config, self, NAME)
        for parameter in self.attention_parameters().values():
            parameter.data = parameter.data.to(self.mask_embedding.dtype)
            parameter.requires_grad_(True)

    def _own_attention(self, attention: nn.Module, dtype: torch.dtype) -> nn.Module:
        own = shallow_copy(attention)
        for name, child in attention.named_children():
            if not isinstance(child, nn.Linear):
                own._modules[name] = copy.deepcopy(child).to(dtype)
        return own

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters (A, B, norms, mask embedding, bonus slot), by their names in PEFT files."""
        shared = {id(p) for p in self.target.parameters()}
        own = {name: p for name, p in super().attention_parameters().items() if id(p) not in shared}
        return {name.replace(f".{NAME}.", "."): p for name, p in own.items()}

    def own_parameters(self) -> dict[str, Tensor]:  # type: ignore[override]  # merged projections are plain tensors
        """Return all exported tensors by name. Projections are copies with the updates merged in."""
        own: dict[str, Tensor] = dict(self.parts(ATTENTION_TUNING))
        for i, layer in enumerate(self.layers):
            for name, module in layer.get_submodule("self_attn").named_children():
                base = getattr(module, "base_layer", module)
                for kind, parameter in base.named_parameters():
                    merged = parameter.to(self.mask_embedding.dtype)
                    if base is not module and kind == "weight":
                        merged = merged + cast(Any, module).get_delta_weight(NAME)  # a PEFT layer
                    own[f"layers.{i}.self_attn.{name}.{kind}"] = merged
        return own

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> DraftModel:
        """Return an equivalent `DraftModel` with merged projections. `dtype` defaults to the trained parameters'."""
        draft = DraftModel(self.target, self.config, dtype=dtype or self.mask_embedding.dtype)
        load_draft_weights(draft.own_parameters(), self.own_parameters(), source="adapter")
        return draft.requires_grad_(False).eval()


def save_adapter(draft: LoraDraft, directory: Path) -> None:
    """Write a PEFT adapter: its config and tensors, plus the drafter's `config.json` as in an export.

    `PeftModel.from_pretrained(DraftModel(target, ...), directory)` loads it, including mask embedding and norms.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = copy.copy(draft.lora_config)
    # PEFT stores a set, whose order varies between processes.
    config.target_modules = sorted(config.target_modules or ())
    config.save_pretrained(str(directory))
    write_object(directory / CONFIG, artifact_config(draft.target.config, draft.config, draft.mask_embedding.dtype))
    tensors = {PREFIX + name: p.detach().cpu().contiguous() for name, p in sorted(draft.attention_parameters().items())}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def load_adapter(directory: Path, target: PreTrainedModel, *, dtype: torch.dtype | None = None) -> LoraDraft:
    """Load an adapter written by `save_adapter`, for the target it was trained for.

    Raises:
        ValueError: the directory does not contain an adapter, or the adapter was trained for a different target.
    """
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        written = json.loads((directory / LORA_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except OSError as error:
        raise ValueError(
            f"{directory}: not a drafter's LoRA adapter. Expected {LORA_CONFIG}, {WEIGHTS} and {CONFIG}."
        ) from error
    if different := other_target(config, target_identity(target.config)):
        raise ValueError(f"{directory}: the adapter was trained for a target with {different}.")
    lora = Lora(written["r"], written["lora_alpha"], tuple(written["target_modules"]))
    draft = LoraDraft(target, lora, DraftConfig.from_artifact(config), dtype=dtype)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    load_draft_weights(draft.attention_parameters(), tensors, source=str(directory))
    return draft.requires_grad_(False).eval()
