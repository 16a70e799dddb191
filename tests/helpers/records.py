"""Artificial stage records."""

import copy

from helpers.configs import composed
from omegaconf import OmegaConf

from train.run_dir.state import StageRecord

TARGET = {"config.json": "a" * 64}


SETTINGS = {"stage": {"steps": 6}, "inputs": {"target": TARGET}}


def config(**changes):
    made = composed("+experiment=tiny")
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value, force_add=True)
    return made


def record(run_dir, stage="attention_tuning", settings=SETTINGS):
    return StageRecord(run_dir, stage, copy.deepcopy(settings))


def finished(run_dir, stage="attention_tuning", name="draft.safetensors"):
    file = run_dir / stage / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"result")
    made = record(run_dir, stage)
    made.begin(restart=True)
    made.finish({}, [file])
    return made, file
