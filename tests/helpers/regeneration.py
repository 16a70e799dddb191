"""Runs `python -m data.regenerate` in a folder, with the embedded target and a stub server."""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

import data.regenerate.run

FAST = ("regenerate.server.patience=20",)


def write(folder, records):
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def run(folder, *overrides, status=0):
    """Run the command in this process, which avoids the startup time. Return its output, stdout first."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    call = ["regenerate", "+experiment=tiny", "data.path=questions.jsonl", *overrides]
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", call)
            data.regenerate.run.main()
        failed = None
    except SystemExit as exit:
        failed = str(exit.code)
    finally:
        os.chdir(before)
    printed = out.getvalue() + err.getvalue() + (failed or "")
    assert (failed is None) == (status == 0), printed
    return printed


def users(*turns):
    return [{"role": "user", "content": turn} for turn in turns]


def server(stub):
    return ("regenerate.backend=server", f"regenerate.server.url={stub.url}", *FAST)


def read(folder, name="regenerated.jsonl"):
    return [json.loads(line) for line in (folder / "checkpoints" / "tiny" / name).read_text().splitlines()]
