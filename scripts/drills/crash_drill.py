"""Kill runs of the tiny experiment at random times and resume them: the results must equal those of uninterrupted runs.

    python scripts/drills/crash_drill.py                     # 30 runs, about 40 minutes on 2 cores
    python scripts/drills/crash_drill.py --runs 4 --only zero2

Each run is killed with SIGKILL (all ranks at once) and restarted with the same command several times, and then left to
finish. Half of the kills happen at a random time, half while a checkpoint is being written. The weights of both
stages and the exported file must be byte-identical to those of an uninterrupted run, and the logged losses and
validation metrics must be equal.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train.evaluate.plots import read_metrics
from train.run_dir.state import file_sha256

STAGES = {"attention_tuning": (24, 8), "bonus_calibration": (16, 4)}  # steps, steps between validations
SHORT = ("+experiment=tiny", "trainer.precision=32-true", "data.max_records=400", "data.validation_records=16")
SHORT += ("stage.evaluate.num_prompts=1", "stage.evaluate.max_new_tokens=8")
for stage, (steps, validate_every) in STAGES.items():
    SHORT += (f"stage.{stage}.steps={steps}", f"stage.{stage}.validate_every={validate_every}")
    SHORT += (f"stage.{stage}.num_anchors=8", f"stage.{stage}.checkpoint_every=2")
PAIR = ("trainer.accelerator=cpu", "trainer.devices=2")
VARIANTS = {
    "one rank": (),
    "one rank, 4 micro-batches": (
        "stage.attention_tuning.micro_batch_size=1",
        "stage.bonus_calibration.micro_batch_size=1",
    ),
    "two ranks, DDP": ("trainer.devices=2",),
    "two ranks, ZeRO 1": ("trainer=zero1", *PAIR),
    "two ranks, ZeRO 2": ("trainer=zero2", *PAIR),
    "two ranks, ZeRO 3": ("trainer=zero3", *PAIR),
}
FILES = ("attention_tuning/draft.safetensors", "bonus_calibration/draft.safetensors", "export/model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--kills", type=int, default=3, help="kills per run at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    arguments = parser.parse_args()
    variants = [name for name in VARIANTS if arguments.only in name]
    with tempfile.TemporaryDirectory(prefix="crash-drill-") as folder:
        alone = {name: reference(name, Path(folder)) for name in variants}
        good = 0
        for number in range(arguments.runs):
            name = variants[number % len(variants)]
            generator = random.Random(f"{arguments.seed}/{number}")
            cwd = Path(folder, f"run{number}")
            cwd.mkdir()
            kills = killed_run(name, cwd, generator, arguments.kills, alone[name]["seconds"])
            problems = differences(outcome(cwd), alone[name])
            good += not problems
            print(f"run {number + 1:2} ({name}): killed {', '.join(kills)}: {problems or 'identical'}", flush=True)
    print(f"{good}/{arguments.runs} runs have the weights and the history of an uninterrupted run")
    sys.exit(good != arguments.runs)


def reference(name: str, folder: Path) -> dict:
    """Run without interruption and return duration and results."""
    cwd = folder / name.replace(" ", "_")
    cwd.mkdir()
    started = time.monotonic()
    code, log = start(name, cwd).wait(), cwd / "log.txt"
    if code:
        sys.exit(f"the uninterrupted run failed ({name}):\n{log.read_text()[-3000:]}")
    result = {"seconds": time.monotonic() - started, **outcome(cwd)}
    print(f"uninterrupted ({name}): {result['seconds']:.0f} s", flush=True)
    return result


def start(name: str, cwd: Path) -> subprocess.Popen:
    """Start the command in a separate process group, so that all ranks can be killed at once."""
    call = [sys.executable, "-m", "train", *SHORT, *VARIANTS[name], "name=drill"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (cwd / "log.txt").open("ab") as log:
        return subprocess.Popen(
            call, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def killed_run(name: str, cwd: Path, generator: random.Random, most: int, seconds: float) -> list[str]:
    """Start and kill a run repeatedly, then let it finish. Return where each kill happened."""
    kills: list[str] = []
    for _ in range(generator.randint(1, most)):
        left = being_written(cwd)  # temporary files left by the previous kill
        process = start(name, cwd)
        writing = generator.random() < 0.5
        moment = time.monotonic() + generator.uniform(0.1, 0.8) * seconds
        # After `moment`: kill immediately, or during the next checkpoint write.
        while process.poll() is None and (time.monotonic() < moment or (writing and not being_written(cwd) - left)):
            time.sleep(0.0005)
        if process.poll() is not None:
            break  # finished before the kill
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills.append(("writing in " if writing else "in ") + where(cwd))
    code = start(name, cwd).wait()
    if code:
        kills.append(f"then it failed with status {code}:\n{(cwd / 'log.txt').read_text()[-2000:]}")
    return kills or ["never"]


def being_written(cwd: Path) -> set[Path]:
    """Return the temporary files of checkpoints and best weights being written."""
    return set((cwd / "checkpoints" / "drill").glob("*/checkpoints/.*.tmp"))


def where(cwd: Path) -> str:
    """Return the name of the running stage."""
    run_dir = cwd / "checkpoints" / "drill"
    begun = [f.name.split(".")[0] for f in sorted((run_dir / "records").glob("*.begun.json"), key=os.path.getmtime)]
    done = [name for name in begun if (run_dir / "records" / f"{name}.done.json").exists()]
    return next((name for name in reversed(begun) if name not in done), "between stages" if begun else "preparation")


def outcome(cwd: Path) -> dict:
    """Return hashes of the results, and the logged training and validation metrics by step, except durations."""
    run_dir = cwd / "checkpoints" / "drill"
    result: dict = {file: file_sha256(run_dir / file) if (run_dir / file).exists() else None for file in FILES}
    for stage in STAGES:
        rows = read_metrics(run_dir / stage)
        result[f"{stage} history"] = {
            step: {
                key: value
                for key, value in row.items()
                if key.startswith(("train/", "val/")) and not key.endswith("_seconds")
            }
            for step, row in rows.items()
        }
    return result


def differences(mine: dict, alone: dict) -> list[str]:
    return [key for key in mine if mine[key] != alone[key]]


if __name__ == "__main__":
    main()
