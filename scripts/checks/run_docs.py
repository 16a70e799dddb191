"""Run every command in README.md and docs/, shortened for 2 CPU cores without a network.

    python scripts/checks/run_docs.py                 # all commands: about 30 minutes
    python scripts/checks/run_docs.py --only data.md  # commands whose location or text contains "data.md"
    python scripts/checks/run_docs.py --list          # dry run

Prints a table and exits with status 1 if a command failed. RULES defines the arguments appended to each command, or the
reason why it is not run; a command without a matching rule is an error. The commands on a page run in order, in a
separate directory that resembles the root of a checkout, with conf/, scripts/, src/ and the files named on the pages.
SLURM, the Hub and a chat server are replaced by local stand-ins.
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
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(ROOT / "tests"))
from helpers.hub_server import hub_server  # noqa: E402
from helpers.stub_server import StubServer  # noqa: E402

TINY = ROOT / "src" / "data" / "tiny"
SECONDS = 900  # per command

# Placeholders of the pages and their replacements. `workspace` creates the files.
REPLACED = {
    "/path/or/hub-id": "src/data/tiny/target",
    "DRAFTER TARGET": "checkpoints/tiny/export src/data/tiny/target",
    "mlabonne/open-perfectblend": "conversations.jsonl",
    " user/": " owner/",  # the account of the stand-in for the Hub
}

STAGES = ("attention_tuning", "bonus_calibration")
STEPS = ("steps=6", "global_batch_size=2", "num_anchors=8", "decode.prompts=2", "decode.max_new_tokens=8")
SHORT = " ".join(f"stage.{stage}.{setting}" for stage in STAGES for setting in STEPS)
SHORT += " stage.evaluate.num_prompts=2 stage.evaluate.max_new_tokens=16 stage.evaluate.speed.num_prompts=0"
SHORT += " data.max_records=60 data.validation_records=4 data.num_proc=1 overwrite=true"
SHORT += " regenerate.max_new_tokens=16 regenerate.drop_cut_off=false"
SHORT += " runtime.compile=false runtime.workers=0"  # would take minutes for a few steps
STAND_IN = f"model=stand_in data=tiny trainer=cpu {SHORT}"  # a small target instead of 8B
RANKS = f"model=stand_in data=tiny trainer.accelerator=cpu trainer.devices=2 trainer.precision=32-true {SHORT}"
# Settings that fit the embedded target and a CPU.
MINE = f"trainer=cpu model.target.dtype=float32 model.draft.num_layers=6 data.max_seq_len=320 {SHORT}"
EMBEDDED = f"data=tiny model=custom model.target.name=src/data/tiny/target {MINE}"
BENCH = "--preset tiny --device cpu --dtype float32 --steps 1"

STOOD_IN = f"python -m train +experiment=qwen3_8b {STAND_IN}"

# Drafters that commands read. They are trained first, unless an earlier command of the page has created them.
TRAINED = {
    "checkpoints/tiny/export": f"python -m train +experiment=tiny {SHORT}",
    "checkpoints/lora/adapter": f"python -m train +experiment=tiny adapter=lora name=lora {SHORT}",
    "checkpoints/qwen3_8b/export": STOOD_IN,
    "checkpoints/mine/export": "python -m train +experiment=qwen3_8b name=mine model.target.name=src/data/tiny/target "
    f"model=custom data.path=conversations.jsonl data.prompts=prompts.jsonl {MINE}",
}
# Variables that the text around a Python block refers to.
TARGET = """
from pathlib import Path
from models.draft import DraftModel
from models.export.artifact_io import load_draft
from models.target import load_target
target = load_target("src/data/tiny/target")
"""
PAIR = TARGET + 'draft, prompts = load_draft("checkpoints/tiny/export", target), [[1, 40, 41, 42], [1, 43, 44]]\n'


@dataclass(frozen=True)
class Rule:
    """How to run the commands that contain a pattern."""

    pattern: str
    how: str  # shown in the table; for commands that are not run, the reason
    run: bool = True
    before: str = ""  # prepended
    add: str = ""  # appended
    server: str = ""  # "hub" or "chat": stand-in that runs during the command


def not_run(pattern: str, why: str) -> Rule:
    return Rule(pattern, f"not run: {why}", run=False)


# The first matching rule applies. tests/project/test_docs.py composes the settings and parses the options of all
# commands, including those that are not run.
RULES = (
    # Not run.
    not_run(r"^make ", "installs packages; by CI"),
    not_run(r"^source ", "only changes the shell"),
    not_run(r"^(pip|hf|wandb) ", "needs the network"),
    not_run(r"^(scancel|scontrol|sbatch --signal)", "a fragment; scripts/slurm/drill.py on a real SLURM"),
    not_run(r"scripts/slurm/(drill\.py|local_cluster)|CLUSTER_NODES", "starts a real SLURM, as root"),
    not_run(r"hydra/launcher=submitit", "needs SLURM; scripts/slurm/drill.py sweep"),
    not_run(r"^vllm ", "needs vLLM and a GPU"),
    not_run(r"benchmarks=paper", "downloads six data sets"),
    not_run(r"\.\.\.|<\w+>", "abbreviated; a block has the full command"),
    not_run(r"^python -m [\w.]+$", "only the command's name"),
    not_run(r"scripts/\w+/compare_strategies", "takes 8 minutes, cannot be shortened"),
    not_run(r"scripts/\w+/regeneration_drill", "needs transformers[serving]"),
    not_run(r"scripts/\w+/bench_threads", "takes 3 minutes on idle cores, cannot be shortened"),
    not_run(r"scripts/\w+/run_docs", "this script"),
    not_run(r"scripts/\w+/import_graph", "rewrites a page; checked by the tests"),
    # The plan loads nothing, so it runs as written.
    Rule(
        r"hub-id.* plan=true",
        "embedded target",
        add="trainer=cpu model.target.dtype=float32 model.draft.num_layers=6 data.max_seq_len=320",
    ),
    Rule(r" plan=true", "as written"),
    Rule(r" name=dry_run ", "as written"),
    # The user's own target and data.
    Rule(r"^python -m (train|data\.(report|regenerate)) .*hub-id", "short, embedded target and data", add=MINE),
    Rule(r"^python -m models\.verify ", "as written"),
    Rule(r"scripts/push_to_hub", "to a stand-in for the Hub", server="hub"),
    # Experiments.
    Rule(r"^sbatch .*trainer=", "stand-ins for SLURM, stand-in target", add=RANKS),
    Rule(r"^sbatch ", "stand-ins for SLURM, stand-in target", add=STAND_IN),
    Rule(r"stages=\[evaluate\]", "short, after training", before=f"{STOOD_IN} && ", add=STAND_IN),
    Rule(r"^python -m train .*push_to_hub", "short, to a stand-in for the Hub", add=STAND_IN, server="hub"),
    Rule(r"^python -m data\.regenerate .*backend=server", "short, stub server", add=EMBEDDED, server="chat"),
    Rule(r"^python -m data\.regenerate .*qwen3_8b", "short, embedded target", add=EMBEDDED),
    Rule(r"^python -m train .*qwen3_8b.*trainer=(ddp|zero)", "short, stand-in target, two ranks", add=RANKS),
    Rule(
        r"^python -m (train|data\.(report|regenerate)) .*\+experiment=qwen3_8b", "short, stand-in target", add=STAND_IN
    ),
    Rule(r"^python -m (train|data\.(report|regenerate)) .*\+experiment=tiny", "short", add=SHORT),
    Rule(r"^stage\.\w+\.", "short, as settings of a run", before="python -m train +experiment=tiny ", add=SHORT),
    # Scripts.
    Rule(r"scripts/\w+/(ablate_layers|dflash_reference)", "short", add=SHORT),
    Rule(r"scripts/\w+/bench_train_step.* --sweep", "smallest shape", add=f"{BENCH} --values 4,8"),
    Rule(r"scripts/\w+/bench_train_step", "smallest shape", add=f"{BENCH} --naive-anchors 1"),
    Rule(r"scripts/\w+/bench_decoding", "smallest shape", add=f"{BENCH} --rows 1"),
    Rule(r"scripts/\w+/benchmark_data", "600 records", add="--records 600 --processes 1"),
    Rule(r"scripts/\w+/check_families", "short", add="--prompts 2 --new-tokens 4"),
    Rule(r"scripts/\w+/measure_memory", "one configuration", add="+experiment=tiny"),
    Rule(r"scripts/\w+/crash_drill", "one run, one kill", add="--runs 1 --kills 1 --only 'one rank, 4'"),
    # Python blocks.
    Rule(r"^result = generate\(target, draft, prompts", "with a short drafter", before=PAIR),
    Rule(r"^draft = load_adapter\(", "with a short adapter", before=TARGET),
    Rule(r"checkpoints/tiny/export", "with a short drafter"),
    Rule(r"custom_generate=.checkpoints/mine/export", "with a short drafter"),
)

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
    raise LookupError(f"{command.place}: no rule in scripts/checks/run_docs.py for: {short(command)}")


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
