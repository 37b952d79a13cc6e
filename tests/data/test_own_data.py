"""Data of one's own: a folder of images by class, a NumPy file, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repeatlab.core.schema import ConfigError, parse
from repeatlab.data import DataError, load_splits
from repeatlab.data.sources import DIRECTORY_VARIABLE
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

SIDE = 8


def pictures(count: int, colour: bool = True, seed: int = 0, side: int = SIDE) -> np.ndarray:
    draws = np.random.default_rng(seed)
    shape = (count, side, side + 2, 3) if colour else (count, side, side + 2)
    return draws.integers(256, size=shape, dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray, labels: np.ndarray, names: str = "abc") -> Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / names[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def samples(*sets) -> Counter:
    return Counter(
        (image.tobytes(), label)
        for data in sets
        for image, label in zip(data.images.numpy(), data.labels.tolist(), strict=True)
    )


def expected(images: np.ndarray, labels: np.ndarray) -> Counter:
    pixels = images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)
    return Counter(
        (np.ascontiguousarray(image).tobytes(), int(label))
        for image, label in zip(pixels, labels, strict=True)
    )


LABELS = np.arange(60) % 3


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_every_image_is_in_exactly_one_split_with_its_label(kind, colour, tmp_path):
    images = pictures(60, colour)
    if kind == "folder":
        path = write_folder(tmp_path / "birds", images, LABELS)
    else:
        path = tmp_path / "birds.npz"
        np.savez(path, images=images, labels=LABELS)
    splits = load_splits(str(path))
    assert samples(splits.train, splits.validation, splits.test) == expected(images, LABELS)
    assert splits.train.images.shape[1:] == (3 if colour else 1, SIDE, SIDE + 2)
    assert splits.classes == 3
    for part, count in ((splits.train, 36), (splits.validation, 12), (splits.test, 12)):
        assert part.labels.bincount().tolist() == [count // 3] * 3
    assert torch.equal(load_splits(str(path)).test.images, splits.test.images)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_test_part_of_one_s_own_is_the_test_split(kind, tmp_path):
    images, tests = pictures(60), pictures(9, seed=1)
    if kind == "folder":
        path = tmp_path / "birds"
        write_folder(path / "train", images, LABELS)
        write_folder(path / "test", tests, LABELS[:9])
    else:
        path = tmp_path / "birds.npz"
        np.savez(path, images=images, labels=LABELS, test_images=tests, test_labels=LABELS[:9])
    splits = load_splits(str(path))
    assert samples(splits.test) == expected(tests, LABELS[:9])
    assert samples(splits.train, splits.validation) == expected(images, LABELS)


def test_the_name_tells_the_content(tmp_path):
    path, names = tmp_path / "birds.npz", []
    for seed in (0, 1, 0):
        np.savez(path, images=pictures(60, seed=seed), labels=LABELS)
        names.append(load_splits(str(path)).name)
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("birds-")


def test_a_relative_path_is_found_where_one_is_and_in_the_data_directory(tmp_path, monkeypatch):
    np.savez(tmp_path / "birds.npz", images=pictures(60), labels=LABELS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(DataError, match=r"folder of images by class or an .npz file; there is"):
        load_splits("birds.npz", root=elsewhere)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    there = load_splits("birds.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DIRECTORY_VARIABLE)
    assert load_splits("./birds.npz").name == there.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "must hold the arrays images and labels.*it holds images"),
        ({"test_images": pictures(3)}, "test_images and test_labels or"),
        ({"images": pictures(60).astype(float)}, "images must be uint8, .*; not float64"),
        ({"images": pictures(60)[0, 0]}, r"images must be uint8, .*; not uint8, \(10, 3\)"),
        ({"images": pictures(60).repeat(2, axis=3)}, "one channel or three; not 6"),
        ({"labels": LABELS[:59]}, r"labels must be whole numbers from 0, \(60,\), .*\(59,\)"),
        ({"labels": LABELS / 2}, "labels must be whole numbers"),
        ({"labels": LABELS - 1}, "labels must be whole numbers from 0"),
        ({"labels": LABELS * 2}, "class 1 of 5 has 0"),
        ({"labels": np.zeros(60, dtype=int)}, "two classes or more"),
        ({"test_images": pictures(6, side=9), "test_labels": LABELS[:6]}, "size and classes"),
        ({"test_images": pictures(6), "test_labels": LABELS[:6] + 1}, "size and classes"),
        ({"labels": np.array([object()] * 60)}, "must be an .npz file of plain arrays"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(change, message, tmp_path):
    arrays = {"images": pictures(60), "labels": LABELS} | change
    path = tmp_path / "birds.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=message) as caught:
        load_splits(str(path))
    assert str(path) in str(caught.value)


def test_what_is_no_numpy_file_is_said(tmp_path):
    path = tmp_path / "birds.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"must be an .npz file of plain arrays") as caught:
        load_splits(str(path))
    assert str(caught.value).startswith(f"{path} must be")
    assert str(caught.value).endswith(": it is no .npz archive")


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    images = pictures(60)
    folder = write_folder(tmp_path / "birds", images, LABELS)
    (folder / "a" / "notes.txt").write_text("left alone")
    assert len(load_splits(str(folder)).train) == 36

    odd = folder / "b" / "odd.png"
    Image.fromarray(pictures(1, side=9)[0]).save(odd)
    with pytest.raises(DataError, match=rf"{odd} is 11 x 9 pixels, .* 10 x 8: all images"):
        load_splits(str(folder))
    odd.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"{odd} must be an image"):
        load_splits(str(folder))
    odd.unlink()
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="for each class; there is none in empty"):
        load_splits(str(folder))
    with pytest.raises(DataError, match="it holds no folder"):
        load_splits(str(folder / "a"))

    other = tmp_path / "other"
    write_folder(other / "train", images, LABELS)
    write_folder(other / "test", images[:4], LABELS[:4] % 2)
    with pytest.raises(DataError, match="train and test must have the same classes"):
        load_splits(str(other))


def run(dataset: str, **fields) -> RunConfig:
    task = {"name": "supervised", "dataset": dataset, "batch_size": 8, "width": 2} | fields
    data = {"task": task, "max_updates": 3, "evaluation": {"every": 3}}
    return parse(RunConfig, data)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": "semisupervised", "labels": 12, "mu": 1},
        {"name": "continual", "first_classes": 2, "pretraining": {"updates": 2, "batch_size": 8}},
        {"name": "noisy_labels"},
    ],
)
def test_a_task_trains_on_it(fields, tmp_path):
    labels = np.arange(200) % 4
    np.savez(tmp_path / "birds.npz", images=pictures(200), labels=labels)
    done = train(run(str(tmp_path / "birds.npz"), **fields), tmp_path / "runs")
    assert done.status == {"status": "complete"}
    accuracies = done.evals.query("split == 'test' and metric == 'accuracy'")["value"]
    assert [0 <= value <= 1 for value in accuracies] == [True]


def test_a_configuration_is_read_where_its_data_are_not(tmp_path):
    config = run("./gone.npz")
    assert RunConfig.from_json(config.to_json()) == config
    with pytest.raises(DataError, match=r"dataset './gone.npz' must be a folder"):
        config.task.prepare()
    with pytest.raises(ConfigError, match=r"unknown dataset 'birds'; .* by a path: ./birds"):
        run("birds")
