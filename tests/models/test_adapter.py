"""LoRA adapters: trained parameters, merged and unmerged decoding, PEFT's format, complete runs."""

import json

import helpers.runs
import pytest
import torch
from check_families import FAMILIES, random_pair
from helpers.configs import composed
from helpers.flops import flop_counter, without_data
from helpers.forked import forked_command
from helpers.runs import STEPS, run
from helpers.shared import SHORT, command, random_documents, random_target
from helpers.training import SETTINGS, data, hashes, trainer
from measure_memory import random_batch
from peft import PeftModel
from safetensors.torch import load_file

from data.errors import UserError
from data.preprocess.anchors import make_batch
from data.preprocess.packing import pack_documents
from models.attention.layers import Execution
from models.attention.masks import block_tiles, clean_tiles, tile_pairs
from models.cost.flops import step_flops
from models.decoding.flex import generate
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export.artifact_io import export_draft, load_draft
from models.lora import Lora, LoraDraft, load_adapter, save_adapter
from models.target import load_target, target_pass
from train.loop.modules import AttentionTuning
from train.loop.validation_decoding import as_exported
from train.plan.estimate import weights_of
from train.settings.checks import check_adapter

CONFIG = DraftConfig(num_layers=3, block_size=6, calibrator_rank=0)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
EVERY = pytest.mark.parametrize("family", FAMILIES)


def lora_draft(target, *, trained: bool = True, rank: int = 4, **kwargs) -> LoraDraft:
    """Return a LoRA drafter; `trained`: perturbed, since merged and unmerged are trivially equal at initialization."""
    torch.manual_seed(2)
    draft = LoraDraft(target, Lora(rank, 2 * rank), CONFIG, **kwargs)
    if trained:
        with torch.no_grad():
            for parameter in draft.attention_parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return draft


@torch.no_grad()
def logits(draft) -> torch.Tensor:
    """Return the logits [R, A, B, V] of all blocks of a few rows."""
    rows = pack_documents(random_documents(6, seed=5), 96, pad_id=0)
    batch = make_batch(rows, num_anchors=8, block_size=draft.block_size, seeds=[(i,) for i in range(len(rows))])
    context = target_pass(draft.target, batch, draft.split_layer).context
    return draft.logits(draft.forward_batch(context, batch))


def difference(one, other) -> float:
    return float((logits(one) - logits(other)).abs().max())


@EVERY
def test_it_starts_as_the_target_and_copies_no_projector(family):
    target, _ = random_pair(family)
    draft = lora_draft(target, trained=False)
    plain = DraftModel(target, CONFIG)
    assert torch.equal(logits(draft), logits(plain))
    shared = {p.data_ptr() for p in target.parameters()}
    own = [p for p in draft.parameters() if p.data_ptr() not in shared]
    assert {id(p) for p in own} == {id(p) for p in draft.attention_parameters().values()}
    assert all("lora_" in name or p.ndim == 1 for name, p in draft.attention_parameters().items())


@EVERY
def test_merged_and_unmerged_are_the_same_drafter(family, tmp_path):
    target, _ = random_pair(family)
    before, draft = hashes(target), lora_draft(target)
    merged = draft.merged()
    assert difference(draft, merged) < 1e-5 < difference(draft, lora_draft(target, trained=False))
    assert merged.own_parameters().keys() == DraftModel(target, CONFIG).own_parameters().keys()
    export_draft(draft, tmp_path, torch.float32)  # under the contract's names, merged
    assert torch.equal(logits(load_draft(tmp_path, target)), logits(merged))
    assert hashes(target) == before


