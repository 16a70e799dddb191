"""Test regeneration with a real server while killing client and server: no answer may be lost, duplicated or altered.

    pip install "transformers[serving]"
    python scripts/drills/regeneration_drill.py
    python scripts/drills/regeneration_drill.py --server vllm --python VLLM_ENV/bin/python --target DIR \\
        --prompts A.jsonl B.jsonl --questions 1000 --compare 0

Starts `transformers serve` or vLLM with the target on loopback, regenerates answers to the prompts through it with
`python -m data.regenerate`, kills the client (SIGKILL) at random times and the server at every fourth of them. A proxy
between the two records every reply of the server. At the end, each id must occur exactly once, each answer must be one
that the server wrote for this question, as text and, if the server returns them, as token ids, and the first
`--compare` answers must equal those of the in-process backend. The default takes about 5 minutes on 2 cores; 1,000
prompts with vLLM and SmolLM2-135M take about 15. vLLM is installed in a separate environment (`--python`).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from recording_proxy import RecordingProxy, key

TINY = Path(__file__).resolve().parents[2] / "src" / "data" / "tiny"


class Server:
    """The server's process group, which can be killed and restarted."""

    def __init__(self, kind: str, python: str, target: str, port: int, log: Path) -> None:
        # Target files are bfloat16, in which near ties would resolve differently from float32 and between batches.
        if kind == "vllm":
            self.command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", target, "--enforce-eager"]
            self.command += ["--host", "127.0.0.1"]
        else:
            self.command = [str(Path(python).with_name("transformers")), "serve", target, "--device", "cpu"]
        self.command += ["--port", str(port), "--dtype", "float32"]
        self.port, self.log = port, log
        self.start()

    def start(self) -> None:
        """Start the server and wait until it responds."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=self.log.parent, start_new_session=True,
                env={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ},
            )  # fmt: skip
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    tail = self.log.read_text(errors="replace")[-2000:]
                    sys.exit(f"{tail}\nthe server did not start; is it installed? {' '.join(self.command)}")
                time.sleep(0.2)

    def kill(self) -> None:
        """Kill the server with all its worker processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def client(args: argparse.Namespace, folder: Path, name: str, *overrides: str) -> list[str]:
    """Return the command that regenerates the answers."""
    call = [sys.executable, "-m", "data.regenerate", "+experiment=tiny", f"data.path={folder / 'questions.jsonl'}"]
    call += [f"model.target.name={args.target}", "model.target.dtype=float32"]
    call += [f"regenerate.max_new_tokens={args.max_new_tokens}", "regenerate.drop_cut_off=false"]
    return [*call, "regenerate.repeat_times=0", f"regenerate.output={folder / name}.jsonl", *overrides]


def read(file: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def as_written(sample: dict[str, Any], proxy: RecordingProxy) -> tuple[int, int]:
    """Count the answers of a sample that equal a recorded reply, and those that carry the reply's token ids.

    Raises:
        SystemExit: the server never wrote an answer.
    """
    texts = ids = 0
    for number, message in enumerate(sample["messages"]):
        if message["role"] != "assistant":
            continue
        replies = proxy.replies.get(key(sample["messages"][:number]), [])
        matching = [reply for reply in replies if _same(message, reply)]
        if not matching:
            sys.exit(f"{sample['id']}: the server did not write {message}; it wrote {replies}")
        texts += 1
        ids += message.get("token_ids") is not None
    return texts, ids


def _same(message: dict[str, Any], reply: dict[str, Any]) -> bool:
    text = reply["message"]["content"] or ""
    if reply["finish_reason"] == "length":  # trailing white space of truncated answers is not kept
        text = text.rstrip()
    return message["content"] == text and message.get("token_ids") == reply.get("token_ids")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--python", default=sys.executable, help="the server's Python interpreter")
    parser.add_argument("--target", default=str(TINY / "target"), help="directory of the target")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[TINY / "prompts.jsonl"])
    parser.add_argument("--questions", type=int, default=200, help="number of prompts")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--compare", type=int, default=200, help="answers to compare with the in-process backend")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--in-flight", type=int, default=8, help="concurrent requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the answers and the server's log in this new folder")
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    if args.folder:
        args.folder.mkdir(parents=True)
        return drill(args, args.folder.resolve())
    with tempfile.TemporaryDirectory() as temporary:
        return drill(args, Path(temporary))


