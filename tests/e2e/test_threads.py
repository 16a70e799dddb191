"""Commands limit the spinning of OpenMP threads before torch loads the OpenMP runtime."""

import os
import subprocess
import sys

import pytest

from data.threads import SPIN_COUNT

SHOW = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch with", os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)

sys.meta_path.insert(0, Watch())
import {command}
print("no torch but", os.environ.get("GOMP_SPINCOUNT"))
"""

pytestmark = pytest.mark.slow  # each starts processes


def spin_count(command: str, **environment: str) -> str:
    """Return the setting when torch is imported, or after a command's imports."""
    others = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    shown = subprocess.run(
        [sys.executable, "-c", SHOW.format(command=command)],
        env=others | environment,
        capture_output=True,
        text=True,
    )
    return shown.stdout.split()[-1]


@pytest.mark.parametrize("command", ["train.__main__", "data.regenerate.__main__", "models.verify.__main__"])
def test_threads_spin_only_briefly(command):
    assert spin_count(command) == SPIN_COUNT


@pytest.mark.parametrize(
    ("given", "found"),
    [({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_the_users_setting_is_kept(given, found):
    assert spin_count("train.__main__", **given) == found
