"""Decoding with quantized or adapted targets; training requires plain ones."""

import pytest
import torch
from helpers.shared import random_draft, random_target
from helpers.wrapped_targets import adapted, packed

from models.decoding.flex import generate
from models.draft import DraftModel, is_plain
from models.draft_config import DraftConfig
from models.export.artifact_io import export_draft, load_draft
from models.families import check_trainable
from models.target import vocabulary
from models.verify.prompts import prompt_tokens
from models.verify.run import decoding_check, is_untrained, target_check

PROMPTS = [[3, 4, 5, 6], [7, 8, 9]]
TARGETS = {
    "4 bits packed": packed,
    "LoRA on queries and values": adapted("q_proj", "v_proj"),
    "LoRA on the FFN": adapted("gate_proj"),
    "LoRA merged": adapted("q_proj", merge=True),
}


@pytest.fixture
def exported(tmp_path):
    target = random_target()
    draft = random_draft(target)
    export_draft(draft, tmp_path, torch.float32)
    return target, draft, tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TARGETS)
def test_a_drafter_decodes_with_a_target_that_is_quantized_or_adapted(exported, kind):
    target, trained, directory = exported
    changed = TARGETS[kind](target)
    draft = load_draft(directory, changed)
    own = draft.own_parameters()
    assert all(torch.equal(parameter, own[name]) for name, parameter in trained.own_parameters().items())
    how = {"max_new_tokens": 12, "stop": set()}
    expected = generate(changed, None, PROMPTS, **how).tokens
    for mode in ("sequential", "parallel"):
        assert generate(changed, draft, PROMPTS, mode=mode, **how).tokens == expected


def test_weights_that_were_never_loaded_are_not_mistaken_for_trained_ones(exported):
    target, _, directory = exported
    assert is_plain(target.model.layers[-1].self_attn)
    draft = DraftModel(packed(target), DraftConfig(num_layers=2, block_size=4, calibrator_rank=0))
    assert not is_plain(target.model.layers[-1].self_attn) and is_plain(draft.layers[0].self_attn)
    with pytest.raises(ValueError, match="Non-finite"):
        export_draft(draft, directory, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*TARGETS, "adapted embeddings", "copied embeddings"])
def test_verification_accepts_a_quantized_or_adapted_target(kind, exported):
    target, _, directory = exported
    changed = TARGETS[kind](target) if kind in TARGETS else embeddings_changed(target, kind)
    assert vocabulary(changed) == 97
    check, draft = target_check(directory, changed, None)
    assert not check.faults
    check = decoding_check(draft, prompt_tokens(None, changed, None), 12)
    assert not check.faults and "identical to the target's output" in check.summary


def embeddings_changed(target, kind):
    from peft import LoraConfig, get_peft_model

    where = {"target_modules" if kind == "adapted embeddings" else "modules_to_save": ["embed_tokens"]}
    return get_peft_model(target, LoraConfig(r=2, **{"target_modules": ["q_proj"]} | where)).get_base_model()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "LoRA on queries and values", "LoRA on the FFN"])
def test_an_untrained_drafter_is_detected_with_an_adapted_target(kind):
    target = random_target()
    draft = DraftModel(target, DraftConfig(num_layers=2, block_size=4, calibrator_rank=0))
    assert is_untrained(draft)
    if kind != "plain":
        TARGETS[kind](target)  # in place
    assert is_untrained(draft)
    with torch.no_grad():
        draft.layers[1].self_attn.o_proj.weight[0, 0] += 1
    assert not is_untrained(draft)


def test_a_wrapped_target_is_rejected_with_a_fix(exported):
    from peft import LoraConfig, get_peft_model

    target, _, directory = exported
    wrapped = get_peft_model(target, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"The target is a PeftModel.*merge_and_unload\(\).*get_base_model"):
        load_draft(directory, wrapped)


def test_training_rejects_a_quantized_target(exported):
    config = exported[0].config
    check_trainable(config)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="The target is quantized, .* Train with the original, unquantized model"):
        check_trainable(config)
