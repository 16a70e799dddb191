"""Runs decoder layers. The attention kernel, compilation and activation checkpointing do not affect the result."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from models.attention.compiled import compiled
from models.attention.packed import KINDS, LayerStopped
from models.families import position_embeddings
from models.hf_cache import require_arguments


@dataclass(frozen=True)
class Execution:
    """How to execute decoder layers: the settings of the same names under `runtime` in conf/config.yaml."""

    attention: str = "auto"  # flex | sdpa | dense; auto: flex on GPUs, else sdpa
    compile: bool = False  # compile layers and loss
    activation_checkpointing: bool = False  # applies to the draft layers

    def __post_init__(self) -> None:
        if self.attention not in KINDS:
            raise ValueError(f"attention={self.attention!r}: expected one of {', '.join(KINDS)}.")


EAGER = Execution()


class LayerView(Protocol):
    """The object passed to a layer as its attention mask, e.g. `packed.View`. The layer passes it to its attention."""

    stop: bool  # whether attention raises LayerStopped, because the layer's output is not needed


def run_layers(
    target: PreTrainedModel,
    layers: nn.ModuleList | Sequence[nn.Module],
    first_layer: int,
    hidden: Tensor,
    position_ids: Tensor,
    views: Iterable[LayerView],
    execution: Execution = EAGER,
) -> Tensor:
    """Run decoder layers of the target's architecture in sequence, with one view per layer.

    Args:
        first_layer: target index of the first layer, or of the layer it was copied from.
        hidden: [R, tokens, H] input to the first layer.
        position_ids: [R, tokens].

    Returns:
        The output [R, tokens, H] of the last layer or, if a view has `stop` set, the input to that view's layer.

    Raises:
        ValueError: the layers in this version of transformers do not take the required arguments.
    """
    for layer in layers:  # layers silently drop unknown arguments, and with them the mask
        require_arguments(type(layer), {"attention_mask", "position_ids", "position_embeddings"})
    numbers = range(first_layer, first_layer + len(layers))
    embeddings = position_embeddings(target, hidden, position_ids, numbers)
    call = _compiled_layer() if execution.compile else _layer
    for layer, view, rope in zip(layers, views, embeddings, strict=True):
        if view.stop:
            try:
                _layer(layer, hidden, view, position_ids, rope)
            except LayerStopped:
                return hidden
        if execution.activation_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(call, layer, hidden, view, position_ids, rope, use_reentrant=False)
        else:
            hidden = call(layer, hidden, view, position_ids, rope)
    return hidden


def _layer(layer: nn.Module, hidden: Tensor, view: LayerView, position_ids: Tensor, rope: tuple) -> Tensor:
    return layer(hidden, attention_mask=view, position_ids=position_ids, position_embeddings=rope)


@functools.cache
def _compiled_layer() -> Callable[..., Tensor]:
    """Return the compiled layer call. Layers of one type share a graph, so compiling takes seconds, not minutes."""
    return compiled(_layer, dynamic=False)
