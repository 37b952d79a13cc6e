"""What CONTRIBUTING says works: its commands are run in a copy, its snippets are put there.

Beside its examples something of one's own is made by the same commands and left as it was written.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from repeatlab.cli import ROOT

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    \.venv/bin/repeatlab new (\w+) (\w+)$", GUIDE, re.MULTILINE)
SNIPPETS = re.findall(
    r"^In `(\S+)`, (above|below|in place of|a new file)(?: `([^`\n]+)`)?:\n\n```\w+\n(.*?)^```$",
    GUIDE,
    re.DOTALL | re.MULTILINE,
)
# As long as a name may be: what is written with it has to stay in style.
LONGEST = "something_of_ones_own_ab"
OWN = [("mapping", LONGEST), ("task", LONGEST), ("notebook", LONGEST)]
COPIED = ("repeatlab", "tests", "params", "notebooks", "docs")
PAGES = ("pyproject.toml", "README.md", "README.zh-CN.md", "CONTRIBUTING.md")


def run(copy, *command: str, status: int = 0) -> str:
    """Return what Python says where the copy is the package that it finds; not called in it."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy.parent,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def new(copy, kind: str, name: str, status: int = 0) -> str:
    return run(copy, "-m", "repeatlab", "new", kind, name, status=status)


def put(copy, path: str, where: str, mark: str, snippet: str) -> None:
    """Put a snippet where CONTRIBUTING says that it goes, as far in as what is there."""
    file = copy / path
    if where == "a new file":
        assert not file.exists()
        file.write_text(snippet)
        return
    text = file.read_text(encoding="utf-8")
    if where == "in place of" and path.endswith(".py"):
        first, last = span(text, mark)
    elif where == "in place of":
        assert text.count(mark) == 1, mark
        file.write_text(text.replace(mark, snippet.strip()), encoding="utf-8")
        return
    else:
        (place,) = [i for i, line in enumerate(text.splitlines()) if mark in line]
        first = last = place + (where == "below")
    lines = text.splitlines(keepends=True)
    beside = lines[first - 1 if where == "below" else first]
    margin = beside[: len(beside) - len(beside.lstrip())]
    apart = "\n\n" if where == "above" else ""  # as functions of a module are
    lines[first:last] = textwrap.indent(snippet, margin) + apart
    file.write_text("".join(lines), encoding="utf-8")


def span(source: str, name: str) -> tuple[int, int]:
    """Return between which lines a class, or a method, stands."""
    node = ast.parse(source)
    for part in name.split("."):
        (node,) = [inner for inner in node.body if getattr(inner, "name", None) == part]
    decorated = [decorator.lineno for decorator in node.decorator_list]
    return min([node.lineno, *decorated]) - 1, node.end_lineno


def tree(root) -> dict[str, bytes]:
    """Return the files under a folder with what they hold, but for those that Python makes."""
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Return a copy of the clone."""
    root = tmp_path_factory.mktemp("clone") / "copy"
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PAGES:
        shutil.copy(ROOT / name, root / name)
    (root / "figures").symlink_to(ROOT / "figures")  # only read
    return root


@pytest.fixture(scope="module")
def said():
    """Return what each command has said, as `made` has run them."""
    return {}


@pytest.fixture(scope="module")
def made(bare, said):
    """Return a copy with what CONTRIBUTING makes, and with something of one's own."""
    for kind, name in [*COMMANDS, *OWN]:
        said[kind, name] = new(bare, kind, name)
    for snippet in SNIPPETS:
        put(bare, *snippet)
    run(bare, str(bare / "docs" / "readme.py"), str(bare))  # `make readme`
    return bare


REFUSED = """
import sys
from repeatlab.cli import PLACES
from repeatlab.core.schema import ConfigError
sys.path.insert(0, str(PLACES[0] / "docs"))
from scaffolding import scaffold
for asked in sys.argv[1:]:
    try:
        scaffold(*asked.split())
        print("written")
    except ConfigError as error:
        print(error)
"""


