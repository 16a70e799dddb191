"""Short training runs with Lightning."""

import hashlib

import lightning
import torch
from helpers.shared import random_documents

from data.preprocess.packing import pack_documents
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.loss.objectives import Objective
from train.loop.batches import BatchSettings
from train.loop.datamodule import DraftData
from train.loop.modules import AttentionTuning, BonusCalibration

SETTINGS = {
    "objective": Objective(),
    "slot0_loss": False,
    "chunk": 64,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "warmup_ratio": 0.1,
    "min_lr_ratio": 0.0,
    "steps": 6,
    "bonus_slot_fraction": 0.5,
}


def hashes(model) -> dict[str, str]:
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in model.state_dict().items()}


def rows(count: int = 40):
    return pack_documents(random_documents(count, seed=1), 64, pad_id=0)


def data(steps: int = 6) -> DraftData:
    # Many blocks: the calibrator trains only where the target predicts the token, one in a hundred here.
    settings = BatchSettings(steps=steps, global_batch_size=4, num_anchors=40, block_size=6, seed=0)
    return DraftData(rows(), rows(10), settings)


def trainer(tmp_path, steps: int, **kwargs) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": tmp_path,
        "gradient_clip_val": 1.0,
    }
    return lightning.Trainer(**(defaults | kwargs))


def module(stage, target, beyond: bool = False) -> AttentionTuning | BonusCalibration:
    """Build the module of a stage; `beyond`: with bonus slot, chain and joint training in stage 2."""
    torch.manual_seed(0)
    calibrates = stage is BonusCalibration
    ranks = {"calibrator_rank": 8 * calibrates, "chain_rank": 4 * (calibrates and beyond)}
    draft = DraftModel(target, DraftConfig(num_layers=3, block_size=6, bonus_slot=beyond, **ranks))
    return stage(target, draft, **SETTINGS, **({"joint": beyond} if calibrates else {}))
