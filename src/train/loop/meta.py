"""A training stage's module on the meta device, for counting its parameters and tracing its steps without data."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PretrainedConfig

from models.attention.layers import Execution
from models.cost.memory import Weights
from models.cost.trace import meta_target
from models.draft import DraftModel
from models.draft_config import BONUS_CALIBRATION, DraftConfig
from models.lora import LoraDraft
from train.loop.modules import DraftTraining


def meta_module(
    config: DictConfig,
    stage: str,
    target_config: PretrainedConfig,
    *,
    execution: Execution | None = None,
    last_layers: int | None = None,
) -> DraftTraining:
    """Build a stage's module on the meta device.

    Args:
        execution: if given, the module has the dtypes and logit chunks of a real run. If None, everything is in
            float32, the logits are computed in one chunk and nothing is recomputed, which minimizes the FLOPs.
        last_layers: see `meta_target`.

    Raises:
        ValueError: the drafter does not fit the target.
    """
    dtype = getattr(torch, config.model.target.dtype) if execution else torch.float32
    target, draft_config = meta_target(target_config, dtype, last_layers), DraftConfig(**config.model.draft)
    more: dict[str, Any] = {} if execution else {"chunk": 2**62}
    with torch.device("meta"):
        if stage == BONUS_CALIBRATION:
            draft = DraftModel(target, draft_config, dtype=torch.float32)
        elif config.adapter:
            draft = LoraDraft(target, instantiate(config.adapter), draft_config, dtype=torch.float32)
        else:
            draft = DraftModel(target, draft_config.uncalibrated(), dtype=torch.float32)
        return instantiate(config.stage[stage].module, **more)(target, draft, execution=execution or Execution("dense"))


def count_parameters(config: DictConfig, stage: str, target_config: PretrainedConfig) -> Weights:
    """Count the parameters of a stage's module.

    Raises:
        ValueError: see `meta_module`.
    """
    module = meta_module(config, stage, target_config)
    target = {id(p) for p in module.target.parameters()}
    trained = [p.numel() for p in module.trained().values()]
    return Weights(
        target=sum(p.numel() for p in module.target.parameters()),
        drafter=sum(p.numel() for p in module.draft.parameters() if id(p) not in target),
        trained=sum(trained),
        largest=max(trained),
        exported=sum(p.numel() for p in module.draft.own_parameters().values()),
    )
