"""Greedy decoding: the target alone, and sequential draft-then-verify ("Flex Decoding", one request at a time)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.draft import DraftModel
from models.metrics import accepted_drafts, mean_acceptance_length
from models.target import cached_context


@dataclass
class GenerationResult:
    """What decoding one prompt gave."""

    tokens: list[int]  # new tokens, the stop token included
    accepted: list[int] = field(default_factory=list)  # accepted drafts of each verify step

    @property
    def tau(self) -> float:
        """Mean acceptance length over the verify steps."""
        return mean_acceptance_length(self.accepted)


def stop_tokens(target: PreTrainedModel) -> set[int]:
    """Token ids at which the target ends its answer."""
    stop = target.generation_config.eos_token_id
    if stop is None:
        stop = target.config.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


@torch.inference_mode()
def autoregressive_generate(target: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> GenerationResult:
    """The target's own greedy answer, one token a pass: the oracle and the baseline."""
    stop, cache, tokens = stop_tokens(target), DynamicCache(), []
    step = _row(prompt, target)
    while len(tokens) < max_new_tokens:
        token = int(_target_predictions(target, step, cache, keep=1)[0])
        tokens.append(token)
        if token in stop:
            break
        step = _row([token], target)
    return GenerationResult(tokens)


@torch.inference_mode()
def speculative_generate(
    target: PreTrainedModel, draft: DraftModel, prompt: list[int], max_new_tokens: int, *, calibrate: bool = True
) -> GenerationResult:
    """Greedy draft-and-verify; the tokens equal `autoregressive_generate`'s whatever the drafter says.

    One step: the block anchored at the bonus token's position is drafted on the K/V that verification left behind; the
    target scores the bonus token and the drafts in one causal pass; the leading drafts that it agrees with are
    committed, and its prediction after them is the next bonus token.

    Args:
        prompt: at least one token id.
        calibrate: False leaves the drafter's calibrator out.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("The prompt is empty; decoding needs at least one token to continue.")
    stop, cache, result = stop_tokens(target), DynamicCache(), GenerationResult([])
    bonus = _target_predictions(target, _row(prompt, target), cache, keep=1)  # [1], at position len(prompt)
    while len(result.tokens) < max_new_tokens and int(bonus) not in stop:
        anchor = cache.get_seq_length()
        drafts = draft_block(draft, cache, anchor, bonus if calibrate else None)
        # No draft is worth verifying beyond the last token that may be kept.
        drafts = drafts[: max_new_tokens - len(result.tokens) - 1]
        candidates = torch.cat([bonus, drafts])  # positions anchor .. anchor + len(drafts)
        predictions = _target_predictions(target, candidates[None], cache, keep=len(candidates))
        accepted = int(accepted_drafts(drafts, predictions[:-1]))
        _crop(cache, anchor + accepted + 1)
        committed = _until_stop(candidates[: accepted + 1].tolist(), stop)
        result.tokens += committed
        result.accepted.append(len(committed) - 1)  # what follows the stop token is no gain
        if committed[-1] in stop:
            return result
        bonus = predictions[accepted : accepted + 1]
    if len(result.tokens) < max_new_tokens:
        result.tokens.append(int(bonus))
    return result


def draft_block(draft: DraftModel, cache: DynamicCache, anchor: int, bonus: Tensor | None) -> Tensor:
    """[B-1] the drafted tokens of slots 1 .. B-1 of the block at `anchor`; `cache` holds the positions before it."""
    return draft_logits(draft, cache, anchor, bonus)[1:].argmax(-1)


def draft_logits(draft: DraftModel, cache: DynamicCache, anchor: int, bonus: Tensor | None) -> Tensor:
    """[B, V] logits of all slots of the block at `anchor`. `bonus` [1] or None for uncalibrated logits."""
    positions = torch.arange(anchor, anchor + draft.block_size, device=draft.mask_embedding.device)
    hidden = draft(cached_context(cache, draft.split_layer), positions[None, None])[0, 0]  # [B, H]
    return draft.logits(hidden, None if bonus is None else bonus.expand(draft.block_size))


def _target_predictions(target: PreTrainedModel, input_ids: Tensor, cache: DynamicCache, keep: int) -> Tensor:
    """[keep] greedy predictions of the target after each of the last `keep` tokens; `cache` grows by the tokens."""
    logits = target(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    return logits[0].argmax(-1)


def _until_stop(tokens: list[int], stop: set[int]) -> list[int]:
    """The tokens up to the first stop token, that one included."""
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens) - 1)
    return tokens[: end + 1]


def _crop(cache: DynamicCache, length: int) -> None:
    """Forget the candidates that verification rejected."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _row(tokens: list[int], target: PreTrainedModel) -> Tensor:
    return torch.tensor([tokens], device=target.device)
