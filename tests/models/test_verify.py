"""`models.verify`: each kind of damage gives exactly its own fault; a healthy artifact gives none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.corrupt_artifacts import DAMAGES, change_config, change_settings, change_tensors
from helpers.shared import ARCHITECTURE, ROOT, TINY, random_draft, random_target
from safetensors.torch import save_file
from transformers import AutoConfig

from data.sources.records import Conversation
from models.decoding.flex import generate
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export import artifact_io as export
from models.export.artifact_io import export_draft
from models.export.weight_checks import foreign_tensors
from models.target import load_target
from models.verify.prompts import prompt_tokens, read_prompts
from models.verify.run import ROWS, _decoded, decoding_check, main, target_check, verify


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Return a target and its artifacts by name: plain, sharded, complete, without calibrator, beyond the paper."""
    root = tmp_path_factory.mktemp("healthy")
    random_target().save_pretrained(root / "target")
    target = load_target(str(root / "target"))
    draft = random_draft(target)
    export_draft(draft, root / "whole", torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "MAX_SHARD_BYTES", 20_000)
        export_draft(draft, root / "shards", torch.float32)
    export_draft(random_draft(target, rank=0), root / "no_calibrator", torch.float32)
    export_draft(random_draft(target, bonus_slot=True, chain_rank=4), root / "beyond", torch.float32)
    shutil.copytree(root / "whole", root / "complete")
    own = {f"layers.{i}.{name}": p for i, layer in enumerate(target.model.layers[2:]) for name, p in kept(layer)}
    change_tensors(lambda tensors: tensors.update(own | {"norm.weight": target.model.norm.weight}))(root / "complete")
    return root


def kept(layer):
    """Return the tensors of a decoder layer outside its attention."""
    return [(name, p.detach().clone()) for name, p in layer.named_parameters() if not name.startswith("self_attn")]


def faults_of(artifact: Path, target: Path) -> list[str]:
    """Return the faults as printed by the command."""
    return [f"{check.name}: {fault}" for check in verify(artifact, target, max_new_tokens=8) for fault in check.faults]


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_gives_exactly_its_own_fault(name, healthy, tmp_path):
    kind, damage, complaint = DAMAGES[name]
    shutil.copytree(healthy / kind, tmp_path / "artifact")
    damage(tmp_path / "artifact")
    faults = faults_of(tmp_path / "artifact", healthy / "target")
    assert len(faults) == 1 and complaint in faults[0]


@pytest.mark.parametrize("kind", ["whole", "shards", "complete", "no_calibrator", "beyond"])
def test_a_healthy_artifact_passes(kind, healthy):
    checks = list(verify(healthy / kind, healthy / "target", max_new_tokens=12))
    assert [check.name for check in checks] == ["files", "config", "tensors", "values", "target", "decoding"]
    assert not [fault for check in checks for fault in check.faults]
    assert "identical to the target's output" in checks[-1].summary
    assert checks[1].summary.endswith(", bonus slot, chain of rank 4") == (kind == "beyond")


def test_disabled_parts_may_be_stated_or_omitted(healthy, tmp_path):
    shutil.copytree(healthy / "whole", tmp_path / "artifact")
    change_settings(bonus_slot=False, chain_rank=0)(tmp_path / "artifact")
    assert not faults_of(tmp_path / "artifact", healthy / "target")


WRONG_TARGETS = {
    "hidden_size": (64, "hidden_size is 32; expected 64, the target's"),
    "num_hidden_layers": (6, "num_target_layers is 5; expected 6, the target's number of layers"),
    "vocab_size": (90, "vocab_size is 97; expected 90, the target's"),
    "model_type": ("qwen2", "model_type is 'qwen3'; expected 'qwen2', the target's"),
    "num_key_value_heads": (4, "num_key_value_heads is 2; expected 4, the target's"),
    "rms_norm_eps": (1e-5, "rms_norm_eps is 1e-06; expected 1e-05, the target's"),
}


@pytest.mark.parametrize("key", WRONG_TARGETS)
def test_another_target_is_detected_by_its_config_alone(key, healthy, tmp_path):
    value, complaint = WRONG_TARGETS[key]
    AutoConfig.for_model(**ARCHITECTURE | {key: value}).save_pretrained(tmp_path)
    faults = faults_of(healthy / "whole", tmp_path)
    assert any(complaint in fault for fault in faults)
    related = {"num_hidden_layers": "target_layer_ids", "model_type": "head_dim"}.get(key, key)
    assert all(key in fault or related in fault or complaint in fault for fault in faults)


