"""Lightning modules for the two training stages.

Each defines its trainable parameters and drafter inputs; the loss and the optimizer are shared.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.batch import IGNORE, Batch
from models.acceptance import acceptance_length, leading_true
from models.attention.layers import EAGER, Execution
from models.draft import UNKNOWN, DraftModel
from models.loss.block_loss import block_loss
from models.loss.objectives import Objective
from models.target import bonus_tokens, target_pass
from train.endings.finite import StepMetrics, gradient_norms, step_metrics


@dataclass
class Features:
    """Loss inputs for the blocks in a batch."""

    hidden: Tensor  # [R, A, B, H]
    labels: Tensor  # [R, A, B]
    bonus: Tensor | None = None  # [R, A] for the calibrator
    previous: Tensor | None = None  # [R, A, B] for the chain
    target_hidden: Tensor | None = None  # [R, T, H]


class DraftTraining(lightning.LightningModule, ABC):
    """Base class for both training stages.

    Freezes the target, averages the loss over the global batch, and defines the optimizer and validation. Subclasses
    define which parameters are trained and how the loss inputs are computed.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: DraftModel,
        *,
        objective: Objective,
        slot0_loss: bool,
        chunk: int,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        warmup_ratio: float,
        min_lr_ratio: float,
        steps: int,
        bonus_slot_fraction: float,
        execution: Execution = EAGER,
    ) -> None:
        """
        Args:
            slot0_loss: whether to include slot 0 in the loss.
            bonus_slot_fraction: fraction of blocks that see their bonus token. With a bonus slot, this token is the
                input of slot 0; with a chain, these blocks also see the token before each slot.
        """
        super().__init__()
        self.target, self.draft = target, draft
        self.step = StepMetrics(math.nan, 0.0, math.nan, "")  # metrics of the latest step
        self.objective, self.execution = objective, execution
        self.slot0_loss, self.chunk, self.bonus_slot_fraction = slot0_loss, chunk, bonus_slot_fraction
        self.adamw: dict[str, Any] = {
            "lr": learning_rate,
            "weight_decay": weight_decay,
            "betas": tuple(betas),
            "eps": eps,
        }
        self.warmup_ratio, self.min_lr_ratio, self.steps = warmup_ratio, min_lr_ratio, steps
        self.requires_grad_(False)
        for parameter in self.trained().values():
            parameter.requires_grad_(True)

    _micro_batch: int  # index of the current micro-batch in its step
    _sums: Tensor  # sums over the current step so far: loss, weight, blocks, labeled blocks
    masks_labels = False  # whether `features` masks some of the batch's labels

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters trained in this stage, keyed by exported name."""

    @abstractmethod
    def features(self, batch: Batch) -> Features:
        """Compute the hidden states of a batch's blocks and the other loss inputs."""

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of `block_loss` (loss sum, weight sum, correct [R, A, B-1]) and the labels [R, A, B]."""
        features = self.features(batch)
        sums = block_loss(
            self.draft.logits,
            features.hidden,
            batch,
            objective=self.objective,
            chunk=self.chunk,
            slot0_loss=self.slot0_loss,
            labels=features.labels,
            bonus=features.bonus,
            previous=features.previous,
            target_hidden=features.target_hidden,
            head_trainable=features.bonus is not None,
            compiled=self.execution.compile,
        )
        return *sums, features.labels

    def mask_bonus(self, bonus: Tensor) -> Tensor:
        """Replace the bonus tokens [R, A] with UNKNOWN, except in a fraction `bonus_slot_fraction` of the blocks.

        Those blocks are evenly spaced rather than random, so the choice depends on neither step nor rank.
        """
        number = torch.arange(bonus.shape[1], device=bonus.device)
        revealed = ((number + 1) * self.bonus_slot_fraction).floor() > (number * self.bonus_slot_fraction).floor()
        return bonus.masked_fill(~revealed, UNKNOWN)

    def train(self, mode: bool = True) -> "DraftTraining":
        """Stay in eval mode, because dropout in the target or drafter would make training differ from decoding."""
        return super().train(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss sum of this micro-batch, not divided by the slot weight.

        The total slot weight is known only after all micro-batches on all ranks, so `on_before_optimizer_step` divides
        the gradients by it.
        """
        micro_batches = self.trainer.accumulate_grad_batches
        self._micro_batch = batch_idx % micro_batches
        if self._micro_batch == 0:
            # Free memory now: Lightning clears the previous step's gradients only right before backward.
            for parameter in self.trained().values():
                parameter.grad = None
        loss_sum, weight_sum, _, labels = self.loss(batch)
        blocks = [(of[..., 1:] != IGNORE).any(-1).sum() for of in (batch.labels, labels)]
        here = torch.stack([loss_sum.detach(), weight_sum, *(count.to(loss_sum.dtype) for count in blocks)])
        self._sums = here if self._micro_batch == 0 else self._sums + here
        # Cancel Lightning's division by the accumulation steps and its averaging of gradients across ranks.
        return loss_sum * (micro_batches * self.trainer.world_size)

    @property
    def ends_step(self) -> bool:
        """Whether the current micro-batch is the last of its step."""
        return self._micro_batch + 1 == self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Divide the gradients by the total slot weight of the global batch, before gradient clipping.

        If the loss or a gradient is not finite on any rank, all ranks skip the step, and `self.step.fault` gives the
        reason.
        """
        if not self.ends_step:
            return  # Lightning calls DeepSpeed's step after every micro-batch; it takes effect only after the last
        trained = self.trained()
        strategy: Any = self.trainer.strategy
        sharded = hasattr(strategy, "gradient_norms")  # ZeRO
        norms = strategy.gradient_norms() if sharded else gradient_norms(trained.values())
        rows = self._of_all_ranks(torch.cat([self._sums, norms]))
        self.step = step_metrics(rows, list(trained), sharded=sharded)
        if self.step.fault:
            self._skip()
        elif sharded:
            strategy.divide_gradients(self.step.weight)
        else:
            torch._foreach_div_([p.grad for p in trained.values() if p.grad is not None], self.step.weight)

    def _skip(self) -> None:
        """Skip this optimizer step, leaving weights and optimizer state unchanged."""
        if hasattr(self.trainer.strategy, "skip_step"):
            self.trainer.strategy.skip_step()
        for parameter in self.trained().values():
            parameter.grad = None  # AdamW skips parameters without a gradient

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(4 + self.draft.block_size - 1, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss_sum, weight_sum, correct, labels = self.loss(batch)
        drafted = (labels[..., 1:] != IGNORE).any(-1)  # [R, A]
        accepted = leading_true(correct)[drafted]  # [blocks]
        reached = accepted[:, None] > torch.arange(self.draft.block_size - 1, device=accepted.device)
        parts = [loss_sum, weight_sum, acceptance_length(accepted).sum(), drafted.sum(), *reached.sum(0)]
        self._validation += torch.stack([p.double().cpu() for p in parts])

    def on_validation_epoch_end(self) -> None:
        totals = self._sum_over_ranks(self._validation.to(self.device, torch.float32))
        loss, weight, gained, blocks, *slots = totals.tolist()
        if not blocks:
            return
        # Teacher-forced estimate: blocks start at uniformly sampled anchors, not after a rejected draft, so τ in real
        # decoding is lower.
        figures = {"val/loss": loss / weight, "val/tau_estimate": gained / blocks}
        self.log_dict(figures, prog_bar=True, logger=False)  # on every rank, so that all agree on the best weights
        figures |= {f"val/slot_{j}": hits / blocks for j, hits in enumerate(slots, 1)}
        for logger in self.trainer.loggers:
            logger.log_metrics(figures, step=self.trainer.global_step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        parameters = list(self.trained().values())
        optimizer = torch.optim.AdamW(parameters, **self.adamw)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, self.steps, self.warmup_ratio, self.min_lr_ratio)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)  # Lightning's reduction adds a barrier
        return total

    def _of_all_ranks(self, values: Tensor) -> list[list[float]]:
        """Gather `values` from all ranks, in rank order. This is the only device synchronization in a training step."""
        if self.trainer.world_size == 1:
            return [values.tolist()]
        rows = [torch.empty_like(values) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(rows, values)
        return torch.stack(rows).tolist()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # own format
        """Return only the trained parameters, without the target, keyed by exported name."""
        return {name: p.detach() for name, p in self.trained().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load the output of `state_dict`.

        Raises:
            RuntimeError: the parameter names differ.
        """
        trained = self.trained()
        if trained.keys() != state_dict.keys():
            raise RuntimeError(
                "The checkpoint does not match the model. Parameters present in only one of them: "
                f"{sorted(trained.keys() ^ state_dict.keys())}."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state_dict[name])


