"""Decoding during validation, which measures the acceptance length of the current weights on a fixed set of prompts."""

import copy
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

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
from train.loop.modules import DraftTraining
from train.names import TAU

M = TypeVar("M", bound=nn.Module)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LiveDecoding(Callback):
    """Logs τ, its confidence interval and the acceptance rate by slot after the teacher-forced part of each validation.

    Every verify step verifies all drafts, because selective verification (models/decoding/selection.py) is a property
    of the decoder, not of the drafter. Decoding is greedy, so it does not advance training's random number generators.
    Its cost is limited by the number of prompts and tokens, not by time, so the metrics do not depend on the machine's
    speed.
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
            prompts: token ids of the prompts that all ranks decode together; at least one prompt.
            batch_size: prompts per decoding batch on each rank.
            tokenizer: the target's tokenizer; required if its `generation_config` has stop strings.
        """
        self.prompts, self.max_new_tokens, self.batch_size = prompts, max_new_tokens, batch_size
        self.tokenizer = tokenizer

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        begun = time.perf_counter()
        draft = cast(DraftTraining, pl_module).draft
        by_prompt = self._accepted(trainer, draft)
        accepted = [count for prompt in by_prompt for count in prompt]
        low, high = tau_interval(by_prompt)
        tau = {TAU: mean_acceptance_length(accepted)}
        interval = {f"{TAU}_low": low, f"{TAU}_high": high}
        # Log on every rank, because all ranks must agree on the best weights. The decoding time is excluded because it
        # differs between repeated runs.
        pl_module.log_dict(tau, prog_bar=True, logger=False)
        pl_module.log_dict(interval, logger=False)
        slots = acceptance_by_slot(accepted, draft.block_size)
        figures = tau | interval | {f"val/accept_{j}": share for j, share in enumerate(slots, 1)}
        figures["val/decode_seconds"] = time.perf_counter() - begun
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def _accepted(self, trainer: lightning.Trainer, draft: DraftModel) -> list[list[int]]:
        """Return the number of accepted drafts in each verify step, per prompt.

        The result is the same on every rank and independent of the number of ranks.
        """
        rank, world = trainer.global_rank, trainer.world_size
        # Under ZeRO 3 every forward pass gathers shards from all ranks, so all ranks decode all prompts in lockstep.
        in_step = getattr(trainer.strategy, "zero_stage_3", False)
        mine = self._decode(draft, self.prompts if in_step else self.prompts[rank::world])
        if world == 1:
            return mine
        parts = [mine] * world
        dist.all_gather_object(parts, mine)
        if in_step:
            return parts[0]
        together: list[list[int]] = [[] for _ in self.prompts]
        for first, part in enumerate(parts):
            together[first::world] = part
        return together

    def _decode(self, draft: DraftModel, prompts: list[list[int]]) -> list[list[int]]:
        """Return the number of accepted drafts in each verify step, per prompt."""
        # Do not use inference mode: training must not reuse inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            decoder = as_exported(draft)
            how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "mode": "sequential", "selection": OFF}
            counts = []
            for first in range(0, len(prompts), self.batch_size):
                batch = prompts[first : first + self.batch_size]
                result = generate(draft.target, decoder, batch, tokenizer=self.tokenizer, **how)
                counts += [[step.accepted for step in row] for row in result.steps]
            return counts


def as_exported(draft: DraftModel) -> DraftModel:
    """Return the drafter as it would be exported: with its own parameters copied and cast to the target's dtype.

    Parameters shared with the target stay shared. LoRA updates are merged. Must be called on every rank, because ZeRO 3
    shards the parameters.
    """
    if isinstance(draft, LoraDraft):
        return draft.merged(draft.target.dtype)
    own = list(draft.own_parameters().values())
    with _gathered(own):
        copies = {id(p): nn.Parameter(p.to(draft.target.dtype, copy=True), requires_grad=False) for p in own}
    return _with_parameters(draft, copies)


def _with_parameters(module: M, copies: dict[int, nn.Parameter]) -> M:
    """Return a shallow copy of the module with some parameters replaced, or the module itself if it has none of them.

    Args:
        copies: replacements, keyed by the `id()` of the original parameter.
    """
    if not any(id(p) in copies for p in module.parameters()):
        return module
    twin = copy.copy(module)
    twin._parameters = {name: copies.get(id(p), p) for name, p in module._parameters.items()}
    twin._modules = {name: child and _with_parameters(child, copies) for name, child in module._modules.items()}
    for name in HOOKS:  # ZeRO 3's hooks expect sharded parameters
        setattr(twin, name, OrderedDict())
    return twin


def _gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Return a context manager that gathers the parameters; a no-op unless ZeRO 3 shards them. Enter on every rank."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed  # lazy: only ZeRO 3 needs it

    return deepspeed.zero.GatheredParameters(list(parameters))


def live_decoding(
    config: DictConfig,
    stage: str,
    validation: PackedRows,
    positions: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[LiveDecoding]:
    """Return the stage's decoding callback in a list, which is empty if decoding is off or there is no validation data.

    Args:
        positions: the target's context length.
        tokenizer: the target's tokenizer; required if its `generation_config` has stop strings.

    Raises:
        UserError: no validation prompt leaves room for `max_new_tokens` within the target's context length.
    """
    settings = config.stage[stage].decode
    if not settings.prompts or not len(validation):
        return []
    longest = positions - settings.max_new_tokens - config.model.draft.block_size
    prompts = validation.prompts(settings.prompts, longest)
    if not prompts:
        raise UserError(
            f"stage.{stage}.decode.max_new_tokens={settings.max_new_tokens}: no validation prompt leaves room for that "
            f"many tokens within the target's context length of {positions}. Decrease it, or set "
            f"stage.{stage}.decode.prompts=0 to disable decoding."
        )
    limits = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    return [LiveDecoding(prompts, tokenizer=tokenizer, **limits)]
