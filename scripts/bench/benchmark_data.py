"""Measure speed and memory of preprocessing 50,000 and 200,000 conversations into rows, with 1 and 2 processes.

    python scripts/bench/benchmark_data.py

The records are distinct conversations of one to six turns, composed from the embedded ones. Each measurement runs in a
separate process with an empty cache; a second call then reuses the cache of the first. "One row" is the time to
assemble one row of 4,096 tokens. Takes about 15 minutes and 4 GB of temporary disk space. Linux only.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parents[2] / "src" / "data" / "tiny"
ROW_LENGTH = 4096


def write_records(file: Path, count: int) -> None:
    """Write `count` distinct conversations."""
    turns = [json.loads(line)["messages"] for line in (TINY / "conversations.jsonl").open(encoding="utf-8")]
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            chosen = [message for _ in range(draw.randint(1, 6)) for message in draw.choice(turns)]
            system = {"role": "system", "content": f"This is conversation {number}."}
            out.write(json.dumps({"messages": [system, *chosen]}, ensure_ascii=False) + "\n")


def measure(file: str, num_proc: int) -> None:
    """Prepare a file and print the measurements as JSON. Runs in a separate process."""
    from data.preprocess.chat_template import ChatEncoder
    from data.preprocess.prepare import prepare
    from data.sources.readers import open_sources
    from models.target import load_tokenizer

    encoder = ChatEncoder(load_tokenizer(str(TINY / "target")), {})
    start = time.perf_counter()
    prepared = prepare(
        open_sources(file, split="train", max_records=None),
        encoder,
        max_seq_len=ROW_LENGTH,
        truncation="turn",
        bad_records="stop",
        num_proc=num_proc,
        validation_records=256,
        block_size=16,
        seed=0,
        rejects=Path(file).with_suffix(".rejects"),
    )
    seconds = time.perf_counter() - start
    rows = prepared.training
    for index in range(0, len(rows), max(1, len(rows) // 1000)):
        rows[index]
    figures = {
        "seconds": seconds,
        "tokens": int(prepared.documents.lengths.sum()),
        "rows": len(rows),
        "efficiency": rows.efficiency(),
        "row_ms": (time.perf_counter() - start - seconds) / min(1000, len(rows)) * 1e3,
    }
    print(json.dumps(figures))


def run_and_watch(command: list[str], environment: dict[str, str]) -> tuple[dict[str, Any], float, float]:
    """Run a command. Return the measurements that it prints, and the peak memory in MB of it and of its largest worker.

    Only anonymous memory counts: pages of memory-mapped files can be reclaimed by the system.
    """
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True) as process:
        peaks = {"main": 0.0, "worker": 0.0}

        def watch() -> None:
            while process.poll() is None:
                for who, pid in [("main", process.pid), *(("worker", child) for child in children(process.pid))]:
                    peaks[who] = max(peaks[who], own_memory(pid))
                time.sleep(0.02)

        thread = threading.Thread(target=watch)
        thread.start()
        output, _ = process.communicate()
        thread.join()
    if process.returncode:
        sys.exit(f"{command} failed with status {process.returncode}")
    return json.loads(output), peaks["main"], peaks["worker"]


def children(pid: int) -> list[int]:
    """Return all descendant processes."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        found = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return found + [grandchild for child in found for grandchild in children(child)]


def own_memory(pid: int) -> float:
    """Return the anonymous memory of a process in MB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], int(args.measure[1]))

    print("| records | processes | call | seconds | tokens/s | rows full | peak of main, worker | one row |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for count in args.records:
            file = Path(folder) / f"{count}.jsonl"
            write_records(file, count)
            for processes in args.processes:
                for call in ("first", "second"):
                    # RAYON: with the tokenizer's threads, one process would use as many cores as several.
                    cache = {"HF_DATASETS_CACHE": f"{folder}/cache-{count}-{processes}", "RAYON_NUM_THREADS": "1"}
                    command = [sys.executable, __file__, "--measure", str(file), str(processes)]
                    result, main_memory, worker_memory = run_and_watch(command, cache)
                    print(
                        f"| {count:,} | {processes} | {call} | {result['seconds']:.1f} "
                        f"| {result['tokens'] / result['seconds']:,.0f} | {result['efficiency']:.2%} "
                        f"| {main_memory:.0f} MB, {worker_memory:.0f} MB | {result['row_ms']:.2f} ms |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
