"""The oracle that the tests hold decoding against: one prompt at a time, through transformers' own model and cache.

Slow and obvious: the target alone, and sequential draft-then-verify. Tests and drills use it, and the evaluation for
its first prompts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.decoding import GenerationResult, Step, stop_tokens, uniform_numbers
from models.draft import DraftModel
from models.sampling import GREEDY, Sampling
from models.selection import RELEASE, Selection, drafts_and_confidence
from models.target import cached_context

Choice = Callable[[Tensor, int], int]  # the token of a number, from its logits [V]


@torch.inference_mode()
def autoregressive_generate(
    target: PreTrainedModel, prompt: list[int], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
) -> list[int]:
    """The target's own answer, one token a pass."""
    stop, cache, tokens = stop_tokens(target), DynamicCache(), []
    choose, step = _choice(sampling, seed, max_new_tokens), prompt
    while len(tokens) < max_new_tokens:
        logits = _target_logits(target, step, cache)
        tokens.append(choose(logits[-1], len(tokens)))
        if tokens[-1] in stop:
            break
        step = tokens[-1:]
    return tokens


@torch.inference_mode()
def reference_generate(
    target: PreTrainedModel,
    draft: DraftModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    selection: Selection = RELEASE,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    calibrate: bool = True,
    told: bool = True,
) -> GenerationResult:
    """Draft, verify, commit; what `decoding.generate` must give for one prompt, steps included; with a bonus slot, in
    sequential mode if the drafter is `told` the bonus before it drafts; in parallel mode if not, but for the first
    block, which comes after the prompt in every mode."""
    stop, cache = stop_tokens(target), DynamicCache()
    choose = _choice(sampling, seed, max_new_tokens)
    tokens, steps = [], []
    bonus = choose(_target_logits(target, prompt, cache)[-1], 0) if max_new_tokens else None
    while len(tokens) + 1 < max_new_tokens and bonus not in stop:
        anchor = cache.get_seq_length()
        logits = draft_logits(draft, cache, anchor, torch.tensor([bonus]), calibrate=calibrate, told=told or not steps)
        drafts, confidence = drafts_and_confidence(logits[1:])
        room = max_new_tokens - len(tokens) - 1
        drafts = drafts[: int(selection.count(confidence))][:room].tolist()

        after = _target_logits(target, [bonus, *drafts], cache)  # [1 + drafts, V]
        accepted = 0
        while (chosen := choose(after[accepted], len(tokens) + 1 + accepted)) in drafts[accepted : accepted + 1]:
            accepted += 1
        crop(cache, anchor + 1 + accepted)
        for number, token in enumerate([bonus, *drafts[:accepted]]):
            tokens.append(token)
            if token in stop:
                return GenerationResult([tokens], [[*steps, Step(len(drafts), number)]])
        steps.append(Step(len(drafts), accepted))
        bonus = chosen
    if len(tokens) < max_new_tokens:
        tokens.append(bonus)
    return GenerationResult([tokens], [steps])


def draft_logits(
    draft: DraftModel,
    cache: DynamicCache,
    anchor: int,
    bonus: Tensor | None,
    *,
    calibrate: bool = True,
    told: bool = True,
) -> Tensor:
    """[B, V] logits of all slots of the block at `anchor`; `cache` holds the positions before it.

    Args:
        bonus: [1] the token at the anchor; None: it is not known, and the logits are not corrected.
        calibrate: whether the logits are corrected by it, and by the draft before each slot.
        told: whether slot 0 holds it, as in sequential mode.
    """
    positions = torch.arange(anchor, anchor + draft.block_size, device=draft.mask_embedding.device)
    known = bonus[None] if told and bonus is not None else None
    hidden = draft(cached_context(cache, draft.split_layer), positions[None, None], bonus=known)[0, 0]  # [B, H]
    if bonus is None or not calibrate:
        return draft.logits(hidden)
    logits = draft.logits(hidden, bonus.expand(draft.block_size))
    before = bonus[0]
    for slot in range(1, draft.block_size if draft.chain_rank else 0):
        logits[slot] = draft.logits(hidden[slot], bonus[0], before)
        before = logits[slot].argmax()
    return logits


def crop(cache: DynamicCache, length: int) -> None:
    """Forget the candidates that verification rejected."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _target_logits(target: PreTrainedModel, tokens: list[int], cache: DynamicCache) -> Tensor:
    """[tokens, V]; `cache` grows by the tokens."""
    input_ids = torch.tensor([tokens], device=target.device)
    return target(input_ids=input_ids, past_key_values=cache, use_cache=True).logits[0]


def _choice(sampling: Sampling, seed: int, max_new_tokens: int) -> Choice:
    uniforms = uniform_numbers(seed, max_new_tokens)
    return lambda logits, number: int(sampling.choose(logits, uniforms[min(number, max_new_tokens - 1)]))
