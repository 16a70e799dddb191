"""Benchmark of a training step: its implementations of a step agree, and its reports are correct."""

import json
import os
import subprocess
import sys

import bench_train_step
import pytest
import torch
from bench_report import least_squares, slopes
from bench_shapes import PRESETS, Shape, least_memory, meta_draft, random_batch, typical_blocks
from bench_steps import Training, peak_memory
from helpers.shared import ARCHITECTURE, ROOT, TINY
from omegaconf import OmegaConf

from models.attention.layers import Execution
from models.loss.objectives import Objective

SHAPE = Shape(rows=2, max_seq_len=41, documents=3, anchors=5, block_size=6, vocabulary=97)
SMALL = ("--preset=tiny", "--device=cpu", "--max-seq-len=64", "--documents=2", "--steps=1", "--matmul-size=128")
HEAVY = {"lightning", "hydra", "omegaconf", "datasets", "rich", "train"}


def training(objective: str = "ce", dtype: str = "float32", **execution) -> Training:
    torch.manual_seed(0)
    return Training(
        ARCHITECTURE | {"initializer_range": 0.2},
        draft_layers=3,
        block_size=6,
        device=torch.device("cpu"),
        dtype=dtype,
        execution=Execution(**execution),
        objective=Objective(**bench_train_step.OBJECTIVES[objective]),
        chunk=12,
    )


def called(monkeypatch, *options: str) -> None:
    """Run the script in this process."""
    monkeypatch.setattr(sys, "argv", ["bench_train_step.py", *options])
    bench_train_step.main()


@pytest.mark.slow
@pytest.mark.parametrize("objective", bench_train_step.OBJECTIVES)
def test_every_way_has_the_same_loss_and_gradient(objective):
    ways, batch = training(objective), random_batch(SHAPE, 0)
    gradients = []

    def update() -> None:
        gradients.append([p.grad.clone() for p in ways.trained])
        ways.optimizer.zero_grad()

    ways.update = update
    every = typical_blocks(batch, batch.anchors.numel())
    losses = torch.stack([ways.fast(batch), ways.dense(batch), ways.naive(batch, every)])
    torch.testing.assert_close(losses, losses[:1].expand(3), rtol=1e-5, atol=1e-6)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-6)


def test_blocks_are_whole_and_anchors_any_of_the_places():
    full = Shape(rows=2, max_seq_len=41, documents=3, anchors=41 - 3 * 6, block_size=6, vocabulary=97)
    assert full.anchors == full.places and full.misfit() is None
    batch = random_batch(full, 3)
    for row in range(2):
        anchors, documents = batch.anchors[row].tolist(), batch.document_ids[row].tolist()
        assert len(set(anchors)) == full.anchors and anchors == sorted(anchors)
        assert all(batch.position_ids[row, anchor] > 0 for anchor in anchors)
        for anchor, labels in zip(anchors, batch.labels[row], strict=True):
            assert len(set(documents[anchor : anchor + 6])) == 1
            assert torch.equal(batch.input_ids[row, anchor : anchor + 6], labels)
    lengths = [documents.count(number) for number in range(3)]
    assert sum(lengths) == 41 and max(lengths) - min(lengths) <= 1
    assert Shape(2, 41, 3, full.anchors + 1, 6, 97).misfit()


