"""Parameter files, notebooks and papermill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Thread

import nbformat
import pytest
from every_method import SIX

from repeatlab.cli import ROOT
from repeatlab.core.schema import ConfigError, read_yaml
from repeatlab.report.notebooks import Kernels, NotebookError, execute, execute_profile
from repeatlab.studies.parameter_files import (
    Job,
    parameter_names,
    plans_of,
    read_job,
    read_profile,
)

PARAMETERS = "# a comment = with a sign\nrate = 1.0  # = papermill's inspector misses this\n"
PLACES = 'runs = "."\nfigures = "."\n'


@pytest.fixture
def project(tmp_path):
    """Return a function that lays out a project of one notebook and one parameter file."""

    def make(code: str, parameters: str = "notebook: 00_small\nparameters: {rate: 1e-3}\n"):
        notebook = nbformat.v4.new_notebook()
        cell = nbformat.v4.new_code_cell(PARAMETERS + PLACES, metadata={"tags": ["parameters"]})
        notebook.cells = [cell, nbformat.v4.new_code_cell(code)]
        for directory in ("notebooks", "params/tiny"):
            (tmp_path / directory).mkdir(parents=True)
        nbformat.write(notebook, tmp_path / "notebooks" / "00_small.ipynb")
        (tmp_path / "params" / "tiny" / "small.yaml").write_text(parameters)
        return tmp_path

    return make


def _execute(root):
    return execute_profile("tiny", root=root, runs=root / "runs", figures=root / "figures")


def test_parameters_are_read_from_the_syntax_tree(project):
    root = project("")
    names = parameter_names(root / "notebooks" / "00_small.ipynb")
    assert names == {"rate", "runs", "figures"}


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("study: dict = {}\nrate: float\n", {"study", "rate"}),
        ("a, b = 1, 2\n[c, (d, *e)] = 3, (4, 5)\n", {"a", "b", "c", "d", "e"}),
        ("f = g = 1\n", {"f", "g"}),
        ("%matplotlib inline\nx = 1\n!echo hello\ny = !ls\n", {"x", "y"}),
        ("%%time\nx = 1\n", {"x"}),
        ("x = 1\nx.y = 2\nz[0] = 3\nprint(x)\nt = 'a\\n!b'  # = 4\n", {"x", "t"}),
        ("", set()),
    ],
)
def test_every_way_to_write_a_parameter_is_understood(tmp_path, cell, names):
    path = tmp_path / "a.ipynb"
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})]
    nbformat.write(notebook, path)
    assert parameter_names(path) == names


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x = = 1", "the cell tagged 'parameters' must be Python: line 1: invalid syntax"),
        (None, "no cell is tagged 'parameters'"),
        ("{", "must be a notebook"),
        ("[]", "must be a notebook"),
        ("{}", "must be a notebook"),
    ],
)
def test_a_notebook_whose_parameters_cannot_be_read_is_named(project, content, reason):
    root = project("")
    path = root / "notebooks" / "00_small.ipynb"
    if content is None or content.startswith("x"):
        notebook = nbformat.v4.new_notebook()
        if content:
            tags = {"tags": ["parameters"]}
            notebook.cells = [nbformat.v4.new_code_cell(content, metadata=tags)]
        nbformat.write(notebook, path)
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {reason}")):
        read_profile("tiny", root)


def test_a_notebook_is_executed_where_the_temporary_directory_has_a_long_name(
    project, tmp_path, monkeypatch
):
    """A cluster's may be of a hundred characters; a socket's path has no more than 107 bytes."""
    long = tmp_path / ("t" * 110)
    long.mkdir()
    root = project("assert rate == 0.001")
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert _execute(root) == []


def test_a_notebook_gets_its_parameters_and_its_figures_are_named(project, caplog):
    code = """
