"""Forward passes for decoding: prefill, verification, drafting, and joint verification and drafting."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.attention.layers import LayerView, run_layers
from models.attention.masks import Rule, cached_causal, dense, own_block, per_window, slots_first
from models.attention.packed import KeysValues, LayerCache, RowViews, View
from models.decoding.kv_cache import Group, KVCache, growing_capacities
from models.draft import DraftModel
from models.families import layer_windows
from models.target import clean_views


def prefill(
    target: PreTrainedModel,
    prompts: list[list[int]],
    capacity: int,
    slots: int = 0,
    needed: list[int] | None = None,
) -> tuple[Tensor, KVCache]:
    """Run the target over the prompts, packed into one row.

    Args:
        capacity: maximum number of tokens per row.
        slots: number of slots per row.
        needed: allocate only as much as the rows need, and let them grow: for each prompt, the number of tokens to make
            room for, in ascending order. None: allocate `capacity` tokens per row.

    Returns:
        Logits [R, V] after the last token of each prompt, and the KV cache.
    """
    device = target.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    row_of = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    input_ids = torch.tensor([token for prompt in prompts for token in prompt])
    row_of, positions, input_ids = row_of.to(device), positions.to(device), input_ids.to(device)
    # Tiled SDPA on every device: FlexAttention would recompile for every new length.
    views = clean_views(target, row_of[None], "sdpa")
    for view in views:
        view.keep = True
    hidden = target.get_input_embeddings()(input_ids[None])
    hidden = run_layers(target, target.model.layers, 0, hidden, positions[None], views)
    last = (lengths.cumsum(0) - 1).to(device)
    sizes = [capacity] if needed is None else growing_capacities(capacity)
    cache = KVCache(_release_kv(views), lengths.tolist(), needed or [capacity] * len(prompts), sizes, slots)
    return target_logits(target, hidden[0, last]), cache


def _release_kv(views: list[View]) -> Iterator[KeysValues]:
    """Yield the keys and values of each view in turn and drop the view's reference, so that memory is freed early."""
    for view in views:
        kept, view.kept = view.kept, None
        yield cast(KeysValues, kept)  # not None: `keep` was set