def test_typical_blocks_have_the_mean_prefix_of_all():
    batch = random_batch(Shape(rows=2, max_seq_len=400, documents=4, anchors=80, block_size=6, vocabulary=97), 0)
    blocks = typical_blocks(batch, 8)
    mean = batch.position_ids.gather(1, batch.anchors).double().mean().item()
    assert sum(block.anchor - block.start for block in blocks) / 8 == pytest.approx(mean, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "recompute"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_least_memory_is_less_than_a_step_takes(dtype, recompute):
    fast, batch = training(dtype=dtype, activation_checkpointing=recompute), random_batch(SHAPE, 0)
    fast.fast(batch)
    word = 2 if dtype == "bfloat16" else 4
    least = least_memory(meta_draft(ARCHITECTURE, 3, 6), SHAPE, word=word, chunk=12, recompute=recompute)
    assert 0.3 < sum(least.values()) / peak_memory(fast.fast, batch, fast) <= 1


def test_presets_and_objectives_are_those_of_the_settings():
    settings = {name: OmegaConf.load(ROOT / "conf" / "model" / f"qwen3_{name}.yaml") for name in ("1_7b", "4b", "8b")}
    for name, model in settings.items():
        preset = PRESETS[name.replace("_", ".")]
        expected = OmegaConf.to_container(model.target.architecture) | {"max_position_embeddings": 2**20}
        assert preset.architecture(preset.vocabulary) == expected
    assert all(PRESETS[name].tied for name in PRESETS if name != "8b")
    tiny, preset = json.loads((TINY / "target" / "config.json").read_text()), PRESETS["tiny"]
    ours = preset.architecture(preset.vocabulary) | {"max_position_embeddings": tiny["max_position_embeddings"]}
    assert ours == {key: tiny[key] for key in ours}
    for name, shares in bench_train_step.OBJECTIVES.items():
        ours = Objective(**shares)
        written = OmegaConf.load(ROOT / "conf" / "objective" / f"{name}.yaml")
        assert all(getattr(ours, key) == written[key] for key in ("ce", "kl", "tv") if key in written), name


def test_fits_and_slopes():
    x = [8, 16, 64, 1024]
    assert least_squares(x, [3 + 0.5 * v + 0.01 * v * v for v in x], 2) == pytest.approx([3, 0.5, 0.01])
    assert least_squares(x, [3 + 0.5 * v for v in x], 1) == pytest.approx([3, 0.5])
    assert slopes(x, [v**1.5 for v in x]) == pytest.approx([1.5] * 3)


@pytest.mark.slow
def test_step_phases_and_baselines_without_the_rest_of_the_project(tmp_path):
    """Runs in a separate process, without an install."""
    script = ROOT / "scripts" / "bench" / "bench_train_step.py"
    call = ["bench_train_step.py", *SMALL, "--anchors=6", "--naive-anchors=2", "--baseline=naive", f"--out={tmp_path}"]
    code = f"import runpy, sys; sys.argv = {call!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    code += f"; print('heavy:', sorted({HEAVY!r} & set(sys.modules)))"
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "scripts/bench")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout and "SCALED from 2 of 6 anchors" in done.stdout
    assert all(len(line) < 120 for line in done.stdout.splitlines() if not line.startswith("Written"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny_cpu_step.json", "tiny_cpu_step.png"]

    figures = json.loads((tmp_path / "tiny_cpu_step.json").read_text())
    flops, step, rate = figures["flops"], figures["step"], figures["matmul"]["used"]
    assert rate == max(figures["matmul"]["before"], figures["matmul"]["after"]) > 0
    assert flops["step"] == pytest.approx(sum(flops[part] for part in ("target pass", "mask pass", "head and loss")))
    assert flops["head and loss"] == 2 * 2 * 192 * 2048 * 6 * 7
    assert step["floor"] == pytest.approx(flops["step"] / rate)
    assert step["ratio"] == pytest.approx(step["seconds"] / step["floor"]) and step["ratio"] > 0
    phases = figures["phases"]
    assert list(phases) == ["target pass", "mask pass", "loss", "optimizer"]
    assert sum(phase["share"] for phase in phases.values()) == pytest.approx(1)
    assert all(phase["seconds"] > 0 for phase in phases.values())
    assert figures["recompilations"] == 0 and "waits" not in figures
    memory = figures["memory"]
    assert memory["peak"] > memory["held"] + memory["chunk"] and memory["head"] == 192 * 2048 * 4
    assert memory["chunk"] == 6 * 7 * 2048 * 4
    assert {name: found["ratio"] > 0 for name, found in figures["baselines"].items()} == {"dense": True, "naive": True}


@pytest.mark.slow
@pytest.mark.parametrize(("sweep", "values"), [("anchors", "4,16"), ("rows", "40,64")])
def test_sweep_of_time(sweep, values, tmp_path, monkeypatch, capsys):
    called(monkeypatch, *SMALL, f"--sweep={sweep}", f"--values={values}", "--anchors=8", f"--out={tmp_path}")
    assert "Conclusion: " in capsys.readouterr().out
    figures = json.loads((tmp_path / f"tiny_cpu_{sweep}.json").read_text())
    assert [str(point["value"]) for point in figures["points"]] == values.split(",")
    assert figures["points"][0]["flops"] < figures["points"][1]["flops"]
    assert len(figures["slopes_seconds"]) == len(figures["slopes_floor"]) == 1
    assert figures["within"] == (figures["slopes_seconds"][0] <= 1.1 * figures["slopes_floor"][0])
    assert (tmp_path / f"tiny_cpu_{sweep}.png").stat().st_size > 0


@pytest.mark.slow
def test_a_large_vocabulary_costs_its_head_and_one_chunk_of_logits(tmp_path, monkeypatch, capsys):
    options = ("--sweep=vocabulary", "--values=256,4096", "--anchors=32", "--chunk=56", f"--out={tmp_path}")
    called(monkeypatch, *SMALL, *options)
    assert "one chunk of logits: yes." in capsys.readouterr().out
    figures = json.loads((tmp_path / "tiny_cpu_vocabulary.json").read_text())
    small, large = figures["points"]
    assert figures["mask_tokens"] == 32 * 8
    assert large["head and embedding"] == 4096 * 192 * 4 and large["chunk"] == 56 * 4096 * 4
    assert large["peak"] < small["peak"] + large["head and embedding"] + large["chunk"] + 2**20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--anchors=0"], "expected a positive integer"),
        (["--documents=8"], "blocks of 8 do not fit"),
        (["--anchors=60"], "48 valid anchors"),
        (["--draft-layers=9"], "the target has 8"),
        (["--attention=flex"], "no gradient on CPUs"),
        (["--values=3,4"], "belongs to --sweep"),
        (["--sweep=rows", "--values=3"], "two values or more"),
        (["--sweep=anchors", "--baseline=dense"], "single shape"),
        (["--sweep=anchors"], "64 anchors of 8 slots"),
        (["--rows=100000000"], "needs at least"),
        (["--preset=9b"], "invalid choice"),
        pytest.param(["--device=cuda"], "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU")),
    ],
)
def test_a_wrong_call_is_a_one_line_error_before_any_work(options, said, monkeypatch, capsys):
    monkeypatch.setattr(bench_train_step, "Training", None)
    with pytest.raises(SystemExit) as stopped:
        called(monkeypatch, *SMALL, *options)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert said in printed.err and printed.err.count("\n") == 1
