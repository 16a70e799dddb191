"""Test preemption, requeueing and sweeps on a SLURM cluster: the weights must equal those of an uninterrupted run.

    pip install -e ".[slurm]"
    export CLUSTER_NODES=2                        # or 1, which skips two_nodes
    eval "$(scripts/slurm/local_cluster.sh start)"
    python scripts/slurm/drill.py                 # or a subset of: time_limit zero2 two_nodes sweep
    scripts/slurm/local_cluster.sh stop

time_limit   one task; SLURM signals it before each time limit until it finishes
zero2        two tasks with ZeRO 2, signaled once in each training stage
two_nodes    the same as zero2, with one task on each of two nodes
sweep        a sweep over two learning rates with submitit, including the table at the end

Takes about 12 minutes on 2 cores.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "train.sbatch"
RESULTS = [f"{stage}/draft.safetensors" for stage in ("attention_tuning", "bonus_calibration")]
RESULTS += ["export/model.safetensors"]
COMMON = ("+experiment=tiny", "data.max_records=400", "data.validation_records=16")
COMMON += ("stage.evaluate.num_prompts=4", "stage.evaluate.max_new_tokens=30")
# 32-true: the same arithmetic on every machine. The experiment uses bf16-mixed on CPUs that support it.
ZERO2 = ("trainer=zero2", "trainer.accelerator=cpu", "trainer.precision=32-true")

STARTED = time.monotonic()


def say(text: str) -> None:
    """Print a log line with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.0f} s  {text}", flush=True)


def steps(tuning: int, calibration: int) -> list[str]:
    """Return overrides for the lengths of both training stages, with a checkpoint every 10 steps."""
    lengths = {"attention_tuning": tuning, "bonus_calibration": calibration}
    overrides = [f"stage.{stage}.steps={count}" for stage, count in lengths.items()]
    return overrides + [f"stage.{stage}.checkpoint_every=10" for stage in lengths]


class Job:
    """A run of train.sbatch in the queue."""

    def __init__(self, folder: Path, flags: list[str], overrides: list[str]) -> None:
        call = ["sbatch", "--parsable", *flags, str(SCRIPT), *overrides]
        self.number = subprocess.check_output(call, cwd=folder, text=True).strip()
        self.log = folder / f"flexdraft-{self.number}.log"
        self.last = ""
        say(f"job {self.number}: sbatch {' '.join(flags)} train.sbatch ...")

    def fields(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        text = subprocess.check_output(["scontrol", "show", "job", "--oneliner", self.number], text=True)
        return dict(re.findall(r"\b(\w+)=(\S+)", text))

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition holds or the job has ended; print changes of its state."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            fields = self.fields()
            state = fields["JobState"]
            if (now := f"{state}, restarts {fields['Restarts']}") != self.last:
                say(f"job {self.number}: {now}")
                self.last = now
            if until() or state in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
                return
            time.sleep(0.3)
        raise TimeoutError(f"job {self.number} after {seconds} s: {self.last}\n{self.output()[-3000:]}")

    def signal(self) -> None:
        """Send the signal of --signal=USR1@... now, because SLURM itself may send it up to a minute early."""
        subprocess.run(["scancel", "--signal=USR1", self.number], check=True)
        say(f"job {self.number}: SIGUSR1 sent")

    def output(self) -> str:
        """Return the output of all restarts so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def left_alone(folder: Path, overrides: list[str]) -> Path:
    """Train without interruption outside SLURM. Return the run directory."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    call = [sys.executable, "-m", "train", *overrides]
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(call)}\n{done.stderr[-3000:]}")
    say("the uninterrupted run: finished")
    return folder / "checkpoints" / "tiny"


