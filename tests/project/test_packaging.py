"""Contents of a wheel: code, conf/, embedded target and exported decoder, all found without a checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers.shared import ROOT

import train
from data.config.compose import CONF, EMBEDDED


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An unpacked wheel of the checkout, as in site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("conf", "src"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


def files_of(place: Path) -> set[str]:
    """Return all files in a directory, without those of setuptools."""
    files = {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}
    return {name for name in files if not name.split("/")[0].endswith((".egg-info", ".dist-info"))}


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_file_of_data_and_nothing_else(installed):
    source = installed.parent / "source"
    expected = files_of(source / "src") | {f"data/conf/{name}" for name in files_of(source / "conf")}
    held = files_of(installed)
    assert held == expected
    assert {"data/conf/config.yaml", "models/custom_generate/generate.py", "data/tiny/target/config.json"} <= held


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python with the unpacked wheel on its path instead of the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_settings_and_embedded_files_are_found_in_an_installed_package(installed, tmp_path):
    code = (
        "from data.config.compose import CONF, EMBEDDED, composed\n"
        "from data.config.validate import check_settings\n"
        "c = composed(['+experiment=tiny']); check_settings(c, ['+experiment=tiny'])\n"
        "print(CONF, EMBEDDED, c.model.target.name, c.data.path, c.run_dir, sep='\\n')"
    )
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    data = installed / "data"
    expected = [data / "conf", data / "tiny", data / "tiny/target", data / "tiny/conversations.jsonl"]
    *found, run_dir = done.stdout.splitlines()
    assert found == list(map(str, expected)) and run_dir == "checkpoints/tiny"  # below the working directory


@pytest.mark.slow
def test_an_installed_package_plans_in_an_empty_directory(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "train", "+experiment=tiny", "plan=true")
    assert done.returncode == 0 and "attention_tuning" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_checkout_reads_its_own_settings():
    assert CONF == ROOT / "conf" and EMBEDDED == ROOT / "src" / "data" / "tiny"


def test_the_version_is_written_once(installed):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"Version: {train.__version__}\n" in metadata.read_text(encoding="utf-8")
    assert f"\nversion: {train.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{train.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
