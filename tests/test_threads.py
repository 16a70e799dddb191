"""Commands that decode let OpenMP's threads sleep while they wait: set before torch loads the OpenMP runtime."""

import os
import subprocess
import sys

import pytest

SHOW = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch with", os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0)

sys.meta_path.insert(0, Watch())
import {command}
print("no torch but", os.environ.get("OMP_WAIT_POLICY"))
"""


def policy(command: str, **environment: str) -> str:
    """The wait policy at the moment when torch is imported, or at the end of a command's imports."""
    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | environment
    sys.stdout.flush()
    shown = subprocess.run(
        [sys.executable, "-c", SHOW.format(command=command)], env=clean, capture_output=True, text=True
    )
    return shown.stdout.split()[-1]


@pytest.mark.parametrize("command", ["train.__main__", "data.regenerate", "models.verify"])
def test_threads_sleep_while_they_wait(command):
    assert policy(command) == "passive"


def test_the_users_own_choice_stays():
    assert policy("train.__main__", OMP_WAIT_POLICY="active") == "active"