@EVERY
def test_a_saved_adapter_is_loaded_here_and_by_peft(family, tmp_path):
    target, _ = random_pair(family)
    draft = lora_draft(target)
    save_adapter(draft, tmp_path)
    loaded = load_adapter(tmp_path, target)
    assert torch.equal(logits(loaded), logits(draft))
    fresh = DraftModel(target, CONFIG)
    by_peft = PeftModel.from_pretrained(fresh, str(tmp_path)).merge_and_unload()
    assert by_peft is fresh  # mask embedding and norms came with it
    assert difference(by_peft, draft.merged()) < 1e-6
    save_adapter(loaded, tmp_path / "again")
    for file in tmp_path.glob("adapter_*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_adapter_that_does_not_fit_is_rejected(tmp_path):
    target = random_target()
    with pytest.raises(ValueError, match="not a drafter's LoRA adapter"):
        load_adapter(tmp_path, target)
    save_adapter(lora_draft(target), tmp_path)
    with pytest.raises(ValueError, match="num_target_layers=5, but this one has 6"):
        load_adapter(tmp_path, random_target(num_hidden_layers=6))
    with pytest.raises(ValueError, match=r"(?s)q_prj.*expected one or more of q_proj, k_proj, v_proj, o_proj"):
        LoraDraft(target, Lora(4, 8, ("q_prj",)), CONFIG)
    for rank, alpha in ((0, 8), (4, 0)):
        with pytest.raises(ValueError, match="=0: must be"):
            Lora(rank, alpha)


def test_a_subset_of_the_projectors(tmp_path):
    target = random_target()
    draft = LoraDraft(target, Lora(4, 8, ("v_proj", "q_proj")), CONFIG)
    updated = {name.split(".")[3] for name in draft.attention_parameters() if "lora_" in name}
    assert updated == {"q_proj", "v_proj"}
    save_adapter(draft, tmp_path)
    assert load_adapter(tmp_path, target).attention_parameters().keys() == draft.attention_parameters().keys()


def test_updates_are_added_in_float32_to_bfloat16_weights():
    target = random_target("bfloat16")
    draft = lora_draft(target, dtype=torch.float32)
    module = draft.layers[0].self_attn.q_proj
    base = target.model.layers[2].self_attn.q_proj.weight
    assert module.base_layer.weight is base and base.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in draft.attention_parameters().values())
    expected = base.float() + 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    merged = draft.merged().own_parameters()["layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(merged, expected, rtol=0, atol=1e-6)
    assert not torch.equal(merged, merged.bfloat16().float())
    assert torch.equal(as_exported(draft).own_parameters()["layers.0.self_attn.q_proj.weight"], merged.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_decoding_takes_the_same_steps_merged_and_unmerged(mode):
    target = random_target()
    draft = LoraDraft(target, Lora(4, 8), CONFIG)  # a copy of the target, so some drafts are right
    with torch.no_grad():
        for name, parameter in draft.attention_parameters().items():
            if "lora_B" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    alone = generate(target, None, PROMPTS, max_new_tokens=20)
    one, other = (generate(target, d, PROMPTS, max_new_tokens=20, mode=mode) for d in (draft, as_exported(draft)))
    assert one.tokens == other.tokens == alone.tokens and one.steps == other.steps


def test_only_the_adapter_is_trained(tmp_path):
    target = random_target()
    before = hashes(target)
    training = AttentionTuning(target, lora_draft(target, trained=False), **SETTINGS)
    start = {name: p.detach().clone() for name, p in training.trained().items()}
    trainer(tmp_path, 6).fit(training, data())
    assert hashes(target) == before
    assert all(not torch.equal(start[name], p) for name, p in training.trained().items())
    trained = {id(p) for p in training.trained().values()}
    assert {id(p) for p in training.parameters() if p.requires_grad} == trained


@pytest.mark.slow
def test_a_run_stopped_at_any_step_resumes_as_if_uninterrupted(tmp_path, monkeypatch):
    def module(stage, target):
        return AttentionTuning(target, lora_draft(target, trained=False), **SETTINGS)

    monkeypatch.setattr(helpers.runs, "module", module)
    straight, kept, history = run(tmp_path / "straight")
    for step in (1, 4, 7):
        directory = tmp_path / f"stopped{step}"
        with pytest.raises(SystemExit):
            run(directory, stop_at=step, monkeypatch=pytest.MonkeyPatch())
        training, checkpointer, after = run(directory)
        assert (
            after.losses == {s: loss for s, loss in history.losses.items() if s > step} and max(history.losses) == STEPS
        )
        assert all(torch.equal(p, training.trained()[name]) for name, p in straight.trained().items())
        assert all(torch.equal(t, checkpointer.best_weights()[name]) for name, t in kept.best_weights().items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=0", "adapter.rank=0: must be >= 1"),
        ("adapter.alpha=0", "adapter.alpha=0: must be > 0"),
        ("adapter.target_modules=q_proj", "adapter.target_modules=q_proj: expected a list"),
        ("trainer=zero3", "Set trainer=zero2 or adapter=none"),
    ],
)
def test_invalid_settings_are_rejected(override, message):
    with pytest.raises(UserError, match=message):
        check_adapter(composed("+experiment=tiny", "adapter=lora", override))


def test_valid_settings_are_accepted():
    check_adapter(composed("+experiment=tiny", "adapter=lora", "trainer=zero2"))
    check_adapter(composed("+experiment=tiny", "adapter=lora", "trainer=zero3", "stages=[bonus_calibration]"))
    check_adapter(composed("+experiment=tiny", "trainer=zero3"))


def test_the_plan_counts_the_trained_parameters():
    config = composed("+experiment=tiny", "adapter=lora", "adapter.rank=4")
    target = load_target(config.model.target.name)
    weights = weights_of(config, "attention_tuning", target.config)
    draft = LoraDraft(target, Lora(4, 32), DraftConfig(**config.model.draft))
    assert weights.trained == weights.drafter == count(draft.attention_parameters())
    assert weights.exported == count(draft.own_parameters())
    other = composed("+experiment=tiny", "adapter=lora", "adapter.target_modules=[gate_proj]")
    with pytest.raises(UserError, match=r"adapter\..*expected one or more of"):
        weights_of(other, "attention_tuning", target.config)


def test_the_plan_counts_the_arithmetic_of_updates():
    target, batch = random_target(), random_batch(97, 2, 64, 5, 6)
    with flop_counter() as counter:
        loss, weight, _, _ = AttentionTuning(target, lora_draft(target, rank=16), **SETTINGS).loss(batch)
        (loss / weight).backward()
    settings = SETTINGS | {"execution": Execution("dense")}
    traced = without_data(AttentionTuning, target.config, CONFIG, Lora(16, 32), **settings)
    mask_pairs = tile_pairs(block_tiles(batch.document_ids, batch.anchors, 6))
    parts = step_flops(
        traced.loss, traced.draft, rows=2, max_seq_len=64, num_anchors=5,
        clean_pairs=tile_pairs(clean_tiles(batch.document_ids)), mask_pairs=mask_pairs,
    )  # fmt: skip
    scores = 3 * 2 * 4 * 8 * mask_pairs  # fused kernels recompute them
    assert sum(parts.values()) + scores == pytest.approx(counter.get_total_flops(), rel=0.02)


def count(parameters: dict[str, torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [("adapter.rnk=8", "Did you mean adapter.rank"),
     ("adapter.target_modules=[gate_proj]", "expected one or more of q_proj, k_proj, v_proj, o_proj")],
)  # fmt: skip
def test_wrong_settings_end_with_an_error_message(override, message, tmp_path):
    done = forked_command(*SHORT, "adapter=lora", override, "data.max_records=40", cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_all_stages_with_an_adapter(tmp_path, tiny_target):
    short = (*SHORT, "stage.attention_tuning.steps=10", "stage.bonus_calibration.steps=4", "name=short")
    short += ("stage.evaluate.speed.num_prompts=0", "stage.evaluate.num_prompts=3", "adapter=lora", "adapter.rank=4")
    done = command(*short, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "checkpoints" / "short"
    assert "PEFT adapter: checkpoints/short/adapter" in done.stdout and "3/3 prompts identical" in done.stdout
    result = json.loads((run_dir / "records" / "attention_tuning.done.json").read_text())["result"]
    assert result["adapter"] == "checkpoints/short/adapter"
    adapter = load_adapter(run_dir / "adapter", tiny_target)
    assert result["trained_parameters"] == sum(p.numel() for p in adapter.attention_parameters().values())
    exported = load_file(run_dir / "export" / "model.safetensors")
    for name, tensor in adapter.own_parameters().items():
        assert torch.equal(exported[name], tensor), name
    size = (run_dir / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 5 * size < (run_dir / "attention_tuning" / "draft.safetensors").stat().st_size
    again = command(*short[:-2], cwd=tmp_path)
    assert again.returncode == 1 and "adapter.rank: 4 -> None" in again.stderr
