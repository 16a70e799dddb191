"""Target families other than Qwen3: the same properties in all stages, and rejected targets."""

import hashlib

import pytest
import torch
from check_families import FAMILIES, SIZES, lossless, parity, random_pair, unchanged_by_export
from helpers.shared import ROOT, random_target
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from transformers import AutoConfig

import train.__main__  # noqa: F401  registers the `root` resolver
from models.attention.packed import View, packed_attention
from models.decoding.flex import check_untested, generate
from models.decoding.reference import autoregressive_generate, reference_generate
from models.decoding.selection import OFF
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.families import TESTED, check_architecture, layer_windows, max_text_length
from models.target import load_target
from train.pipeline import run
from train.run_dir.state import read_json

EVERY = pytest.mark.parametrize("family", FAMILIES)


def test_the_tested_families_are_those_in_the_list():
    assert {special["model_type"] for special in FAMILIES.values()} == set(TESTED)


@pytest.mark.slow(but="[gemma 3]")
@EVERY
def test_training_and_decoding_agree_and_the_output_is_the_targets_own(family):
    target, draft = random_pair(family)
    states, worst = parity(target, draft)
    assert states > 100 and worst < 1e-4
    assert lossless(target, draft, prompts=8, new_tokens=16) == 8
    assert unchanged_by_export(target, draft)


@pytest.mark.slow(but="[phi 4 mini]")
@EVERY
def test_decoding_takes_the_steps_of_the_reference(family):
    """The drafter is a copy of the target, so some drafts are right."""
    target, _ = random_pair(family)
    draft = DraftModel(target, DraftConfig(num_layers=3, block_size=6, calibrator_rank=0))
    prompts = [torch.randint(3, 97, (n,)).tolist() for n in (2, 13, 30)]
    expected = [reference_generate(target, draft, prompt, 20, selection=OFF) for prompt in prompts]
    for mode in ("parallel", "sequential"):
        result = generate(target, draft, prompts, max_new_tokens=20, mode=mode, selection=OFF)
        assert result.tokens == [one.tokens[0] for one in expected]
        assert result.steps == [one.steps[0] for one in expected]


@pytest.mark.slow
@EVERY
def test_all_stages(family, tmp_path, monkeypatch):
    """Train, export, reload and decode; the target stays bit-identical, and the drafter changes."""
    tiny = {"vocab_size": 2048, "num_hidden_layers": 3, "max_position_embeddings": 512}
    special = {"layer_types": None} | FAMILIES[family]
    special["layer_types"] = special["layer_types"] and special["layer_types"][-3:]
    if special.get("original_max_position_embeddings"):
        special |= {"original_max_position_embeddings": 500}
        special["rope_parameters"] = special["rope_parameters"] | {"original_max_position_embeddings": 500}
    architecture = {key: value for key, value in (SIZES | special | tiny).items() if value is not None}
    stages = [
        f"stage.{stage}.{setting}"
        for stage in ("attention_tuning", "bonus_calibration")
        for setting in (
            "steps=2",
            "global_batch_size=2",
            "num_anchors=8",
            "decode.prompts=2",
            "decode.max_new_tokens=4",
        )
    ]
    evaluation = ["num_prompts=2", "max_new_tokens=6", "speed.num_prompts=0"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            "config",
            [
                "+experiment=tiny",
                "model=stand_in",
                "model.target.architecture=null",
                "model.draft.num_layers=2",
                "model.draft.block_size=6",
                "data.max_records=60",
                "data.validation_records=8",
                "data.num_proc=1",
                f"run_dir={tmp_path}",
                "trainer.precision=32-true",
                *stages,
                *(f"stage.evaluate.{setting}" for setting in evaluation),
            ],
        )
    config.model.target.architecture = architecture
    target = load_target(None, architecture=architecture)
    monkeypatch.setattr("train.context.load_target", lambda *_, **__: target)
    before = digest(target)
    run(config)
    assert digest(target) == before
    untrained = DraftModel(target, DraftConfig(num_layers=2, block_size=6, calibrator_rank=0)).own_parameters()
    trained = load_file(tmp_path / "export" / "model.safetensors")
    assert untrained.keys() < trained.keys()
    assert not any(torch.equal(trained[name], parameter) for name, parameter in untrained.items())
    for stage in ("attention_tuning", "bonus_calibration"):
        assert read_json(tmp_path / "records" / f"{stage}.done.json")["result"]["steps"] == 2
    report = read_json(tmp_path / "evaluate" / "report.json")
    assert all(variant["identical"] == 2 for variant in report["benchmarks"]["held_out"]["variants"].values())


