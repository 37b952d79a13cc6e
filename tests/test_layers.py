"""Imports point downwards only, and the viewpoints never load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import repeatlab

ROOT = Path(repeatlab.__file__).parent

# Each part with the parts right below it; it may import those and whatever lies below them. A part
# is a module or a folder of the package. A new one is given its place here.
BELOW: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"batch", "checks", "ensembles", "measure", "paper", "search", "study", "verification"},
    "checks": {"config", "environment"},
    "search": {"study", "analysis"},
    "batch": {"study", "figures"},
    "paper": {"comparison", "figures", "hypotheses", "schema"},
    "study": {"execution"},
    "execution": {"lockstep", "places"},
    "places": {"interrupts", "jobs"},
    "jobs": {"libraries", "lockstep"},
    "preload": {"libraries"},
    "lockstep": {"loop", "stopwatch"},
    "verification": {"prediction"},
    "measurements": {"measure", "study"},
    "measure": {"prediction", "turns", "watch"},
    "turns": {"stopwatch", "training"},
    "loop": {"distillation", "interrupts", "prerequisites", "training"},
    "distillation": {"ensembles"},
    "training": {
        "checkpoint",
        "data_parallel",
        "environment",
        "label_noise",
        "method",
        "pacing",
        "weights",
    },
    "data_parallel": {"loss_reader"},
    "checkpoint": {"records"},
    "weights": {"checkpoint"},
    "ensembles": {"config", "cost", "weights"},
    "early_stopping": {"schema"},
    "method": {"config", "controls", "repeater"},
    "pacing": {"config", "cost", "repeater"},
    "prerequisites": {"calibration"},
    "calibration": {"config"},
    "config": {"tasks", "mappings", "sampling", "schedules", "early_stopping"},
    "sampling": {"cost", "seeding"},
    "tasks": {"data", "models", "schema", "fid", "replay", "retrieval"},
    "fid": {"data"},
    "data": {"seeding"},
    "repeater": {"loss_reader", "endless_loader", "loss_stats", "mappings", "visit_log"},
    "sliders": {"figures", "loss_stats", "mappings"},
    "live": {"figures"},
    "figures": {"echo", "environment"},
    "echo": {"analysis", "cost"},
    "hypotheses": {"evidence", "findings"},
    "mechanism": {"comparison", "evidence"},
    "sensitivity": {"analysis"},
    "comparison": {"findings"},
    "findings": {"inference", "pairs"},
    "evidence": {"pairs"},
    "pairs": {"analysis"},
    "analysis": {"records"},
    "prediction": {"cost", "records"},
    # Nothing below: usable alone.
    "__init__": set(),
    "controls": set(),
    "cost": set(),
    "endless_loader": set(),
    "label_noise": set(),
    "environment": set(),
    "html_view": set(),
    "inference": set(),
    "libraries": set(),
    "loss_reader": set(),
    "loss_stats": set(),
    "mappings": set(),
    "models": set(),
    "records": {"html_view", "locks"},
    "locks": {"files"},
    "files": set(),
    "interrupts": set(),
    "replay": set(),
    "retrieval": set(),
    "schedules": set(),
    "schema": set(),
    "seeding": set(),
    "stopwatch": set(),
    "target_times": set(),
    "visit_log": set(),
    "watch": set(),
}
VIEWPOINTS = (
    "records",
    "analysis",
    "comparison",
    "hypotheses",
    "target_times",
    "mechanism",
    "sensitivity",
    "figures",
    "figures.mechanism",
    "figures.sensitivity",
    "live",
    "sliders",
    "paper",
)


def modules(root: Path) -> dict[str, Path]:
    """Return every module below `root` by its dotted name inside the package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        package = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        found[".".join(package)] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node: ast.AST):
    """Yield every import below `node`, inside functions too, but none for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif is_type_checking(child):
            for other in child.orelse:
                yield from statements(ast.Module([other], []))
        else:
            yield from statements(child)


def imports(root: Path, name: str, known: dict[str, Path]) -> set[str]:
    """Return the package's modules that module `name` imports."""
    prefix = root.name + "."
    targets = set()
    for node in statements(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            package = (root.name, *known[name].relative_to(root).parts[:-1])
            above = package[: len(package) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        # `from package import name` may mean a module or something that a module holds.
        for alias in node.names:
            inside = f"{base}.{alias.name}"
            targets.add(inside if inside.removeprefix(prefix) in known else base)
    inside = {t for t in targets if t == root.name or t.startswith(prefix)}
    return {"__init__" if t == root.name else t.removeprefix(prefix) for t in inside} - {name}


def reachable(part: str) -> set[str]:
    """Return all parts below `part`."""
    below = BELOW.get(part, set())
    return below.union(*map(reachable, below))


def violations(root: Path) -> list[str]:
    """Return a line for every import that does not point downwards, and every part unknown."""
    known = modules(root)
    found = []
    for name in known:
        part = name.split(".")[0]
        if part not in BELOW:
            found.append(f"{name}: has no place in BELOW")
            continue
        allowed = reachable(part) | {part}
        found += [
            f"{name} imports {target}"
            for target in sorted(imports(root, name, known))
            if target.split(".")[0] not in allowed
        ]
    return found


def test_imports_point_downwards():
    assert violations(ROOT) == []


def test_the_places_have_no_cycle_and_no_missing_part():
    list(TopologicalSorter(BELOW).static_order())
    assert set().union(*BELOW.values()) <= BELOW.keys()


def test_no_two_modules_import_each_other_inside_a_folder_either():
    known = modules(ROOT)
    graph = {name: imports(ROOT, name, known) for name in known}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from repeatlab.loop import train", ["config imports loop"]),
        ("from repeatlab import loop", ["config imports loop"]),
        ("import repeatlab.loop as x", ["config imports loop"]),
        ("from .loop import train", ["config imports loop"]),
        ("from . import loop", ["config imports loop"]),
        ("def f():\n    from repeatlab.loop import train", ["config imports loop"]),
        ("try:\n    import repeatlab.loop\nexcept ImportError:\n    pass", ["config imports loop"]),
        (
            "if TYPE_CHECKING:\n    pass\nelse:\n    import repeatlab.loop",
            ["config imports loop"],
        ),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import repeatlab.loop", []),
        ("import typing\nif typing.TYPE_CHECKING:\n    from repeatlab.loop import train", []),
        ("from repeatlab.tasks.one import Task\nimport numpy, loop", []),
        ("from repeatlab.schedules import SCHEDULES", []),
    ],
)
def test_the_check_finds_what_it_is_there_to_find(tmp_path, source, expected):
    root = tmp_path / "repeatlab"
    (root / "tasks").mkdir(parents=True)
    for name in ("__init__", "loop", "schedules", "tasks/__init__", "tasks/one"):
        (root / f"{name}.py").touch()
    assert violations(root) == []
    (root / "config.py").write_text(source)
    assert violations(root) == expected


def test_the_check_looks_into_folders_and_asks_for_a_place(tmp_path):
    root = tmp_path / "repeatlab"
    (root / "tasks").mkdir(parents=True)
    for name in ("loop", "records", "utils"):
        (root / f"{name}.py").touch()
    (root / "tasks" / "__init__.py").write_text("from ..loop import train")
    (root / "tasks" / "one.py").write_text("from . import two\nfrom .two import x")
    (root / "tasks" / "two.py").write_text("import repeatlab.records")
    assert violations(root) == [
        "tasks imports loop",
        "tasks.two imports records",
        "utils: has no place in BELOW",
    ]


@pytest.mark.parametrize("name", VIEWPOINTS)
def test_viewpoints_never_load_torch(name):
    code = (
        f"import sys, repeatlab.{name};"
        "print(sorted({module.split('.')[0] for module in sys.modules} & {'torch', 'torchvision'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
