"""Commands in processes forked from one that has imported their modules: an invalid call takes no time for imports."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["train.pipeline", "data.report.run", "data.regenerate.run"])


def forked_command(
    *arguments: str, cwd: Path, timeout: float = 300, module: str = "train"
) -> subprocess.CompletedProcess:
    """Run a command as `helpers.shared.command` does. Only for calls that end before training."""
    files = [cwd / "stdout.forked", cwd / "stderr.forked"]
    process = FORKED.Process(target=_run, args=(module, arguments, cwd, files))
    process.start()
    process.join(timeout)
    assert process.exitcode is not None, f"{arguments} takes more than {timeout} s"
    output, errors = (file.read_text(encoding="utf-8") for file in files)
    for file in files:
        file.unlink()
    return subprocess.CompletedProcess(list(arguments), process.exitcode, output, errors)


def _run(module: str, arguments: tuple[str, ...], cwd: Path, files: list[Path]) -> None:
    os.chdir(cwd)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
