"""W&B: environment variables apply, stages stay separate, and missing server, login or package stop no training."""

import os
import socket
import subprocess
import sys
import time

import pytest
from helpers.shared import ROOT
from helpers.wandb_file import history, records

STAGES = """
import sys
from train.loop.loggers import wandb_logger
for number, stage in enumerate(("attention_tuning", "bonus_calibration"), start=1):
    logger = wandb_logger(save_dir=sys.argv[1], run_name="mine", stage=stage, run_id=f"own{number}")
    logger.log_hyperparams({"seed": 1})
    for step in (1, 2):
        logger.log_metrics({"train/loss": number + step / 10}, step=step)
    logger.finalize("success")
print("trained")
"""


def run(code, *arguments, **variables):
    """Run code in a process whose only credentials are the given variables."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = clean | {"PYTHONPATH": str(ROOT / "src"), "NETRC": "/nowhere", "WANDB_SILENT": "true", **variables}
    call = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)


def logged(folder):
    """Return the run records and histories of the offline runs in a directory."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    runs = [next(r.run for r in records(file) if r.WhichOneof("record_type") == "run") for file in files]
    return dict(zip((r.run_id for r in runs), zip(runs, map(history, files), strict=True), strict=True))


@pytest.mark.slow
def test_wandb_environment_variables_take_precedence(tmp_path):
    variables = {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g", "WANDB_ENTITY": "e"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    more = {"WANDB_TAGS": "a,b", "WANDB_MODE": "offline", "WANDB_DIR": str(elsewhere), "WANDB_JOB_TYPE": "j"}
    done = run(STAGES, tmp_path, **variables, **more)
    assert done.returncode == 0, done.stderr
    found = logged(elsewhere)
    assert found.keys() == {"own1", "own2"}
    for one, rows in found.values():
        assert (one.project, one.display_name, one.run_group, one.entity, one.job_type) == ("p", "n", "g", "e", "j")
        assert sorted(one.tags) == ["a", "b"] and [row["trainer/global_step"] for row in rows] == [1, 2]


@pytest.mark.slow
def test_by_default_each_stage_is_a_wandb_run_in_one_group(tmp_path):
    assert run(STAGES, tmp_path).returncode == 0
    found = logged(tmp_path)
    names = {(one.project, one.display_name, one.run_group) for one, _ in found.values()}
    assert names == {("flexdraft", f"mine-{stage}", "mine") for stage in ("attention_tuning", "bonus_calibration")}


@pytest.mark.slow
def test_stages_that_share_a_wandb_run_use_separate_keys(tmp_path):
    done = run(STAGES, tmp_path, WANDB_RUN_ID="agent1", WANDB_SWEEP_ID="sweep1")
    assert done.returncode == 0, done.stderr
    found = logged(tmp_path)
    assert found.keys() == {"agent1"} and found["agent1"][0].sweep_id == "sweep1"
    rows = found["agent1"][1]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    for number, stage in enumerate(("attention_tuning", "bonus_calibration")):
        mine = [row for row in rows if f"{stage}/train/loss" in row]
        assert mine == rows[2 * number : 2 * number + 2]
        assert [row[f"{stage}/trainer/global_step"] for row in mine] == [1, 2]


@pytest.mark.slow
def test_an_unreachable_server_is_detected_in_seconds_and_training_continues_offline(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        port = silent.getsockname()[1]
        done = run(STAGES, tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{port}")
    assert done.returncode == 0 and "trained" in done.stdout and time.monotonic() - started < 60
    assert done.stdout.count("is unreachable") == 1 and "wandb sync" in done.stdout
    assert len(logged(tmp_path)) == 2


@pytest.mark.slow
def test_a_server_that_rejects_the_run_does_not_stop_training(tmp_path):
    refuse = STAGES.replace("import sys", "import sys, wandb; begin = wandb.init")
    refuse = refuse.replace(
        "for number",
        "def init(**how):\n"
        "    if how['mode'] == 'online':\n        raise wandb.errors.CommError('invalid key')\n"
        "    return begin(**how)\n"
        "wandb.init = init\nimport train.loop.loggers\ntrain.loop.loggers.unreachable = lambda url: ''\nfor number",
        1,
    )
    done = run(refuse, tmp_path, WANDB_API_KEY="0" * 40)
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr
    assert "invalid key" in done.stdout and len(logged(tmp_path)) == 2


@pytest.mark.slow
def test_an_error_during_logging_disables_logging_but_not_training(tmp_path):
    dying = STAGES.replace(
        "    logger.finalize", "    logger.experiment.log = lambda row: 1 / 0\n" + "    logger.finalize"
    )
    dying = dying.replace("    logger.finalize", "    logger.log_metrics({'x': 1}, step=3)\n    logger.finalize")
    done = run(dying, tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr
    assert done.stdout.count("division by zero") == 2  # one line for each stage


@pytest.mark.slow
def test_an_invalid_mode_is_a_one_line_error(tmp_path):
    done = run(STAGES, tmp_path, WANDB_MODE="ofline")
    assert done.returncode and "WANDB_MODE=ofline: expected one of online, offline" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["csv", "wandb"])
def test_wandb_is_required_only_by_its_logger(logger, tmp_path):
    code = f"""
import sys
sys.modules["wandb"] = None
from pathlib import Path
from data.config.compose import composed
import train.pipeline
from train.loop.fit import stage_loggers
from train.loop.loggers import check_loggers
config = composed(["+experiment=tiny", "logger={logger}"])
check_loggers(config)
print(stage_loggers(config, "attention_tuning", Path(sys.argv[1])))
"""
    done = run(code, tmp_path)
    assert (done.returncode == 0) == (logger == "csv"), done.stderr
    assert logger == "csv" or "use logger=csv" in done.stderr
