"""FLOPs, parameters and memory of the plan against those of real modules."""

import json

import pytest
import torch
from helpers.flops import flop_counter, sizes_of
from helpers.shared import TINY, command, random_target
from helpers.training import SETTINGS
from measure_memory import CASES, EXPERTS, GEMMA, decoding_peak, estimated, full_batch, saying, tensor_peak

from data.config.compose import composed
from data.errors import UserError
from models.attention.layers import Execution
from models.attention.masks import block_tiles, clean_tiles, tile_pairs
from models.cost.activation_memory import Setup
from models.cost.flops import Twice, block_flops, step_flops
from models.cost.hardware import GPUS, find_gpu, peak_flops
from models.cost.memory import decoding_memory, peak, step_memory
from models.decoding.forward_passes import ForwardPasses, prefill
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.loss.objectives import Objective
from models.target import load_target
from train.loop.modules import AttentionTuning, BonusCalibration
from train.names import TRAINED
from train.plan.estimate import estimate, machine_of, target_sizes
from train.plan.report import apply, plan, refusal
from train.settings.checks import check_sizes

REAL = ("qwen3_1_7b", "qwen3_4b", "qwen3_8b", "qwen3_14b", "qwen3_32b", "qwen3_30b_a3b", "llama3_1_8b")
MIXTURE = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURE |= {"decoder_sparse_step": 2}  # draft layers with experts and without
BEYOND = {"bonus_slot": True, "chain_rank": 5}
OTHER_SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_key_value_heads": 4, "num_hidden_layers": 4}


@pytest.mark.slow(but="[paper-")
@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("objective", [Objective(), Objective(ce=0.1, tv=0.9)], ids=["ce", "mixture"])
@pytest.mark.parametrize(
    "shape, rows, length, anchors, chunk, recompute",
    [
        ({}, 2, 64, 5, 1000, False),
        ({}, 2, 64, 5, 7, False),
        ({}, 1, 200, 90, 50, True),  # enough anchors for three tiles
        (OTHER_SHAPE | {"tie_word_embeddings": True}, 3, 40, 9, 50, False),
        (OTHER_SHAPE | {"tie_word_embeddings": True}, 3, 40, 9, 1000, True),
        (MIXTURE, 2, 64, 5, 1000, False),
        (MIXTURE, 2, 64, 5, 7, True),
    ],
)
@pytest.mark.parametrize(
    "beyond, joint", [({}, False), (BEYOND, True), (BEYOND, False)], ids=["paper", "joint", "frozen"]
)
def test_flops_are_those_of_the_training_step(
    stage, objective, shape, rows, length, anchors, chunk, recompute, beyond, joint, monkeypatch
):
    target = random_target(**shape)
    draft = DraftModel(target, DraftConfig(num_layers=3, block_size=6, calibrator_rank=8, **beyond))
    settings = SETTINGS | {
        "chunk": chunk,
        "objective": objective,
        "execution": Execution(activation_checkpointing=recompute),
    }
    if stage == "attention_tuning":
        module = AttentionTuning(target, draft, **settings)
    else:
        module = BonusCalibration(target, draft, joint=joint, **settings)
    sizes = sizes_of(target, joint=joint, **beyond)
    batch = full_batch(sizes, rows, length, anchors)
    monkeypatch.setattr("train.loop.modules.bonus_tokens", saying(batch))
    with flop_counter() as counter:
        loss, weight, _, _ = module.loss(batch)
        (loss / weight).backward()
    in_pieces = rows * anchors * 5 > chunk
    parts = step_flops(
        sizes,
        stage,
        rows=rows,
        max_seq_len=length,
        num_anchors=anchors,
        teacher=objective.needs_target,
        clean_pairs=tile_pairs(clean_tiles(batch.document_ids)),
        mask_pairs=tile_pairs(block_tiles(batch.document_ids, batch.anchors, 6)),
        twice=Twice(scores=True, layers=recompute, logits=in_pieces and stage == "bonus_calibration"),
    )
    assert sum(parts.values()) == pytest.approx(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "stand_in"])
@pytest.mark.parametrize("recipe", [[], ["+recipe=beyond"]], ids=["paper", "beyond"])
def test_parameters_are_those_of_the_real_modules(model, recipe):
    config = composed(["+experiment=tiny", f"model={model}", *recipe])
    settings = config.model.target
    target = load_target(settings.name, architecture=settings.architecture and dict(settings.architecture))
    draft = DraftModel(target, DraftConfig(**config.model.draft))
    sizes = target_sizes(config)

    def count(parameters) -> int:
        return sum(p.numel() for p in parameters)

    assert sizes.target_parameters == count(target.parameters())
    assert sizes.trained_parameters("attention_tuning") == count(draft.attention_parameters().values())
    trained = draft.own_parameters() if recipe else draft.calibrator_parameters()
    assert sizes.trained_parameters("bonus_calibration") == count(trained.values())
    assert sizes.draft_parameters("bonus_calibration") == count(draft.own_parameters().values())


