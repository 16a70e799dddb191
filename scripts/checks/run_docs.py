"""Run every command in README.md and docs/, shortened for 2 CPU cores without a network.

    python scripts/checks/run_docs.py                 # all commands: about 30 minutes
    python scripts/checks/run_docs.py --only data.md  # commands whose location or text contains "data.md"
    python scripts/checks/run_docs.py --list          # dry run

Prints a table and exits with status 1 if a command failed. RULES in docs_rules.py defines the arguments appended to
each command, or the reason why it is not run; a command without a matching rule is an error. The commands on a page
run in order, in a separate directory that resembles the root of a checkout, with conf/, scripts/, src/ and the files
named on the pages. SLURM, the Hub and a chat server are replaced by local stand-ins.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from docs_commands import PYTHON, ROOT, SHELL, Command, commands_of, pages
from docs_rules import REPLACED, RULES, TRAINED, Rule
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(ROOT / "tests"))
from helpers.hub_server import hub_server  # noqa: E402
from helpers.stub_server import StubServer  # noqa: E402

TINY = ROOT / "src" / "data" / "tiny"
SECONDS = 900  # per command

SBATCH = """#!/bin/bash
# Replaces SLURM's sbatch: runs the job immediately, with the allocation in SLURM's variables.
export SLURM_JOB_ID=1 SLURM_JOB_NUM_NODES=1
while [[ $1 == --* ]]; do
  case $1 in
    --nodes=*) export SLURM_JOB_NUM_NODES=${1#*=} ;;
    --gpus-per-node=*) export SLURM_GPUS_PER_NODE=${1#*=} ;;
    --ntasks-per-node=*) export SLURM_NTASKS_PER_NODE=${1#*=} ;;
    --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${1#*=} ;;
    --time=*) ;;
    *) echo "sbatch: this stand-in does not support $1" >&2; exit 1 ;;
  esac
  shift