def lr_factor(step: int, steps: int, warmup_ratio: float, min_lr_ratio: float = 0.0) -> float:
    """Return the learning rate factor: linear warm-up to 1, then cosine decay to `min_lr_ratio`."""
    warmup = max(1, round(warmup_ratio * steps))
    progress = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    cosine = min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return min((step + 1) / warmup, cosine)


class AttentionTuning(DraftTraining):
    """Stage 1: trains the attention projectors and slot inputs by block diffusion over mask tokens."""

    def trained(self) -> dict[str, nn.Parameter]:
        return self.draft.attention_parameters()

    def features(self, batch: Batch) -> Features:
        wanted = self.objective.needs_target
        clean = target_pass(self.target, batch, self.draft.split_layer, with_hidden=wanted, execution=self.execution)
        # Use the token from the text, not the target's prediction, because the labels continue the text.
        known = self.mask_bonus(batch.input_ids.gather(1, batch.anchors))
        hidden = self.draft.forward_batch(clean.context, batch, self.execution, known)
        return Features(hidden, batch.labels, target_hidden=clean.hidden)


class BonusCalibration(DraftTraining):
    """Stage 2: trains the logit corrections, given the bonus token that the target would produce in decoding.

    Without `joint`, only the calibrator and chain are trained, on frozen features as in the paper. With `joint`, all
    drafter parameters are trained.
    """

    masks_labels = True

    def __init__(self, target: PreTrainedModel, draft: DraftModel, *, joint: bool, **settings: Any) -> None:
        self.joint = joint
        super().__init__(target, draft, **settings)

    def trained(self) -> dict[str, nn.Parameter]:
        return self.draft.own_parameters() if self.joint else self.draft.calibrator_parameters()

    def features(self, batch: Batch) -> Features:
        clean = target_pass(self.target, batch, self.draft.split_layer, execution=self.execution)
        assert clean.hidden is not None  # target_pass returns it by default
        bonus = bonus_tokens(self.target, clean.hidden, batch.anchors)
        # Mask blocks whose bonus token differs from the token in the text: the rest of the text does not continue the
        # bonus token.
        at_anchor = batch.input_ids.gather(1, batch.anchors)
        labels = batch.labels.masked_fill((bonus != at_anchor)[..., None], IGNORE)
        known = self.mask_bonus(bonus)
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            hidden = self.draft.forward_batch(clean.context, batch, self.execution, known)
        previous = previous_tokens(labels, known) if self.draft.config.chain_rank else None
        return Features(hidden, labels, bonus, previous, clean.hidden if self.objective.needs_target else None)


def previous_tokens(labels: Tensor, bonus: Tensor) -> Tensor:
    """Return the token before each slot, [R, A, B]: the bonus token for slot 1, the previous slot's label after that.

    These are the tokens that decoding sees as long as its drafts are correct. The token is UNKNOWN for slot 0, after an
    ignored label, and throughout blocks whose `bonus` [R, A] is UNKNOWN; such blocks train the drafter for decoders
    without chain support.
    """
    before = torch.cat([labels[..., :1], bonus[..., None], labels[..., 1:-1]], dim=-1)
    before[..., 0] = UNKNOWN
    return before.masked_fill((bonus == UNKNOWN)[..., None] | (before == IGNORE), UNKNOWN)
