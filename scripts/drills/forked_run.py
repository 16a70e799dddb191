"""Run a shortened version of the tiny experiment in forks of this process, which share its imported modules."""

import atexit
import os
import random
import re
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch is imported

import train.__main__  # every run is a fork of this process  # noqa: F401
import train.evaluate.acceptance  # noqa: F401
from train.run_dir.state import file_sha256

SHORT = ["+experiment=tiny", "name=drill", "logger=csv", "data.max_records=60", "data.validation_records=8"]
SHORT += ["data.num_proc=1", "trainer.precision=32-true", "stage.evaluate.num_prompts=2"]
SHORT += ["stage.evaluate.max_new_tokens=8", "stage.evaluate.speed.num_prompts=0"]
for stage, steps in {"attention_tuning": 8, "bonus_calibration": 4}.items():
    SHORT += [f"stage.{stage}.steps={steps}", f"stage.{stage}.validate_every=4", f"stage.{stage}.checkpoint_every=2"]
    SHORT += [
        f"stage.{stage}.num_anchors=8",
        f"stage.{stage}.decode.prompts=2",
        f"stage.{stage}.decode.max_new_tokens=8",
    ]
WEIGHTS = ("attention_tuning/draft.safetensors", "bonus_calibration/draft.safetensors", "export/model.safetensors")


class Wrong(Exception):
    """Incorrect behavior after a fault."""


@dataclass
class Drill:
    """State of one fault: directory, random generator, weights of an uninterrupted run, and logs of all commands."""

    cwd: Path
    random: random.Random
    alone: dict[str, str] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    run_dir: Path = Path()

    def __post_init__(self) -> None:
        self.run_dir = self.cwd / "checkpoints" / "drill"

    def start(self, *overrides: str, prepare: Callable[[], None] | None = None) -> "Process":
        """Start `python -m train` with the short settings in a fork, after calling `prepare` there."""
        return Process(self, [*SHORT, *overrides], prepare)

    def run(self, *overrides: str, prepare: Callable[[], None] | None = None) -> int:
        return self.start(*overrides, prepare=prepare).wait()

    def finish(self, *overrides: str) -> None:
        """Rerun the command without the fault and check that its weights equal those of an uninterrupted run."""
        expect(self.run(*overrides) == 0, "the command failed after the fault was removed", self)
        expect(self.weights() == self.alone, "weights differ from those of an uninterrupted run", self)

    def weights(self) -> dict[str, str]:
        return {name: file_sha256(self.run_dir / name) for name in WEIGHTS if (self.run_dir / name).exists()}

    def step(self, stage: str = "attention_tuning") -> int:
        """Return the step of the latest checkpoint; 0 before the first."""
        found = (self.run_dir / stage / "checkpoints").glob("step-*.ckpt")
        return max((int(path.name.split("-")[1]) for path in found), default=0)


class Process:
    """A run in a fork of this process, in a new session."""

    def __init__(self, drill: Drill, arguments: list[str], prepare: Callable[[], None] | None) -> None:
        self.drill, self.log = drill, drill.cwd / f"log{len(drill.logs)}.txt"
        drill.logs.append("")
        self.number = len(drill.logs) - 1
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._child(arguments, prepare)
        self.status: int | None = None

    def _child(self, arguments: list[str], prepare: Callable[[], None] | None) -> None:
        atexit._clear()  # the child must not run the parent's exit handlers
        os.setsid()
        os.chdir(self.drill.cwd)
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ["train", *arguments]
        status = 0
        try:
            if prepare:
                prepare()
            runpy.run_module("train", run_name="__main__", alter_sys=True)
        except SystemExit as end:  # mimics the interpreter
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except KeyboardInterrupt:
            status = 130
            traceback.print_exc()
        except BaseException:
            status = 1
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def signal(self, number: int) -> None:
        """Send a signal to the run and its child processes; do nothing if it has exited."""
        if not self.running():
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # the child has not called setsid yet
            os.kill(self.pid, number)

    def wait(self, seconds: float = 600) -> int:
        """Wait for the run and return its exit status.

        Raises:
            Wrong: the run timed out, its log has a traceback, or it failed without exactly one message.
        """
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise Wrong(f"still running after {seconds:.0f} s:\n{self.text()[-2000:]}")
            time.sleep(0.02)
        text = self.drill.logs[self.number] = self.text()
        expect("Traceback (most recent call last)" not in text, "a traceback", self.drill)
        if self.status and self.status > 0:
            messages = re.findall("error: |stopped by |stopped;", text)  # may follow a progress bar on the same line
            expect(len(messages) == 1, f"{len(messages)} messages for exit status {self.status}", self.drill)
        return self.status

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def until(self, moment: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until `moment` is true, the run exits, or the time is up."""
        end = time.monotonic() + seconds
        while self.running() and not moment() and time.monotonic() < end:
            time.sleep(0.002)


def expect(true: bool, problem: str, drill: Drill) -> None:
    if not true:
        raise Wrong(f"{problem}\n--- the last log:\n{drill.logs[-1][-3000:]}")