def test_all_faults_of_a_check_are_reported_and_later_checks_skipped(healthy, tmp_path):
    shutil.copytree(healthy / "whole", tmp_path / "artifact")
    change_config(block_size=1, rope_theta=1.0, head_dim=5)(tmp_path / "artifact")
    change_tensors(lambda tensors: tensors.pop("mask_embedding"))(tmp_path / "artifact")
    faults = faults_of(tmp_path / "artifact", healthy / "target")
    assert len(faults) == 3 and all(fault.startswith("config: ") for fault in faults)


def warnings_of(artifact: Path, target: Path) -> str:
    checks = list(verify(artifact, target, max_new_tokens=8))
    assert not [fault for check in checks for fault in check.faults]
    return "\n".join(f"{check.name}: {warning}" for check in checks for warning in check.warnings)


UNTRAINED = {
    "anchor_bias_mlp.2.weight (the calibrator has no effect).": {"calibrator_rank": 8},
    "chain_mlp.2.weight (the chain has no effect).": {"calibrator_rank": 0, "chain_rank": 4},
    "anchor_bias_mlp.2.weight, bonus_slot.weight (the calibrator has no effect, the bonus slot has no effect).": {
        "calibrator_rank": 8,
        "bonus_slot": True,
    },
}


@pytest.mark.parametrize("zeros", UNTRAINED)
def test_an_untrained_drafter_is_valid_but_causes_a_warning(zeros, healthy, tmp_path):
    draft = DraftModel(
        load_target(str(healthy / "target")), DraftConfig(num_layers=3, block_size=6, **UNTRAINED[zeros])
    )
    export_draft(draft, tmp_path, torch.float32)
    warnings = warnings_of(tmp_path, healthy / "target")
    assert f"values: all zeros, possibly untrained: {zeros}" in warnings
    assert "target: the projections equal the target's, so the drafter is untrained" in warnings


def test_a_trained_drafter_of_another_target_of_equal_shape_is_detected_by_its_tau(healthy, tmp_path):
    random_target(seed=5).save_pretrained(tmp_path)
    warnings = warnings_of(healthy / "whole", tmp_path)
    assert "decoding: τ 1.0" in warnings and "almost no drafts are accepted" in warnings
    assert "untrained: " not in warnings and "equal the target's" not in warnings


def test_drafts_that_are_accepted_and_identical_give_no_warning():
    """The target repeats one token, which its copy drafts with too little confidence to have more than one verified."""
    target = random_target(eos_token_id=None)
    with torch.no_grad():
        target.model.norm.weight.zero_()
    draft = DraftModel(target, DraftConfig(num_layers=3, block_size=6, calibrator_rank=0))
    check = decoding_check(draft, [[5, 6], [7]], 13)
    assert "τ 2.00 parallel, τ 2.00 sequential; identical" in check.summary and not check.warnings + check.faults


def test_the_targets_generation_settings_are_applied_and_printed():
    draft = random_draft(random_target(eos_token_id=None))
    draft.target.generation_config.repetition_penalty = 1.3
    check = decoding_check(draft, [[5, 6], [7]], 8)
    assert "identical to the target's output under its generation_config (repetition_penalty=1.3)" in check.summary


def test_prompts_in_several_batches_keep_their_order():
    draft = random_draft(random_target(eos_token_id=None))
    prompts = [[5 + i] * (1 + i % 3) for i in range(2 * ROWS + 1)]
    result = _decoded(draft.target, draft, prompts, max_new_tokens=4)
    assert result.tokens == [generate(draft.target, None, [p], max_new_tokens=4).tokens[0] for p in prompts]
    assert decoding_check(draft, prompts, 4).summary.startswith("17 prompts, up to 4 new tokens")


def test_answers_too_short_to_verify_a_draft_prove_nothing():
    check = decoding_check(random_draft(random_target()), [[5, 6]], 1)
    assert "identical" not in check.summary and "nan" not in check.summary
    assert not check.faults and check.warnings == [
        "no drafts were verified. Use different prompts, or increase --max-new-tokens."
    ]


