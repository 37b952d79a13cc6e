"""Runs in CSV, TensorBoard, W&B and Trackio, read back by pandas and by the libraries' own readers.

W&B has no public reader of its offline files: their blocks are LevelDB's log format, their records
the library's own protocol buffers.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from repeatlab import load
from repeatlab.cli import main
from repeatlab.core.schema import ConfigError
from repeatlab.store.records import Run
from repeatlab.studies.cluster import Places
from repeatlab.studies.study import Study
from repeatlab.studies.viewers import viewer

STUDY = {
    "name": "shown",
    "tasks": {"digits": {"name": "supervised", "lr": 0.05}},
    "methods": {
        "standard": {},
        "twice": {"mapping": {"name": "constant", "repeats": 2}, "rate": 0.5},
        "wild": {"rate": 1e30},  # it diverges
    },
    "seeds": 2,
    "max_updates": 7,
    "evaluation": {"every": 3},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return the store of a study."""
    root = tmp_path_factory.mktemp("store")
    Study.of(**STUDY).run(root / "runs", places=Places(workers=0))
    return root / "runs"


@pytest.fixture
def export(store, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["repeatlab", "export", "--runs", str(store), *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, capsys.readouterr()

    return call


def expected(store):
    """Return (method, seed) -> the run's configuration, and (scalar, update) -> value."""
    found = {}
    for row in load(store, "shown").runs.itertuples():
        run, values = Run(store / "supervised" / row.id), {}
        for update in run.updates.to_dict("records"):
            for name, column in {"train/loss": "loss", "N": "repeats", "lr": "lr"}.items():
                values[name, update["update"]] = update[column]
        for one in run.evals.to_dict("records"):
            name = {"validation": ""}.get(one["split"], one["split"] + ".") + one["metric"]
            values[f"eval/{name}", one["update"]] = one["value"]
        found[row.method, row.seed] = (run.config, values)
    assert len(found) == 6
    return found


def same(found, wanted, relative=0.0):
    """Return whether numbers are equal by key, also those that are not finite."""
    assert found.keys() == wanted.keys()
    keys = sorted(wanted)
    here, there = ([float(values[key]) for key in keys] for values in (found, wanted))
    np.testing.assert_allclose(here, there, rtol=relative, atol=0)


def test_csv_holds_the_frames_of_the_store_bit_for_bit(store, export, tmp_path):
    code, said = export("shown", "--as", "csv", "--to", str(tmp_path / "out"))
    assert (code, said.out) == (0, f"6 runs written into {tmp_path / 'out'}\n")
    records = load(store, "shown")
    frames = {"runs": records.runs.drop(columns="path"), "evaluations": records.evals}
    for name, frame in (frames | {"updates": records.updates}).items():
        file = tmp_path / "out" / "shown" / f"{name}.csv"
        read = pd.read_csv(file)
        pd.testing.assert_frame_equal(read, frame, check_exact=True, check_dtype=False)
    assert {"complete", "diverged"} == set(records.runs["status"])


def events(folder):
    """Return what TensorBoard's own reader finds: hyperparameters, and scalars by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (_file,) = folder.iterdir()
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    content = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    chosen = HParamsPluginData.FromString(content).session_start_info.hparams
    named = {k: v.string_value or v.number_value for k, v in chosen.items()}
    scalars = {
        (name, event.step): event.value
        for name in reader.Tags()["scalars"]
        for event in reader.Scalars(name)
    }
    return named, scalars


@pytest.mark.parametrize("live", [False, True])
def test_tensorboard_reads_what_was_written(store, export, tmp_path, live):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    logs = tmp_path / "logs"
    if live:  # as each run ends; those of the store are the same
        places = Places(workers=0, into=viewer("tensorboard", logs))
        Study.of(**STUDY).run(tmp_path / "runs", places=places)
        one = logs / "shown" / "digits" / "standard" / "seed-0"
        before = list(one.iterdir())
        Study.of(**STUDY).run(tmp_path / "runs", places=places)
        assert list(one.iterdir()) == before  # nothing was made
    else:
        assert export("--as", "tensorboard", "--to", str(logs))[0] == 0
    wanted = expected(store)
    assert len(list(logs.glob("*/*/*/*"))) == len(wanted)
    for (method, seed), (config, values) in wanted.items():
        named, scalars = events(logs / "shown" / "digits" / method / f"seed-{seed}")
        lr = 0.05 * config["method"]["rate"]
        assert named == {"task": "digits", "method": method, "seed": seed, "lr": lr}
        with np.errstate(over="ignore"):  # TensorBoard has float32
            same(scalars, {key: np.float32(value) for key, value in values.items()})


def test_a_run_is_shown_in_every_study_that_it_is_made_for(tmp_path):
    from repeatlab.studies.study import run_studies

    seen = []
    both = [Study.of(**STUDY | {"name": name, "seeds": 1, "max_updates": 2}) for name in "ab"]
    into = Places(workers=0, into=lambda run, *names: seen.append((run.done, *names)))
    assert run_studies(both, tmp_path, places=into).trained == 3
    assert sorted(seen) == [
        (True, name, "digits", method, 0) for name in "ab" for method in STUDY["methods"]
    ]


def records_of(file):
    """Return the records of a W&B file."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = file.read_bytes(), 7, [], []
    assert content[:4] == b":W&B"
    while at < len(content):
        left = -at % 32768
        if 0 < left < 7:  # too little for a header
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        parts.append(content[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def test_wandb_s_offline_runs_hold_what_was_written(store, export, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    assert export("shown", "--as", "wandb", "--to", str(tmp_path / "out"))[0] == 0
    wanted = expected(store)
    files = list(tmp_path.glob("out/wandb/offline-run-*/*.wandb"))
    assert len(files) == len(wanted)
    for file in files:
        records = records_of(file)
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert run.project == "shown"
        seed = int(run.display_name.rpartition(" ")[2])
        assert run.display_name == f"digits {run.run_group} seed {seed}"
        config, values = wanted.pop((run.run_group, seed))
        written = {item.key: json.loads(item.value_json) for item in run.config.update}
        written.pop("_wandb", None)
        assert written == config
        found = {}
        for record in records:
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    name = item.key or "/".join(item.nested_key)
                    if not name.startswith("_"):
                        value = json.loads(item.value_json)
                        found[name, record.history.step.num] = float(value)
        same(found, values)
    assert not wanted


READ = """
import json, trackio
runs = {}
for run in trackio.Api().runs("shown"):
    logs = trackio.SQLiteStorage.get_logs("shown", run.name, run_id=run.id)
    runs[run.name] = [run.config, [{k: str(v) for k, v in log.items()} for log in logs]]
print("found", json.dumps(runs))
"""


def test_trackio_reads_what_was_written(store, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    command = [sys.executable, "-m", "repeatlab", "export", "shown", "--runs", str(store)]
    logs = tmp_path / "logs"
    subprocess.run([*command, "--as", "trackio", "--to", str(logs)], check=True)
    environment = os.environ | {"TRACKIO_DIR": str(logs)}
    read = [sys.executable, "-c", READ]
    done = subprocess.run(read, env=environment, check=True, capture_output=True, text=True)
    runs = json.loads(done.stdout.rpartition("found ")[2])
    wanted = expected(store)
    assert len(runs) == len(wanted)
    for (method, seed), (config, values) in wanted.items():
        written, points = runs[f"digits {method} seed {seed}"]
        assert written["_Group"] == method
        assert {key: written[key] for key in config} == config
        found = {
            (name, int(point["step"])): float(value)
            for point in points
            for name, value in point.items()
            if name not in ("step", "timestamp")
        }
        same(found, values)
    # In one process it writes into one directory, and says so.
    code = "from repeatlab.studies.viewers import viewer; viewer('trackio', 'other')"
    other = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    refused = subprocess.run([sys.executable, "-c", code], **other, check=False)
    assert f"trackio must write into {logs} here; not {tmp_path / 'other'}" in refused.stderr


def test_what_cannot_be_shown_is_refused_by_its_reason(store, export, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    code, said = export("--as", "wandb", "--to", str(tmp_path / "full"))
    assert code == 2
    assert "--as wandb: --to must be an empty directory" in said.err
    code, said = export("--as", "csv", "--visits", "shown", "--to", str(tmp_path / "out"))
    assert code == 2
    assert "--as csv: --visits must be left out" in said.err
    with pytest.raises(ConfigError, match="tensorboard, wandb or trackio; not 'comet'"):
        viewer("comet", tmp_path)
    monkeypatch.setattr(sys, "path", [])  # where nothing is found
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        message = f"{name} must be installed: pip install {name}"
        with pytest.raises(ConfigError, match=message):
            viewer(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