def weight_memory(config, stage) -> int:
    """Return the bytes of target and drafter weights, to subtract them from the memory of a step."""
    sizes = target_sizes(config)
    word = getattr(torch, config.model.target.dtype).itemsize
    return word * sizes.target_parameters + 4 * sizes.draft_parameters(stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize(
    "case",
    [
        "tiny, float32",
        "tiny, bf16-mixed",
        "wide, bfloat16 target, small chunks",
        "beyond, bfloat16 target",
        "beyond, bfloat16 target, small chunks",
        "experts, bfloat16 target, small chunks",
        "Gemma 3, bfloat16 target, small chunks",
        "Phi 3, bfloat16 target, small chunks",
    ],
)
def test_memory_equals_that_of_a_real_step(stage, case):
    config = composed(CASES[case])
    weights = weight_memory(config, stage)
    expected = tensor_peak(config, stage) - weights
    assert estimated(config, stage)[0] - weights == pytest.approx(expected, rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [["runtime.activation_checkpointing=true"], ["objective=mixture"]], ids=["recompute", "mixture"]
)
def test_memory_of_other_ways_to_tune(changes):
    config = composed(CASES["wide, bfloat16 target"] + changes)
    assert estimated(config, "attention_tuning")[0] == pytest.approx(tensor_peak(config, "attention_tuning"), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("family", [[], EXPERTS], ids=["dense", "experts"])
def test_memory_of_live_decoding(family):
    few = [f"stage.bonus_calibration.decode.{key}" for key in ("prompts=6", "batch_size=3", "max_new_tokens=8")]
    heads = (
        "model.target.architecture.num_key_value_heads=8"  # more keys and values per token than a layer has activations
    )
    config = composed([*CASES["wide, bfloat16 target"], *family, *few, heads])
    sizes, stage, length = target_sizes(config), "bonus_calibration", 200
    setup = estimate(config, stage, sizes, machine_of(config)).setup
    parts = decoding_memory(sizes, stage, setup, prompts=3, prompt_length=length, new_tokens=8)
    weights = weight_memory(config, stage)
    found = sum(parts.values()) - parts["optimizer"] - parts["gradients"] - weights
    assert found == pytest.approx(decoding_peak(config, stage, length) - weights, rel=0.06)


def test_longer_validation_prompts_at_a_time_may_be_the_peak():
    config = composed(["+experiment=qwen3_8b", "hardware.gpu=a100-40gb", "trainer=gpu"])
    config.stage.bonus_calibration.decode.batch_size = 32
    sizes, machine = target_sizes(config), machine_of(config)
    found = estimate(config, "bonus_calibration", sizes, machine)
    assert found.phase == "live decoding" and not found.fits
    assert "stage.bonus_calibration.decode.batch_size=" in refusal(config, sizes, machine, found)
    config.stage.bonus_calibration.decode.prompts = 0
    assert estimate(config, "bonus_calibration", sizes, machine).fits


def test_windows_bound_the_arithmetic_of_attention():
    def flops(**special) -> float:
        target = random_target(model_type="mistral", **special)
        sizes = sizes_of(target)
        parts = step_flops(sizes, "attention_tuning", rows=1, max_seq_len=128, num_anchors=4, teacher=True)
        return parts["target pass"] - 2 * 128 * sizes.weights(sizes.all_layers)

    token = 4 * 4 * 8  # two products with all query heads, 2 per multiply-add
    assert flops(sliding_window=None) == 5 * token * 128 * 129 / 2
    exact = 5 * token * (16 * 128 - 16 * 15 / 2)  # the first tokens attend to fewer
    assert exact <= flops(sliding_window=16) <= 1.1 * exact
    assert flops(sliding_window=500) == flops(sliding_window=None)


def test_the_estimate_cuts_the_tiles_that_attention_computes():
    sizes = target_sizes(composed(["+experiment=qwen3_8b"]))
    batch = full_batch(sizes, 2, 4096, 200)
    tiles = block_tiles(batch.document_ids, batch.anchors, sizes.block_size)
    expected = Setup(rows=2, max_seq_len=4096, num_anchors=200, chunk=2048, attention="sdpa").tiles(sizes)
    assert 2 * len(expected) == len(tiles)
    assert 2 * sum(queries * keys for queries, keys in expected) == pytest.approx(tile_pairs(tiles), rel=0.02)


def test_sharding_reduces_what_it_shards():
    sizes = target_sizes(composed(["+experiment=qwen3_32b"]))
    common = {"rows": 1, "max_seq_len": 4096, "num_anchors": 128, "chunk": 4096, "weight_bytes": 2, "autocast": True}

    def parts(**sharing):
        return step_memory(sizes, "attention_tuning", Setup(**common, ranks=8, **sharing))["optimizer"]

    ddp, zero1, zero2, zero3 = parts(ddp=True), parts(zero=1), parts(zero=2), parts(zero=3)
    trained = 4 * sizes.trained_parameters("attention_tuning")
    assert ddp["target weights"] == zero1["target weights"] == zero2["target weights"] == 8 * zero3["target weights"]
    assert ddp["drafter weights"] == zero2["drafter weights"] == 8 * zero3["drafter weights"]
    assert zero1["optimizer"] == zero2["optimizer"] == zero3["optimizer"] == 4 * trained / 8  # moments, weights, work
    assert ddp["optimizer"] == 3 * trained
    assert (ddp["gradients"], zero1["gradients"]) == (trained, trained + trained / 8)
    assert (zero2["gradients"], zero3["gradients"]) == (2 * trained / 8, trained / 8)


@pytest.mark.parametrize("stage", TRAINED)
def test_every_larger_size_takes_more_memory(stage):
    sizes = target_sizes(composed(["+experiment=qwen3_8b"]))
    base = {"rows": 2, "max_seq_len": 2048, "num_anchors": 64, "chunk": 512, "weight_bytes": 2, "autocast": True}

    def total(**changes) -> float:
        return peak(step_memory(sizes, stage, Setup(**base | changes)))[1]

    more = [{"rows": 4}, {"max_seq_len": 4096}, {"num_anchors": 256}, {"chunk": 8192}, {"weight_bytes": 4}]
    for change in more:
        assert total(**change) > total(), change
    if stage == "attention_tuning":
        assert total(teacher=True) > total() > total(recompute=True)
        assert total(attention="sdpa") > total(attention="flex") > total(compiled=True)


def test_a_joint_stage_2_keeps_of_the_mask_pass_what_stage_1_keeps():
    sizes = target_sizes(composed(["+experiment=qwen3_8b", "+recipe=beyond"]))
    for recompute in (False, True):
        setup = Setup(rows=2, max_seq_len=2048, num_anchors=64, chunk=512, teacher=True, recompute=recompute)
        first, second = (step_memory(sizes, stage, setup)["mask pass"] for stage in TRAINED)
        assert first["activations"] == second["activations"] and first["K/V and masks"] == second["K/V and masks"]


@pytest.mark.parametrize("experiment", REAL)
def test_the_experiments_fit_their_gpus(experiment):
    config = composed([f"+experiment={experiment}"])
    sizes, machine = target_sizes(config), machine_of(config)
    assert machine.memory < 80 * 2**30
    for stage in TRAINED:
        assert estimate(config, stage, sizes, machine).fits


def test_a_gpu_that_is_too_small_is_rejected_with_a_change_that_fits():
    config = composed(["+experiment=qwen3_8b", "plan=true", "hardware.gpu=a100-40gb"])
    with pytest.raises(UserError, match="attention_tuning takes .* GiB") as refused:
        plan(config)
    changes = [
        dict(word.split("=") for word in line.split("(")[0].split()) for line in str(refused.value).splitlines()[1:]
    ]
    assert {"runtime.activation_checkpointing": "true"} in changes and {"trainer": "zero2"} in changes
    assert any(change.keys() == {"stage.attention_tuning.micro_batch_size"} for change in changes)
    for change in changes:
        changed = apply(config, {key: int(v) if v.isdigit() else v for key, v in change.items()})
        assert estimate(changed, "attention_tuning", target_sizes(changed), machine_of(changed)).fits


@pytest.mark.slow
def test_a_joint_stage_2_may_recompute_its_layers_as_well():
    small = ["hardware.gpu=a100-40gb", "stages=[bonus_calibration]"]
    with pytest.raises(
        UserError, match=r"bonus_calibration takes .* GiB[\s\S]*\n  runtime.activation_checkpointing=true"
    ):
        plan(composed(["+experiment=qwen3_8b", "+recipe=beyond", *small]))


def test_rows_longer_than_the_targets_positions_are_rejected_as_in_training():
    with pytest.raises(UserError, match="= 50016 exceeds the target's 40960 positions"):
        plan(composed(["+experiment=qwen3_8b", "data.max_seq_len=50000"]))


def test_a_reduced_training_is_suggested_if_nothing_else_fits():
    few = ["hardware.gpu=a100-40gb", "hardware.gpus_per_node=1", "data.max_seq_len=400000"]
    few.append("model.target.architecture.max_position_embeddings=500000")
    with pytest.raises(UserError, match=r"checkpointing=true data\.max_seq_len=\d+ .*1 x a100-40gb"):
        plan(composed(["+experiment=qwen3_8b", *few]))


@pytest.mark.slow
def test_the_command_plans_a_hub_target_without_network_or_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    done = command("+experiment=qwen3_8b", "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "target weights" in done.stdout and "disk:" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 130 and not (tmp_path / "checkpoints").exists()
    small = command("+experiment=qwen3_8b", "plan=true", "hardware.gpu=rtx-4090", cwd=tmp_path)
    assert (
        small.returncode != 0 and "It would fit with any of these" in small.stderr and "Traceback" not in small.stderr
    )
    unknown = command("+experiment=qwen3_8b", "plan=true", "model.target.architecture=null", cwd=tmp_path)
    assert unknown.returncode != 0 and "model.target.architecture" in unknown.stderr


def test_the_plan_reads_the_config_of_a_local_target(capsys):
    config = composed(["+experiment=tiny", "plan=true"])
    expected = json.loads((TINY / "target" / "config.json").read_text())
    assert target_sizes(config).hidden == expected["hidden_size"]
    plan(config)
    assert "CPU" in capsys.readouterr().out


def test_the_plan_fills_in_optional_config_keys():
    config = composed(["+experiment=tiny", "model=stand_in", *GEMMA])
    windows = target_sizes(config).windows
    assert windows == (*[128] * 5, None) * 2


def test_an_unsupported_family_is_rejected_by_the_plan():
    config = composed(["+experiment=tiny", "model=stand_in", "model.target.architecture.model_type=mamba"])
    with pytest.raises(UserError, match=r"model.target: .*model_type='mamba' is not counted; these are: gemma3_text"):
        target_sizes(config)


def test_a_target_of_unexpected_sizes_is_rejected():
    with pytest.raises(UserError, match=r"architecture.hidden_size=64, but the target's config has 32"):
        check_sizes({"model_type": "qwen3", "hidden_size": 64}, {"model_type": "qwen3", "hidden_size": 32})


def test_gpus_are_found_by_torchs_device_names():
    names = {
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA A100 80GB PCIe": "a100-80gb",
        "NVIDIA H100 80GB HBM3": "h100-80gb",
        "NVIDIA H100 PCIe": "h100-80gb-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA B200": "b200",
    }
    assert {name: find_gpu(name) for name in names} == {name: GPUS[gpu] for name, gpu in names.items()}
    assert find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert peak_flops("cpu", torch.float32) > 1e9


def test_the_flops_of_a_block_are_those_of_drafting_it():
    """Compare with torch's FLOP counter, with 40 tokens before the block."""
    target = random_target()
    for beyond in ({}, BEYOND):
        draft = DraftModel(target, DraftConfig(num_layers=3, block_size=6, calibrator_rank=8, **beyond))
        _, cache = prefill(target, [list(range(3, 43))], 60, slots=6)
        bonus, passes = torch.tensor([5]), ForwardPasses(target, draft, cache)
        with flop_counter() as counter, torch.no_grad():
            hidden = passes.draft_blocks(torch.tensor([[40]]), 40, bonus[None])[:, 0]
            draft.block_logits(hidden[:, 1:], bonus)
        assert block_flops(sizes_of(target, **beyond), context=40) == counter.get_total_flops()


def test_the_plan_never_uses_the_sizes_of_another_target(tmp_path):
    mine = ("+experiment=qwen3_8b", "plan=true", "name=mine", "model.target.name=owner/mine")
    wrong = command(*mine, cwd=tmp_path)
    assert wrong.returncode == 1 and "has the sizes of Qwen/Qwen3-8B. Choose model=custom" in wrong.stderr
    absent = command(*mine, "model=custom", cwd=tmp_path)
    assert absent.returncode == 1 and "the plan downloads nothing" in absent.stderr
    here = ("model=custom", f"model.target.name={TINY / 'target'}", "data.max_seq_len=320", "model.draft.num_layers=6")
    own = command("+experiment=qwen3_8b", "plan=true", "name=mine", *here, cwd=tmp_path)
    assert own.returncode == 0 and "Qwen3-8B" not in own.stdout, own.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "config.json: contains a JSON list"),
        ("{", "config.json: invalid JSON"),
        ('{"model_type": "qwen3", "hidden_size": "x"}', "failed to load the config from config.json"),
        ("{}", "model_type=None is not counted"),
    ],
)
def test_the_plan_names_a_damaged_config_in_one_line(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    config = composed(["+experiment=qwen3_8b", "name=mine", "model=custom", f"model.target.name={tmp_path}"])
    with pytest.raises(UserError, match=message) as raised:
        target_sizes(config)
    assert "\n" not in str(raised.value)
