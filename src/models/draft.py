"""The drafter: the target's last layers with separate attention projections, and the bonus-conditioned calibrator."""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from data.batch import Batch
from data.errors import out_of_memory
from models.attention.layers import EAGER, Execution, run_layers
from models.attention.masks import dense, own_block, per_window
from models.attention.packed import Mask, View, blocks_mask
from models.draft_config import ATTENTION_TUNING, BONUS_CALIBRATION, DraftConfig
from models.families import layer_windows
from models.target import Context

M = TypeVar("M", bound=nn.Module)
UNKNOWN = -1  # placeholder for a token the drafter is not given


class DraftModel(nn.Module):
    """Drafter that runs mask tokens through the target's last `L` layers (FlexDraft, arXiv 2605.20022).

    Each draft layer reuses the target's decoder layer: norms, FFN and attention function are shared by reference and
    frozen; only `self_attn` is a trainable copy, initialized from the target. Attribute names match the exported tensor
    names, so checkpoints and exports need no key mapping.

    Two extensions go beyond the paper and are disabled in its recipe (docs/results/recipe.md): `bonus_slot` feeds a
    bonus token that is known before drafting (as in sequential mode) into slot 0, where the other slots attend to it;
    `chain_mlp` conditions each slot's logits on the previously drafted token.
    """

    target: PreTrainedModel
    config: DraftConfig
    layers: nn.ModuleList
    anchor_bias_mlp: nn.Sequential | None
    chain_mlp: nn.Sequential | None
    bonus_slot: nn.Linear | None

    def __init__(self, target: PreTrainedModel, config: DraftConfig, *, dtype: torch.dtype | None = None) -> None:
        """Build a drafter on top of a target and initialize it from the target's weights.

        Args:
            dtype: dtype of the drafter's own parameters; defaults to the target's.

        Raises:
            ValueError: the target has fewer than `num_layers` layers, has a sliding window smaller than a block, or is
                wrapped (e.g. by PEFT).
        """
        super().__init__()
        if not isinstance(target, PreTrainedModel):
            raise ValueError(
                f"The target is a {type(target).__name__}; expected a transformers model. For a PEFT model, pass the "
                "result of `merge_and_unload()` or `get_base_model()`. The latter keeps LoRA active, but not Activated "
                "LoRA."
            )
        layers, block_size = target.config.num_hidden_layers, config.block_size
        if config.num_layers > layers:
            raise ValueError(
                f"num_layers={config.num_layers}: expected at most {layers}, the target's number of layers."
            )
        # A plain reference rather than a registered submodule: the drafter neither owns nor saves the target.
        object.__setattr__(self, "target", target)
        self.config, self.block_size = config, block_size
        self.split_layer = layers - config.num_layers
        dtype = dtype or target.dtype
        embedding = cast(Tensor, target.get_input_embeddings().weight)

        self.windows = layer_windows(target.config)[self.split_layer :]
        narrow = [window for window in self.windows if window is not None and window < block_size]
        if narrow:
            raise ValueError(f"block_size={block_size}: expected at most {min(narrow)}, the target's sliding window.")

        # Mean token embedding: needs no data and has the scale the layers expect (Gemma scales its embeddings).
        scale = getattr(target.get_input_embeddings(), "scalar_embed_scale", 1.0)
        self.mask_embedding = nn.Parameter((embedding.detach().float().mean(0) * scale).to(dtype))
        self.layers = nn.ModuleList(
            _draft_layer(layer, self._own_attention(layer.self_attn, dtype))
            for layer in target.model.layers[self.split_layer :]
        )
        vocabulary, hidden = embedding.shape
        place = {"dtype": dtype, "device": embedding.device}
        self.anchor_bias_mlp = _correction(hidden, config.calibrator_rank, vocabulary, **place)
        self.chain_mlp = _correction(hidden, config.chain_rank, vocabulary, **place)
        self.bonus_slot = None
        if config.bonus_slot:
            self.bonus_slot = nn.Linear(hidden, hidden, bias=False, **place)
            nn.init.zeros_(self.bonus_slot.weight)  # no initial effect: training starts from the paper's drafter

    def _own_attention(self, attention: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return the drafter's copy of a layer's attention; NaN-filled if the target's is quantized or adapted."""
        own = copy.deepcopy(attention) if is_plain(attention) else _blank(attention, self.mask_embedding.device)
        return own.to(dtype).requires_grad_(True)

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """Return Attention Tuning's parameters (attention, mask embedding, bonus slot), by exported name."""
        own = {
            f"layers.{i}.self_attn.{name}": p
            for i, layer in enumerate(self.layers)
            for name, p in layer.get_submodule("self_attn").named_parameters()
        }
        return self.parts(ATTENTION_TUNING) | own

    def calibrator_parameters(self) -> dict[str, nn.Parameter]:
        """Return Bonus-guided Calibration's parameters (calibrator and chain), by exported name."""
        return self.parts(BONUS_CALIBRATION)

    def parts(self, stage: str) -> dict[str, nn.Parameter]:
        """Return the parameters that a stage trains, except the attention copies, by exported name."""
        return {name: self.get_parameter(name) for name in self.config.names(stage)}

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the target's parameters in the draft layers and the final norm, by name as in the public release."""
        shared = {
            f"layers.{i}.{name}": p
            for i, layer in enumerate(self.layers)
            for name, p in layer.named_parameters()
            if not name.startswith("self_attn.")
        }
        return {**shared, "norm.weight": self.target.model.norm.weight}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that belong to the drafter rather than the target, by exported name."""
        return {**self.attention_parameters(), **self.calibrator_parameters()}

    def without_extras(self) -> "DraftModel":
        """Return a drafter without bonus slot and chain, as in the public format, that shares this one's parameters."""
        plain = shallow_copy(self)
        plain.config = self.config.without_extras()
        for part in set(self.config.parts()) - set(plain.config.parts()):
            setattr(plain, part.module, None)
        return plain

    def slot_inputs(self, anchors: tuple[int, int], bonus: Tensor | None = None) -> Tensor:
        """Return the inputs to the split layer [R, A, B, H]: the mask embedding, plus `W embed(bonus)` in slot 0.

        Args:
            anchors: (R, A), the number of rows and of blocks per row.
            bonus: [R, A] bonus tokens, UNKNOWN for blocks without one; None if no block has one.
        """
        # Use the target's dtype, as in decoding: the master weights' dtype would cost memory without adding precision.
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
            context: K/V of the clean tokens, one pair per draft layer.
            positions: [R, A, B] position of each slot.
            masks: [L] masks from `blocks_mask`, one per draft layer; None for a single block per row that attends to
                the row's entire context.
            bonus: [R, A] as in `slot_inputs`.

        Returns:
            [R, A, B, H] hidden states after the target's final norm.
        """
        rows, blocks, size = positions.shape
        hidden = self.slot_inputs((rows, blocks), bonus).flatten(1, 2)
        if masks is None:
            masks = per_window(self.windows, lambda window: self._one_block(context, window) if window else None)
        views = [View(*own[:2], window=own[2]) for own in zip(masks, context, self.windows, strict=True)]
        flat_positions = positions.reshape(rows, blocks * size)
        hidden = run_layers(self.target, self.layers, self.split_layer, hidden, flat_positions, views, execution)
        return self.target.model.norm(hidden).view(rows, blocks, size, -1)

    def forward_batch(
        self, context: Context, batch: Batch, execution: Execution = EAGER, bonus: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states [R, A, B, H] of all blocks in a training batch; bonus [R, A] as in `slot_inputs`."""
        blocks = (batch.document_ids, batch.anchors, self.block_size, execution.attention)
        masks = per_window(self.windows, lambda window: blocks_mask(*blocks, window))
        return self(context, batch.slot_positions(), masks, execution, bonus)

    def _one_block(self, context: Context, window: int) -> Tensor:
        """Return the mask [R, 1, B, T + B] for one block per row that follows a context of T tokens."""
        rows, _, length, _ = context[0][0].shape
        one_document = torch.zeros(rows, length, dtype=torch.long, device=context[0][0].device)
        rule = own_block(one_document, one_document[:, :1] + length, self.block_size, window)
        return dense(rule, rows, self.block_size, length + self.block_size, one_document.device)

    def logits(self, hidden: Tensor, bonus: Tensor | None = None, previous: Tensor | None = None) -> Tensor:
        """Compute the slots' logits [..., V], for both training and decoding.

        The calibrator adds `W2 SiLU(W1 [embed(bonus) ; h] + b1) + b2`, where h is the hidden state after the final
        norm. The chain (not in the paper) adds a second term of this form, with the embedding of the previous slot's
        token, scaled to unit RMS, in place of the bonus token's.

        Args:
            hidden: [..., H] hidden states after the final norm.
            bonus: [...] token at the anchor of each slot's block; None leaves the logits uncalibrated.
            previous: [...] token in the previous slot, UNKNOWN where there is none; None skips the chain.
        """
        logits = self.target.get_output_embeddings()(hidden)
        if bonus is not None and self.anchor_bias_mlp is not None:
            embedded = self._embedded(bonus).to(hidden.dtype)
            logits = logits + self.anchor_bias_mlp(torch.cat([embedded, hidden], dim=-1))
        if previous is not None and self.chain_mlp is not None:
            logits = logits + self._chain(hidden, previous).masked_fill((previous == UNKNOWN)[..., None], 0)
        return logits

    def block_logits(self, hidden: Tensor, bonus: Tensor | None) -> Tensor:
        """Compute the logits [..., B-1, V] of the drafted slots; a chain conditions each on the previous slot's draft.

        Args:
            hidden: [..., B-1, H] hidden states of slots 1 .. B-1 after the final norm.
            bonus: [...] bonus tokens; None skips calibrator and chain.
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
        """Return the tokens' input embeddings [..., H], which are arbitrary for UNKNOWN."""
        return self.target.get_input_embeddings()(tokens.clamp(min=0))

    def _chain(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Return the chain's logit correction [..., V] for hidden states [..., H] and previous tokens [...]."""
        assert self.chain_mlp is not None
        embedded = self._embedded(previous)
        # Embeddings are much smaller than normalized hidden states; without scaling, W1 would learn slowly from them.
        embedded = rms_norm(embedded, embedded.shape[-1:], eps=1e-6).to(hidden.dtype)
        return self.chain_mlp(torch.cat([embedded, hidden], dim=-1))


def shallow_copy(module: M) -> M:
    """Copy a module, sharing its parameters and children; replacing one in the copy does not affect the original."""
    twin = copy.copy(module)
    # `copy.copy` also shares the registries: a hook or submodule set on one module would appear on both.
    for name, registry in vars(module).items():
        if isinstance(registry, dict):
            setattr(twin, name, registry.copy())
    return twin


def is_plain(attention: nn.Module) -> bool:
    """Return whether an attention module can be copied and trained: only plain linear layers and float parameters."""
    plain = all(type(p) is nn.Parameter and p.is_floating_point() and p.itemsize > 1 for p in attention.parameters())
    return plain and all(type(m) is nn.Linear for m in attention.modules() if hasattr(m, "in_features"))


def _blank(attention: nn.Module, device: torch.device) -> nn.Module:
    """Build an attention module of the same class from plain layers, filled with NaN until weights are loaded.

    Used for targets whose attention is not plain, i.e. quantized or adapted.

    Raises:
        ValueError: the attention class cannot be instantiated from its config.
    """
    try:
        with torch.device("meta"):
            own = type(attention)(attention.config, attention.layer_idx)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(
            f"Cannot build a plain copy of the target's {type(attention).__name__} from its config ({error})."
        ) from error
    own = own.to_empty(device=device).train(attention.training)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.fill_(float("nan"))
    return own


def _draft_layer(target_layer: nn.Module, attention: nn.Module) -> nn.Module:
    """Return a target layer with its attention replaced; everything else is shared by reference."""
    layer = shallow_copy(target_layer)
    # Slots of a block attend to each other in both directions; by default, transformers would apply a causal mask.
    attention.is_causal = False  # type: ignore[assignment]  # `nn.Module` declares attributes as tensors or modules
    layer.self_attn = attention
    return layer


def _correction(hidden: int, rank: int, vocabulary: int, **kwargs: Any) -> nn.Sequential | None:
    """Build the MLP `W2 SiLU(W1 x + b1) + b2`, or return None for rank 0.

    W2 and b2 are zero, so that training starts from the attention-tuned drafter.
    """
    if not rank:
        return None
    first, second = nn.Linear(2 * hidden, rank, **kwargs), nn.Linear(rank, vocabulary, **kwargs)
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    return nn.Sequential(first, nn.SiLU(), second)


@torch.no_grad()
def start_from_head(draft: DraftModel) -> None:
    """Initialize calibrator and chain from the target's head, so that they learn faster. Their output is still 0.

    With random W1 and zero W2, only W2 can learn at first. Here, W1 and b1 are zeroed, so the hidden units output 0,
    and W2 is set to the target's head projected onto its principal directions, so W1 receives a useful gradient from
    the first step. Units beyond the target's hidden size keep random W1 and zero W2. docs/results/recipe.md has
    measurements.
    """
    head = cast(Tensor, draft.target.get_output_embeddings().weight).float()  # [V, H]
    _, directions = torch.linalg.eigh(head.T @ head)  # eigenvalues in ascending order
    for mlp in filter(None, (draft.anchor_bias_mlp, draft.chain_mlp)):
        first, second = cast(nn.Linear, mlp[0]), cast(nn.Linear, mlp[2])
        known = min(first.out_features, head.shape[1])
        first.weight[:known] = 0.0
        first.bias.zero_()
        second.weight[:, :known] = (head @ directions[:, -known:]).to(second.weight.dtype)
