"""Inject random faults into short runs: each run must succeed, or fail with one clear message and no lost results.

    python scripts/drills/fault_drill.py                        # 60 faults, about 40 minutes on 2 cores; Linux, as root
    python scripts/drills/fault_drill.py --faults 5 --only kill   # 5 faults of the kinds whose name contains "kill"

A fault counts as handled if the run exits with status 0, or with one message and no traceback; if existing weights are
still present and byte-identical; and if the same command, once the fault is removed, produces the weights of an
uninterrupted run. If the message suggests a different command (for a changed setting), the drill follows that advice.
Full and read-only disks are simulated with separate mounts, which require root; without root, these kinds of faults are
listed as skipped.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from forked_run import WEIGHTS, Drill, Wrong, expect
from safetensors.torch import load_file, save_file

import train.loop.modules  # noqa: E402


def finite(drill: Drill) -> None:
    """Check that all weights in the run directory are finite."""
    for path in drill.run_dir.rglob("*.safetensors"):
        bad = [name for name, tensor in load_file(path).items() if not tensor.isfinite().all()]
        expect(not bad, f"{path.name} holds weights that are not finite", drill)


def broken_loss(at: Callable[[int], bool]) -> Callable[[], None]:
    """Return a function that makes the stage 1 loss NaN at the steps for which `at` is true."""

    def prepare() -> None:
        inner = train.loop.modules.AttentionTuning.training_step

        def training_step(self, batch, *rest):
            return inner(self, batch, *rest) * (float("nan") if at(self.trainer.global_step) else 1.0)

        train.loop.modules.AttentionTuning.training_step = training_step

    return prepare


def stopped_at(drill: Drill, step: int) -> None:
    """Start a run and stop it with SIGTERM once a checkpoint of this step exists."""
    process = drill.start()
    process.until(lambda: drill.step() >= step)
    process.signal(signal.SIGTERM)
    process.wait()


def nan_at_one_step(drill: Drill) -> str:
    step = drill.random.randrange(8)
    expect(
        drill.run(prepare=broken_loss(lambda at, left=[step]: at == step and bool(left) and left.pop() >= 0)) == 0,
        "one bad step ended the run",
        drill,
    )
    expect("not finite" in drill.logs[-1], "a skipped step without a word", drill)
    finite(drill)
    return f"step {step}"


def nan_from_a_step_on(drill: Drill) -> str:
    step = drill.random.randrange(8)
    drill.run("stage.attention_tuning.max_skipped_steps=2", prepare=broken_loss(lambda at: at >= step))
    finite(drill)
    drill.finish("stage.attention_tuning.max_skipped_steps=2")
    return f"from step {step} on"


def kill(drill: Drill) -> str:
    process = drill.start()
    moment = drill.random.uniform(0.2, 1.2) * drill.random.choice([4, 8, 12])
    begun = time.monotonic()
    process.until(lambda: time.monotonic() - begun > moment)
    process.signal(signal.SIGKILL)
    process.wait()
    drill.finish()
    return f"after {moment:.1f} s"


def ask_to_stop(drill: Drill) -> str:
    number, step = drill.random.choice([signal.SIGTERM, signal.SIGINT]), drill.random.choice([0, 2, 4])
    process = drill.start()
    process.until(lambda: "[1/4]" in process.text() and drill.step() >= step)
    process.signal(number)
    status = process.wait()
    expect(status in (0, 128 + number, -number), f"exit status {status}", drill)
    drill.finish()
    return f"{number.name} from step {step} on"


def full_disk(drill: Drill) -> str:
    size = drill.random.randint(1, 24)
    with mounted(drill, "tmpfs", "-t", "tmpfs", "-o", f"size={size}m") as place:
        status = drill.run(f"run_dir={place}/drill")
        expect(status == 0 or str(place) in drill.logs[-1], "the message does not name the path", drill)
        subprocess.run(["mount", "-o", "remount,size=200m", place], check=True)
        drill.run_dir = place / "drill"
        drill.finish(f"run_dir={place}/drill")
    return f"{size} MB"


def read_only(drill: Drill) -> str:
    step = drill.random.choice([0, 2, 4])
    if step:
        stopped_at(drill, step)
    place = drill.cwd / "checkpoints"
    place.mkdir(exist_ok=True)
    with mounted(drill, place, "--bind"):
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        expect(drill.run() != 0, "a run that cannot write succeeded", drill)
        expect(str(place) in drill.logs[-1] or "checkpoints/drill" in drill.logs[-1], "no path in the message", drill)
    drill.finish()
    return f"from step {step} on"


def two_writers(drill: Drill) -> str:
    first = drill.start()
    wait = drill.random.uniform(0, 6)
    time.sleep(wait)
    second = drill.start()
    statuses = sorted([first.wait(), second.wait()])
    expect(statuses[0] == 0, "neither of the two runs succeeded", drill)
    if statuses[1]:
        expect(
            str(first.pid) in "".join(drill.logs) or str(second.pid) in "".join(drill.logs), "no process named", drill
        )
    drill.finish()
    return f"{wait:.1f} s apart"


def deleted_result(drill: Drill) -> str:
    drill.run()
    names = [*WEIGHTS, "export/config.json", "evaluate/report.json", "records/export.done.json", "export"]
    victim = drill.run_dir / drill.random.choice(names)
    subprocess.run(["rm", "-r", victim], check=True)
    kept = drill.weights()
    status = drill.run()
    expect(kept.items() <= drill.weights().items(), "intact weights are missing", drill)
    expect(status == 0 or victim.name in drill.logs[-1] or victim.parent.name in drill.logs[-1], "no file named", drill)
    if status == 0:
        expect(victim.exists(), f"{victim.name} is still missing", drill)
        expect(drill.weights() == drill.alone, "weights differ from those of an uninterrupted run", drill)
    return str(victim.relative_to(drill.run_dir))


CHANGED = ["model.draft.block_size=4", "model.draft.num_layers=3", "seed=5", "stage.attention_tuning.steps=10"]
CHANGED += [
    "stage.attention_tuning.module.learning_rate=0.01",
    "objective=kl",
    "data.template_kwargs={enable_thinking:false}",
]
SPARED = ["stage.attention_tuning.decode.batch_size=1", "stage.attention_tuning.module.chunk=64", "data.num_proc=2"]
SPARED += ["stage.evaluate.batch_size=1", "stage.attention_tuning.micro_batch_size=1", "runtime.workers=1"]


def changed_setting(drill: Drill) -> str:
    stopped_at(drill, drill.random.choice([2, 4]))
    setting = drill.random.choice(CHANGED)
    expect(drill.run(setting) == 1, f"{setting} was taken without a word", drill)
    expect(setting.split("=")[0].split(".")[-1] in drill.logs[-1], "the message does not name the setting", drill)
    drill.finish()
    return setting


def setting_of_memory_or_speed(drill: Drill) -> str:
    stopped_at(drill, 4)
    setting = drill.random.choice(SPARED)
    expect(drill.run(setting) == 0, f"{setting} was refused", drill)
    return setting


def damaged_checkpoint(drill: Drill) -> str:
    process = drill.start()
    process.until(lambda: drill.step() >= 4)
    process.signal(signal.SIGKILL)
    process.wait()
    files = sorted((drill.run_dir / "attention_tuning" / "checkpoints").glob("*-*"))
    chosen = drill.random.sample(files, drill.random.randint(1, len(files))) if files else []
    ways = [damage(path, drill.random) for path in chosen]
    drill.finish()
    return ", ".join(f"{path.name[:13]} {way}" for path, way in zip(chosen, ways, strict=True))


def damaged_result(drill: Drill) -> str:
    drill.run("stages=[attention_tuning]")
    victim = drill.run_dir / WEIGHTS[0]
    way = drill.random.choice(["cut", "bit", "nan"])
    if way == "nan":
        tensors = load_file(victim)
        tensors[drill.random.choice(sorted(tensors))].flatten()[0] = float("nan")
        save_file(tensors, victim)
    else:
        way = damage(victim, drill.random)
    status = drill.run("stages=[bonus_calibration,export]")
    expect(status == 1, "a damaged file was trained on without a word", drill)
    expect(victim.name in drill.logs[-1], "the message does not name the file", drill)
    return way


def damaged_record(drill: Drill) -> str:
    if drill.random.random() < 0.5:
        stopped_at(drill, drill.random.choice([2, 4]))
    else:
        drill.run()
    victim = drill.random.choice(sorted((drill.run_dir / "records").glob("*.json")))
    way = damage(victim, drill.random)
    kept = drill.weights()
    if drill.run():
        expect(victim.name in drill.logs[-1], "the message does not name the record", drill)
        expect(drill.weights() == kept, "intact weights are missing", drill)
    else:
        expect(drill.weights() == drill.alone, "weights differ from those of an uninterrupted run", drill)
    return f"{victim.name} {way}"


def damage(path: Path, generator: random.Random) -> str:
    """Truncate, empty, corrupt or delete a file at random. Return which was done."""
    way = generator.choice(["cut", "emptied", "changed", "deleted"])
    content = bytearray(path.read_bytes())
    if way == "cut":
        path.write_bytes(content[: generator.randrange(1, len(content))])
    elif way == "emptied":
        path.write_bytes(b"")
    elif way == "changed":
        content[generator.randrange(len(content))] ^= 0x55
        path.write_bytes(content)
    else:
        path.unlink()
    return way


class mounted:
    """Context manager for a mount, which is unmounted on exit."""

    def __init__(self, drill: Drill, place: Path | str, *options: str) -> None:
        self.place = drill.cwd / place
        self.place.mkdir(exist_ok=True)
        source = str(self.place) if "--bind" in options else "tmpfs"
        subprocess.run(["mount", *options, source, self.place], check=True)

    def __enter__(self) -> Path:
        return self.place

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", "--lazy", self.place], check=True)


FAULTS = {
    "NaN at one step": nan_at_one_step,
    "NaN from a step on": nan_from_a_step_on,
    "kill -9": kill,
    "signal": ask_to_stop,
    "full disk": full_disk,
    "read-only disk": read_only,
    "two writers": two_writers,
    "deleted result": deleted_result,
    "changed setting": changed_setting,
    "setting of memory or speed": setting_of_memory_or_speed,
    "damaged checkpoint": damaged_checkpoint,
    "damaged weights": damaged_result,
    "damaged record": damaged_record,
}
MOUNTS = ("full disk", "read-only disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    arguments = parser.parse_args()
    kinds = [name for name in FAULTS if arguments.only in name]
    if os.geteuid():
        print(f"skipped, because they need root: {', '.join(set(kinds) & set(MOUNTS))}")
        kinds = [name for name in kinds if name not in MOUNTS]
    wrong: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fault-drill-") as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        alone = Drill(fresh(Path(folder), "alone"), random.Random(0))
        if alone.run():
            sys.exit(f"the uninterrupted run failed:\n{alone.logs[-1][-3000:]}")
        for number in range(arguments.faults):
            name = kinds[number % len(kinds)]
            generator = random.Random(f"{arguments.seed}/{number}")
            drill = Drill(fresh(Path(folder), f"run{number}"), generator, alone.weights())
            begun = time.monotonic()
            try:
                what, verdict = FAULTS[name](drill), "right"
            except Wrong as problem:
                what, verdict = "", f"WRONG: {problem}"
                wrong[name] += 1
            print(f"{number + 1:3} {name:27} {time.monotonic() - begun:4.0f} s  {what}: {verdict}", flush=True)
    print(f"{arguments.faults - wrong.total()}/{arguments.faults} faults handled correctly")
    sys.exit(bool(wrong))


def fresh(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


if __name__ == "__main__":
    main()
