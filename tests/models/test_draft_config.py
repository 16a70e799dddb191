"""`DraftConfig` and its table of parts describe the drafter that is built, exported and read."""

import itertools

import pytest
from helpers.shared import random_target

from models.draft import DraftModel
from models.draft_config import ATTENTION_TUNING, BONUS_CALIBRATION, EXTRAS, FLEXDRAFT_KEYS, DraftConfig

ALL = [
    DraftConfig(num_layers=3, block_size=6, calibrator_rank=rank, bonus_slot=slot, chain_rank=chain)
    for rank, slot, chain in itertools.product((0, 8), (False, True), (0, 5))
]


@pytest.mark.parametrize("config", ALL, ids=str)
def test_the_tables_tensors_are_those_of_the_drafter(config):
    target = random_target()
    draft = DraftModel(target, config)
    hidden, vocabulary = target.config.hidden_size, target.config.vocab_size
    own = {name: tuple(p.shape) for name, p in draft.own_parameters().items() if ".self_attn." not in name}
    assert config.tensors(hidden, vocabulary) == own
    for stage, trained in (
        (ATTENTION_TUNING, draft.attention_parameters()),
        (BONUS_CALIBRATION, draft.calibrator_parameters()),
    ):
        parts = {name: p for name, p in trained.items() if ".self_attn." not in name}
        assert list(parts) == config.names(stage)
        assert config.tensors(hidden, vocabulary, stage) == {name: tuple(p.shape) for name, p in parts.items()}


@pytest.mark.parametrize("config", ALL, ids=str)
def test_a_config_is_read_as_it_was_written(config):
    written = {"block_size": config.block_size}
    for key in FLEXDRAFT_KEYS:
        assert DraftConfig.from_artifact(written | {key: config.settings(5)}) == config
    assert config.settings(5)["target_layer_ids"] == [2, 3, 4]
    assert EXTRAS.keys() & config.settings(5).keys() == {key for key in EXTRAS if getattr(config, key)}


def test_parts_are_left_out_by_stage_and_by_origin():
    full = ALL[-1]
    assert full.uncalibrated() == DraftConfig(3, 6, 0, bonus_slot=True)
    assert full.without_extras() == DraftConfig(3, 6, 8)
    assert {"mask_embedding", "anchor_bias_mlp", "bonus_slot", "chain_mlp"} <= {part.module for part in full.parts()}
    assert full.described() == "calibrator of rank 8, bonus slot, chain of rank 5"
    assert DraftConfig(3, 6, 0).described() == "no calibrator"


WRONG = {
    "num_layers=0: expected an integer >= 1": {"num_layers": 0},
    "block_size=1: expected an integer >= 2, since slot 0 is never drafted": {"block_size": 1},
    "calibrator_rank=-1: expected an integer >= 0": {"calibrator_rank": -1},
    "chain_rank=1.5: expected an integer >= 0": {"chain_rank": 1.5},
    "bonus_slot='yes': expected true or false": {"bonus_slot": "yes"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_value_out_of_range_is_rejected(message):
    with pytest.raises(ValueError, match=message):
        DraftConfig(**{"num_layers": 3, "block_size": 6, "calibrator_rank": 8} | WRONG[message])
