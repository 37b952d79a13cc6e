"""The wings import downwards only, in few arrows, and what draws never loads torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import wings


def test_wings_import_only_those_before_them():
    place = {name: i for i, name in enumerate(wings.ORDER)}
    upward = {(a, b) for a, b in wings.arrows() if place.get(b, len(place)) >= place[a]}
    assert not upward
    assert len(wings.arrows()) <= 45


def test_every_folder_of_the_library_is_a_wing_and_beside_them_lie_few_files():
    entries = {p.name for p in wings.LIBRARY.iterdir() if not p.name.startswith("__")}
    assert entries == {*wings.ORDER, "cli.py"}


def test_a_line_of_code_is_no_blank_comment_or_docstring():
    text = '"""Doc.\n\nMore."""\n\nimport os  # why\n\n# no\ndef f(\n    x,\n):\n'
    text += '    """D."""\n    return """a\nb"""\n'
    assert wings.lines_of_code(text) == 6


@pytest.mark.parametrize("wing", ["core", "store", "analysis", "figures", "report"])
def test_reading_and_drawing_never_load_torch(wing):
    code = (
        "import importlib, pkgutil, sys, repeatlab\n"
        f"package = importlib.import_module('repeatlab.{wing}')\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
