"""The drafter: the target's last layers with attention projectors of their own, and the bonus-conditioned MLP."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.batch import Batch
from models.attention import Mask, View, blocks_mask
from models.execution import EAGER, Execution, through_layers
from models.families import layer_windows
from models.masks import dense, own_block, per_window
from models.target import Context


class DraftModel(nn.Module):
    """Mask tokens through the target's last `L` layers (FlexDraft, arXiv 2605.20022, "Attention Tuning").

    A draft layer *is* the target's decoder layer: norms, FFN and attention function are the target's modules by
    reference, frozen; only `self_attn` is a copy, initialised from the target and trained. Attribute names are those of
    the exported tensors, so neither checkpoints nor exports need a key map.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        *,
        num_layers: int,
        block_size: int,
        calibrator_rank: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            num_layers: L, how many of the target's last layers draft.
            block_size: B, mask tokens per block.
            calibrator_rank: r, hidden size of the calibrator; 0 for a drafter without one.
            dtype: of the drafter's own parameters; the target's if None.

        Raises:
            ValueError: L, B or r out of range.
        """
        super().__init__()
        config = target.config
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"num_layers={num_layers}: expected 1 to {config.num_hidden_layers}, the target's layers.")
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: expected at least 2, since slot 0 is never drafted.")
        if calibrator_rank < 0:
            raise ValueError(f"calibrator_rank={calibrator_rank}: expected 0 (no calibrator) or more.")
        # Referred to, not registered: the drafter neither owns nor saves the target.
        object.__setattr__(self, "target", target)
        self.block_size = block_size
        self.calibrator_rank = calibrator_rank
        self.split_layer = config.num_hidden_layers - num_layers
        dtype = dtype or target.dtype
        embedding = target.get_input_embeddings().weight

        self.windows = layer_windows(config)[self.split_layer :]
        narrow = [window for window in self.windows if window is not None and window < block_size]
        if narrow:
            raise ValueError(f"block_size={block_size}: expected at most {min(narrow)}, the target's sliding window.")

        # The mean token embedding: data-free, and on the scale that the layers know (Gemma scales what it looks up).
        scale = getattr(target.get_input_embeddings(), "scalar_embed_scale", 1.0)
        self.mask_embedding = nn.Parameter((embedding.detach().float().mean(0) * scale).to(dtype))
        self.layers = nn.ModuleList(
            _draft_layer(layer, self._own_attention(layer.self_attn, dtype))
            for layer in target.model.layers[self.split_layer :]
        )
        self.anchor_bias_mlp = None
        if calibrator_rank:
            vocabulary, hidden = embedding.shape
            self.anchor_bias_mlp = _calibrator(
                hidden, calibrator_rank, vocabulary, dtype=dtype, device=embedding.device
            )

    def _own_attention(self, attention: nn.Module, dtype: torch.dtype) -> nn.Module:
        """What the drafter has in place of a target layer's attention."""
        return copy.deepcopy(attention).to(dtype).requires_grad_(True)

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """What Attention Tuning trains, by exported name: the projectors and the mask embedding."""
        own = {
            f"layers.{i}.self_attn.{name}": p
            for i, layer in enumerate(self.layers)
            for name, p in layer.self_attn.named_parameters()
        }
        return {"mask_embedding": self.mask_embedding, **own}

    def calibrator_parameters(self) -> dict[str, nn.Parameter]:
        """What Bonus-guided Calibration trains, by exported name."""
        if self.anchor_bias_mlp is None:
            return {}
        return {f"anchor_bias_mlp.{name}": p for name, p in self.anchor_bias_mlp.named_parameters()}

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The target's own in the draft layers and behind them, by the names that the public release gives them."""
        shared = {
            f"layers.{i}.{name}": p
            for i, layer in enumerate(self.layers)
            for name, p in layer.named_parameters()
            if not name.startswith("self_attn.")
        }
        return {**shared, "norm.weight": self.target.model.norm.weight}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that the drafter owns, by exported name; the rest is the target's."""
        return {**self.attention_parameters(), **self.calibrator_parameters()}

    def forward(
        self, context: Context, positions: Tensor, masks: list[Mask | None] | None = None, execution: Execution = EAGER
    ) -> Tensor:
        """Run mask blocks through the draft layers.

        Args:
            context: clean K/V that the blocks may see.
            positions: [R, A, B] position of each slot.
            masks: [L] `attention.blocks_mask` for each layer's window; None: there is one block per row, behind all of
                its context.

        Returns:
            [R, A, B, H] hidden states after the target's final norm.
        """
        rows, blocks, size = positions.shape
        # In the target's dtype, as in decoding: a stream in the master weights' would be wider, and no more exact.
        hidden = self.mask_embedding.to(self.target.dtype).expand(rows, blocks * size, -1)
        if masks is None:
            masks = per_window(self.windows, lambda window: window and self._one_block(context, window))
        views = [View(*own[:2], window=own[2]) for own in zip(masks, context, self.windows, strict=True)]
        flat_positions = positions.reshape(rows, blocks * size)
        hidden = through_layers(self.target, self.layers, self.split_layer, hidden, flat_positions, views, execution)
        return self.target.model.norm(hidden).view(rows, blocks, size, -1)

    def forward_batch(self, context: Context, batch: Batch, execution: Execution = EAGER) -> Tensor:
        """[R, A, B, H] hidden states of all blocks of a training batch."""
        blocks = (batch.document_ids, batch.anchors, self.block_size, execution.attention)
        masks = per_window(self.windows, lambda window: blocks_mask(*blocks, window))
        return self(context, batch.slot_positions(), masks, execution)

    def _one_block(self, context: Context, window: int) -> Tensor:
        """[R, 1, B, T + B] mask of a block behind all of a context of T tokens."""
        rows, _, length, _ = context[0][0].shape
        one_document = torch.zeros(rows, length, dtype=torch.long, device=context[0][0].device)
        rule = own_block(one_document, one_document[:, :1] + length, self.block_size, window)
        return dense(rule, rows, self.block_size, length + self.block_size, one_document.device)

    def logits(self, hidden: Tensor, bonus: Tensor | None = None) -> Tensor:
        """[..., V] logits of slots, in training and in decoding.

        `bias = W2 SiLU(W1 [embed(bonus) ; h] + b1) + b2`, h after the final norm ("Bonus-guided Calibration").

        Args:
            hidden: [..., H] after the final norm.
            bonus: [...] token at the anchor of each slot's block; None leaves the logits uncalibrated.
        """
        logits = self.target.get_output_embeddings()(hidden)
        if bonus is None or self.anchor_bias_mlp is None:
            return logits
        embedded = self.target.get_input_embeddings()(bonus).to(hidden.dtype)
        return logits + self.anchor_bias_mlp(torch.cat([embedded, hidden], dim=-1))


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module that shares its parameters and children with another, until they are replaced on one of them."""
    twin = copy.copy(module)
    # A shallow copy shares the registries too: without these, a hook or module set on one would be on both.
    for name, registry in vars(module).items():
        if isinstance(registry, dict):
            setattr(twin, name, registry.copy())
    return twin


def _draft_layer(target_layer: nn.Module, attention: nn.Module) -> nn.Module:
    """The target's decoder layer with another attention; everything else is shared by reference."""
    layer = shallow_copy(target_layer)
    # Slots of a block see each other in both directions; transformers would read the default as causal.
    attention.is_causal = False
    layer.self_attn = attention
    return layer


