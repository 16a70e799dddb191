"""Reference decoder: one prompt at a time, with transformers' own model and cache.

Slow but simple: decodes with the target alone, or drafts and verifies in sequence. Used by tests and drills, and by the
evaluation for its first prompts.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from models.decoding.batch_decoder import GenerationResult, Step
from models.decoding.generation_settings import sequence_state, stop_tokens
from models.decoding.sampling import GREEDY, Sampling
from models.decoding.selection import RELEASE, Selection, drafts_and_confidence
from models.decoding.target_sampler import next_token, uniform_numbers
from models.draft import DraftModel
from models.hf_cache import crop, forward_cached
from models.target import cached_context


@torch.inference_mode()
def autoregressive_generate(
    target: PreTrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[int]:
    """Decode with the target alone, one token per pass.

    Applies the logits processors and stopping criteria from the target's `generation_config`.

    Args:
        tokenizer: the target's tokenizer; required if its `generation_config` has stop strings.
    """
    own = _TargetTokens(target, prompt, max_new_tokens, sampling, seed, tokenizer)
    cache, tokens, step, ended = DynamicCache(), [], prompt, not max_new_tokens
    while not ended:
        token, ended = own.next(_target_logits(target, step, cache)[-1])
        tokens.append(token)
        step = [token]
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
    bonus_known: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> GenerationResult:
    """Decode one prompt by drafting and verifying. `decoding.generate` must return the same tokens and steps.

    Args:
        bonus_known: for drafters with a bonus slot. True matches sequential mode, where slot 0 holds the bonus token;
            False matches parallel mode, where it does so only in the first block after the prompt.
        tokenizer: the target's tokenizer; required if its `generation_config` has stop strings.
    """
    cache, own = DynamicCache(), _TargetTokens(target, prompt, max_new_tokens, sampling, seed, tokenizer)
    tokens: list[int] = []
    steps: list[Step] = []
    if not max_new_tokens:
        return GenerationResult([tokens], [steps])
    bonus, ended = own.next(_target_logits(target, prompt, cache)[-1])
    while not ended:
        anchor = cache.get_seq_length()
        logits = draft_logits(
            draft, cache, anchor, torch.tensor([bonus]), calibrate=calibrate, bonus_known=bonus_known or not steps
        )
        best, confidence = drafts_and_confidence(logits[1:])
        room = max_new_tokens - len(tokens) - 1
        drafts = best[: int(selection.count(confidence))][:room].tolist()

        after = _target_logits(target, [bonus, *drafts], cache)  # [1 + drafts, V]
        tokens.append(bonus)
        accepted = 0
        bonus, ended = own.next(after[0])
        while bonus in drafts[accepted : accepted + 1]:
            accepted += 1
            tokens.append(bonus)
            if ended:
                return GenerationResult([tokens], [[*steps, Step(len(drafts), accepted)]])
            bonus, ended = own.next(after[accepted])
        steps.append(Step(len(drafts), accepted))
        crop(cache, anchor + 1 + accepted)  # discard the rejected drafts
    return GenerationResult([[*tokens, bonus]], [steps])


class _TargetTokens:
    """Chooses the target's tokens for one sequence, one at a time."""

    def __init__(
        self,
        target: PreTrainedModel,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.stop, self.sampling = stop_tokens(target), sampling
        self.state = sequence_state(target, prompt, max_new_tokens, tokenizer)
        self.uniforms = uniform_numbers(seed, max_new_tokens).to(target.device)

    def next(self, logits: Tensor) -> tuple[int, bool]:
        """Choose the next token from logits [V]. Return it and whether it ends the sequence."""
        token = next_token(self.state, logits, self.sampling, self.uniforms)
        return token, self.state.add(token) or token in self.stop


def draft_logits(
    draft: DraftModel,
    cache: DynamicCache,
    anchor: int,
    bonus: Tensor | None,
    *,
    calibrate: bool = True,
    bonus_known: bool = True,
) -> Tensor:
    """Return the logits [B, V] of the block at `anchor`. `cache` holds the tokens before the anchor.

    Args:
        bonus: [1] token at the anchor; None: unknown, so the logits are not corrected.
        calibrate: whether the calibrator, and the chain if there is one, correct the logits.
        bonus_known: whether slot 0 holds the bonus token, as in sequential mode (drafters with a bonus slot).
    """
    positions = torch.arange(anchor, anchor + draft.block_size, device=draft.mask_embedding.device)
    known = bonus[None] if bonus_known and bonus is not None else None
    hidden = draft(cached_context(cache, draft.split_layer), positions[None, None], bonus=known)[0, 0]  # [B, H]
    if bonus is None or not calibrate:
        return draft.logits(hidden)
    logits = draft.logits(hidden, bonus.expand(draft.block_size))
    before = bonus[0]
    for slot in range(1, draft.block_size if draft.config.chain_rank else 0):
        logits[slot] = draft.logits(hidden[slot], bonus[0], before)
        before = logits[slot].argmax()
    return logits


def _target_logits(target: PreTrainedModel, tokens: list[int], cache: DynamicCache) -> Tensor:
    """Run the target over `tokens` and append them to `cache`. Return the logits [tokens, V].

    Raises:
        ValueError: the target does not accept a cache or does not update it.
    """
    return forward_cached(target, torch.tensor([tokens], device=target.device), cache).logits[0]