def test_a_token_that_differs_from_the_targets_own_is_a_fault_only_in_float32(monkeypatch):
    from models.verify import run as module

    honest = module.generate

    def altered(target, draft, prompts, **settings):
        result = honest(target, draft, prompts, **settings)
        if draft is not None and settings["mode"] == "parallel":
            result.tokens[1][3] = 96 - result.tokens[1][3]
        return result

    monkeypatch.setattr(module, "generate", altered)
    draft = random_draft(random_target(eos_token_id=None))
    [fault] = decoding_check(draft, [[5, 6], [7]], 6).faults
    assert fault.startswith("parallel, prompt 2: new token 3 is [")
    rounded = decoding_check(random_draft(random_target("bfloat16", eos_token_id=None)), [[5, 6], [7]], 6)
    assert not rounded.faults and any("parallel, prompt 2" in warning for warning in rounded.warnings)


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "models.verify", *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_prints_its_checks_and_exits_with_0(tmp_path, tiny_target):
    draft = DraftModel(tiny_target, DraftConfig(num_layers=2, block_size=4, calibrator_rank=0))
    export_draft(draft, tmp_path / "artifact", torch.bfloat16)
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["How many?", "And now?"]}\n')
    arguments = (tmp_path / "artifact", TINY / "target", "--prompts", tmp_path / "prompts.jsonl")
    done = command(*arguments, "--max-new-tokens", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("ok")] == [
        ["ok", name] for name in ("files", "config", "tensors", "values", "target", "decoding")
    ]
    assert "1 prompt, up to 8 new tokens: τ " in done.stdout and "warning  target    the projections" in done.stdout


@pytest.mark.slow
def test_the_command_exits_with_1_after_faults_and_wrong_calls(healthy, tmp_path):
    shutil.copytree(healthy / "whole", tmp_path / "artifact")
    change_config(block_size=1)(tmp_path / "artifact")
    done = command(tmp_path / "artifact", healthy / "target")
    assert done.returncode == 1 and "1 fault; remaining checks skipped" in done.stderr
    assert done.stdout.splitlines()[1].startswith("fault    config    config.json: block_size is 1")
    done = command(tmp_path / "nothing", healthy / "target")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "no such directory" in done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "", "²"])
def test_an_out_of_range_number_of_new_tokens_is_rejected_with_the_range(value, healthy, monkeypatch, capsys):
    call = ["verify", str(healthy / "whole"), str(healthy / "target"), f"--max-new-tokens={value}"]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "expected an integer >= 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_new_tokens=0: expected an integer of at least 1"):
        next(verify(healthy / "whole", healthy / "target", max_new_tokens=0))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "prompts.jsonl contains no records"),
        ("{" * 100_000, ":1: invalid JSON"),
        ('{"turns": ["a"]}\n{', ":2: invalid JSON"),
        ('{"text": "a"}', ":1: expected `messages`.*or `turns`"),
        ('{"messages": [{"role": "system", "content": "a"}]}', ":1: has only a system message; expected a user turn"),
    ],
)
def test_invalid_prompts_are_rejected_with_their_line(content, complaint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_prompts(tmp_path / "prompts.jsonl")


def test_a_conversation_is_a_prompt_up_to_its_last_question(tmp_path):
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": messages}))
    assert read_prompts(tmp_path / "prompts.jsonl") == [Conversation(messages[:3])]


def test_a_tokenizer_with_more_tokens_than_the_target_embeds_is_a_warning_unless_a_prompt_has_one(
    healthy, tiny_tokenizer
):
    """Gemma 3 ships 262,145 tokens for 262,144 rows of embeddings."""
    target = load_target(str(healthy / "target"))
    check, _ = target_check(healthy / "whole", target, tiny_tokenizer)
    assert not check.faults
    assert (
        "the tokenizer has 2048 tokens, but the target's embeddings have 97 rows. "
        "Prompts with token ids beyond that are rejected" in check.warnings[0]
    )
    with pytest.raises(ValueError, match=r"Prompt 1 contains token id \d+; expected \[0, 96\]"):
        prompt_tokens(None, target, tiny_tokenizer)
    one_too_many = random_target(vocab_size=2047)
    assert len(prompt_tokens(None, one_too_many, tiny_tokenizer)) == 4
    with pytest.raises(ValueError, match="no tokenizer, so text prompts cannot be encoded"):
        prompt_tokens([[{"role": "user", "content": "a"}]], target, None)


def test_the_targets_own_tensors_are_compared_in_the_lower_precision(tmp_path):
    own = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"norm.weight": own.bfloat16(), "other": own}, tmp_path / "model.safetensors")
    assert foreign_tensors(tmp_path, {"norm.weight": own}) == []
    assert foreign_tensors(tmp_path, {"norm.weight": own * 1.01}) == ["norm.weight"]


def test_names_that_are_neither_directory_nor_repository_are_rejected(healthy, tmp_path):
    with pytest.raises(ValueError, match="owner/none: no such directory, not in the local cache, and the Hub is un"):
        next(verify("owner/none", healthy / "target"))
    with pytest.raises(ValueError, match="failed to load the target's config"):
        next(verify(healthy / "whole", tmp_path))
    with pytest.raises(ValueError, match="nothing: no such directory, and not a Hub repository name"):
        next(verify(healthy / "whole", tmp_path / "nothing"))
    with pytest.raises(ValueError, match="target is a local directory; revision=v1 requires"):
        next(verify(healthy / "whole", healthy / "target", target_revision="v1"))
