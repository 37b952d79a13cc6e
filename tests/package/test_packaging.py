"""One list of versions, pyproject.toml, that lock and environment follow; how the lab starts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "constraints.txt").read_text(encoding="utf-8")
EXTRAS = PROJECT["optional-dependencies"]
# A name may come twice: the laboratory may need a later one than the primitive does.
DIRECT = {
    line: requirement
    for lines in (PROJECT["dependencies"], *EXTRAS.values())
    for line, requirement in zip(lines, map(Requirement, lines), strict=True)
    if requirement.name != PROJECT["name"]
}


def locked() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in LOCK.splitlines())
    return [Requirement(line) for line in lines if line]


def test_the_primitive_needs_torch_and_numpy_and_the_tests_all_that_the_laboratory_needs():
    assert sorted(Requirement(line).name for line in PROJECT["dependencies"]) == ["numpy", "torch"]
    own = [Requirement(line) for line in EXTRAS["test"]]
    assert [r.extras for r in own if r.name == PROJECT["name"]] == [{"lab"}]
    assert not re.search("data-files", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DIRECT)
def test_every_direct_dependency_has_a_lower_bound_and_no_upper_one(name):
    operators = [specifier.operator for specifier in DIRECT[name].specifier]
    assert operators == [">="]
    assert DIRECT[name].url is None


@pytest.mark.parametrize("name", DIRECT)
def test_the_lock_satisfies_every_bound(name):
    pins = [
        pin
        for pin in locked()
        if canonicalize_name(pin.name) == canonicalize_name(DIRECT[name].name)
    ]
    assert pins
    for pin in pins:  # more than one where the platform or the Python decides
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert DIRECT[name].specifier.contains(Version(specifier.version))


def test_the_lock_pins_exactly_and_holds_no_address():
    for pin in locked():
        assert pin.url is None
        assert [specifier.operator for specifier in pin.specifier] == ["=="], pin
    assert not re.search(r"https?:|file:|index-url|find-links|@|^-", LOCK, re.MULTILINE)


def test_the_conda_environment_lists_no_second_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert sorted(Requirement(entry).name for entry in conda) == ["pip", "python"]
    python = next(Requirement(entry) for entry in conda if entry.startswith("python"))
    assert str(python.specifier) == PROJECT["requires-python"]
    assert not Requirement(next(e for e in conda if e.startswith("pip"))).specifier
    (line,) = pip["pip"]
    assert pip.keys() == {"pip"}
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", line).group(1).split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    assert environment["channels"] == ["conda-forge"]


def test_the_lab_keeps_jupyter_s_loopback_and_token():
    """Nothing here says otherwise: no option of `make lab`, no server configuration."""
    recipe = (ROOT / "Makefile").read_text().partition("\nlab:")[2].partition("\n\n")[0]
    options = re.findall(r"--[\w.-]+", recipe)
    assert options == ["--notebook-dir"]
    assert [file.name for file in (ROOT / "etc" / "jupyter").rglob("*") if file.is_file()] == [
        "default_setting_overrides.json"
    ]
