"""The shipped decoder with unusual targets, arguments and drafters: exact output, or an error."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from helpers.shared import TINY
from helpers.wrapped_targets import CALL, IDS, MASK, adapted, drafted, own, packed
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from models.custom_generate import generate as shipped

MASK[1, :4] = 0


@pytest.fixture
def drafter(root, tmp_path):
    """Return a copy that tests may damage."""
    return shutil.copytree(root / "drafter", tmp_path / "drafter")


class Bans(LogitsProcessor):
    """Processor that bans different tokens in each row and step."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            scores[row, (7 * row + 3 * len(ids) + torch.arange(20)) % 97] = -1e9
        return scores


class Machine(LogitsProcessor):
    """Processor like a grammar matcher: it has a state per row, which each call advances."""

    def __init__(self, rows):
        self.states = [row for row in range(rows)]

    def __call__(self, input_ids, scores):
        assert len(scores) == len(self.states)
        scores = scores.clone()
        for row, token in enumerate(input_ids[:, -1].tolist()):
            self.states[row] = (5 * self.states[row] + token) % 97
            scores[row, self.states[row]] += 20.0
        return scores


class Ends(StoppingCriteria):
    """Criterion that ends each row at a different length."""

    def __call__(self, input_ids, scores, **_):
        return torch.tensor([input_ids.shape[1] >= 14 + 2 * row for row in range(len(input_ids))])


PER_ROW = {
    "processor": lambda: {"logits_processor": LogitsProcessorList([Bans()])},
    "state": lambda: {"logits_processor": LogitsProcessorList([Machine(3)])},
    "state, more than one sequence": lambda: {
        "logits_processor": LogitsProcessorList([Machine(6)]),
        "num_return_sequences": 2,
        "do_sample": True,
    },
    "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([Ends()])},
    "criterion, no stop tokens": lambda: {"stopping_criteria": StoppingCriteriaList([Ends()]), "eos_token_id": None},
    "prefix": lambda: {"prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 20 + row, 30 + len(ids)]},
    "samples": lambda: {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    "penalties": lambda: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 8},
}


@pytest.mark.slow(but="[state]")
@pytest.mark.parametrize("name", PER_ROW)
def test_row_dependent_processors_and_criteria_work_as_in_generate(twin, drafter, name):
    torch.manual_seed(1)
    expected = own(twin, **PER_ROW[name]())
    torch.manual_seed(1)
    assert torch.equal(drafted(twin, drafter, **PER_ROW[name]()), expected)


@pytest.fixture(scope="module")
def words():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY / "target")


@pytest.mark.parametrize("given", ["argument", "config", "config of the model"])
def test_stop_strings_end_a_row_as_in_generate(twin, drafter, words, given):
    twin.generation_config.eos_token_id = None
    texts = [words.decode(row[12:14]) for row in own(twin)[:2]]
    settings = {"stop_strings": texts} if given == "argument" else {}
    if given == "config":
        settings["generation_config"] = GenerationConfig(stop_strings=texts, **{k: CALL[k] for k in list(CALL)[1:]})
    if given == "config of the model":
        twin.generation_config.stop_strings = texts
    expected = own(twin, tokenizer=words, **settings)
    assert torch.equal(drafted(twin, drafter, tokenizer=words, **settings), expected)
    assert expected.shape[1] < 9 + 20 or (expected[:2, -1] == 0).all()


def test_every_unsupported_setting_is_rejected():
    """Settings of this version of transformers, and of a simulated later one."""

    class Later(GenerationConfig):
        def __init__(self, **kwargs):
            self.later_penalty = kwargs.pop("later_penalty", None)
            super().__init__(**kwargs)

    for name in vars(Later()).keys() - set(shipped.SETTINGS.split()):
        settings = Later()
        settings.num_beams = 1
        setattr(settings, name, 7)
        if name[0] != "_":
            with pytest.raises(ValueError, match=f"does not support .*({name}|beam|assisted|contrastive|dola)"):
                shipped._token_mask(settings, IDS, {})
    settings = Later(num_beams=1, guidance_scale=1.0, encoder_repetition_penalty=1.0, output_scores=False)
    assert shipped._token_mask(settings, IDS, {}).all()
    settings.cache_implementation = "quantized"
    with pytest.raises(ValueError, match="cache_implementation=quantized"):
        shipped._token_mask(settings, IDS, {})


PREPARED = {
    "inputs_embeds": torch.zeros(3, 9, 32),
    "token_type_ids": torch.zeros(3, 9),
    "encoder_outputs": (torch.zeros(1),),
    "pixel_values": torch.zeros(3, 3, 8, 8),
    "output_attentions": True,
    "something_later": "yes",
}


@pytest.mark.parametrize("name", PREPARED)
def test_model_inputs_other_than_tokens_are_rejected_by_name(name):
    with pytest.raises(ValueError, match=f"does not support {name}"):
        shipped._token_mask(GenerationConfig(num_beams=1), IDS, {name: PREPARED[name]})


