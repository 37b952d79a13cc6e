"""JupyterLab in a real browser: it opens ready to use, and notebooks run to their end.

Needs Chromium and the extra `browser`; where they are missing every test says so and is skipped.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import nbformat
import pandas as pd
import pytest
import yaml

from repeatlab.analysis.frames import load
from repeatlab.studies.study import Study

ROOT = Path(__file__).parents[2]
RECIPE = re.compile(r"bin/jupyter lab (.*)")
ADDRESS = re.compile(r"http://127\.0\.0\.1:(?P<port>\d+)/lab")
CELLS = ".jp-Notebook .jp-CodeCell"
PROMPTS = f"document.querySelectorAll('{CELLS} .jp-InputPrompt')"
PATIENCE = 600  # seconds for a notebook, on a machine that has others to serve


def _recipe() -> list[str]:
    """Return the arguments that `make lab` gives to `jupyter lab`."""
    command = ["make", "--dry-run", "--always-make", "lab"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (arguments,) = RECIPE.findall(printed.replace("\\\n", " "))  # a line may go on in the next
    return arguments.split()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Start what `make lab` starts, on copies of the notebooks; return address, token, folder."""
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    settings = {name: str(folder / "settings" / name) for name in ("config", "data", "runtime")}
    environment = os.environ | {f"JUPYTER_{k.upper()}_DIR": v for k, v in settings.items()}
    environment["JUPYTER_CONFIG_PATH"] = str(ROOT / "etc" / "jupyter")
    here = [f"--IdentityProvider.token={token}", "--no-browser", "--port=0", "--ip=127.0.0.1"]
    command = [sys.executable, "-m", "jupyter", "lab", *_recipe(), *here]
    server = subprocess.Popen(
        [*command, "--allow-root"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    for line in server.stderr:
        said.append(line)
        if found := ADDRESS.search(line):
            break
    else:
        pytest.fail("JupyterLab did not start:\n" + "".join(said))
    # A full pipe would stop the server.
    threading.Thread(target=server.stderr.read, daemon=True).start()
    try:
        _until_it_listens(int(found["port"]), server)
        yield found.group(), token, folder
    finally:
        server.terminate()
        server.wait(timeout=60)


def _until_it_listens(port: int, server: subprocess.Popen) -> None:
    """Wait: the address is printed a moment before anything listens there."""
    while server.poll() is None:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        threading.Event().wait(0.1)
    pytest.fail("JupyterLab has ended")


def _get(address: str, token: str = "") -> bytes:
    with urlopen(f"{address}?token={token}" if token else address, timeout=60) as answer:
        return answer.read()


def test_it_answers_to_whom_has_the_token_and_to_nobody_else(lab):
    address, token, _ = lab
    status = address.removesuffix("/lab") + "/api/status"
    assert "started" in json.loads(_get(status, token))
    with pytest.raises(HTTPError, match="403"):
        _get(status)
    assert b"jupyter-config-data" in _get(address, token)


@pytest.mark.parametrize(
    ("plugin", "setting", "value"),
    [
        # Pictures that are drawn in a widget's callback could be corrupted (jupyterlab#19719).
        ("apputils-extension:kernels-settings", "commsOverSubshells", "disabled"),
        # No question before one can begin: which kernel, and whether news are wanted.
        ("notebook-extension:tracker", "autoStartDefaultKernel", True),
        ("apputils-extension:notification", "fetchNews", "false"),
    ],
)
def test_it_is_set_up_for_these_notebooks(lab, plugin, setting, value):
    address, token, _ = lab
    answer = json.loads(_get(f"{address}/api/settings/@jupyterlab/{plugin}", token))
    assert answer["schema"]["properties"][setting]["default"] == value


def _choose(page, menu: str, item: str) -> None:
    """Choose an item of a menu, once it is there to be chosen: at first it is greyed out."""
    there = page.locator(f".lm-Menu-item:has(.lm-Menu-itemLabel:text-is('{item}'))")
    for _ in range(PATIENCE):
        page.click(f".lm-MenuBar-itemLabel:text-is('{menu}')")
        there.wait_for()
        if "lm-mod-disabled" not in there.get_attribute("class"):
            return there.click()
        page.keyboard.press("Escape")
    pytest.fail(f"{menu}, {item} stays greyed out")


def _run_all(page, lab, name: str) -> None:
    """Open a notebook, run all of its cells, and wait until the kernel has."""
    address, token, _ = lab
    page.goto(f"{address}/tree/notebooks/{name}.ipynb?token={token}&reset")
    # The notebook's own indicator says idle also before there is a kernel.
    idle = "#jp-main-statusbar :text-matches('ipykernel.*Idle')"
    page.wait_for_selector(idle, timeout=1000 * PATIENCE)
    # The notebooks keep the numbers of their cells, by which is seen here which have run.
    _choose(page, "Edit", "Clear Outputs of All Cells")
    page.wait_for_function(
        f"() => ![...{PROMPTS}].some(p => /\\d/.test(p.textContent))", polling=100
    )
    _choose(page, "Run", "Run All Cells")
    page.wait_for_function(
        """selector => {
            const cells = [...document.querySelectorAll(selector)];
            const left = cells.map(cell => cell.querySelector('.jp-InputPrompt').textContent);
            const failed = document.querySelector('[data-mime-type*="error"]');
            return failed || left.every(prompt => /\\[\\d+\\]/.test(prompt));
        }""",
        arg=CELLS,
        timeout=1000 * PATIENCE,
        polling=500,  # milliseconds; without it, at frames, and a page that nobody sees has none
    )
    page.wait_for_selector(idle)
    assert page.locator(".jp-Dialog").count() == 0


@pytest.mark.parametrize("name", ["00_quickstart", "10_supervised"])
def test_a_notebook_runs_to_its_end_and_its_sliders_draw(page, lab, name):
    _run_all(page, lab, name)
    assert page.locator("[data-mime-type*='error']").all_text_contents() == []
    figures = [
        cell.locator(".jp-RenderedImage img").evaluate_all("all => all.map(image => image.src)")
        for cell in page.locator(CELLS).all()
    ]
    assert sum(len(found) for found in figures) >= 1
    # Drawn once: pyplot's figures are shown at a cell's end, and as its value, too.
    assert all(len(found) == len(set(found)) for found in figures)

    form = page.locator(CELLS).last.locator(".repeatlab")
    form.scroll_into_view_if_needed()
    _moves_with_its_sliders(page, form)
    assert page.problems == []


def _moves_with_its_sliders(page, form) -> None:
    """See that a mapping form says and draws something else after its first slider was moved."""
    said, curve = form.locator(".said").first, form.locator("svg path").nth(1)
    assert "mean N" in said.text_content()
    shown = [said.text_content(), curve.get_attribute("d")]
    slider = form.locator("input[type=range]").first
    slider.focus()
    for _ in range(60):
        slider.press("ArrowRight")
    assert "mean N" in said.text_content()
    assert said.text_content() != shown[0]
    assert curve.get_attribute("d") != shown[1]
    # The pointer names the loss and both N.
    svg = form.locator("svg").bounding_box()
    page.mouse.move(svg["x"] + 70, svg["y"] + 40)
    assert re.match(r"fresh batch \d+", form.locator("th").first.text_content())
    values = form.locator("td.number").all_text_contents()
    assert len([value for value in values if value]) == 3


ARMS = {
    "standard": {},
    "fixed2": {"mapping": {"name": "constant", "repeats": 2}},
    "linear": {"mapping": {"name": "linear", "t": 0.5}},
}


@pytest.fixture
def explorer_notebook(lab):
    """Write a notebook with an explorer, a store that it shows, and a study that it can start."""
    _, _, folder = lab
    fields = {"tasks": {"digits": {"name": "supervised", "lr": 0.05}}, "methods": ARMS, "seeds": 2}
    fields |= {"max_updates": 30, "evaluation": {"every": 10}}
    Study.of(name="made", **fields).run(folder / "explored", workers=0)
    to_train = {"notebook": "10_supervised", "parameters": {"study": fields | {"name": "started"}}}
    to_train["parameters"]["study"] |= {"seeds": 1, "max_updates": 4, "evaluation": {"every": 2}}
    (folder / "started.yaml").write_text(yaml.safe_dump(to_train))
    code = (
        "from repeatlab.report.explorer import Explorer\n"
        "Explorer('../explored', params='../started.yaml')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, folder / "notebooks" / "explorer.ipynb")
    return "explorer"


def test_the_store_can_be_clicked_through_and_a_study_started(page, lab, explorer_notebook):
    for width in (1280, 620):
        page.set_viewport_size({"width": width, "height": 1400})
        _run_all(page, lab, explorer_notebook)
        explorer = page.locator(".repeatlab")
        explorer.locator("svg").nth(2).wait_for()
        if folder := os.environ.get("SCREENSHOTS"):
            explorer.screenshot(path=f"{folder}/explorer-{width}.png")
    page.set_viewport_size({"width": 1280, "height": 1400})

    def waits(what: str, holds: str) -> None:
        page.wait_for_function(
            "([what, holds]) => [...document.querySelectorAll(what)].at(-1)"
            "?.textContent.includes(holds)",
            arg=[what, holds],
            polling=100,
        )

    # Filters leave what fits.
    names = explorer.locator(".runs td:nth-child(3)")
    assert names.all_text_contents() == list(ARMS)
    explorer.get_by_label("method").select_option("fixed2")
    assert names.all_text_contents() == ["fixed2"]
    explorer.get_by_label("seed", exact=True).select_option("1")
    chip = explorer.locator(".runs button")
    assert chip.all_text_contents() == ["1"]
    # A run that is clicked is drawn; the pointer names its loss, N, metric and rate.
    chip.click()
    waits(".repeatlab", "digits, fixed2, seed 1")
    explorer.get_by_label("method").select_option("")
    explorer.get_by_label("seed", exact=True).select_option("")
    box = explorer.locator("svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    row = explorer.locator("tr:has-text('digits, fixed2, seed 1') td.number").all_text_contents()
    assert row[1] == "2"
    assert len([float(value) for value in row]) == 4
    # A third arm is compared, and another one is what the others are compared with.
    explorer.get_by_label("compare fixed2 on digits").check()
    waits(".repeatlab", "seeds")
    page.wait_for_function(
        "() => document.querySelectorAll('.repeatlab svg')[2].querySelectorAll('circle').length"
        " == 4",
        polling=100,
    )
    explorer.get_by_label("compared with").select_option("fixed2")
    waits(".repeatlab svg:last-of-type", "better than fixed2")
    explorer.locator("circle").first.hover()
    waits(".repeatlab", "seed ")
    with page.expect_download() as saved:
        explorer.locator("button:text-is('CSV')").last.click()
    pairs = pd.read_csv(saved.value.path())
    shown = pairs.set_index(["method", "seed"])["difference"]
    records = load(lab[2] / "explored", "made").runs.set_index(["method", "seed"])
    final = records["validation.accuracy"]
    for method in ("standard", "linear"):
        by_hand = final[method] - final["fixed2"]
        assert shown[method].tolist() == pytest.approx(by_hand.tolist())
    # The kernel stays free while a study is trained.
    explorer.locator("button:text-is('Start or go on')").click()
    waits(".repeatlab .said", "complete")
    assert explorer.get_by_label("study").input_value() == "started"
    assert page.problems == []
