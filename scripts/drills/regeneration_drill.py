"""Test regeneration with a real server while killing client and server: no answer may be lost or duplicated.

    pip install "transformers[serving]"
    python scripts/drills/regeneration_drill.py

Starts `transformers serve` with the embedded target on loopback, regenerates answers to held-out prompts through it
with `python -m data.regenerate`, kills the client (SIGKILL) at ten random times and the server at three of them, and
compares the result with that of the in-process backend: each id must occur exactly once, with the same greedy answer.
Takes about 5 minutes on 2 cores.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

TINY = Path(__file__).resolve().parents[2] / "src" / "data" / "tiny"
TARGET = str(TINY / "target")


def start_server(port: int) -> subprocess.Popen:
    """Start `transformers serve` and wait until it responds."""
    call = [str(Path(sys.executable).with_name("transformers")), "serve", TARGET, "--port", str(port)]
    # The target file is bfloat16, and the server would compute in it: near ties would resolve differently from float32.
    call += ["--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return process
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the server did not start; is transformers[serving] installed?")
            time.sleep(0.2)


def client(folder: Path, name: str, *overrides: str) -> list[str]:
    """Return the command that regenerates the answers."""
    call = [sys.executable, "-m", "data.regenerate", "+experiment=tiny", f"data.path={folder / 'questions.jsonl'}"]
    keep = ["regenerate.max_new_tokens=48", "regenerate.drop_cut_off=false", "regenerate.repeat_times=0"]
    return [*call, *keep, f"regenerate.output={folder / name}.jsonl", *overrides]


def answers(file: Path) -> list[dict]:
    """Read the samples of a finished file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prompts = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[: args.questions]
        (folder / "questions.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        subprocess.run(client(folder, "local"), check=True, cwd=folder)
        expected = answers(folder / "local.jsonl")

        journal = folder / "served.unfinished.jsonl"
        at_server = ["regenerate.backend=server", f"regenerate.server.url=http://127.0.0.1:{args.port}/v1"]
        at_server += ["regenerate.server.in_flight=8"]
        moments = sorted(draw.sample(range(args.questions * 9 // 10), args.kills))
        server = start_server(args.port)
        for number, moment in enumerate(moments):
            process = subprocess.Popen(client(folder, "served", *at_server), cwd=folder, stderr=subprocess.DEVNULL)
            while not journal.exists() or len(journal.read_bytes().splitlines()) < moment:
                if process.poll() is not None:
                    sys.exit(f"the client ended with status {process.returncode} before it was killed")
                time.sleep(0.01)
            time.sleep(draw.random())
            if number % 4 == 1:  # kill the server first, so that the client sees it down
                server.send_signal(signal.SIGKILL)
                server.wait()
                time.sleep(2)
                server = start_server(args.port)
                time.sleep(3 * draw.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
            torn = "a truncated line" if not journal.read_bytes().endswith(b"\n") else "complete lines"
            finished = len(journal.read_bytes().splitlines())
            print(f"kill {number + 1}: {finished} of {args.questions} finished, {torn}", flush=True)
        subprocess.run(client(folder, "served", *at_server), check=True, cwd=folder)
        server.kill()
        found = answers(folder / "served.jsonl")

    ids = [sample["id"] for sample in found]
    same = sum(a["messages"] == b["messages"] for a, b in zip(found, expected, strict=True))
    print(f"ids: {len(ids)}, distinct: {len(set(ids))}, in order: {ids == [s['id'] for s in expected]}")
    print(f"greedy answers equal to the in-process backend's: {same} of {len(expected)}")
    if len(set(ids)) != args.questions or ids != [s["id"] for s in expected] or same != args.questions:
        sys.exit("the drill failed")


if __name__ == "__main__":
    main()