import json, pathlib
assert rate == 0.001 and pathlib.Path.cwd().name == "notebooks"
# A kernel that is interrupted to end it, after its last cell, would call that an error.
log = get_ipython().kernel.log
assert max(log.level, *(handler.level for handler in log.handlers)) > 40
pathlib.Path(figures).mkdir()
entry = {"mine": {"notebook": "00_small"}, "not mine": {"notebook": "99_other"}}
(pathlib.Path(figures) / "manifest.json").write_text(json.dumps(entry))
"""
    root = project(code)
    assert _execute(root) == ["mine"]
    executed = nbformat.read(root / "runs" / "notebooks" / "tiny" / "small.ipynb", 4)
    assert all(cell.execution_count for cell in executed.cells)
    assert [r.message for r in caplog.records if r.name == "papermill"] == []


def test_a_cell_that_raises_fails_the_batch(project):
    with pytest.raises(NotebookError, match=r"small\.yaml: ValueError: no such luck"):
        _execute(project("raise ValueError('no such luck')"))


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "raise SystemExit"])
def test_a_notebook_that_ends_itself_before_its_last_cell_fails_the_batch(project, code):
    with pytest.raises(NotebookError, match=r"small\.yaml: sys\.exit must not end a notebook"):
        _execute(project(code))


def test_a_kernel_that_dies_fails_the_batch(project):
    with pytest.raises(NotebookError, match=r"small\.yaml: DeadKernelError"):
        _execute(project("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))


MEETING = """
import os, pathlib, signal
signal.alarm(120)  # should nobody come
meeting = pathlib.Path(runs) / "meeting"
# Opening a FIFO waits for its other end.
with open(meeting, "w" if name == "left" else "r") as end:
    end.write("here") if name == "left" else end.read()
"""


def test_notebooks_run_side_by_side(project, monkeypatch):
    root = project(MEETING)
    (root / "params" / "tiny" / "small.yaml").unlink()
    source = root / "notebooks" / "00_small.ipynb"
    text = source.read_text().replace("rate = 1.0", "name = ''")
    source.unlink()
    (root / "runs").mkdir()
    os.mkfifo(root / "runs" / "meeting")
    for number, name in (("20", "left"), ("21", "right")):
        (root / "notebooks" / f"{number}_{name}.ipynb").write_text(text)
        (root / "params" / "tiny" / f"{name}.yaml").write_text(
            f"notebook: {number}_{name}\nparameters: {{name: {name}}}\n"
        )
    monkeypatch.chdir(root)
    places = {"runs": Path("runs"), "figures": Path("figures")}
    assert execute_profile("tiny", root=root, **places) == []
    assert Path.cwd() == root  # which all threads share
    executed = sorted(path.name for path in Path("runs/notebooks/tiny").glob("*.ipynb"))
    assert executed == ["left.ipynb", "right.ipynb"]


WAITING = """
import os, pathlib, signal
told = pathlib.Path(runs) / "told"
def late(*_):
    (told.parent / "late").touch()
    os._exit(1)
signal.signal(signal.SIGALRM, late)
signal.alarm(60)  # should nobody end it
def wait():
    told.write_text(str(os.getpid()))
    while True:
        signal.pause()