def test_a_name_that_cannot_be_is_refused_and_nothing_is_written(bare):
    before = tree(bare)
    assert "Error: name must be in snake_case" in new(bare, "mapping", "9th", status=2)
    named = {
        "task class": "in snake_case, as square_root, of 24 characters at most; not 'class'",
        "mapping none": "not 'none'",  # None is no name of a class
        "task true": "not 'true'",
        "mapping integral": "repeatlab/repetition/mappings.py has 'integral'",  # it imports one
        "mapping SquareRoot": "not 'SquareRoot'",
        f"notebook {LONGEST}c": f"not '{LONGEST}c'",
        "mapping linear": "not taken; repeatlab/repetition/mappings.py has 'linear'",
        "mapping linear_repeats": "mappings.py has 'linear_repeats'",  # as the name of a class
        "task supervised": "repeatlab/tasks/supervised.py has",
        "task learner": "repeatlab/tasks/learner.py has",
        "notebook convergence": "params/quick/convergence.yaml has",
        "notebook quickstart": "_quickstart.ipynb has",  # under another number
    }
    said = run(bare, "-c", REFUSED, *named).splitlines()
    for told, why in zip(said, named.values(), strict=True):
        assert why in told
    assert tree(bare) == before


def test_without_a_clone_there_is_nothing_to_add_to(tmp_path):
    alone = tmp_path / "site-packages"
    shutil.copytree(ROOT / "repeatlab", alone / "repeatlab")
    told = new(alone, "task", "mine", status=2)
    assert f"{alone} must be a clone of the repository" in told


def test_a_mark_that_is_gone_is_named_and_nothing_is_written(tmp_path, bare):
    root = tmp_path / "copy"
    shutil.copytree(bare, root, symlinks=True)
    file = root / "tests" / "every_method.py"
    file.write_text(file.read_text().replace("`repeatlab new task` writes lines here", ""))
    before = tree(root)
    told = new(root, "task", "mine", status=2)
    assert "tests/every_method.py must have one line with '`repeatlab new task`" in told
    assert tree(root) == before


def test_every_kind_is_shown_and_says_file_by_file_what_to_fill_in(made, said):
    assert [kind for kind, _ in COMMANDS] == [kind for kind, _ in OWN]
    shown = {snippet[0] for snippet in SNIPPETS}
    told = {line.partition(": ")[0] for text in said.values() for line in text.splitlines()}
    before, after = tree(ROOT / "repeatlab"), tree(made / "repeatlab")
    changed = {f"repeatlab/{path}" for path in after if after[path] != before.get(path)}
    assert changed
    assert changed <= told | shown


def test_what_is_written_and_shown_is_in_style(made):
    for command in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=made, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


CONFIGURED = """
import json
from repeatlab.training.config import MethodConfig
from repeatlab.repetition.loss_stats import LossStats
from repeatlab.core.schema import ConfigError, parse
given = {"mapping": {"name": "square_root", "t": 0.1, "max_repeats": 3}}
mapping = parse(MethodConfig, given).mapping.build()
try:
    parse(MethodConfig, {"mapping": {"name": "square_root", "t": -1.0}})
except ConfigError as error:
    refused = str(error)
print(json.dumps([refused, [mapping(loss, LossStats()) for loss in (-1, 0.2, 0.41, 0.91, 9.0)]]))
"""


def test_the_mapping_is_configured_and_decides(made):
    refused, counts = json.loads(run(made, "-c", CONFIGURED))
    assert refused.startswith("mapping: t must be a positive, finite number")
    assert counts == [1, 1, 2, 3, 3]  # the square root of 2, 4.1, 9.1 and 90