def report(job: Job, expected: Path, actual: Path, restarts: int) -> dict[str, bool]:
    """Return the checks of a finished job and whether each passed."""
    fields = job.fields()
    resumed = re.findall(r"resuming from step (\d+)", job.output())
    say(f"job {job.number}: resumed from step {', '.join(resumed)}")
    shown = {
        f"requeued {restarts} times or more: {fields['Restarts']}": int(fields["Restarts"]) >= restarts,
        "resumed from the checkpoint of each stop": len(resumed) >= restarts,
        "ended COMPLETED with status 0:0": (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"),
    }
    for name in RESULTS:
        shown[f"{name} byte-identical"] = digest(expected / name) == digest(actual / name) != ""
    return shown


def digest(file: Path) -> str:
    """Return the SHA-256 of a file; empty if the file is missing."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def time_limit(folder: Path) -> dict[str, bool]:
    """SLURM sends its signal one minute before a time limit of two minutes."""
    overrides = [*COMMON, *steps(240, 20), "stage.attention_tuning.global_batch_size=2"]
    expected = left_alone(folder / "alone", overrides)
    job = Job(folder, ["--time=2", "--signal=USR1@60"], overrides)
    job.wait(lambda: False, 900)
    return report(job, expected, folder / "checkpoints" / "tiny", restarts=1)


def two_ranks(folder: Path, flags: list[str]) -> dict[str, bool]:
    """Run ZeRO 2 on two ranks, and signal the job once in each training stage."""
    overrides = [*COMMON, *ZERO2, *steps(30, 20)]
    expected = left_alone(folder / "alone", [*overrides, "trainer.devices=2"])
    job = Job(folder, ["--time=30", *flags], overrides)
    run_dir = folder / "checkpoints" / "tiny"
    for stage in ("attention_tuning", "bonus_calibration"):
        job.wait(lambda stage=stage: any((run_dir / stage / "checkpoints").glob("*.ckpt")), 300)
        before = job.output().count("back into the queue")
        job.signal()
        job.wait(lambda before=before: job.output().count("back into the queue") > before, 60)
    job.wait(lambda: False, 600)
    return report(job, expected, run_dir, restarts=2)


def zero2(folder: Path) -> dict[str, bool]:
    """Run both ranks on one node."""
    return two_ranks(folder, ["--ntasks-per-node=2"])


def two_nodes(folder: Path) -> dict[str, bool]:
    """Run one rank on each of two nodes."""
    return two_ranks(folder, ["--nodes=2", "--ntasks-per-node=1"])


def sweep(folder: Path) -> dict[str, bool]:
    """Run a sweep as a job array with submitit."""
    rate = "stage.attention_tuning.module.learning_rate"
    call = [sys.executable, "-m", "train", "-m", *COMMON, *steps(20, 10), "hydra/launcher=submitit_slurm"]
    call += ["hydra.launcher.timeout_min=10", f"{rate}=2e-3,5e-3", f"name=lr_${{{rate}}}"]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    found = next(folder.glob("multirun/*/table.md"), None)
    table = found.read_text(encoding="utf-8") if found else done.stderr[-3000:]
    print(table, flush=True)
    exports = [digest(folder / f"checkpoints/lr_{value}/export/model.safetensors") for value in ("0.002", "0.005")]
    return {
        "status 0": done.returncode == 0,
        "the table lists both jobs as done": table.count("| done ") == 2 and table in done.stdout,
        "two different drafters": all(exports) and len(set(exports)) == 2,
    }


def prepare_environment() -> list[str]:
    """Set the environment that jobs inherit. Return the names of the cluster's nodes."""
    if not shutil.which("sbatch") or "SLURM_CONF" not in os.environ:
        sys.exit('no SLURM: eval "$(scripts/slurm/local_cluster.sh start)" first')
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # One thread, so that results do not depend on the number of visible cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    nodes = subprocess.check_output(["sinfo", "--noheader", "--Node", "--format=%N"], text=True).split()
    if len(nodes) > 1:  # emulated nodes, whose names do not resolve
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return nodes


def main() -> None:
    scenarios = {f.__name__: f for f in (time_limit, zero2, two_nodes, sweep)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=f"one of {', '.join(scenarios)}; default: all")
    parser.add_argument("--folder", type=Path, help="directory in which runs and logs are kept")
    arguments = parser.parse_args()
    if unknown := set(arguments.scenarios) - scenarios.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    nodes = prepare_environment()
    chosen = arguments.scenarios or [name for name in scenarios if name != "two_nodes" or len(nodes) > 1]
    root = arguments.folder or Path(tempfile.mkdtemp(prefix="slurm-drill-"))
    shown: list[tuple[str, str, bool]] = []
    for name in chosen:
        say(f"--- {name}")
        folder = root / name
        folder.mkdir(parents=True)
        try:
            shown += [(name, what, held) for what, held in scenarios[name](folder).items()]
        except (RuntimeError, TimeoutError) as error:
            print(error)
            shown.append((name, "finished", False))
    print()
    for name, what, held in shown:
        print(f"{name:<12} {what:<56} {'yes' if held else 'NO'}")
    if not all(held for *_, held in shown):
        sys.exit(f"some checks failed; runs and logs: {root}")
    if not arguments.folder:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