"""
DEAF = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwait()"
STUBBORN = """
try:
    wait()
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
wait()
"""


@pytest.mark.parametrize(
    ("code", "presses", "patience"),
    [("wait()", 1, 600), (DEAF, 1, 0), (STUBBORN, 2, 600)],
    ids=["interrupted", "killed in the end", "killed at the second"],
)
def test_ctrl_c_ends_the_kernel_and_leaves_out_the_notebooks_after_it(
    project, monkeypatch, code, presses, patience
):
    root = project(WAITING + code)
    for name in ("tall", "vast"):
        (root / "params" / "tiny" / f"{name}.yaml").write_text("notebook: 00_small\n")
    (root / "runs").mkdir()
    os.mkfifo(root / "runs" / "told")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr("repeatlab.report.notebooks.LEAVE_SECONDS", patience)
    kernels = []

    def press():
        for _ in range(presses):
            kernels.append(int((root / "runs" / "told").read_text()))
            os.kill(os.getpid(), signal.SIGINT)

    user = Thread(target=press, daemon=True)
    user.start()
    with pytest.raises(KeyboardInterrupt):
        _execute(root)
    user.join()
    with pytest.raises(ProcessLookupError):
        os.kill(kernels[0], 0)
    assert not (root / "runs" / "late").exists()
    assert [path.name for path in (root / "runs" / "notebooks" / "tiny").iterdir()] == [
        "small.ipynb"
    ]


def test_a_kernel_that_starts_after_ctrl_c_executes_nothing(project):
    root = project("(__import__('pathlib').Path(runs) / 'executed').touch()")
    (job,) = read_profile("tiny", root)
    kernels, places = Kernels(), {"runs": root, "figures": root}
    with kernels.ending(), pytest.raises(NotebookError, match=r"small\.yaml: .* interrupted"):
        execute(job, output=root / "out", **places, kernels=kernels)
    assert not (root / "executed").exists()


def test_notebooks_of_one_group_share_a_stage_but_those_that_time_what_they_train():
    alone = {"10_a": False, "11_b": False, "20_c": False, "21_d": False, "26_e": True}
    jobs = [Job(Path("a.yaml"), Path(f"{n}.ipynb"), {}, alone=flag) for n, flag in alone.items()]
    assert jobs[0].stage == jobs[1].stage
    assert jobs[2].stage == jobs[3].stage
    assert len({job.stage for job in jobs}) == 3
    assert Job(Path("p.yaml"), Path("30_paper.ipynb"), {}).stage != jobs[3].stage


STUDY = """
parameters:
  study:
    name: tiny
    tasks: {digits: {name: supervised, width: 2, batch_size: 8}}
    methods: {standard: {}}
    seeds: 1
    max_updates: 2
    evaluation: {every: 2, splits: [], test: false}
    device: cpu
