"""Decoding while training: what the weights of the moment are worth, on the same few prompts at every validation."""

import copy
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.preprocess.packing import PackedRows
from models.acceptance import acceptance_by_slot, mean_acceptance_length, tau_interval
from models.decoding.flex import generate
from models.decoding.selection import OFF
from models.draft import DraftModel
from models.lora import LoraDraft
from train.names import FIGURE

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LiveDecoding(Callback):
    """Logs τ, its interval and acceptance by slot after the teacher-forced part of each validation.

    Every verify step verifies all drafts: which of them are worth it (models/decoding/selection.py) is the decoder's
    business, not the drafter's. Decoding is greedy, so nothing is drawn, and training does not notice. Its cost is
    bounded by prompts and tokens, not by a clock: the figure does not depend on the machine's speed.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        batch_size: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """
        Args:
            prompts: at least one, over all ranks.
            batch_size: prompts that a rank decodes at a time.
            tokenizer: of the target; its stop strings need it.
        """
        self.prompts, self.max_new_tokens, self.batch_size = prompts, max_new_tokens, batch_size
        self.tokenizer = tokenizer

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        begun = time.perf_counter()
        by_prompt = self._accepted(trainer, pl_module.draft)
        accepted = [count for prompt in by_prompt for count in prompt]
        low, high = tau_interval(by_prompt)
        tau = {FIGURE: mean_acceptance_length(accepted)}
        interval = {f"{FIGURE}_low": low, f"{FIGURE}_high": high}
        # On every rank, as all must agree on which weights are best. Not so the time: a repeated run takes another.
        pl_module.log_dict(tau, prog_bar=True, logger=False)
        pl_module.log_dict(interval, logger=False)
        slots = acceptance_by_slot(accepted, pl_module.draft.block_size)
        figures = tau | interval | {f"val/accept_{j}": share for j, share in enumerate(slots, 1)}
        figures["val/decode_seconds"] = time.perf_counter() - begun
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def _accepted(self, trainer: lightning.Trainer, draft: DraftModel) -> list[list[int]]:
        """Accepted drafts of each verify step, by prompt: the same on every rank, whatever the number of ranks."""
        rank, world = trainer.global_rank, trainer.world_size
        # Under ZeRO 3 each pass needs the pieces of all ranks: all make the same ones.
        in_step = getattr(trainer.strategy, "zero_stage_3", False)
        mine = self._decode(draft, self.prompts if in_step else self.prompts[rank::world])
        if world == 1:
            return mine
        parts = [mine] * world
        dist.all_gather_object(parts, mine)
        if in_step:
            return parts[0]
        together = [[] for _ in self.prompts]
        for first, part in enumerate(parts):
            together[first::world] = part
        return together

    def _decode(self, draft: DraftModel, prompts: list[list[int]]) -> list[list[int]]:
        """[prompts] accepted drafts of each verify step."""
        # Tensors of inference mode must not find their way into what training goes on with.
        with torch.inference_mode(False), torch.no_grad():
            decoder = as_exported(draft)
            how = {"max_new_tokens": self.max_new_tokens, "mode": "sequential", "selection": OFF}
            counts = []
            for first in range(0, len(prompts), self.batch_size):
                batch = prompts[first : first + self.batch_size]
                result = generate(draft.target, decoder, batch, tokenizer=self.tokenizer, **how)
                counts += [[step.accepted for step in row] for row in result.steps]
            return counts


def as_exported(draft: DraftModel) -> DraftModel:
    """The same drafter with copies of its own parameters, in the target's dtype, as the inference side has them.

    What it shares with the target stays shared. Call on every rank: ZeRO 3 keeps a piece of each parameter on each.
    """
    if isinstance(draft, LoraDraft):
        return draft.merged(draft.target.dtype)
    own = list(draft.own_parameters().values())
    with _whole(own):
        copies = {id(p): nn.Parameter(p.to(draft.target.dtype, copy=True), requires_grad=False) for p in own}
    return _with_parameters(draft, copies)


def _with_parameters(module: nn.Module, copies: dict[int, nn.Parameter]) -> nn.Module:
    """The module with these parameters in place of those with such ids; the module itself if it has none of them."""
    if not any(id(p) in copies for p in module.parameters()):
        return module
    twin = copy.copy(module)
    twin._parameters = {name: copies.get(id(p), p) for name, p in module._parameters.items()}
    twin._modules = {name: child and _with_parameters(child, copies) for name, child in module._modules.items()}
    for name in HOOKS:  # those of ZeRO 3 would look for pieces
        setattr(twin, name, OrderedDict())
    return twin


def _whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Whole parameters inside, also where ZeRO 3 keeps a piece on each rank. Enter on every rank."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed  # late: nothing else needs it

    return deepspeed.zero.GatheredParameters(list(parameters))


def live_decoding(
    config: DictConfig,
    stage: str,
    validation: PackedRows,
    positions: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[LiveDecoding]:
    """The callback that a stage's settings ask for; none if they ask for none, or nothing is validated.

    Args:
        positions: how many the target has.
        tokenizer: of the target; its stop strings need it.

    Raises:
        UserError: no validation conversation leaves room for so many new tokens.
    """
    settings = config.stage[stage].decode
    if not settings.prompts or not len(validation):
        return []
    longest = positions - settings.max_new_tokens - config.model.draft.block_size
    prompts = validation.beginnings(settings.prompts, longest)
    if not prompts:
        raise UserError(
            f"stage.{stage}.decode.max_new_tokens={settings.max_new_tokens}: the beginning of no validation "
            f"conversation leaves so much room in the target's {positions} positions. "
            f"Choose fewer, or stage.{stage}.decode.prompts=0 for no decoding."
        )
    limits = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    return [LiveDecoding(prompts, tokenizer=tokenizer, **limits)]
