"""The shipped decoder: further supported and rejected calls, each rejection with its actual reason."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.wrapped_targets import CALL, IDS, drafted, own
from transformers import DynamicCache, GenerationConfig, StaticCache

from models.custom_generate import generate as shipped


@pytest.fixture
def drafter(root, tmp_path):
    """Return a copy that tests may change."""
    return shutil.copytree(root / "drafter", tmp_path / "drafter")


def set_config(drafter, **values):
    file = drafter / "config.json"
    config = json.loads(file.read_text())
    for key, value in values.items():
        place = config if key in config else config["flexdraft_config"]
        place[key] = value
    file.write_text(json.dumps(config))
    return file


class Embeds:
    """Model that prepares embeddings, as models with image tokens do."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        prepared = super().prepare_inputs_for_generation(*args, **kwargs)
        return prepared | {"inputs_embeds": 2 * self.get_input_embeddings()(prepared.pop("input_ids"))}


class KeepsState:
    def _update_model_kwargs_for_generation(self, *args, **kwargs):
        return super()._update_model_kwargs_for_generation(*args, **kwargs)


class SamplesItself:
    def _sample(self, *args, **kwargs):
        return super()._sample(*args, **kwargs)


@pytest.mark.parametrize("kind", [Embeds, KeepsState, SamplesItself])
def test_a_subclass_with_custom_input_preparation_is_rejected_by_name(twin, drafter, kind):
    twin.__class__ = type("Own", (kind, type(twin)), {})
    with pytest.raises(ValueError, match=f"inputs prepared by {kind.__name__}.* in {kind.__module__}"):
        drafted(twin, drafter)


@pytest.mark.parametrize("wrap", ["none", "partial", "name and module of transformers' own"])
def test_an_instance_method_that_prepares_inputs_is_rejected(twin, drafter, wrap):
    def prepare(*args, **kwargs):
        prepared = type(twin).prepare_inputs_for_generation(twin, *args, **kwargs)
        return prepared | {"inputs_embeds": 2 * twin.get_input_embeddings()(prepared.pop("input_ids"))}

    if wrap == "partial":
        prepare = functools.partial(prepare)
    if wrap == "name and module of transformers' own":
        prepare = functools.wraps(type(twin).prepare_inputs_for_generation)(prepare)
    twin.prepare_inputs_for_generation = prepare
    with pytest.raises(ValueError, match="does not support inputs prepared by"):
        drafted(twin, drafter)


@pytest.mark.parametrize(
    "name", ["embed_tokens", "lm_head", "norm", "layers.2.mlp.up_proj", "layers.0.input_layernorm"]
)
@pytest.mark.parametrize("change", [1.05, float("nan")])
def test_every_tensor_of_the_fingerprint_is_compared(twin, drafter, name, change):
    module = twin.get_output_embeddings() if name == "lm_head" else twin.model.get_submodule(name)
    rows = 5 if name in ("embed_tokens", "lm_head") else 0
    with torch.no_grad():
        module.weight[rows:].mul_(change)
    with pytest.warns(UserWarning, match=f"1 of this model's weights, e.g. {name}, differ"):
        shipped._compare(twin, json.loads((drafter / "config.json").read_text())["target_fingerprint"])