TRAINED = """
import json, torch
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.core.schema import parse
from repeatlab.tasks import TASKS, load_task, version

def losses(method):
    fields = {"task": {"name": "robust_regression", "lr": 0.2}, "method": method}
    run = train(parse(RunConfig, fields | {"max_updates": 60}), "store")
    counts = run.updates.groupby("fresh_batch")["repeats"].first().tolist()
    return counts, run.updates["loss"].tolist(), run.summary["ledger"]["scoring_samples"]

linear = {"mapping": {"name": "linear", "t": 0.3}}
found = {
    "standard": losses({}),
    "linear": losses(linear),
    "mirrored": losses({"mapping": {"name": "trace", "of": linear, "control": "mirrored"}}),
    "easiest": losses({"sampler": {"name": "easiest", "presample": 3}}),
}
kind = load_task(TASKS["robust_regression"])
task = kind(kind.Config(), seed=0, device="cpu")
batch = task.fresh_batch(0)
errors = (task.model(batch.inputs).squeeze(1) - batch.targets).detach().requires_grad_()
by_hand = (1 + errors ** 2) ** 0.5 - 1
by_hand.sum().backward()
found["losses"] = [task.sample_losses(batch).tolist(), by_hand.tolist()]
found["bounds"] = [task.gradient_bounds(batch).tolist(), errors.grad.abs().tolist()]
found["versions"] = [version("robust_regression"), version("supervised")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trained(made):
    return json.loads(run(made, "-c", TRAINED).splitlines()[-1])


def test_the_task_learns_and_descends_what_it_says(trained):
    counts, losses, _ = trained["standard"]
    assert set(counts) == {1}
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    for found, by_hand in (trained["losses"], trained["bounds"]):
        assert found == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


def test_the_runs_of_a_task_that_is_not_settled_are_told_apart_by_its_source(trained):
    unsettled, settled = trained["versions"]
    assert isinstance(unsettled, str)
    assert settled == 1


def test_the_control_replays_its_source_backwards(trained):
    assert trained["mirrored"][0] == trained["linear"][0][::-1]
    assert max(trained["linear"][0]) > 1


def test_the_sampler_takes_the_easiest_and_is_charged_for_looking(trained):
    assert trained["easiest"][2] == 60 * 3 * 32
    assert trained["easiest"][1][0] < trained["standard"][1][0]


def test_the_notebook_is_trained_and_drawn_by_the_command(made):
    places = ("--runs", str(made / "runs"), "--figures", str(made / "drawn"))
    told = run(made, "-m", "repeatlab", "figures", "40_robust_regression", *places)
    assert "robust-regression-curves.pdf" in told
    records = {path.parent.parent.name for path in (made / "runs").glob("*/*/summary.json")}
    assert len(records) == 1


def test_the_notebook_of_ones_own_shows_what_it_keeps(made):
    """As CI runs notebooks: the output of its checked cell is compared."""
    notebook = made / "notebooks" / f"41_{LONGEST}.ipynb"
    options = ("--nbval-lax", "--nbval-current-env", "-o", "addopts=", "-p", "no:cacheprovider")
    assert " passed" in run(made, "-m", "pytest", *options, str(notebook))


# What the package's own tests ask of a new mapping, sampler, control, task and notebook.
CONTRACT = (
    "figures/test_sliders",
    "repetition/test_mappings",
    "package/test_guides",
    "package/test_hosted",
    "package/test_notebooks",
    "package/test_readme",
    "studies/test_checks",
    "studies/test_measure",
    "tasks/test_device_without_float64",
    "tasks/test_tasks",
    "training/test_config",
    "training/test_host_reads",
    "training/test_resume",
    "training/test_stand_ins",
    "training/test_weights",
)
# And those that hold all of a kind at once.
TOGETHER = (
    "test_the_browser_knows_the_mappings_offered_with_all_their_fields",
    "test_every_registered_mapping_is_under_contract",
    "test_the_guide_to_mappings_lists_all",
    "test_the_guide_to_controls_lists_all",
    "test_tables_are_those_of_the_benchmarks_and_the_package",
    "test_the_tasks_and_the_wings_are_all_there",
    "test_it_is_read_aloud_in_five_minutes",
    "test_by_default_the_quick_tasks_are_measured",
    "test_versions_are_declared_for_tasks_that_there_are",
)


def test_what_is_added_passes_the_package_s_own_tests(made):
    names = ["square_root", "SquareRoot", "robust_regression", LONGEST, "SomethingOfOnesOwnAb"]
    asked = " or ".join([*names, *TOGETHER, "supervised-easiest", "supervised-mirrored"])
    files = [str(made / "tests" / f"{name}.py") for name in CONTRACT]
    options = ("--rootdir", str(made), "-c", str(made / "pyproject.toml"), "-p", "no:cacheprovider")
    told = run(made, "-m", "pytest", *options, *files, "-v", "-k", asked)
    passed = re.findall(r"^(\S.*) PASSED", told, re.MULTILINE)
    for part in (
        "test_every_registered_mapping",
        "test_count_is_an_integer_from_1_to_most[SquareRoot(",
        "test_count_is_an_integer_from_1_to_most[SomethingOfOnesOwnAb(",
        *(f"[{number}_{name}]" for number, name in ((40, "robust_regression"), (41, LONGEST))),
        *(f"[{name}-standard]" for name in ("robust_regression", LONGEST)),
        *(f"[linear-{name}]" for name in ("robust_regression", LONGEST)),
        "test_it_is_read_aloud_in_five_minutes",
        "[supervised-easiest]",
        "[supervised-mirrored]",
    ):
        assert any(part in name for name in passed), part
