"""FLOPs, parameters and memory of the plan against those of real modules."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.flops import flop_counter, without_data
from helpers.forked import forked_command
from helpers.shared import TINY, command, random_target
from helpers.training import SETTINGS
from measure_memory import CASES, EXPERTS, GEMMA, decoding_peak, estimated, random_batch, saying, tensor_peak

from data.config.compose import composed
from data.errors import UserError
from models.attention.layers import Execution
from models.attention.masks import block_tiles, clean_tiles, tile_pairs
from models.cost.flops import DecodingFlops, step_flops
from models.cost.hardware import GPUS, find_gpu, peak_flops
from models.cost.memory import Sharing, Weights, decoding_memory
from models.cost.trace import meta_target
from models.decoding.forward_passes import ForwardPasses, prefill
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.families import TESTED, layer_windows
from models.loss.objectives import Objective
from models.target import load_target
from train.loop.modules import AttentionTuning, BonusCalibration
from train.names import TRAINED
from train.plan.estimate import estimate, machine_of, peak_memory, weights_of
from train.plan.report import apply, plan, refusal
from train.plan.target import local_config
from train.settings.checks import check_sizes

REAL = ("qwen3_1_7b", "qwen3_4b", "qwen3_8b", "qwen3_14b", "qwen3_32b", "qwen3_30b_a3b", "llama3_1_8b")
MIXTURE = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURE |= {"decoder_sparse_step": 2}  # draft layers with experts and without
BEYOND = {"bonus_slot": True, "chain_rank": 5}
SHAPE = DraftConfig(num_layers=3, block_size=6, calibrator_rank=0)
OTHER_SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_key_value_heads": 4, "num_hidden_layers": 4}


@pytest.mark.slow(but="[paper-shape0-")
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
    batch = random_batch(97, rows, length, anchors, 6)
    monkeypatch.setattr("train.loop.modules.bonus_tokens", saying(batch))
    with flop_counter() as counter:
        loss, weight, _, _ = module.loss(batch)
        (loss / weight).backward()
    monkeypatch.undo()
    settings |= {"execution": Execution("dense", activation_checkpointing=recompute)}
    settings |= {} if stage == "attention_tuning" else {"joint": joint}
    traced = without_data(type(module), target.config, draft.config, **settings)
    mask_pairs = tile_pairs(block_tiles(batch.document_ids, batch.anchors, 6))
    parts = step_flops(
        traced.loss,
        traced.draft,
        rows=rows,
        max_seq_len=length,
        num_anchors=anchors,
        clean_pairs=tile_pairs(clean_tiles(batch.document_ids)),
        mask_pairs=mask_pairs,
    )
    # Fused kernels recompute the attention scores in the backward pass.
    scores = 3 * 2 * 4 * 8 * mask_pairs if stage == "attention_tuning" or joint else 0
    assert sum(parts.values()) + scores == pytest.approx(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "stand_in"])
@pytest.mark.parametrize("recipe", [[], ["+recipe=beyond"]], ids=["paper", "beyond"])
def test_parameters_are_those_of_the_real_modules(model, recipe):
    config = composed(["+experiment=tiny", f"model={model}", *recipe])
    settings = config.model.target
    target = load_target(settings.name, architecture=settings.architecture and dict(settings.architecture))
    draft = DraftModel(target, DraftConfig(**config.model.draft))
    first, second = (weights_of(config, stage, local_config(config)) for stage in TRAINED)

    def count(parameters) -> int:
        return sum(p.numel() for p in parameters)

    assert first.target == second.target == count(target.parameters())
    assert first.trained == first.drafter == first.exported == count(draft.attention_parameters().values())
    trained = draft.own_parameters() if recipe else draft.calibrator_parameters()
    assert second.trained == count(trained.values())
    assert second.drafter == second.exported == count(draft.own_parameters().values())


def weight_memory(config, stage) -> int:
    """Return the bytes of target and drafter weights, to subtract them from the memory of a step."""
    weights = weights_of(config, stage, local_config(config))
    return getattr(torch, config.model.target.dtype).itemsize * weights.target + 4 * weights.drafter


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
    target, stage, length = local_config(config), "bonus_calibration", 200
    built = meta_target(target, torch.bfloat16, config.model.draft.num_layers + 1)
    parts = decoding_memory(
        built, target.num_hidden_layers, prompts=3, prompt_length=length, new_tokens=8, block_size=16
    )
    copy = 2 * weights_of(config, stage, target).exported
    assert sum(parts.values()) + copy == pytest.approx(
        decoding_peak(config, stage, length) - weight_memory(config, stage), rel=0.06
    )


@pytest.mark.slow
def test_longer_validation_prompts_at_a_time_may_be_the_peak():
    config = composed(["+experiment=qwen3_8b", "hardware.gpu=a100-40gb", "trainer=gpu"])
    config.stage.bonus_calibration.decode.batch_size = 32
    target, machine = local_config(config), machine_of(config)
    found = estimate(config, "bonus_calibration", target, machine)
    assert found.memory.phase == "live decoding" and not found.memory.fits
    assert "stage.bonus_calibration.decode.batch_size=" in refusal(config, target, machine, found)
    config.stage.bonus_calibration.decode.prompts = 0
    assert peak_memory(config, "bonus_calibration", target, machine).fits


def test_windows_bound_the_arithmetic_of_attention():
    def flops(**special) -> float:
        config = random_target(model_type="mistral", **special).config
        module = without_data(
            AttentionTuning, config, SHAPE, **SETTINGS | {"objective": Objective(kl=1), "execution": Execution("dense")}
        )
        parts = step_flops(module.loss, module.draft, rows=1, max_seq_len=128, num_anchors=4)
        weights = [p for layer in module.target.model.layers for p in layer.parameters() if p.ndim == 2]
        return parts["target pass"] - 2 * 128 * sum(p.numel() for p in weights)

    token = 4 * 4 * 8  # two products with all query heads, 2 per multiply-add
    assert flops(sliding_window=None) == 5 * token * 128 * 129 / 2
    exact = 5 * token * (16 * 128 - 16 * 15 / 2)  # the first tokens attend to fewer
    assert exact <= flops(sliding_window=16) <= 1.1 * exact
    assert flops(sliding_window=500) == flops(sliding_window=None)


def test_sharding_reduces_what_it_shards():
    weights = Weights(target=1000, drafter=300, trained=200, largest=50, exported=300)

    def parts(**sharing):
        sharing = Sharing(8, **sharing)
        held, step = weights.held(sharing, 2), weights.optimizer_step(sharing, multi_tensor=True)
        return Counter(held) + Counter(step)

    ddp, zero1, zero2, zero3 = parts(ddp=True), parts(zero=1), parts(zero=2), parts(zero=3)
    trained = 4 * weights.trained
    assert ddp["target weights"] == zero1["target weights"] == zero2["target weights"] == 8 * zero3["target weights"]
    assert ddp["drafter weights"] == zero2["drafter weights"] == 8 * zero3["drafter weights"]
    assert zero1["optimizer"] == zero2["optimizer"] == zero3["optimizer"] == 4 * trained / 8  # moments, weights, work
    assert ddp["optimizer"] == 3 * trained
    assert (ddp["gradients"], zero1["gradients"]) == (trained, trained + trained / 8)
    assert (zero2["gradients"], zero3["gradients"]) == (2 * trained / 8, trained / 8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
def test_every_larger_size_takes_more_memory(stage):
    base = [f"stage.{stage}.{key}" for key in ("global_batch_size=2", "num_anchors=16", "module.chunk=64")]
    base += ["model.target.dtype=bfloat16", "trainer.precision=bf16-mixed", "data.max_seq_len=256"]

    def total(*changes) -> float:
        config = composed(["+experiment=tiny", "model=stand_in", "trainer=gpu", *base, *changes])
        config.stage[stage].decode.prompts = 0
        return peak_memory(config, stage, local_config(config), machine_of(config)).bytes

    more = [f"stage.{stage}.{key}" for key in ("global_batch_size=4", "num_anchors=64", "module.chunk=1024")]
    for change in [*more, "data.max_seq_len=512", "model.target.dtype=float32"]:
        assert total(change) > total(), change
    if stage == "attention_tuning":
        recompute, sdpa, flex = (
            "runtime.activation_checkpointing=true",
            "runtime.attention=sdpa",
            "runtime.compile=true",
        )
        assert total("objective=mixture") > total() > total(recompute)
        assert total(sdpa) > total() > total(flex)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", REAL)
def test_the_experiments_fit_their_gpus(experiment):
    config = composed([f"+experiment={experiment}"])
    target, machine = local_config(config), machine_of(config)
    assert machine.memory < 80 * 2**30
    for stage in TRAINED:
        assert peak_memory(config, stage, target, machine).fits


@pytest.mark.slow
def test_a_gpu_that_is_slightly_too_small_is_rejected_with_changes_that_fit(monkeypatch):
    config = composed(["+experiment=tiny", "model=stand_in", "trainer=gpu", "stages=[attention_tuning]"])
    need = peak_memory(config, "attention_tuning", local_config(config), machine_of(config)).bytes
    small = replace(GPUS[config.hardware.gpu], memory=int(need / 0.95 - 2**20))
    monkeypatch.setitem(GPUS, config.hardware.gpu, small)
    with pytest.raises(UserError, match="attention_tuning takes .* GiB") as refused:
        plan(config)
    assert "\n  runtime.activation_checkpointing=true   (" in str(refused.value)


@pytest.mark.slow
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
        assert peak_memory(changed, "attention_tuning", local_config(changed), machine_of(changed)).fits


@pytest.mark.slow
def test_a_joint_stage_2_may_recompute_its_layers_as_well():
    small = ["hardware.gpu=a100-40gb", "stages=[bonus_calibration]"]
    with pytest.raises(
        UserError, match=r"bonus_calibration takes .* GiB[\s\S]*\n  runtime.activation_checkpointing=true"
    ):
        plan(composed(["+experiment=qwen3_8b", "+recipe=beyond", *small]))


def test_rows_longer_than_the_targets_positions_are_rejected_as_in_training():
    with pytest.raises(UserError, match="= 50016 exceeds the target's context length of 40960"):
        plan(composed(["+experiment=qwen3_8b", "data.max_seq_len=50000"]))


@pytest.mark.slow
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
    small = forked_command("+experiment=qwen3_8b", "plan=true", "hardware.gpu=rtx-4090", cwd=tmp_path)
    assert (
        small.returncode != 0 and "It would fit with any of these" in small.stderr and "Traceback" not in small.stderr
    )
    unknown = forked_command("+experiment=qwen3_8b", "plan=true", "model.target.architecture=null", cwd=tmp_path)
    assert unknown.returncode != 0 and "model.target.architecture" in unknown.stderr


def test_the_plan_reads_the_config_of_a_local_target(capsys):
    config = composed(["+experiment=tiny", "plan=true"])
    expected = json.loads((TINY / "target" / "config.json").read_text())
    assert local_config(config).hidden_size == expected["hidden_size"]
    plan(config)
    assert "CPU" in capsys.readouterr().out


def test_the_plan_fills_in_optional_config_keys():
    config = composed(["+experiment=tiny", "model=stand_in", *GEMMA])
    windows = layer_windows(local_config(config))
    assert windows == [*[128] * 5, None] * 2


def test_an_unsupported_family_is_rejected_by_the_plan():
    config = composed(["+experiment=tiny", "model=stand_in", "model.target.architecture.model_type=mamba"])
    with pytest.raises(UserError, match="model.target: mamba is not supported as a target"):
        local_config(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smollm3", "olmo3", "granite"])
def test_an_untested_architecture_is_planned(kind, capsys):
    assert kind not in TESTED
    plan(composed(["+experiment=tiny", "model=stand_in", f"model.target.architecture.model_type={kind}"]))
    assert "target pass" in capsys.readouterr().out


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
        assert DecodingFlops.of(draft).drafting(context=40) == counter.get_total_flops()


@pytest.mark.slow
def test_the_plan_never_uses_the_sizes_of_another_target(tmp_path):
    mine = ("+experiment=qwen3_8b", "plan=true", "name=mine", "model.target.name=owner/mine")
    wrong = forked_command(*mine, cwd=tmp_path)
    assert wrong.returncode == 1 and "has the sizes of Qwen/Qwen3-8B. Choose model=custom" in wrong.stderr
    absent = forked_command(*mine, "model=custom", cwd=tmp_path)
    assert absent.returncode == 1 and "plan=true downloads nothing" in absent.stderr
    here = ("model=custom", f"model.target.name={TINY / 'target'}", "data.max_seq_len=320", "model.draft.num_layers=6")
    own = forked_command("+experiment=qwen3_8b", "plan=true", "name=mine", *here, cwd=tmp_path)
    assert own.returncode == 0 and "Qwen3-8B" not in own.stdout, own.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "config.json: contains a JSON list"),
        ("{", "config.json: invalid JSON"),
        ('{"model_type": "qwen3", "hidden_size": "x"}', "failed to load the config from config.json"),
        ("{}", "model_type"),
    ],
)
def test_the_plan_names_a_damaged_config_in_one_line(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    config = composed(["+experiment=qwen3_8b", "name=mine", "model=custom", f"model.target.name={tmp_path}"])
    with pytest.raises(UserError, match=message) as raised:
        local_config(config)
    assert "\n" not in str(raised.value)
