"""Wrong calls end with one message that names the value and the way out, and leave nothing behind."""

import json
import shutil

import pytest
from conftest import TINY, command


def jsonl(path, *records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def chat(answer: str, role: str = "user") -> dict:
    return {"messages": [{"role": role, "content": "Why?"}, {"role": "assistant", "content": answer}]}


CALLS = {
    "no experiment": ([], ["+experiment=tiny"]),
    "unknown experiment": (["+experiment=tyni"], ["tyni", "tiny"]),
    "misspelt key in a group": (
        ["stage.lerning_rate=1"],
        ["stage.lerning_rate", "Did you mean stage.attention_tuning.module.learning_rate or"],
    ),
    "misspelt key": (
        ["stage.attention_tuning.module.lerning_rate=1"],
        ["lerning_rate", "Did you mean stage.attention_tuning.module.learning_rate?"],
    ),
    "misspelt key, forced": (
        ["+stage.attention_tuning.stepz=1"],
        ["stepz", "Did you mean stage.attention_tuning.steps?"],
    ),
    "wrong type": (["stage.attention_tuning.steps=many"], ["steps='many'", "expected int"]),
    "out of range": (["stage.attention_tuning.module.learning_rate=-1"], ["learning_rate=-1", "more than 0"]),
    "an infinite learning rate": (
        ["stage.bonus_calibration.module.learning_rate=inf"],
        ["stage.bonus_calibration.module.learning_rate=inf", "expected a finite number"],
    ),
    "no number of the trainer's": (["+trainer.overfit_batches=nan"], ["trainer.overfit_batches=nan", "finite"]),
    "unknown weights": (["objective.weights=dpac"], ["'dpac'", "dpace, decay, flat"]),
    "no value": (["stage.attention_tuning.steps=null"], ["steps=None", "expected int"]),
    "unknown variant": (["stage.evaluate.variants=[calibratd]"], ["calibratd", "calibrated_parallel, calibrated."]),
    "an unknown kind of attention": (["speed.attention=eager"], ["'eager'", "auto or flex or sdpa or dense"]),
    "an objective without terms": (["objective.ce=0"], ["ce=0", "one of them more"]),
    "trainer setting of the stage": (
        ["+trainer.accumulate_grad_batches=2"],
        ["accumulate_grad_batches", "leave it out"],
    ),
    "float32 arithmetic on a bfloat16 target": (
        ["trainer.precision=32-true", "model.target.dtype=bfloat16"],
        ["model.target.dtype=bfloat16 with trainer.precision=32-true", "bf16-mixed"],
    ),
    "weights in less than float32": (["trainer.precision=bf16-true"], ["'bf16-true'", "32-true or bf16-mixed"]),
    "a callback that saves": (
        ["+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint"],
        ["error: callbacks.mine: ModelCheckpoint", "stage.<stage>.checkpoint_every"],
    ),
    "a callback that averages weights": (
        ["+callbacks.mine._target_=lightning.pytorch.callbacks.EMAWeightAveraging"],
        ["error: callbacks.mine: EMAWeightAveraging", "Leave it out"],
    ),
    "nothing to choose weights by": (
        ["+trainer.limit_val_batches=0"],
        ["trainer.limit_val_batches", "leave it out"],
    ),
    "no validation": (
        ["data.validation_records=0", "stage.attention_tuning.patience=1"],
        ["patience=1", "data.validation_records=0"],
    ),
    "validation before training": (["+trainer.num_sanity_val_steps=2"], ["num_sanity_val_steps", "leave it out"]),
    "no skipped step allowed for": (["stage.attention_tuning.max_skipped_steps=0"], ["max_skipped_steps=0", "1 or"]),
    "trainer setting that is taken": (["+trainer.plugins=[]"], ["plugins", "leave it out"]),
    "passes that do not go round": (["stage.attention_tuning.rows_per_pass=3"], ["rows_per_pass=3", "4 rows"]),
    "no checkpoint kept": (["stage.attention_tuning.keep_checkpoints=0"], ["keep_checkpoints=0", "1 or more"]),
    "unknown figure": (["stage.attention_tuning.best_by=tau"], ["'tau'", "val/tau or val/tau_estimate or null"]),
    "a figure that is not measured": (["stage.attention_tuning.decode.prompts=0"], ["val/tau", "decode.prompts=0"]),
    "patience without a figure": (
        ["stage.bonus_calibration.best_by=null", "stage.bonus_calibration.patience=2"],
        ["patience=2", "best_by"],
    ),
    "a chain of less than nothing": (["model.draft.chain_rank=-1"], ["chain_rank=-1", "0 or more"]),
    "more than all told": (["stage.attention_tuning.module.told_share=2"], ["told_share=2", "0 to 1"]),
    "slot 0 told its label": (
        ["+recipe=beyond", "stage.attention_tuning.module.slot0_loss=true"],
        ["slot0_loss=true", "bonus_slot=true", "Choose one"],
    ),
    "all of a low-rank adapter": (
        ["+recipe=beyond", "adapter=lora"],
        ["joint=true", "adapter=lora would save nothing"],
    ),
    "no eps": (["stage.bonus_calibration.module.eps=0"], ["eps=0", "more than 0"]),
    "unknown stage": (["stages=[evalute]"], ["evalute", "evaluate"]),
    "block of one": (["model.draft.block_size=1"], ["block_size=1", "2 or more"]),
    "block longer than any answer": (["model.draft.block_size=300"], ["block_size=300", "longest answer"]),
    "more draft layers than layers": (["model.draft.num_layers=9"], ["num_layers=9", "8 layers"]),
    "rows longer than positions": (["data.row_length=2000"], ["2008", "1024 positions"]),
    "missing data file": (["data.path=nowhere.jsonl"], ["nowhere.jsonl", "No file"]),
    "mix with a typo": (["data.path=[{path: a.jsonl, wait: 2}]"], ["wait", "path, weight, split"]),
    "unknown policy": (["data.bad_records=ignore"], ["'ignore'", "stop or skip"]),
    "no process": (["data.num_proc=0"], ["num_proc=0", "1 or more"]),
    "missing target": (["model.target.name=./nowhere"], ["./nowhere", "no config.json"]),
    "nothing left to train on": (["data.max_records=50"], ["validation_records=64", "50"]),
    "no GPU": (["trainer=gpu"], ["trainer", "gpu"]),
    "unknown trainer setting": (["+trainer.devicez=2"], ["devicez"]),
    "name with a slash": (["name=a/b"], ["a/b", "plain directory name"]),
    "unknown kind of GPU": (["hardware.gpu=h101"], ["'h101'", "h100-80gb"]),
    "more than the peak": (["hardware.share_of_peak=1.5"], ["share_of_peak=1.5", "at most 1"]),
    "plan without a training stage": (["plan=true", "stages=[export]"], ["plan=true", "attention_tuning"]),
    "no room to answer": (["stage.evaluate.max_new_tokens=1016"], ["max_new_tokens=1016", "1024"]),
    "unknown selection": (["stage.evaluate.selection=product"], ["'product'", "cumulative_product"]),
    "no probability": (["stage.evaluate.top_p=1.5"], ["stage.evaluate.top_p=1.5", "at most 1"]),
    "no batch": (["stage.evaluate.speed.batch_sizes=[1,0]"], ["batch_sizes=[1, 0]", "1 or more"]),
    "threshold in percent": (["stage.evaluate.speed.thresholds=[1,10]"], ["thresholds=[1, 10]", "0 to 1"]),
    "benchmark with a typo": (["+benchmarks.held_out.tmplate=x"], ["benchmarks.held_out.tmplate", "path, subset"]),
    "benchmark of nothing": (["+benchmarks.mine.path=nowhere.jsonl"], ["nowhere.jsonl", "No file"]),
}


def assert_refused(done, words, cwd):
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not list(cwd.glob("checkpoints/*/*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CALLS)
def test_wrong_setting(case, tmp_path):
    overrides, words = CALLS[case]
    experiment = [] if case in ("no experiment", "unknown experiment") else ["+experiment=tiny"]
    assert_refused(command(*experiment, *overrides, cwd=tmp_path), words, tmp_path)


DATA = {
    "empty file": ((), ["holds no record"]),
    "unknown role": (
        (chat("Because.", role="wizard"),),
        ["data.jsonl:1: turn 1", "'wizard'", "system, user, assistant"],
    ),
    "no messages": (({"text": "?"},), ["data.jsonl:1", "`messages`", "the keys are text"]),
    "content of a wrong type": (
        ({"messages": [{"role": "user", "content": 3}]},),
        ["turn 1", "must be a string", "a number"],
    ),
    "answers shorter than a block": ((chat("No."), chat("Yes.")), ["block_size=8", "longest answer"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DATA)
def test_wrong_data(case, tmp_path):
    records, words = DATA[case]
    path = jsonl(tmp_path / "data.jsonl", *records)
    done = command("+experiment=tiny", f"data.path={path}", "data.validation_records=0", cwd=tmp_path)
    assert_refused(done, words, tmp_path)


@pytest.mark.slow
def test_broken_json_is_named_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(chat("Because.")) + "\n{broken\n", encoding="utf-8")
    done = command("+experiment=tiny", f"data.path={path}", cwd=tmp_path)
    assert_refused(done, ["data.jsonl:2", "not JSON"], tmp_path)


@pytest.mark.slow
def test_tokenizer_of_another_target(tmp_path):
    other = tmp_path / "target"
    shutil.copytree(TINY / "target", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    done = command("+experiment=tiny", f"model.target.name={other}", cwd=tmp_path)
    assert_refused(done, ["2048 tokens", "vocabulary 1000", "model.target.tokenizer"], tmp_path)