def target_logits(target: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply the final norm and the LM head: [..., H] -> [..., V]."""
    return target.get_output_embeddings()(target.model.norm(hidden))


@torch.no_grad()
def difference_from_forward(target: PreTrainedModel, tokens: list[int]) -> float:
    """Return the largest difference between prefill logits and the target's own, both after the last of `tokens`.

    The difference is relative to the largest absolute logit. Differences within rounding error are returned as 0: those
    below 1e-3 in float32 and float64, and below 0.1 in lower precision.
    """
    own = target(input_ids=torch.tensor([tokens], device=target.device), logits_to_keep=1).logits[0, -1].float()
    ours = prefill(target, [tokens], capacity=len(tokens))[0][0].float()
    difference = float((ours - own).abs().max() / own.abs().max())
    exact = target.dtype in (torch.float32, torch.float64)
    return 0.0 if difference < (1e-3 if exact else 0.1) else difference


def contiguous_copy(part: Tensor) -> Tensor:
    """Copy a slice into a contiguous tensor. On a strided slice, PyTorch would run one small matmul per row."""
    return part.clone(memory_format=torch.contiguous_format)


class ForwardPasses:
    """Runs the forward passes of a batch against its KV cache.

    The argument `kv_length` is one past the last token position that any row reads. Attention runs group by group, so
    that the rows of a group read only as many tokens as its longest row has.
    """

    def __init__(self, target: PreTrainedModel, draft: DraftModel | None, cache: KVCache) -> None:
        self.target, self.draft, self.cache = target, draft, cache
        self.joint_layers = _joint_layers(target, draft) if draft else []
        self.windows = layer_windows(target.config)

    @property
    def _drafter(self) -> DraftModel:
        """The drafter, for passes that require one."""
        assert self.draft is not None
        return self.draft

    def verify(self, candidates: Tensor, positions: Tensor, kv_length: int) -> Tensor:
        """Run the target over candidates [R, C] at positions [R, C]. Return the logits [R, C, V]."""
        views = self._candidate_views(positions, kv_length)
        hidden = self.target.get_input_embeddings()(candidates)
        hidden = run_layers(self.target, self.target.model.layers, 0, hidden, positions, views)
        return target_logits(self.target, hidden)

    def draft_blocks(self, anchors: Tensor, kv_length: int, bonus: Tensor | None = None) -> Tensor:
        """Run one block per anchor [R, g] through the draft layers. Return [R, g, B, H] after the final norm.

        `bonus` [R, g]: tokens at the anchors, for drafters with a bonus slot; None: unknown.
        """
        draft = self._drafter
        hidden, positions, views = self._blocks(anchors, kv_length, bonus)
        hidden = run_layers(self.target, draft.layers, draft.split_layer, hidden, positions, views)
        return self.target.model.norm(hidden).view(*anchors.shape, draft.block_size, -1)

    def verify_and_draft(self, candidates: Tensor, positions: Tensor, kv_length: int) -> tuple[Tensor, Tensor]:
        """Verify and draft in one pass, with a block for every possible number of accepted drafts.

        Block k is anchored after candidate k and attends to the tokens before its anchor, including candidates 0 .. k.

        Returns:
            The target's logits [R, C, V] and the hidden states of the blocks [R, C, B, H].
        """
        split, count = self._drafter.split_layer, candidates.shape[1]
        clean = self._candidate_views(positions, kv_length)
        hidden = self.target.get_input_embeddings()(candidates)
        hidden = run_layers(self.target, self.target.model.layers[:split], 0, hidden, positions, clean[:split])

        slots, slot_positions, blocks = self._blocks(positions + 1, kv_length)
        views = [_JointView(*pair, count) for pair in zip(clean[split:], blocks, strict=True)]
        hidden = torch.cat([hidden, slots], dim=1)
        both = torch.cat([positions, slot_positions], dim=1)
        hidden = run_layers(self.target, self.joint_layers, split, hidden, both, views)
        drafted = self.target.model.norm(hidden[:, count:])
        blocks = drafted.view(*positions.shape, self._drafter.block_size, -1)
        return target_logits(self.target, contiguous_copy(hidden[:, :count])), blocks

    def _candidate_views(self, positions: Tensor, kv_length: int) -> list[LayerView]:
        def views(group: Group) -> list[View]:
            own, stop = positions[group.rows], kv_length - group.shorter
            caches = group.token_entries(own, stop, drafts=self.draft is not None)
            return _views(lambda window: cached_causal(own, window), self.windows, (*own.shape, stop), caches)

        return self._by_layer(views)

    def _blocks(
        self, anchors: Tensor, kv_length: int, bonus: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[LayerView]]:
        """Build the slots for blocks at anchors [R, g]: inputs [R, g*B, H], positions [R, g*B], one view per layer."""
        draft, size, device = self._drafter, self._drafter.block_size, anchors.device
        positions = (anchors[..., None] + torch.arange(size, device=device)).flatten(1)
        slots, own_layers = positions.shape[1], slice(draft.split_layer, None)

        def views(group: Group) -> list[View]:
            own, stop = anchors[group.rows], kv_length - group.shorter
            one_document = torch.zeros(1, 1, dtype=torch.long, device=device).expand(len(own), stop)

            def rule(window: int | None) -> Rule:
                return slots_first(own_block(one_document, own, size, window), slots, stop)

            caches = group.slot_entries(slots, stop, own_layers)
            return _views(rule, self.windows[own_layers], (len(own), slots, slots + stop), caches)

        hidden = draft.slot_inputs((len(anchors), anchors.shape[1]), bonus).flatten(1, 2)
        return hidden, positions, self._by_layer(views)

    def _by_layer(self, views: Callable[[Group], list[View]]) -> list[LayerView]:
        """Return one view per layer for all rows, given those of each group."""
        groups = self.cache.groups
        if len(groups) == 1:
            return list(views(groups[0]))
        return [
            RowViews([(group.rows, view) for group, view in zip(groups, own, strict=True)])
            for own in zip(*map(views, groups), strict=True)
        ]


def _views(
    rule: Callable[[int | None], Rule], windows: list[int | None], shape: tuple[int, int, int], caches: list[LayerCache]
) -> list[View]:
    """Build one view per layer from the layer's cache and a dense mask of shape (rows, queries, keys)."""
    masks = per_window(windows, lambda window: dense(rule(window), *shape, caches[0].rows.device))
    return [View(mask, cache=cache, window=window) for mask, window, cache in zip(masks, windows, caches, strict=True)]


@dataclass
class _JointView:
    """Views for candidates and slots that are concatenated along the sequence, candidates first."""

    clean: LayerView
    blocks: LayerView
    count: int  # number of candidates
    stop: bool = False


class _JointAttention(nn.Module):
    """Attention that uses the target's projections for candidates and the drafter's projections for slots."""

    def __init__(self, clean: nn.Module, blocks: nn.Module) -> None:
        super().__init__()
        self.clean, self.blocks = clean, blocks

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: _JointView,
        position_ids: Tensor,
        **_: object,
    ) -> tuple[Tensor, None]:
        view, outputs = attention_mask, []
        parts = ((self.clean, view.clean, slice(view.count)), (self.blocks, view.blocks, slice(view.count, None)))
        for attention, own_view, part in parts:  # candidates first: they write keys and values that slots attend to
            embeddings = tuple(table[:, part] for table in position_embeddings)
            own = attention(
                contiguous_copy(hidden_states[:, part]),
                position_embeddings=embeddings,
                attention_mask=own_view,
                position_ids=position_ids[:, part],
            )
            outputs.append(own[0])
        return torch.cat(outputs, dim=1), None


def _joint_layers(target: PreTrainedModel, draft: DraftModel) -> list[nn.Module]:
    """Build layers whose norms and FFN run once over candidates and slots, so that their weights are read only once."""
    layers = []
    for clean, drafting in zip(target.model.layers[draft.split_layer :], draft.layers, strict=True):
        layer = copy.copy(clean)
        layer._modules = clean._modules | {
            "self_attn": _JointAttention(clean.self_attn, cast(nn.Module, drafting.self_attn))
        }
        layers.append(layer)
    return layers
