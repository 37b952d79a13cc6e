"""`make gpu` where there is no GPU: what it says, and its parts on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from repeatlab.cli import ROOT


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import gpu

    return gpu


def test_without_a_device_it_says_what_it_would_do(script, tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), str(tmp_path / "results")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=hidden).stdout
    assert said.startswith("There is no CUDA device: nothing is run.")
    assert all(
        f"  {part}, at most {limit} s: " in said for part, (limit, _) in script.PARTS.items()
    )
    assert sum(limit for limit, _ in script.PARTS.values()) <= 7 * 60
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        (
            "updates",
            [
                {"task": task, "as": kind}
                for kind in ("run", "graph", "compiled")
                for task in ("supervised", "reinforcement")
            ],
        ),
        (
            "lockstep",
            [
                {"arms": 2, "as": kind, "warned": []}
                for _ in range(4)
                for kind in ("eager", "graph")
            ],
        ),
        ("processes", [{"processes": 1}, {"processes": 2}]),
        ("resnet", [{"format": "float32"}, {"format": "bfloat16"}, {}]),
    ],
)
def test_every_part_works_on_the_cpu_at_toy_size(script, tmp_path, part, rows):
    script.run_part(part, tmp_path, "cpu", True)
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert (found["device"], found["toy"]) == ("CPU", True)
    for row, expected in zip(found["rows"], rows, strict=True):
        assert "error" not in row
        assert expected.items() <= row.items()
        rates = [value for name, value in row.items() if "/s" in name]
        assert min(rates) > 0


def test_what_hangs_is_ended_at_its_limit(script, tmp_path, monkeypatch):
    monkeypatch.setitem(script.PARTS, "updates", (0.01, "no time for anything"))
    assert "updates: ended at its limit" in script.in_time("updates", tmp_path, True)
    assert not (tmp_path / "updates.json").exists()


def test_what_was_known_before_a_failure_is_written(script, tmp_path, monkeypatch):
    def fails(device, toy):
        yield {"first": 1}
        raise RuntimeError("no such luck")

    monkeypatch.setattr(script, "updates", fails)
    with pytest.raises(RuntimeError):
        script.run_part("updates", tmp_path, "cpu", True)
    assert json.loads((tmp_path / "updates.json").read_text())["rows"] == [{"first": 1}]


def test_the_committed_table_is_that_of_the_committed_parts(script, tmp_path):
    committed = ROOT / "tests" / "benchmarks" / "results"
    copied = shutil.copytree(committed / "gpu", tmp_path / "gpu")
    made = script.table(copied).read_text(encoding="utf-8")
    assert made == (committed / "gpu.csv").read_text(encoding="utf-8")
    assert sum(line.startswith("lockstep,") for line in made.splitlines()) == 4 * 3 * 2