def _calibrator(hidden: int, rank: int, vocabulary: int, **kwargs) -> nn.Sequential:
    """`W2 SiLU(W1 x + b1) + b2` with W2 = b2 = 0: no effect, so training departs from the attention-tuned drafter."""
    first, second = nn.Linear(2 * hidden, rank, **kwargs), nn.Linear(rank, vocabulary, **kwargs)
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    return nn.Sequential(first, nn.SiLU(), second)


@torch.no_grad()
def start_calibrator_from_head(draft: DraftModel) -> None:
    """A start for training that has no effect either, and learns faster (docs/recipe.md).

    W1 and b1 become zero, so the hidden units are silent; W2 becomes the target's head in its own principal directions,
    so that the first gradient already tells W1 how to move the hidden state. With random W1 and zero W2, only W2 can
    learn at first. Units beyond the head's rank keep that start.
    """
    first, _, second = draft.anchor_bias_mlp
    head = draft.target.get_output_embeddings().weight.float()  # [V, H]
    known = min(draft.calibrator_rank, head.shape[1])
    _, directions = torch.linalg.eigh(head.T @ head)  # ascending
    first.weight[:known] = 0.0
    first.bias.zero_()
    second.weight[:, :known] = (head @ directions[:, -known:]).to(second.weight.dtype)