"""
STORED = "stored = list(pathlib.Path(runs).glob('supervised/*/summary.json'))\n"


@pytest.mark.parametrize(("alone", "stored"), [("false", 1), ("true", 0)])
def test_studies_are_trained_before_the_notebooks_but_for_those_alone(project, alone, stored):
    code = f"import pathlib\n{STORED}assert len(stored) == {stored}"
    root = project(code, f"notebook: 00_small\nalone: {alone}\n{STUDY}")
    notebook = root / "notebooks" / "00_small.ipynb"
    notebook.write_text(notebook.read_text().replace("rate = 1.0", "study = {}"))
    assert _execute(root) == []


def test_a_bad_study_is_refused_before_anything_runs(project):
    text = STUDY.replace("max_updates: 2", "max_updates: 0")
    root = project("raise SystemExit", f"notebook: 00_small\n{text}")
    notebook = root / "notebooks" / "00_small.ipynb"
    notebook.write_text(notebook.read_text().replace("rate = 1.0", "study = {}"))
    with pytest.raises(ConfigError, match=r"small\.yaml: parameters\.study.*max_updates"):
        _execute(root)
    assert not (root / "runs").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            "notebook: 00_small\nparameters: {rat: 1}\n",
            "parameters.rat: 00_small.ipynb has no such",
        ),
        ("notebook: 00_smal\n", "notebook: unknown notebook '00_smal'; did you mean '00_small'?"),
        ("notebok: 00_small\n", "notebok: unknown key; did you mean 'notebook'?"),
        ("notebook: 00_small\nparameters: {runs: x}\n", "parameters.runs: given on the command"),
        ("- 1\n", "must hold a mapping of names to values"),
        ("a: [1\n", "not valid YAML"),
    ],
)
def test_a_bad_parameter_file_is_refused_before_anything_runs(project, parameters, message):
    root = project("raise SystemExit", parameters)
    with pytest.raises(ConfigError) as error:
        _execute(root)
    assert "small.yaml: " in str(error.value)
    assert message in str(error.value)
    assert not (root / "runs").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a function that calls the command line of a package that lies in no clone."""
    packages = tmp_path_factory.mktemp("site-packages")
    here = tmp_path_factory.mktemp("a folder")
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "repeatlab", packages / "repeatlab", ignore=leave)
    (here / "own.yaml").write_text(f"notebook: 10_supervised{STUDY}")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "repeatlab", *arguments],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def test_an_installed_package_trains_a_file_of_one_s_own(installed):
    done = installed("run", "own.yaml", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 run: 1 complete (1 trained now, 0 in the store)\n"


@pytest.mark.parametrize("command", ["figures", "measure"])
def test_what_an_installed_package_lacks_is_said_with_what_to_do(installed, command):
    done = installed(command)
    assert done.returncode == 2
    assert "params must be there: notebooks/ and params/ come with a clone" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_include_must_be_a_regular_file(project):
    text = STUDY.replace("methods: {standard: {}}", "methods: {include: [fifo.yaml]}")
    root = project("study = {}", f"notebook: 00_small\n{text}")
    notebook = root / "notebooks" / "00_small.ipynb"
    notebook.write_text(notebook.read_text().replace("rate = 1.0", "study = {}"))
    os.mkfifo(root / "params" / "tiny" / "fifo.yaml")
    with pytest.raises(ConfigError, match=r"fifo\.yaml: cannot be read: it must be a regular file"):
        read_profile("tiny", root)


def test_an_unknown_profile_names_those_that_exist(project):
    with pytest.raises(ConfigError, match=r"no profile 'tyny' .* did you mean 'tiny'\?"):
        read_profile("tyny", project(""))


def test_notebooks_can_be_named():
    chosen = read_profile("quick", ROOT, only=["20_convergence", "10_supervised"])
    assert [job.notebook.stem for job in chosen] == ["10_supervised", "20_convergence"]
    assert len(read_profile("quick", ROOT)) > 2
    with pytest.raises(ConfigError, match=r"no notebook '10_supervized' .* '10_supervised'"):
        read_profile("quick", ROOT, only=["10_supervized"])


PLANS = [path for folder in (ROOT / "params").iterdir() for path in plans_of(folder.name, ROOT)]
PARAMETER_FILES = [path for path in sorted(ROOT.glob("params/*/*.yaml")) if path not in PLANS]


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_parameter_file_fits_its_notebook_and_its_study_is_valid(path):
    from repeatlab.studies.study import Study

    job = read_job(path, ROOT)
    if "study" in job.parameters:
        study = Study.of(**job.parameters["study"])
        assert study.planned()
        assert study.name == f"{path.parent.name}-{path.stem}".replace("_", "-")


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.parent.name)
def test_every_plan_is_valid(path):
    from repeatlab.studies.plan import read_plan

    assert read_plan(path).name == path.parent.name


# What a study leaves out of the comparison though its task would take it, and why.
LEFT_OUT = {("reinforcement", "online"): "prioritized replay without its weights"}
# For their time, in the quick profile alone; another fixed dose and another schedule stay.
DEAR = {"unsupervised", "semisupervised", "selfsupervised", "generative"}
DEAR_ARMS = {"fixed3", "cosine_repeats"}


@pytest.mark.parametrize("profile", ["quick", "paper"])
@pytest.mark.parametrize("task", SIX)
def test_every_task_has_the_complete_comparison(profile, task):
    """What a study leaves out of params/methods.yaml means nothing on its task."""
    from repeatlab.studies.study import Study

    study = read_job(ROOT / "params" / profile / f"{task}.yaml", ROOT).parameters["study"]
    assert [config["name"] for config in study["tasks"].values()] == [task]
    shared = read_yaml(ROOT / "params" / "methods.yaml")
    if profile == "paper":
        shared |= read_yaml(ROOT / "params" / "schedules.yaml")
    dear = DEAR_ARMS if profile == "quick" and task in DEAR else set()
    for name in shared.keys() - study["methods"].keys():
        if (task, name) not in LEFT_OUT and name not in dear:
            more = study["methods"] | {name: shared[name]}
            with pytest.raises(ConfigError, match=f"{name}.* is not for the task {task}: "):
                Study.of(**study | {"methods": more})
    kept = shared.keys() & study["methods"].keys()
    assert len(kept | dear) >= len(shared) - 2
    for name in kept - {"hard_mining"}:  # in reinforcement it has other settings
        assert shared[name].items() <= study["methods"][name].items()
