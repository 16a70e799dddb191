"""Measure the cost of spin-waiting OpenMP threads on idle cores and on cores shared with busy processes.

    python scripts/bench/bench_threads.py             # on otherwise idle cores: about 3 minutes

For each spin count of the GNU OpenMP runtime, a new process times a forward and backward pass of the embedded target
over 4 x 320 tokens, and a forward pass over 8 tokens, first on idle cores and then with one busy loop per core.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TINY = Path(__file__).resolve().parents[2] / "src" / "data" / "tiny"
SETTINGS = {
    "300000 (default)": {"GOMP_SPINCOUNT": "300000"},
    "50000": {"GOMP_SPINCOUNT": "50000"},
    "20000": {"GOMP_SPINCOUNT": "20000"},
    "5000 (the commands)": {"GOMP_SPINCOUNT": "5000"},
    "0 (passive)": {"OMP_WAIT_POLICY": "passive"},
}
SECONDS = 4  # per measurement


def milliseconds(call: Callable[[], object]) -> float:
    """Return the mean time of a call after a warm-up call."""
    call()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls * 1e3


def measure() -> None:
    """Print both times of this process, in ms."""
    import torch
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=torch.float32)
    rows, few = torch.randint(0, 1000, (4, 320)), torch.randint(0, 1000, (1, 8))
    step = milliseconds(lambda: target(input_ids=rows, labels=rows).loss.backward())
    with torch.no_grad():
        print(step, milliseconds(lambda: target(input_ids=few)))


def in_new_process(settings: dict[str, str]) -> list[float]:
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    call = [sys.executable, __file__, "--measure"]
    done = subprocess.run(call, env=clean | settings, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return [float(figure) for figure in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="only print the times of this process")
    if parser.parse_args().measure:
        return measure()
    cores = len(os.sched_getaffinity(0))
    print(f"| spin count | alone: step, ms | 8 tokens, ms | with {cores} busy loops: step, ms | 8 tokens, ms |")
    print("|---|---|---|---|---|")
    for name, settings in SETTINGS.items():
        alone = in_new_process(settings)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
        try:
            beside = in_new_process(settings)
        finally:
            for process in busy:
                process.kill()
        print(f"| {name} | {alone[0]:.0f} | {alone[1]:.1f} | {beside[0]:.0f} | {beside[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