def test_masks_and_positions_must_match_the_tokens(twin, drafter):
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 12\], but input_ids has shape \[3, 9\]"):
        drafted(twin, drafter, attention_mask=torch.tensor(3 * [[0] * 3 + [1] * 9]))
    with pytest.raises(ValueError, match="does not support position_ids"):
        drafted(twin, drafter, position_ids=torch.arange(9)[None].expand(3, -1) + 4)
    with pytest.raises(ValueError, match="does not support inputs_embeds"):
        drafted(twin, drafter, inputs_embeds=twin.get_input_embeddings()(IDS))
    with pytest.raises(ValueError, match="does not support synced_gpus"):
        drafted(twin, drafter, synced_gpus=True)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_tuning_is_rejected(twin, drafter, kind):
    import peft

    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(twin, config)

    def through(self, *args, **kwargs):  # as if `custom_generate` were given by name
        return shipped.generate(self, inputs=kwargs.pop("input_ids"), drafter=str(drafter), **kwargs)

    twin.generate = through.__get__(twin)
    with pytest.raises(ValueError, match=f"inputs prepared by {type(tuned).__name__}"):
        tuned.generate(input_ids=IDS, **CALL)


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


TARGETS = {
    "4 bits packed": packed,
    "bfloat16 norms in float32": lambda model: model,
    "LoRA on queries and values": adapted("q_proj", "v_proj"),
    "LoRA on the FFN": adapted("gate_proj", "down_proj"),
    "LoRA merged": adapted("q_proj", "up_proj", merge=True),
}


@pytest.mark.slow(but="[LoRA merged]")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TARGETS)
def test_drafting_works_for_targets_with_quantized_or_adapted_projectors(twin, drafter, kind):
    """The drafter keeps its own tensors and does not modify the target's modules."""
    changed = TARGETS[kind](twin)
    expected = own(changed)
    assert torch.equal(drafted(changed, drafter), expected)
    tensors = load_file(drafter / "model.safetensors")
    for i, layer in enumerate(changed._flexdraft[1].layers):
        for name, tensor in layer.self_attn.state_dict().items():
            assert torch.equal(tensor, tensors[f"layers.{i}.self_attn.{name}"])
        assert type(layer.self_attn.q_proj) is nn.Linear and not layer.self_attn.training


@pytest.mark.filterwarnings("ignore")
def test_a_target_whose_logits_depend_on_other_tokens_in_the_pass_is_rejected(twin, drafter):
    """Dynamic int8 scales a layer's input by all tokens of the pass, so drafting and verifying cannot be lossless."""
    with pytest.raises(ValueError, match="The target's logits depend on the other tokens in a pass"):
        drafted(dynamic(twin), drafter)


def test_drafting_works_for_a_target_with_added_vocabulary_rows(twin, drafter):
    twin.resize_token_embeddings(104, mean_resizing=False)
    assert torch.equal(drafted(twin, drafter), own(twin))
    twin.resize_token_embeddings(90, mean_resizing=False)
    with pytest.raises(ValueError, match="vocab_size=97, but this one has 90"):
        drafted(twin, drafter)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_drafter_cannot_change_the_output(twin, drafter, value):
    tensors = load_file(drafter / "model.safetensors")
    expected = own(twin)
    for part in (".", "self_attn.v_proj", "anchor_bias_mlp.2", "chain_mlp", "mask_embedding", "bonus_slot"):
        broken = {name: torch.full_like(t, value) if part in name else t for name, t in tensors.items()}
        save_file(broken, drafter / "model.safetensors")
        for selection in ("off", "cumulative_product", "min_confidence"):
            for calibrate in (False, True):
                twin.__dict__.pop("_flexdraft", None)
                assert torch.equal(drafted(twin, drafter, selection=selection, calibrate=calibrate), expected)


@pytest.mark.slow
def test_a_draft_on_which_the_target_overflows_does_not_affect_earlier_tokens(twin, drafter):
    """Every step drafts a token with a non-finite embedding, which the target never chooses."""
    token = 7
    with torch.no_grad():
        twin.get_output_embeddings().weight[token] = 0  # never the most likely one
        twin.get_input_embeddings().weight[token] = float("inf")
    tensors = load_file(drafter / "model.safetensors")
    for name, bias in tensors.items():
        if name in ("anchor_bias_mlp.2.bias", "chain_mlp.2.bias"):
            bias[token] = 1e4
    save_file(tensors, drafter / "model.safetensors")
    expected = own(twin)
    assert not (expected == token).any()
    for selection in ("off", "cumulative_product"):
        assert torch.equal(drafted(twin, drafter, selection=selection), expected)


def config_of(change):
    def damage(directory):
        file = directory / "config.json"
        config = json.loads(file.read_text())
        for part in (config, config["flexdraft_config"], config["dflash_config"]):
            change(part)
        file.write_text(json.dumps(config))

    return damage


