"""Execution of a step: identical results in every mode, no redundant computation, synchronization or recompilation."""

import functools
import multiprocessing

import lightning
import pytest
import torch
from helpers.shared import random_documents, random_draft, random_target
from helpers.training import SETTINGS, data, module, trainer
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from data.preprocess.anchors import make_batch
from data.preprocess.packing import pack_documents
from models.attention import layers as execution
from models.attention import masks
from models.attention import packed as attention
from models.attention.layers import Execution
from models.attention.packed import View, blocks_mask, clean_mask, packed_attention
from models.loss import block_loss
from models.loss.objectives import Objective
from models.target import target_pass
from train.checkpoint.checkpoints import Checkpoints
from train.loop.fit import fit
from train.loop.modules import AttentionTuning, BonusCalibration

ATEN = torch.ops.aten
# Operations whose result determines a shape or a Python value: they wait for the GPU to finish all queued work.
WAITING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero, ATEN.unique_dim}
WAITING |= {ATEN._unique2, ATEN.item}


def batches(count: int, size: int = 6) -> list:
    """Return batches of one shape with different documents, anchors and numbers of labels."""
    rows = list(pack_documents(random_documents(30, seed=3), 96, pad_id=0))
    chosen = [[rows[i], rows[-1 - i]] for i in range(count)]
    return [make_batch(r, num_anchors=9, block_size=size, seeds=[(i,), (i, 1)]) for i, r in enumerate(chosen)]


STAGES = pytest.mark.parametrize(
    ("stage", "beyond"), [(AttentionTuning, False), (BonusCalibration, False), (BonusCalibration, True)]
)


def training(stage=AttentionTuning, objective: Objective | None = None, beyond: bool = False, **execution_settings):
    """Return a stage with a randomly perturbed drafter; `beyond` the paper, stage 2 trains the full drafter."""
    target = random_target()
    draft = random_draft(target, bonus_slot=beyond, chain_rank=4 * beyond)
    settings = SETTINGS | {"chunk": 20, "objective": objective or Objective()}
    settings |= {"joint": beyond} if stage is BonusCalibration else {}
    return stage(target, draft, **settings, execution=Execution(**execution_settings))


def loss_and_gradients(stage, batch) -> list[torch.Tensor]:
    loss, weight, _, _ = stage.loss(batch)
    return [loss.detach(), *torch.autograd.grad(loss / weight, list(stage.trained().values()))]


@pytest.fixture
def fresh_compiler(monkeypatch):
    """`torch.compile` without code generation, which requires a C++ compiler; resets its counters."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    caches = (execution._compiled_layer, block_loss._compiled_piece_loss, masks._mask_builder)
    caches += (attention._compiled_flex_attention,)
    torch._dynamo.reset()
    counters.clear()
    for cached in caches:
        cached.cache_clear()
    yield counters["stats"]
    torch._dynamo.reset()
    for cached in caches:
        cached.cache_clear()


@pytest.mark.slow(but="how1-")
@STAGES
@pytest.mark.parametrize("objective", [Objective(), Objective(ce=0.1, kl=0.2, tv=0.9)])
@pytest.mark.parametrize("how", [{"attention": "dense"}, {"activation_checkpointing": True}, {"compile": True}])
def test_execution_settings_do_not_change_the_result(stage, beyond, objective, how, fresh_compiler, monkeypatch):
    # Otherwise stage 2 has few usable blocks: this target predicts the text's token once in a hundred times.
    name = "train.loop.modules.bonus_tokens"
    monkeypatch.setattr(name, lambda target, hidden, anchors: batch.input_ids.gather(1, anchors))
    plain, other = training(stage, objective, beyond), training(stage, objective, beyond, **how)
    for batch in batches(2):
        for expected, got in zip(loss_and_gradients(plain, batch), loss_and_gradients(other, batch), strict=True):
            assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_no_recompilation_between_steps(fresh_compiler):
    # FlexAttention has no backward on CPU, so it is counted separately below.
    stage = training(compile=True, attention="dense", objective=Objective(ce=0.1, tv=0.9))
    graphs = []
    for batch in batches(4):
        loss_and_gradients(stage, batch)
        graphs.append(fresh_compiler["unique_graphs"])
    # One graph each for the target's layers, those that keep K/V, the draft layers and the loss; and a second one for
    # the loss once its number of labeled slots has changed.
    assert len(set(graphs[1:])) == 1 and graphs[-1] <= 5, graphs


@pytest.mark.slow
@torch.no_grad()
def test_layers_with_flex_attention_are_compiled_once(fresh_compiler):
    """Without gradients, which it does not support on CPU; masks and rules are new objects in every step."""
    compiled, plain = training(compile=True, attention="flex"), training(attention="dense")
    graphs = []
    for batch in batches(4):
        assert torch.allclose(compiled.features(batch).hidden, plain.features(batch).hidden, atol=1e-4)
        graphs.append(fresh_compiler["unique_graphs"])
    assert graphs[0] == 4 and len(set(graphs)) == 1 and not counters["graph_break"], graphs


@pytest.mark.slow
@torch.no_grad()
def test_block_sparse_masks_and_their_attention_are_compiled_once(fresh_compiler, monkeypatch):
    build, attend = masks._mask_builder(), attention._compiled_flex_attention()
    monkeypatch.setattr(masks, "create_block_mask", build)
    monkeypatch.setattr(attention, "flex_attention", attend)
    graphs = []
    for batch in batches(4):
        rows, length = batch.input_ids.shape
        for mask, count, before in (
            (clean_mask(batch.document_ids, "flex"), length, None),
            (blocks_mask(batch.document_ids, batch.anchors, 6, "flex"), 54, torch.randn(rows, 2, length, 16)),
        ):
            query, key, value = (torch.randn(rows, n, count, 16) for n in (4, 2, 2))
            context = None if before is None else (before, before)
            packed_attention(torch.nn.Identity(), query, key, value, View(mask, context), scaling=0.3)
        graphs.append(fresh_compiler["unique_graphs"])
    assert graphs[0] == 4 and len(set(graphs)) == 1, graphs


class Watch(TorchDispatchMode):
    """Dispatch mode that records operations that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in WAITING:
            self.waiting.append(str(function))
        return function(*args, **(kwargs or {}))


