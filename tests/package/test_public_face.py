"""What `import repeatlab` offers and imports, and what it says where that is missing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import repeatlab

ROOT = Path(__file__).parents[2]
# Stands for an environment without the extra.
WITHOUT_LAB = """
import importlib.util
importlib.util.find_spec = lambda name: None if name in {"click", "pydantic"} else name
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", repeatlab.__all__)
def test_every_public_name_is_there(name):
    assert name in dir(repeatlab)
    value = getattr(repeatlab, name)
    assert value == repeatlab.__version__ or value.__name__ == name


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Batchrepeater'"):
        _ = repeatlab.Batchrepeater


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import repeatlab; repeatlab.__version__; "
    code += "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] not in "
    code += "sys.stdlib_module_names))"
    assert python(code).stdout.strip() == "['repeatlab']"


def test_importing_the_primitive_imports_torch_and_numpy_alone():
    code = "import sys, torch, numpy; before = set(sys.modules)\n"
    code += "from repeatlab import BatchRepeater, Linear, Quantile, grouped\n"
    code += "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
    code += "print(sorted(new - set(sys.stdlib_module_names) - {'torch', 'numpy'}))"
    assert python(code).stdout.strip() == "['repeatlab']"


def test_the_mappings_are_read_without_torch():
    done = python("import sys; from repeatlab import Quantile; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "code",
    [
        "import repeatlab; repeatlab.Study",
        "from repeatlab import load",
        "import repeatlab.training.making",
        "import repeatlab.tasks",
        "import repeatlab.__main__ as m; m.main()",
    ],
)
def test_the_laboratory_says_what_to_install(code):
    done = python(WITHOUT_LAB + code)
    assert done.returncode != 0
    assert "the laboratory needs click: pip install 'repeatlab[lab]'" in done.stderr


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert f"version: {repeatlab.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
