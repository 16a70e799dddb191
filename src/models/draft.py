"""The drafter: the target's last layers with attention projectors of their own, and the bonus-conditioned MLP."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from data.batch import Batch
from data.errors import out_of_memory
from models.attention.layers import EAGER, Execution, through_layers
from models.attention.masks import dense, own_block, per_window
from models.attention.packed import Mask, View, blocks_mask
from models.families import layer_windows
from models.target import Context

UNKNOWN = -1  # in place of a token that the drafter is not told


class DraftModel(nn.Module):
    """Mask tokens through the target's last `L` layers (FlexDraft, arXiv 2605.20022, "Attention Tuning").

    A draft layer *is* the target's decoder layer: norms, FFN and attention function are the target's modules by
    reference, frozen; only `self_attn` is a copy, initialised from the target and trained. Attribute names are those of
    the exported tensors, so neither checkpoints nor exports need a key map.

    Beyond the paper, both off in its recipe: `bonus_slot`, by which slot 0 tells the other slots a bonus token that is
    known before drafting, as in sequential mode; and `chain_mlp`, by which each slot's logits depend on the token that
    was drafted before it (docs/results/recipe.md).
    """

    def __init__(
        self,
        target: PreTrainedModel,
        *,
        num_layers: int,
        block_size: int,
        calibrator_rank: int,
        bonus_slot: bool = False,
        chain_rank: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            num_layers: L, how many of the target's last layers draft.
            block_size: B, mask tokens per block.
            calibrator_rank: r, hidden size of the calibrator; 0 for a drafter without one.
            bonus_slot: whether slot 0's input can hold a known bonus token.
            chain_rank: hidden size of the MLP that sees the token drafted before a slot's; 0 for a drafter without one.
            dtype: of the drafter's own parameters; the target's if None.

        Raises:
            ValueError: L, B or r out of range; a target that is wrapped in something else.
        """
        super().__init__()
        if not isinstance(target, PreTrainedModel):
            raise ValueError(
                f"The target is a {type(target).__name__}, expected a model of transformers. Of PEFT's, give "
                "`merge_and_unload()`, or `get_base_model()`, in which LoRA stays active, but Activated LoRA does not."
            )
        config = target.config
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"num_layers={num_layers}: expected 1 to {config.num_hidden_layers}, the target's layers.")
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: expected at least 2, since slot 0 is never drafted.")
        for name, rank in (("calibrator_rank", calibrator_rank), ("chain_rank", chain_rank)):
            if rank < 0:
                raise ValueError(f"{name}={rank}: expected 0 (none) or more.")
        # Referred to, not registered: the drafter neither owns nor saves the target.
        object.__setattr__(self, "target", target)
        self.block_size = block_size
        self.calibrator_rank, self.chain_rank = calibrator_rank, chain_rank
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
        vocabulary, hidden = embedding.shape
        place = {"dtype": dtype, "device": embedding.device}
        self.anchor_bias_mlp = _correction(hidden, calibrator_rank, vocabulary, **place) if calibrator_rank else None
        self.chain_mlp = _correction(hidden, chain_rank, vocabulary, **place) if chain_rank else None
        self.bonus_slot = None
        if bonus_slot:
            self.bonus_slot = nn.Linear(hidden, hidden, bias=False, **place)
            nn.init.zeros_(self.bonus_slot.weight)  # no effect, so training departs from the paper's drafter

    def _own_attention(self, attention: nn.Module, dtype: torch.dtype) -> nn.Module:
        """What the drafter has in place of a target layer's attention: a copy, of quantized or adapted ones a blank."""
        own = copy.deepcopy(attention) if is_plain(attention) else _blank(attention, self.mask_embedding.device)
        return own.to(dtype).requires_grad_(True)

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """What Attention Tuning trains, by exported name: the projectors and the inputs of slots."""
        own = {
            f"layers.{i}.self_attn.{name}": p
            for i, layer in enumerate(self.layers)
            for name, p in layer.self_attn.named_parameters()
        }
        return {"mask_embedding": self.mask_embedding, **self._named("bonus_slot"), **own}

    def calibrator_parameters(self) -> dict[str, nn.Parameter]:
        """What Bonus-guided Calibration trains, by exported name: the corrections of the logits."""
        return {**self._named("anchor_bias_mlp"), **self._named("chain_mlp")}

    def _named(self, child: str) -> dict[str, nn.Parameter]:
        """Parameters of a child by exported name; none without it."""
        module = getattr(self, child)
        return {} if module is None else {f"{child}.{name}": p for name, p in module.named_parameters()}

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

    def without_extras(self) -> "DraftModel":
        """The same drafter as a decoder has it that knows the public artifact alone; parameters are shared."""
        plain = shallow_copy(self)
        plain.bonus_slot, plain.chain_mlp, plain.chain_rank = None, None, 0
        return plain

    def slot_inputs(self, anchors: tuple[int, int], bonus: Tensor | None = None) -> Tensor:
        """[R, A, B, H] what enters the split layer: the mask embedding, in slot 0 with `W embed(bonus)` added.

        Args:
            anchors: (R, A).
            bonus: [R, A] tokens at the anchors, UNKNOWN in blocks that are not told; None: in all.
        """
        # In the target's dtype, as in decoding: a stream in the master weights' would be wider, and no more exact.
        masks = self.mask_embedding.to(self.target.dtype).expand(*anchors, self.block_size, -1)
        if bonus is None or self.bonus_slot is None:
            return masks
        known = self.bonus_slot(self._embedded(bonus)).to(masks.dtype) * (bonus != UNKNOWN)[..., None]
        return torch.cat([masks[..., :1, :] + known[..., None, :], masks[..., 1:, :]], dim=-2)

    def forward(
        self,
        context: Context,
        positions: Tensor,
        masks: list[Mask | None] | None = None,
        execution: Execution = EAGER,
        bonus: Tensor | None = None,
    ) -> Tensor:
        """Run mask blocks through the draft layers.

        Args:
            context: clean K/V that the blocks may see.
            positions: [R, A, B] position of each slot.
            masks: [L] `attention.blocks_mask` for each layer's window; None: there is one block per row, behind all of
                its context.
            bonus: [R, A] as for `slot_inputs`.

        Returns:
            [R, A, B, H] hidden states after the target's final norm.
        """
        rows, blocks, size = positions.shape
        hidden = self.slot_inputs((rows, blocks), bonus).flatten(1, 2)
        if masks is None:
            masks = per_window(self.windows, lambda window: window and self._one_block(context, window))
        views = [View(*own[:2], window=own[2]) for own in zip(masks, context, self.windows, strict=True)]
        flat_positions = positions.reshape(rows, blocks * size)
        hidden = through_layers(self.target, self.layers, self.split_layer, hidden, flat_positions, views, execution)
        return self.target.model.norm(hidden).view(rows, blocks, size, -1)

    def forward_batch(
        self, context: Context, batch: Batch, execution: Execution = EAGER, bonus: Tensor | None = None
    ) -> Tensor:
        """[R, A, B, H] hidden states of all blocks of a training batch; bonus [R, A] as for `slot_inputs`."""
        blocks = (batch.document_ids, batch.anchors, self.block_size, execution.attention)
        masks = per_window(self.windows, lambda window: blocks_mask(*blocks, window))
        return self(context, batch.slot_positions(), masks, execution, bonus)

    def _one_block(self, context: Context, window: int) -> Tensor:
        """[R, 1, B, T + B] mask of a block behind all of a context of T tokens."""
        rows, _, length, _ = context[0][0].shape
        one_document = torch.zeros(rows, length, dtype=torch.long, device=context[0][0].device)
        rule = own_block(one_document, one_document[:, :1] + length, self.block_size, window)
        return dense(rule, rows, self.block_size, length + self.block_size, one_document.device)

    def logits(self, hidden: Tensor, bonus: Tensor | None = None, previous: Tensor | None = None) -> Tensor:
        """[..., V] logits of slots, in training and in decoding.

        `bias = W2 SiLU(W1 [embed(bonus) ; h] + b1) + b2`, h after the final norm ("Bonus-guided Calibration"); beyond
        the paper, another of this form with the previous slot's token, embedded and scaled to a root mean square of 1.

        Args:
            hidden: [..., H] after the final norm.
            bonus: [...] token at the anchor of each slot's block; None leaves the logits uncalibrated.
            previous: [...] token of the slot before, UNKNOWN where it is not told; None: nowhere.
        """
        logits = self.target.get_output_embeddings()(hidden)
        if bonus is not None and self.anchor_bias_mlp is not None:
            embedded = self._embedded(bonus).to(hidden.dtype)
            logits = logits + self.anchor_bias_mlp(torch.cat([embedded, hidden], dim=-1))
        if previous is not None and self.chain_mlp is not None:
            logits = logits + self._chain(hidden, previous).masked_fill((previous == UNKNOWN)[..., None], 0)
        return logits

    def block_logits(self, hidden: Tensor, bonus: Tensor | None) -> Tensor:
        """[..., B-1, V] logits of the drafted slots of blocks; with a chain, each knows the draft before it.

        Args:
            hidden: [..., B-1, H] of slots 1 .. B-1, after the final norm.
            bonus: [...] bonus tokens; None leaves out calibrator and chain.
        """
        logits = self.logits(hidden, None if bonus is None else bonus[..., None].expand(hidden.shape[:-1]))
        if bonus is None or self.chain_mlp is None:
            return logits
        slots, previous = [], bonus
        for own, state in zip(logits.unbind(-2), hidden.unbind(-2), strict=True):
            slots.append(own + self._chain(state, previous))
            previous = slots[-1].argmax(-1)
        return torch.stack(slots, dim=-2)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """[..., H] input embeddings; of any token where one is UNKNOWN."""
        return self.target.get_input_embeddings()(tokens.clamp(min=0))

    def _chain(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """[..., V] what the tokens of the slots before, [...], add to the logits of hidden states [..., H]."""
        embedded = self._embedded(previous)
        # Embeddings are small beside hidden states after a norm: W1 would hardly learn from them in time.
        embedded = rms_norm(embedded, embedded.shape[-1:], eps=1e-6).to(hidden.dtype)
        return self.chain_mlp(torch.cat([embedded, hidden], dim=-1))


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module that shares its parameters and children with another, until they are replaced on one of them."""
    twin = copy.copy(module)
    # A shallow copy shares the registries too: without these, a hook or module set on one would be on both.
    for name, registry in vars(module).items():
        if isinstance(registry, dict):
            setattr(twin, name, registry.copy())
    return twin


def is_plain(attention: nn.Module) -> bool:
    """Whether an attention's parameters are plain floats in plain layers, and so can be copied and trained."""
    plain = all(type(p) is nn.Parameter and p.is_floating_point() and p.itemsize > 1 for p in attention.parameters())
    return plain and all(type(m) is nn.Linear for m in attention.modules() if hasattr(m, "in_features"))


def _blank(attention: nn.Module, device: torch.device) -> nn.Module:
    """The same attention made anew of plain layers, and NaN until weights are loaded: the target's are no floats."""
    try:
        with torch.device("meta"):
            own = type(attention)(attention.config, attention.layer_idx)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{type(attention).__name__} of the target cannot be made anew ({error}).") from error
    own = own.to_empty(device=device).train(attention.training)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.fill_(float("nan"))
    return own


def _draft_layer(target_layer: nn.Module, attention: nn.Module) -> nn.Module:
    """The target's decoder layer with another attention; everything else is shared by reference."""
    layer = shallow_copy(target_layer)
    # Slots of a block see each other in both directions; transformers would read the default as causal.
    attention.is_causal = False
    layer.self_attn = attention
    return layer


def _correction(hidden: int, rank: int, vocabulary: int, **kwargs) -> nn.Sequential:
    """`W2 SiLU(W1 x + b1) + b2` with W2 = b2 = 0: no effect, so training departs from the attention-tuned drafter."""
    first, second = nn.Linear(2 * hidden, rank, **kwargs), nn.Linear(rank, vocabulary, **kwargs)
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    return nn.Sequential(first, nn.SiLU(), second)


@torch.no_grad()
def start_from_head(draft: DraftModel) -> None:
    """A start of calibrator and chain for training that has no effect either, and learns faster
    (docs/results/recipe.md).

    W1 and b1 become zero, so the hidden units are silent; W2 becomes the target's head in its own principal directions,
    so that the first gradient already tells W1 how to move the hidden state. With random W1 and zero W2, only W2 can
    learn at first. Units beyond the head's rank keep that start.
    """
    head = draft.target.get_output_embeddings().weight.float()  # [V, H]
    _, directions = torch.linalg.eigh(head.T @ head)  # ascending
    for mlp in filter(None, (draft.anchor_bias_mlp, draft.chain_mlp)):
        first, _, second = mlp
        known = min(first.out_features, head.shape[1])
        first.weight[:known] = 0.0
        first.bias.zero_()
        second.weight[:, :known] = (head @ directions[:, -known:]).to(second.weight.dtype)
