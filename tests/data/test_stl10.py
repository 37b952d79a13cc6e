"""STL-10 from files of its binary layout, small ones that the test writes."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from repeatlab.data import DataError, load_splits, sources, stl10

COUNTS = {"train": 60, "test": 30, "unlabeled": 40}


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """The five files, with a few images each."""
    draws = np.random.default_rng(0)
    files = {}
    for part, count in COUNTS.items():
        pixels = draws.integers(256, size=(count, 3, 96, 96), dtype=np.uint8)
        files[f"stl10_binary/{part}_X.bin"] = pixels.tobytes()
        if part != "unlabeled":
            files[f"stl10_binary/{part}_y.bin"] = bytes(1 + i % 10 for i in range(count))
    return files


def packed(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def known(contents, monkeypatch) -> bytes:
    """Make the small files the expected ones; return them as the archive holds them."""
    archive = packed(contents)
    source = replace(
        stl10.STL10,
        files={name: md5(content).hexdigest() for name, content in contents.items()},
        downloads={"stl10_binary.tar.gz": md5(archive).hexdigest()},
    )
    monkeypatch.setattr(stl10, "STL10", source)

    def refuse(url, timeout):
        raise URLError("no network")

    monkeypatch.setattr(sources, "urlopen", refuse)
    return archive


@pytest.fixture
def root(known, contents, tmp_path) -> Path:
    (tmp_path / "stl10_binary").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


class Torchvisions(datasets.STL10):
    """torchvision's reader without its checksums, which are those of the real files."""

    def _check_integrity(self) -> bool:
        return True


def test_checksums_are_torchvision_s():
    theirs = datasets.STL10
    known = dict(theirs.train_list + theirs.test_list)
    assert stl10.STL10.files == {f"stl10_binary/{name}": known[name] for name in known}
    assert stl10.STL10.downloads == {theirs.filename: theirs.tgz_md5}
    assert stl10.STL10.url + theirs.filename == theirs.url


@pytest.mark.parametrize("part", ["train", "test"])
def test_labelled_images_are_those_torchvision_reads(root, part):
    images, classes = stl10.labelled(part, root)
    theirs = Torchvisions(str(root), split=part)
    assert np.array_equal(images.numpy(), theirs.data)
    assert np.array_equal(classes.numpy(), theirs.labels)
    assert classes.dtype == torch.int64


def test_unlabelled_images_are_those_torchvision_reads(root):
    images = stl10.unlabelled(root)
    assert len(images) == COUNTS["unlabeled"]
    chosen = torch.tensor([7, 0, 39, 7])
    theirs = Torchvisions(str(root), split="unlabeled").data
    assert np.array_equal(images.take(chosen).numpy(), theirs[chosen.numpy()])


def test_unlabelled_images_stay_in_their_file(root):
    """Opening holds no image in memory: the array is the mapping itself, read only."""
    planes = stl10.unlabelled(root)._planes
    assert isinstance(planes, np.memmap)
    assert not planes.flags.writeable
    assert not planes.flags.owndata


def test_the_splits_hold_every_labelled_image_once(root):
    splits = load_splits("stl10", root=root, validation=20)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [40, 20, 30]
    assert splits.train.images.shape[1:] == (3, 96, 96)
    images, _ = stl10.labelled("train", root)
    whole = sorted(image.numpy().tobytes() for image in images)
    both = [*splits.train.images, *splits.validation.images]
    assert sorted(image.numpy().tobytes() for image in both) == whole


def test_an_archive_beside_them_is_unpacked(known, contents, tmp_path):
    (tmp_path / "stl10_binary.tar.gz").write_bytes(known)
    assert stl10.prepare(tmp_path) == tmp_path
    for name, content in contents.items():
        assert (tmp_path / name).read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stl10_binary",
        "stl10_binary.tar.gz",
    ]


def test_only_what_is_missing_is_unpacked(known, root):
    kept = root / "stl10_binary/test_y.bin"
    before = kept.stat().st_mtime_ns
    (root / "stl10_binary/train_y.bin").unlink()
    (root / "stl10_binary.tar.gz").write_bytes(known)
    stl10.prepare(root)
    assert (root / "stl10_binary/train_y.bin").exists()
    assert kept.stat().st_mtime_ns == before


def test_the_archive_is_fetched_from_the_dataset_s_page(known, contents, tmp_path, monkeypatch):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(known)

    monkeypatch.setattr(sources, "urlopen", answer)
    stl10.prepare(tmp_path)
    assert asked == [stl10.STL10.url + "stl10_binary.tar.gz"]
    assert (tmp_path / "stl10_binary/train_X.bin").read_bytes() == contents[
        "stl10_binary/train_X.bin"
    ]


@pytest.mark.parametrize("name", ["train_X.bin", "test_y.bin", "unlabeled_X.bin"])
def test_a_damaged_file_is_refused_and_kept(root, name):
    path = root / "stl10_binary" / name
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is damaged .* Remove it"):
        stl10.prepare(root)
    assert path.read_bytes() == content


def test_a_damaged_archive_is_refused_before_it_is_unpacked(known, tmp_path):
    (tmp_path / "stl10_binary.tar.gz").write_bytes(known[:-1])
    with pytest.raises(DataError, match=r"stl10_binary.tar.gz is damaged"):
        stl10.prepare(tmp_path)
    assert not (tmp_path / "stl10_binary").exists()


def test_without_files_and_network_the_message_says_what_to_put_where(known, tmp_path):
    with pytest.raises(DataError) as error:
        stl10.prepare(tmp_path)
    for name, checksum in (stl10.STL10.files | stl10.STL10.downloads).items():
        assert f"{tmp_path / name}  (MD5 {checksum})" in str(error.value)


def test_a_file_of_broken_images_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(stl10.IMAGE_BYTES + 1))
    with pytest.raises(DataError, match=r"must hold images of 27648 bytes; it has 27649"):
        stl10.MappedImages(path)