done
exec bash "$@"
"""
SRUN = """#!/bin/bash
# Replaces SLURM's srun: runs one task on one device.
while [[ $1 == --* ]]; do shift; done
exec "$@" trainer.devices=1 trainer.num_nodes=1
"""


@dataclass(frozen=True)
class Outcome:
    """Result of a command."""

    command: Command
    how: str
    seconds: float | None  # None: not run
    status: int = 0

    @property
    def ran(self) -> bool:
        return self.seconds is not None


def rule_of(command: Command) -> Rule:
    """Return the first rule that matches a command.

    Raises:
        LookupError: no rule matches.
    """
    for rule in RULES:
        if re.search(rule.pattern, command.text, re.MULTILINE):
            return rule
    raise LookupError(f"{command.place}: no rule in scripts/checks/docs_rules.py for: {short(command)}")


def prepared(command: Command, rule: Rule) -> str:
    """Return the command as it is run."""
    text = f"{rule.before}{command.text}{' ' + rule.add if rule.add else ''}"
    for placeholder, own in REPLACED.items():
        text = text.replace(placeholder, own)
    return text


def workspace(folder: Path) -> Path:
    """Create the directory in which a page's commands run."""
    folder.mkdir(parents=True)
    for name in ("conf", "scripts", "src"):
        (folder / name).symlink_to(ROOT / name)
    lines = (TINY / "conversations.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "conversations.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
    (folder / "logs.jsonl").write_text("".join(lines[200:400]), encoding="utf-8")
    (folder / "logs").mkdir()
    shutil.copy(folder / "logs.jsonl", folder / "logs")
    shutil.copy(TINY / "prompts.jsonl", folder)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of all commands: this Python, stand-ins for SLURM, separate cache, no network, no GPU."""
    stand_ins = folder / "bin"
    stand_ins.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN}.items():
        (stand_ins / name).write_text(text, encoding="utf-8")
        (stand_ins / name).chmod(0o755)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SRUN_"))}
    path = os.pathsep.join((str(stand_ins), str(Path(sys.executable).parent), os.environ["PATH"]))
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": ""}
    return inherited | offline | {"PATH": path, "HF_HOME": str(folder / "hf"), "COLUMNS": "120"}


@contextmanager
def served(rule: Rule, text: str, variables: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the command and its environment while the required stand-in server runs."""
    if rule.server == "hub":
        with hub_server() as hub:
            yield text, variables | hub.environment(Path(variables["HF_HOME"]))
    elif rule.server == "chat":
        with StubServer() as stub:
            yield text.replace("http://localhost:8000/v1", stub.url), variables
    else:
        yield text, variables


def run(text: str, kind: str, cwd: Path, variables: dict[str, str], log: Path) -> int:
    """Run a command with its output in `log`, and return its exit status."""
    call = [sys.executable, "-c", text] if kind == PYTHON else ["bash", "-c", text]
    with log.open("ab") as out:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(call, cwd=cwd, env=variables, start_new_session=True, **pipes)
        try:
            return process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def outcome(command: Command, folder: Path, variables: dict[str, str], log: Path) -> Outcome:
    """Run one command, after training the drafters that it reads."""
    rule = rule_of(command)
    if not rule.run:
        return Outcome(command, rule.how, None)
    page = folder / Path(command.page).stem
    cwd = page if page.exists() else workspace(page)
    started, text, status = time.monotonic(), prepared(command, rule), 0
    for drafter, training in TRAINED.items():
        if drafter in text and not (cwd / drafter).exists():
            status = status or run(training, SHELL, cwd, variables, log)
    with served(rule, text, variables) as (text, own):
        status = status or run(text, command.kind, cwd, own, log)
    return Outcome(command, rule.how, time.monotonic() - started, status)


def run_all(commands: list[Command], folder: Path) -> list[Outcome]:
    """Run all commands in order, and print the end of a failed command's output."""
    logs = folder / "output"
    logs.mkdir(parents=True)
    variables = environment(folder)
    outcomes = []
    for number, command in enumerate(commands, 1):
        print(f"[{number}/{len(commands)}] {command.place}  {short(command)}", flush=True)
        log = logs / f"{Path(command.page).stem}_{command.line}.txt"
        outcomes.append(outcome(command, folder, variables, log))
        if outcomes[-1].status:
            print(f"failed:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}", flush=True)
    return outcomes


def short(command: Command) -> str:
    """Return the first line of a command, to identify it."""
    first = command.text.strip().splitlines()[0]
    return f"Python: {first}" if command.kind == PYTHON else first


def table(outcomes: list[Outcome]) -> Table:
    result = Table(title="Commands of the documentation", title_justify="left")
    for name in ("location", "command", "rule", "seconds", "result"):
        result.add_column(name, no_wrap=name == "command", justify="right" if name == "seconds" else "left")
    for one in outcomes:
        seconds = f"{one.seconds:.0f}" if one.ran else "-"
        ended = "-" if not one.ran else f"failed ({one.status})" if one.status else "ok"
        result.add_row(*map(escape, (one.command.place, short(one.command)[:70], one.how, seconds, ended)))
    return result


def list_only(commands: list[Command]) -> None:
    """Print the commands and their rules without running anything."""
    for command in commands:
        rule = rule_of(command)
        print(f"{command.place}  {short(command)}\n    {rule.how}{': + ' if rule.add else ''}{rule.add}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the commands whose location or text contains this")
    parser.add_argument("--list", action="store_true", help="print the commands and their rules without running them")
    parser.add_argument("--folder", type=Path, help="directory in which runs and logs are kept; must not exist")
    arguments = parser.parse_args()
    found = [command for page in pages() for command in commands_of(page)]
    chosen = [command for command in found if arguments.only in f"{command.place} {command.text}"]
    try:
        for command in found:
            rule_of(command)
    except LookupError as error:
        sys.exit(f"error: {error}")
    if arguments.list:
        return list_only(chosen)
    if arguments.folder and arguments.folder.exists():
        sys.exit(f"error: --folder {arguments.folder} exists. Choose a new directory.")
    with tempfile.TemporaryDirectory(prefix="run-docs-") as temporary:
        outcomes = run_all(chosen, arguments.folder.resolve() if arguments.folder else Path(temporary))
    print()
    Console(width=160).print(table(outcomes))
    ran, failed = sum(one.ran for one in outcomes), sum(one.status != 0 for one in outcomes)
    print(f"{ran} of {len(outcomes)} commands run, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