@STAGES
@pytest.mark.parametrize("objective", [Objective(), Objective(kl=0.2, tv=0.9)])
def test_no_operation_of_a_step_waits_for_the_device(stage, beyond, objective, monkeypatch):
    """With dense masks, because tiles are computed on the host."""
    tuned, batch = training(stage, objective, beyond, attention="dense"), batches(1)[0]

    def refuse(*_):
        raise AssertionError("a tensor was read as a Python value")

    with Watch() as watch:
        bool(torch.ones(1).item())
        assert watch.waiting  # the watch works
        watch.waiting.clear()
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        loss_and_gradients(tuned, batch)
    monkeypatch.undo()
    assert not watch.waiting


@pytest.mark.parametrize(("objective", "calls"), [(Objective(), 0), (Objective(tv=0.5), 1)])
def test_the_last_layer_stops_after_its_keys_and_values_unless_its_output_is_needed(objective, calls):
    stage, seen = training(objective=objective), []
    last = stage.target.model.layers[-1]
    last.self_attn.o_proj.register_forward_hook(lambda *_: seen.append(1))
    stage.features(batches(1)[0])
    assert len(seen) == calls


def test_only_the_draft_layers_keys_and_values_are_kept():
    target = random_target()
    clean = target_pass(target, batches(1)[0], 2, with_hidden=False)
    assert len(clean.context) == target.config.num_hidden_layers - 2 and clean.hidden is None


@pytest.mark.parametrize("workers", [1, 2])
def test_prefetched_batches_are_identical(workers, tmp_path):
    weights = []
    for count in (0, workers):
        stage, rows = module(AttentionTuning, random_target()), data()
        rows.workers = count
        trainer(tmp_path, 6).fit(stage, rows)
        rows.close()
        weights.append(torch.cat([p.detach().flatten() for p in stage.trained().values()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_validation_end"])
def test_no_worker_outlives_a_stopped_run(hook, tmp_path):
    """Workers ignore signals, so an exit that waited for them would hang."""

    def stop(*_):
        assert len(set(multiprocessing.active_children()) - others) >= 2
        raise SystemExit(75)

    others = set(multiprocessing.active_children())
    stage, rows = module(AttentionTuning, random_target()), data()
    rows.workers = 2
    callback = lightning.Callback()
    setattr(callback, hook, stop)
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=100, keep=1, validate_every=2, best_by=None)
    fitting = trainer(
        tmp_path,
        6,
        callbacks=[callback, checkpoints],
        enable_checkpointing=True,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    with pytest.raises(SystemExit) as stopped:
        fit(fitting, stage, rows, tmp_path)
    assert stopped.value.code == 75 and not set(multiprocessing.active_children()) - others


@pytest.mark.parametrize("settings", [{"attention": "eager"}])
def test_an_unknown_attention_kernel_is_rejected(settings):
    with pytest.raises(ValueError, match="auto, flex, sdpa, dense"):
        Execution(**settings)
