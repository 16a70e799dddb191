"""Locked versions: complete, within the bounds of pyproject.toml, installable on every supported Python."""

import tomllib

import pytest
from helpers.shared import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [
    Requirement(text)
    for group in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for text in group
]
PYTHONS = [f"3.{minor}" for minor in range(20) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])]


def pinned(name: str, python: str) -> dict[str, Version]:
    """Return the versions in requirements/<name>.txt for Linux and a Python version."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
    }
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line.strip().startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            assert canonicalize_name(requirement.name) not in found, line
            found[canonicalize_name(requirement.name)] = Version(pin.version)
    return found


def test_pythons_are_those_of_the_workflow():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    assert all(f'"{python}"' in workflow for python in PYTHONS)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["locked", "lowest"])
def test_every_direct_dependency_is_pinned_within_its_bounds(name, python):
    versions = pinned(name, python)
    for requirement in DIRECT:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_lowest_is_the_lower_bound_of_each_direct_dependency(python):
    versions = pinned("lowest", python)
    for requirement in DIRECT:
        lower = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert lower == [versions[canonicalize_name(requirement.name)]], requirement


def test_every_direct_dependency_has_an_upper_bound():
    assert [str(r) for r in DIRECT if not any(s.operator == "<" for s in r.specifier)] == []


def test_builds_of_torch_for_gpus_are_locked_too():
    versions = pinned("locked", "3.11")
    assert "triton" in versions and any(name.startswith("nvidia-cudnn") for name in versions)