def drill(args: argparse.Namespace, folder: Path) -> None:
    """Run the drill in `folder` and exit with an error if a check fails."""
    start = time.monotonic()
    prompts = [record for file in args.prompts for record in read(file)][: args.questions]
    lines = [json.dumps(record | {"id": str(number)}) + "\n" for number, record in enumerate(prompts)]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    expected: list[dict[str, Any]] = []
    if args.compare:
        local = client(args, folder, "local", f"data.max_records={args.compare}")
        subprocess.run(local, check=True, cwd=folder)
        expected = read(folder / "local.jsonl")

    server = Server(args.server, args.python, args.target, args.port, folder / "server.log")
    proxy = RecordingProxy(args.port)
    at_server = ["regenerate.backend=server", f"regenerate.server.url={proxy.url}"]
    at_server += [f"regenerate.server.in_flight={args.in_flight}"]
    command = client(args, folder, "served", *at_server)
    try:
        kill_at_random(args, command, folder / "served.unfinished.jsonl", server, len(prompts))
        subprocess.run(command, check=True, cwd=folder)
    finally:
        server.kill()
        proxy.close()
    kept, dropped = read(folder / "served.jsonl"), read(folder / "served.dropped.jsonl")
    for sample in dropped:
        print(f"dropped: {sample['id']}, {sample['reason']}")
    check(kept, dropped, expected, proxy, len(prompts))
    print(f"{time.monotonic() - start:.0f} seconds")


def kill_at_random(args: argparse.Namespace, command: list[str], log: Path, server: Server, total: int) -> None:
    """Start the client and kill it, with or without the server, at `args.kills` random times."""
    draw = random.Random(args.seed)
    moments = sorted(draw.sample(range(total * 9 // 10), args.kills))
    for number, moment in enumerate(moments):
        process = subprocess.Popen(command, cwd=log.parent, stderr=subprocess.DEVNULL)
        while not log.exists() or len(log.read_bytes().splitlines()) < moment:
            if process.poll() is not None:
                sys.exit(f"the client ended with status {process.returncode} before it was killed")
            time.sleep(0.01)
        time.sleep(draw.random())
        if number % 4 == 1:  # kill the server first, so that the client sees it down
            server.kill()
            time.sleep(2)
            server.start()
            time.sleep(3 * draw.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        torn = "a truncated line" if not log.read_bytes().endswith(b"\n") else "complete lines"
        finished = len(log.read_bytes().splitlines())
        killed = "server and client" if number % 4 == 1 else "client"
        print(f"kill {number + 1}, {killed}: {finished} of {total} finished, {torn}", flush=True)


def check(
    kept: list[dict[str, Any]], dropped: list[dict[str, Any]], expected: list[dict[str, Any]],
    proxy: RecordingProxy, total: int,
) -> None:  # fmt: skip
    """Compare the answers with the prompts, the server's replies and those of the in-process backend."""
    ids = sorted(int(sample["id"]) for sample in (*kept, *dropped))
    texts, with_ids = (sum(column) for column in zip(*(as_written(sample, proxy) for sample in kept), strict=True))
    served = sum(len(replies) for replies in proxy.replies.values())
    answers = {sample["id"]: key(sample["messages"]) for sample in kept}
    same = sum(answers.get(sample["id"]) == key(sample["messages"]) for sample in expected)
    print(f"ids: {len(ids)}, distinct: {len(set(ids))}, dropped: {len(dropped)}")
    print(f"kept answers: {texts}, each as the server wrote it, {with_ids} with its token ids")
    print(f"the server wrote {served} answers and died during {proxy.unanswered} requests")
    if expected:
        print(f"greedy answers equal to the in-process backend's: {same} of {len(expected)}")
    if ids != list(range(total)) or same != len(expected):
        sys.exit("the drill failed")


if __name__ == "__main__":
    main()
