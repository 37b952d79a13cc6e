"""What CONTRIBUTING shows works: its diffs are applied to a copy, and what they add is run."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from repeatlab.cli import ROOT

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (A .*)$", GUIDE, re.MULTILINE)
BLOCK = re.compile(r"^```diff\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COPIED = ("repeatlab", "tests", "params", "notebooks", "pyproject.toml")


def diff(title: str) -> str:
    """Return the diff of one section."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    (block,) = BLOCK.findall(section[1])
    return block


def added(title: str) -> dict[str, list[str]]:
    """Return the lines that a section's diff adds to each file."""
    parts = re.split(r"^\+\+\+ b/(.*)$", diff(title), flags=re.MULTILINE)
    return {
        path: [line[1:] for line in body.splitlines() if line.startswith("+")]
        for path, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of what the diffs change, with all of them applied."""
    root = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    for text in BLOCK.findall(GUIDE):
        # Not the repository that a temporary directory may lie in.
        outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
        command = ["git", "apply", "--verbose", "-"]
        done = subprocess.run(
            command, input=text, cwd=root, env=outside, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return root


def run(copy, *command: str) -> str:
    """Return what Python prints where the copy is the package that it finds."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def said(copy, code: str) -> object:
    """Return what code prints last, which is JSON."""
    where = "import repeatlab; assert repeatlab.__file__.startswith(%r), repeatlab.__file__\n"
    return json.loads(run(copy, "-c", where % str(copy) + code).splitlines()[-1])


def library(title: str) -> dict[str, list[str]]:
    """Return what of `added` is not the tests'."""
    return {path: lines for path, lines in added(title).items() if path.startswith("repeatlab/")}


def test_a_mapping_is_one_class_and_one_line_of_the_library():
    ((path, lines),) = library("A mapping").items()
    assert path == "repeatlab/repetition/mappings.py"
    *source, line = lines
    (kind,) = ast.parse("\n".join(source)).body
    assert isinstance(kind, ast.ClassDef)
    assert line.strip() == f'"square_root": {kind.name},'


def test_a_task_is_one_file_and_one_line_of_the_library():
    lines = library("A task")
    assert set(lines) == {"repeatlab/tasks/__init__.py", "repeatlab/tasks/square_loss.py"}
    (line,) = lines["repeatlab/tasks/__init__.py"]
    assert "repeatlab.tasks.square_loss:SquareLoss" in line
    assert not (ROOT / "repeatlab" / "tasks" / "square_loss.py").exists()


def test_what_is_shown_is_in_style(copy):
    paths = [
        path for title in SECTIONS for path in added(title) if path.endswith((".py", ".ipynb"))
    ]
    assert len(paths) > len(SECTIONS)
    run(copy, "-m", "ruff", "check", *paths)
    run(copy, "-m", "ruff", "format", "--check", *paths)


def test_every_way_to_add_something_is_shown():
    assert SECTIONS == ["A mapping", "A sampler", "A control", "A task", "A notebook"]
    assert all(diff(title) for title in SECTIONS)


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


def test_the_mapping_is_configured_and_decides(copy):
    refused, counts = said(copy, CONFIGURED)
    assert refused.startswith("mapping: t must be a positive, finite number")
    assert counts == [1, 1, 2, 3, 3]  # the square root of 2, 4.1, 9.1 and 90


# Every run trains in this one process; the notebook's own study, too.
TRAINED = """
import json, os
from functools import partial
import torch
from repeatlab.studies import study
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train
from repeatlab.core.schema import parse
from repeatlab.tasks import load_task, TASKS

def made(task, method):
    fields = {"task": {"name": task, "batch_size": 16, "lr": 0.05}, "method": method}
    run = train(parse(RunConfig, fields | {"max_updates": 12}), "store")
    rows = run.updates
    return {
        "status": run.status["status"],
        "updates": len(rows),
        "counts": rows.groupby("fresh_batch")["repeats"].first().tolist(),
        "losses": rows["loss"].tolist(),
        "scored": run.summary["ledger"]["scoring_samples"],
    }

linear = {"mapping": {"name": "linear", "t": 0.04}}
mirrored = {"mapping": {"name": "trace", "of": linear, "control": "mirrored"}}
found = {
    "standard": made("square_loss", {}),
    "linear": made("square_loss", linear),
    "mirrored": made("square_loss", mirrored),
    "easiest": made("square_loss", {"sampler": {"name": "easiest", "presample": 3}}),
}

config = parse(load_task(TASKS["square_loss"]).Config, {"name": "square_loss", "batch_size": 16})
task = load_task(TASKS["square_loss"])(config, seed=0, device="cpu")
batch = task.fresh_batch(0)
task.model.eval()
wanted = torch.eye(10)[batch.labels]
by_hand = torch.nn.functional.mse_loss(task.model(batch.images), wanted, reduction="none").mean(1)
found["losses"] = [task.sample_losses(batch).tolist(), by_hand.tolist()]

study.run_study = partial(study.run_study, workers=0)
os.chdir("notebooks")
names = {}
for cell in json.load(open("19_square_loss.ipynb"))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), names)
found["figures"] = sorted(os.listdir(names["figures"]))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trained(copy):
    return said(copy, TRAINED)


def test_the_task_trains_with_standard_and_linear(trained):
    for method in ("standard", "linear"):
        assert (trained[method]["status"], trained[method]["updates"]) == ("complete", 12)
        assert trained[method]["losses"][-1] < trained[method]["losses"][0]
    assert set(trained["standard"]["counts"]) == {1}
    assert max(trained["linear"]["counts"]) > 1
    assert trained["linear"]["losses"][0] == trained["standard"]["losses"][0]


def test_the_task_descends_what_it_says(trained):
    losses, by_hand = trained["losses"]
    assert losses == pytest.approx(by_hand, rel=1e-5)


def test_the_control_replays_its_source_backwards(trained):
    assert trained["mirrored"]["counts"] == trained["linear"]["counts"][::-1]


def test_the_sampler_takes_the_easiest_and_is_charged_for_looking(trained):
    assert trained["easiest"]["scored"] == 12 * 3 * 16
    assert trained["easiest"]["losses"][0] < trained["standard"]["losses"][0]


def test_the_notebook_draws_its_figure(trained):
    assert {"square-loss-curves.pdf", "square-loss-curves.png"} <= set(trained["figures"])


READ = """
import json
from pathlib import Path
from repeatlab.studies.parameter_files import read_job
job = read_job(Path("params/quick/square_loss.yaml").resolve(), Path.cwd())
print(json.dumps([job.notebook.name, list(job.studies), list(job.parameters["study"]["methods"])]))
"""


def test_the_notebook_fits_its_parameter_file(copy):
    assert said(copy, READ) == ["19_square_loss.ipynb", ["study"], ["standard", "linear"]]


# What the package's own tests ask of a new mapping, sampler, control, task and notebook.
CONTRACT = (
    "repetition/test_mappings",
    "package/test_notebooks",
    "package/test_hosted",
    "tasks/test_tasks",
    "studies/test_checks",
    "training/test_host_reads",
)
ASKED = (
    "registered or SquareRoot or 19_square_loss or square_loss and (says_why or sample_losses)"
    " or makes_exactly and ([square_loss-standard or [square_loss-linear] or [square_loss-mirrored"
    " or [supervised-easiest) or nothing_else and linear-square_loss"
)


def test_what_is_added_passes_the_package_s_own_tests(copy):
    files = [f"tests/{name}.py" for name in CONTRACT]
    told = run(copy, "-m", "pytest", *files, "-v", "-p", "no:cacheprovider", "-k", ASKED)
    passed = re.findall(r"^(.*) PASSED", told, re.MULTILINE)
    for part in (
        "test_every_registered_mapping",
        "SquareRoot(",
        "[19_square_loss]",
        "test_every_task_notebook_names_the_same_first_cell[19_square_loss]",
        "[square_loss-linear]",
        "[supervised-easiest]",
        "[square_loss-mirrored]",
        "test_what_does_not_apply_says_why[square_loss]",
        "test_an_update_reads_its_loss_and_nothing_else[linear-square_loss]",
    ):
        assert any(part in name for name in passed), part