def tensors_of(change):
    def damage(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def file_of(name, change):
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def index(text):
    return lambda directory: (directory / "model.safetensors.index.json").write_text(text)


MLP, QUERIES = "anchor_bias_mlp.2.bias", "layers.1.self_attn.q_proj.weight"
DAMAGES = {
    "config.json: damaged, or not a drafter .*JSONDecodeError": file_of("config.json", lambda b: b[: len(b) // 2]),
    "config.json: damaged, or not a drafter .*UnicodeDecodeError": file_of("config.json", lambda b: b"\xff\xfe" + b),
    "config.json: damaged, or not a drafter .*'list'": file_of("config.json", lambda b: b"[]"),
    "not a drafter; expected a config.json": lambda directory: (directory / "config.json").unlink(),
    "damaged, or not a drafter .*'block_size'": config_of(lambda c: c.pop("block_size", None)),
    "damaged, or not a drafter .*'<' not supported": config_of(lambda c: c.update(block_size="8")),
    "block_size=1": config_of(lambda c: c.update(block_size=1)),
    "damaged, or not a drafter .*'target_layer_ids'": config_of(lambda c: c.pop("target_layer_ids", None)),
    r"target_layer_ids=\[0, 1\]": config_of(lambda c: c.update(target_layer_ids=[0, 1])),
    "'enable_anchor_bias_logits'": config_of(lambda c: c.pop("enable_anchor_bias_logits", None)),
    "vocab_size=98, but this one has 97": config_of(lambda c: c.update(vocab_size=98)),
    "num_key_value_heads=4, but this one has 2": config_of(lambda c: c.update(num_key_value_heads=4)),
    "model.safetensors: damaged, or not a drafter .*SafetensorError": file_of(
        "model.safetensors", lambda b: b[: len(b) // 2]
    ),
    "model.safetensors: damaged, or not a drafter .*FileNotFound": lambda d: (d / "model.safetensors").unlink(),
    "model.safetensors: damaged, or not a drafter .*Safetensor": file_of("model.safetensors", lambda b: b""),
    "index.json: damaged, or not a drafter .*'weight_map'": index("{}"),
    "index.json: damaged, or not a drafter .*JSONDecodeError": index("{"),
    "model-1.safetensors: damaged, or not a drafter .*FileNotFound": index(
        '{"weight_map": {"a": "model-1.safetensors"}}'
    ),
    "damaged, or not a drafter .*'mask_embedding'": tensors_of(lambda t: t.pop("mask_embedding")),
    f"damaged, or not a drafter .*'{MLP}'": tensors_of(lambda t: t.pop(MLP)),
    "damaged, or not a drafter .*'bonus_slot.weight'": tensors_of(lambda t: t.pop("bonus_slot.weight")),
    "damaged, or not a drafter .*'chain_mlp.0.bias'": tensors_of(lambda t: t.pop("chain_mlp.0.bias")),
    "damaged, or not a drafter .*q_proj.weight": tensors_of(lambda t: t.pop(QUERIES)),
    "damaged, or not a drafter .*size mismatch": tensors_of(lambda t: t.update({QUERIES: t[QUERIES][:, :-8].clone()})),
    "damaged, or not a drafter .*must match": tensors_of(lambda t: t.update({MLP: torch.zeros(96)})),
    "damaged, or not a drafter .*q_proj.bias": tensors_of(
        lambda t: t.update({QUERIES.replace("weight", "bias"): t[MLP].clone()})
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_drafter_is_one_error_that_names_its_path(twin, drafter, message):
    DAMAGES[message](drafter)
    with pytest.raises(ValueError, match=f"(?s){drafter}.*{message}|{message}"):
        drafted(twin, drafter)
    with pytest.raises(ValueError, match=str(drafter)):
        drafted(twin, drafter)


@pytest.mark.parametrize("threshold", ["0.1", 5, -0.1, float("nan"), True, torch.tensor(0.1)])
def test_a_threshold_is_a_probability(twin, drafter, threshold):
    with pytest.raises(ValueError, match="threshold=.*: expected a number in .0, 1."):
        drafted(twin, drafter, threshold=threshold)


@pytest.mark.slow
def test_another_target_causes_a_warning_and_a_quantized_one_does_not(twin, drafter):
    if "target_fingerprint" not in json.loads((drafter / "config.json").read_text()):
        pytest.skip("the artifact has no fingerprint")
    other = copy.deepcopy(twin)
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.05)
    with pytest.warns(UserWarning, match="e.g. layers.2.mlp.up_proj, differ from those of the drafter's target"):
        assert torch.equal(drafted(other, drafter), own(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for same in (twin, packed(copy.deepcopy(twin)), copy.deepcopy(twin).to(torch.bfloat16)):
            drafted(same, drafter)


def test_the_embedded_tokenizer_returns_supported_inputs_in_every_version():
    """Without `model_input_names`, transformers 4.57 adds token_type_ids, which `generate` rejects."""
    config = json.loads((TINY / "target" / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