def digest(target) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in target.state_dict().values())).hexdigest()


REFUSED = {
    "gpt2": "no model.layers, no model.norm, no model.rotary_emb",
    "gemma2": "attention logit softcapping, final logit softcapping",
    "gpt_oss": "attention sinks",
    "llama4_text": "layers of type chunked_attention",
    "qwen3_next": "layers of type linear_attention",
    "gemma3": "other modalities .save its gemma3_text as a separate model",
    "t5": "an encoder in addition to its decoder",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_unsupported_architecture_is_rejected_with_the_reasons(kind):
    with pytest.raises(ValueError, match=f"{kind} is not supported as a target: it has {REFUSED[kind]}"):
        check_architecture(AutoConfig.for_model(kind))


@pytest.mark.parametrize("kind", ["granite", "cohere"])
def test_a_forward_with_scaling_outside_its_layers_is_detected(kind):
    scaled = {"logits_scaling": 8.0, "embedding_multiplier": 3.0} if kind == "granite" else {}
    target = load_target(None, architecture=SIZES | {"model_type": kind} | scaled)
    check_architecture(target.config)  # no setting of the config shows it
    with pytest.raises(
        ValueError, match=f"{kind} is not supported as a target: when run layer by layer, its logits differ by"
    ):
        check_untested(target)


@pytest.mark.parametrize("kind", ["smollm3", "mixtral", "ministral3"])
def test_untested_families_with_the_same_structure_are_accepted(kind):
    target = load_target(None, architecture=SIZES | {"model_type": kind, "pad_token_id": 0, "num_local_experts": 4})
    check_architecture(target.config)
    check_untested(target)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "Python", "CPU"])
@pytest.mark.parametrize("where", ["difference_from_forward", "DraftModel", "generate"])
def test_out_of_memory_is_not_reported_as_an_unsupported_architecture(error, where, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    target = random_target()
    monkeypatch.setattr("models.decoding.flex.TESTED", ())
    monkeypatch.setattr(f"models.decoding.flex.{where}", fails)
    with pytest.raises(type(error)) as raised:
        check_untested(target)
    assert raised.value is error


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "Python", "CPU"])
def test_out_of_memory_is_not_reported_as_a_damaged_target(error, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    random_target().save_pretrained(tmp_path)
    monkeypatch.setattr("models.target.AutoModelForCausalLM.from_pretrained", fails)
    with pytest.raises(type(error)) as raised:
        load_target(str(tmp_path))
    assert raised.value is error


@pytest.mark.parametrize(
    ("kind", "message"),
    [("diffllama", "decoding differs from its own|logits differ"), ("doge", "drafting with its layers failed")],
)
def test_a_family_that_decodes_differently_is_detected_before_training(kind, message):
    target = load_target(None, architecture=SIZES | {"model_type": kind})
    with pytest.raises(ValueError, match=f"{kind} is not supported as a target: .*({message})"):
        check_untested(target)


def test_windows_are_read_from_the_config():
    windows = {family: layer_windows(random_pair(family)[0].config) for family in FAMILIES}
    assert windows["gemma 3"] == [9, 9, None, 9, None]
    assert windows["mistral"] == windows["phi 3"] == [9] * 5
    assert windows["qwen3"] == windows["phi 4 mini"] == [None] * 5


def test_a_mask_built_for_another_window_is_rejected():
    query = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="has sliding_window=9, but its mask was built for sliding_window=None"):
        packed_attention(torch.nn.Identity(), query, query, query, View(), sliding_window=9)


def test_a_block_must_fit_the_window():
    target, _ = random_pair("mistral")
    with pytest.raises(ValueError, match="block_size=10: expected at most 9, the target's sliding window"):
        DraftModel(target, DraftConfig(num_layers=2, block_size=10, calibrator_rank=0))


def test_blocks_stay_where_longrope_is_constant():
    target, draft = random_pair("phi 4 mini")
    limit = max_text_length(target.config, draft.block_size)
    assert limit == 128 - 2 * draft.block_size
    prompt = torch.randint(3, 97, (limit - 20,)).tolist()
    own = autoregressive_generate(target, prompt, 20)
    for mode in ("parallel", "sequential"):
        assert generate(target, draft, [prompt], max_new_tokens=20, mode=mode, stop=set()).tokens[0][: len(own)] == own
    with pytest.raises(ValueError, match=f"the target supports at most {limit}"):
        generate(target, draft, [prompt], max_new_tokens=21)
    assert max_text_length(random_target().config, 6) == 256
