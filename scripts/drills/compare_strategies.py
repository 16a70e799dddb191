"""Compare weights after 20 identical steps on one rank and on two ranks under every strategy.

    python scripts/drills/compare_strategies.py                               # about 8 minutes on 2 cores
    python scripts/drills/compare_strategies.py --learning-rate 5e-3 --eps 1e-8

The data and the global batch are the same; only the summation order differs. With its default eps, AdamW turns a
gradient that is pure rounding error into a full step (second command). With an eps above the rounding error, the
weights agree as closely as the gradients. Runs in bfloat16 follow, to check that they work and to show how far they
differ.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from crash_drill import VARIANTS
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

STAGES = ("attention_tuning", "bonus_calibration")
SHORT = ("+experiment=tiny", "data.max_records=400", "data.validation_records=16", f"stages=[{','.join(STAGES)}]")
SHORT += tuple(f"stage.{stage}.{key}=20" for stage in STAGES for key in ("steps", "validate_every", "checkpoint_every"))
# As with large models; otherwise DeepSpeed keeps such small tensors unpartitioned after their first use.
SHARDED = {key: 0 for key in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")}
STRICT = "+trainer.strategy.zero_optimization={" + ",".join(f"stage3_{k}:{v}" for k, v in SHARDED.items()) + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-3)
    arguments = parser.parse_args()
    adamw = {"learning_rate": arguments.learning_rate, "eps": arguments.eps}
    table = Table(title=f"weights after 20 steps of AdamW with {adamw}: greatest difference to one rank")
    for column in ("ranks and strategy", "arithmetic", *STAGES, "seconds"):
        table.add_column(column)
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        for arithmetic in ("float32", "bfloat16"):
            for name in VARIANTS:
                started = time.monotonic()
                weights = train(name, arithmetic, adamw, Path(folder))
                if name == "one rank" and arithmetic == "float32":
                    alone = weights
                apart = [difference(mine, reference) for mine, reference in zip(weights, alone, strict=True)]
                seconds = time.monotonic() - started
                table.add_row(name, arithmetic, *(f"{value:.1e}" for value in apart), f"{seconds:.0f}")
                print(f"{name}, {arithmetic}: {apart}", flush=True)
    Console().print(table)


def train(name: str, arithmetic: str, adamw: dict[str, float], folder: Path) -> list[dict]:
    """Train both stages and return their weights."""
    precision = {"float32": "32-true", "bfloat16": "bf16-mixed"}[arithmetic]
    run = f"{name}-{arithmetic}".replace(" ", "_").replace(",", "")
    call = [sys.executable, "-m", "train", *SHORT, *VARIANTS[name], f"trainer.precision={precision}", f"name={run}"]
    call += [f"stage.{stage}.module.{key}={value}" for stage in STAGES for key, value in adamw.items()]
    call += [STRICT] * name.endswith("ZeRO 3")
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    return [load_file(folder / "checkpoints" / run / stage / "draft.safetensors") for stage in STAGES]


def difference(mine: dict, reference: dict) -> float:
    return max(float((tensor - mine[name]).abs().max()) for name, tensor in reference.items())


if __name__ == "__main__":
    main()