DAMAGED = {
    "fingerprint with words": ({"target_fingerprint": {"norm": "one two"}}, "ValueError: could not convert"),
    "fingerprint of another length": ({"target_fingerprint": {"norm": "1.0 2.0 3.0"}}, "RuntimeError"),
    "fingerprint that is a list": ({"target_fingerprint": ["norm"]}, "AttributeError"),
    "recommendation that is a list": ({"recommended_decoding": ["off"]}, r"recommended_decoding=\['off'\]: expected"),
    "recommendation that is a text": ({"recommended_decoding": "off"}, "recommended_decoding='off': expected"),
    "recommended threshold": (
        {"recommended_decoding": {"threshold": 5}},
        "recommended_decoding: threshold=5: expected",
    ),
    "recommended calibrate": ({"recommended_decoding": {"calibrate": "no"}}, "recommended_decoding: calibrate='no'"),
    "recommended selection": ({"recommended_decoding": {"selection": None}}, "recommended_decoding: selection=None"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_config_is_an_error_that_names_the_file(twin, drafter, damage):
    values, message = DAMAGED[damage]
    file = set_config(drafter, **values)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        drafted(twin, drafter)


RECOMMENDATIONS = {
    '["off"]': r"recommended_decoding=\['off'\]: expected",
    "null": "recommended_decoding=None: expected",
    '{"threshold": 5}': "recommended_decoding: threshold=5: expected",
    '{"calibrate": "no"}': "recommended_decoding: calibrate='no'",
    '{"selection": null}': "recommended_decoding: selection=None",
    '{"selection": ': "damaged, or not a drafter .*JSONDecodeError",
    "": "damaged, or not a drafter .*JSONDecodeError",
}


@pytest.mark.parametrize("content", RECOMMENDATIONS)
def test_a_damaged_recommendation_is_an_error_that_names_the_file(twin, drafter, content):
    file = drafter / "recommended_decoding.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file}.*{RECOMMENDATIONS[content]}"):
        drafted(twin, drafter)


def test_the_recommendation_file_takes_precedence_over_that_in_an_older_config(twin, drafter):
    def followed():
        drafted(twin, drafter)
        return twin._flexdraft[1].settings["recommended_decoding"]

    assert followed() == shipped.RECOMMENDED
    set_config(drafter, recommended_decoding={"selection": "min_confidence", "threshold": 0.5, "calibrate": False})
    assert followed() == {"selection": "min_confidence", "threshold": 0.5, "calibrate": False}
    (drafter / "recommended_decoding.json").write_text('{"selection": "off", "threshold": 0.0, "worth_it": [1]}')
    assert followed() == {"selection": "off", "threshold": 0.0, "calibrate": True, "worth_it": [1]}


@pytest.mark.parametrize("calibrate", ["no", "", 0, 1.0, [], torch.tensor(True)])
def test_calibrate_must_be_a_bool(twin, drafter, calibrate):
    with pytest.raises(ValueError, match="calibrate=.*: expected True or False"):
        drafted(twin, drafter, calibrate=calibrate)


@pytest.mark.slow(but="[0.2]")
@pytest.mark.parametrize("threshold", [np.float64(0.2), np.float32(0.2), np.float16(0.2), np.int64(1), 0, 1])
def test_a_threshold_may_be_any_real_number(twin, drafter, threshold):
    assert torch.equal(drafted(twin, drafter, threshold=threshold), own(twin))


def test_an_empty_cache_is_accepted_and_a_filled_one_is_rejected(twin, drafter):
    name = next(name for name in shipped.CACHES if name in shipped._names(twin)[0])
    for cache in (DynamicCache(), StaticCache(config=twin.config, max_cache_len=64)):
        assert torch.equal(drafted(twin, drafter, **{name: cache}), own(twin))
    filled = DynamicCache()
    twin(input_ids=IDS, use_cache=True, **{name: filled})

    class Rounds(DynamicCache):
        """Lossy cache, such as a quantized one."""

    for cache in (filled, Rounds()):
        with pytest.raises(ValueError, match=f"does not support {name} .only an empty cache"):
            drafted(twin, drafter, **{name: cache})


ASSISTED = {
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
    "max_matching_ngram_size": 2,
    "assistant_ensemble_weight": 0.5,
    "is_assistant": False,
}


@pytest.mark.slow(but="[all]")
@pytest.mark.parametrize("name", [*ASSISTED, "all"])
def test_settings_of_assisted_decoding_have_no_effect(twin, drafter, name):
    for one in ASSISTED if name == "all" else [name]:
        setattr(twin.generation_config, one, ASSISTED[one])
    assert torch.equal(drafted(twin, drafter), own(twin))


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "assistant_early_exit", "num_beams", "dola_layers"])
def test_a_setting_that_needs_extra_passes_is_rejected_by_name(name):
    settings = GenerationConfig()
    setattr(settings, name, "high" if name == "dola_layers" else 3)
    with pytest.raises(ValueError, match=f"does not support {name}"):
        shipped._token_mask(settings, IDS, {})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError("no room"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=["GPU", "Python", "CPU"],
)
@pytest.mark.parametrize("where", ["load_file", "Drafter.block", "Drafter.target", "_compare"])
def test_out_of_memory_is_not_reported_as_a_damaged_drafter(twin, drafter, monkeypatch, error, where):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(f"models.custom_generate.generate.{where}", fails)
    with pytest.raises(type(error)) as raised:
        drafted(twin, drafter)
    assert raised.value is error


def through_peft(tuned, twin, drafter):
    """Call `generate` of a PEFT model as if `custom_generate` were given by name."""

    def through(self, *args, **kwargs):
        return shipped.generate(self, inputs=kwargs.pop("input_ids"), drafter=str(drafter), **kwargs)

    twin.generate = through.__get__(twin)
    return tuned


def test_adapters_that_differ_by_row_or_token_are_rejected_by_name(twin, drafter):
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = through_peft(peft.get_peft_model(twin, lora), twin, drafter).eval()
    tuned.generate(input_ids=IDS, **CALL)  # a single adapter for all rows is supported
    for names in (["default", "__base__", "default"], ["default"] * 3):
        with pytest.raises(ValueError, match="does not support adapter_names .PEFT"):
            tuned.generate(input_ids=IDS, adapter_names=names, **CALL)


def test_activated_lora_is_rejected_by_name(twin, drafter):
    import peft

    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=IDS[0, 3:5].tolist(),
    )
    tuned = through_peft(peft.get_peft_model(twin, config), twin, drafter)
    with pytest.raises(ValueError, match="does not support alora_offsets .PEFT"):
        tuned.generate(input_ids=IDS, **CALL)
