"""Datasets: what is in them, how they are split, and what happens to a wrong file."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections import Counter
from hashlib import md5
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from repeatlab.data import DataError, ImageSet, load_splits, sources
from repeatlab.data.sources import CIFAR10, DIRECTORY_VARIABLE, MNIST, Source


def samples(*sets: ImageSet) -> Counter:
    """Count every (pixels, label) pair: a multiset, as images may occur twice."""
    return Counter(
        (image.tobytes(), label)
        for data in sets
        for image, label in zip(data.images.numpy(), data.labels.tolist(), strict=True)
    )


def checksum(content: bytes) -> str:
    return md5(content).hexdigest()


@pytest.fixture
def no_network(monkeypatch):
    """Refuse every connection; return the (url, timeout) pairs that were asked for."""
    asked = []

    def refuse(url, timeout):
        asked.append((url, timeout))
        raise URLError("no network")

    monkeypatch.setattr(sources, "urlopen", refuse)
    return asked


# --- digits -------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_each_in_exactly_one_split():
    from sklearn.datasets import load_digits

    splits = load_splits("digits")
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert splits.classes == 10

    found = Counter()
    for data in (splits.train, splits.validation, splits.test):
        levels = (data.images.to(torch.float64) * 16 / 255).round().numpy()
        found.update(map(bytes, levels.astype(np.uint8).reshape(len(data), -1)))
    bunch = load_digits()
    assert found == Counter(map(bytes, bunch.data.astype(np.uint8)))
    assert splits.train.images.max() == 255  # grey level 16


def test_digits_are_split_60_20_20():
    splits = load_splits("digits")
    sizes = [len(splits.train), len(splits.validation), len(splits.test)]
    assert np.array(sizes) / 1797 == pytest.approx([0.6, 0.2, 0.2], abs=1 / 1797)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_every_class_has_its_share_of_every_split(part):
    from sklearn.datasets import load_digits

    data = getattr(load_splits("digits"), part)
    wanted = np.bincount(load_digits().target) * len(data) / 1797
    # Two splits one after the other, each rounding by less than one sample.
    assert np.abs(data.labels.bincount().numpy() - wanted).max() < 2


def test_the_split_does_not_follow_any_global_seed():
    torch.manual_seed(1)
    first = load_splits("digits")
    torch.manual_seed(2)
    second = load_splits("digits")
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).images, getattr(second, part).images)
        assert torch.equal(getattr(first, part).labels, getattr(second, part).labels)


def test_the_size_of_the_validation_split_is_a_choice_that_leaves_the_test_split_alone():
    usual, other = load_splits("digits"), load_splits("digits", validation=100)
    assert len(other.validation) == 100
    assert torch.equal(other.test.images, usual.test.images)
    assert samples(other.train, other.validation) == samples(usual.train, usual.validation)


def test_normalisation_constants_are_those_of_the_train_split():
    splits = load_splits("digits", validation=700)
    pixels = splits.train.images.numpy().astype(np.float64) / 255
    assert splits.mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert splits.std == pytest.approx([pixels.std()], rel=1e-12)


def test_an_unknown_dataset_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"one of 'cifar10', 'digits', 'mnist', 'stl10', or .*; not 'cifar'"
    ):
        load_splits("cifar")


@pytest.mark.parametrize("count", [-1, 0, 9, 1429, 5000])
def test_a_validation_split_without_every_class_is_refused(count):
    with pytest.raises(ValueError, match=rf"from 10 to 1428 samples; not {count}"):
        load_splits("digits", validation=count)


# --- where files come from ----------------------------------------------------------------------


def test_checksums_are_those_of_torchvision():
    from torchvision import datasets

    assert {Path(file).name: value for file, value in MNIST.downloads.items()} == dict(
        datasets.MNIST.resources
    )
    reference = datasets.CIFAR10
    assert {Path(file).name: value for file, value in CIFAR10.files.items()} == dict(
        reference.train_list + reference.test_list
    )
    assert CIFAR10.downloads == {reference.filename: reference.tgz_md5}


@pytest.mark.parametrize(("name", "source"), [("mnist", MNIST), ("cifar10", CIFAR10)])
def test_missing_files_are_named_with_their_place_and_checksum(
    name, source, tmp_path, monkeypatch, no_network
):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_splits(name)
    message = str(caught.value)
    for file, expected in {**source.files, **source.downloads}.items():
        assert f"{tmp_path / file}  (MD5 {expected})" in message
    assert DIRECTORY_VARIABLE in message
    assert "no network" in message
    # One attempt, and a short one.
    assert [timeout <= 10 for _, timeout in no_network] == [True]
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_the_argument_else_the_variable_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    assert sources.data_directory("elsewhere") == Path("elsewhere")
    assert sources.data_directory() == tmp_path
    monkeypatch.delenv(DIRECTORY_VARIABLE)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert sources.data_directory() == tmp_path / "home" / ".cache" / "repeatlab"


class Bomb:
    """Unpickled, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_damaged_pickle_is_never_unpickled_nor_replaced(tmp_path, no_network):
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(mark))
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.parent.mkdir()
    file.write_bytes(bomb)
    with pytest.raises(DataError) as caught:
        load_splits("cifar10", root=tmp_path)
    for part in (str(file), checksum(bomb), CIFAR10.files["cifar-10-batches-py/data_batch_3"]):
        assert part in str(caught.value)
    assert not mark.exists()
    assert file.read_bytes() == bomb
    assert no_network == []

    pickle.loads(bomb)
    assert mark.exists(), "the bomb is a dud, so this test shows nothing"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_mnist_file_is_reported_packed_or_not(suffix, tmp_path, no_network):
    file = f"MNIST/raw/train-images-idx3-ubyte{suffix}"
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x00\x00\x08\x03")
    with pytest.raises(DataError) as caught:
        load_splits("mnist", root=tmp_path)
    expected = {**MNIST.files, **MNIST.downloads}[file]
    for part in (str(path), checksum(b"\x00\x00\x08\x03"), expected):
        assert part in str(caught.value)
    assert no_network == []


def gz_source(folder: Path, content: bytes) -> Source:
    packed = gzip.compress(content)
    folder.mkdir()
    (folder / "a.gz").write_bytes(packed)
    return Source(
        "demo", f"{folder.as_uri()}/", {"in/a": checksum(content)}, {"in/a.gz": checksum(packed)}
    )


def tar_source(folder: Path, content: bytes) -> Source:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("in/a", "in/readme"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    folder.mkdir()
    (folder / "all.tar.gz").write_bytes(buffer.getvalue())
    return Source(
        "demo",
        f"{folder.as_uri()}/",
        {"in/a": checksum(content)},
        {"all.tar.gz": checksum(buffer.getvalue())},
    )


@pytest.mark.parametrize("make_source", [gz_source, tar_source])
def test_what_is_missing_is_fetched_once_and_kept(make_source, tmp_path, monkeypatch, request):
    source = make_source(tmp_path / "server", b"content")
    home = tmp_path / "home"
    assert sources.prepare(source, home) == home
    assert (home / "in" / "a").read_bytes() == b"content"

    request.getfixturevalue("no_network")
    sources.prepare(source, home)
    (home / "in" / "a").unlink()  # the download alone will do
    sources.prepare(source, home)
    assert (home / "in" / "a").read_bytes() == b"content"
    left = {path.name for path in home.rglob("*") if path.is_file()}
    assert left == {"a", *(Path(file).name for file in source.downloads)}


def test_a_download_with_the_wrong_checksum_is_thrown_away(tmp_path):
    source = gz_source(tmp_path / "server", b"content")
    (tmp_path / "server" / "a.gz").write_bytes(b"a login page")
    with pytest.raises(DataError, match=checksum(b"a login page")):
        sources.prepare(source, tmp_path / "home")
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


# --- the real files -----------------------------------------------------------------------------


def real(name: str, marker: str) -> Path:
    """Return the data directory, or skip: these tests never download."""
    root = os.environ.get(DIRECTORY_VARIABLE)
    if not root or not (Path(root) / marker).exists():
        pytest.skip(f"{name}: set {DIRECTORY_VARIABLE} to a directory that holds {marker}")
    return Path(root)


def test_mnist_is_torchvision_s():
    from torchvision.datasets import MNIST as REFERENCE

    root = real("mnist", "MNIST/raw/train-images-idx3-ubyte")
    splits = load_splits("mnist", root=root)
    train, test = REFERENCE(root, train=True), REFERENCE(root, train=False)
    assert torch.equal(splits.test.images[:, 0], test.data)
    assert torch.equal(splits.test.labels, test.targets)
    whole = ImageSet(train.data.unsqueeze(1), train.targets)
    assert samples(splits.train, splits.validation) == samples(whole)
    assert len(splits.validation) == 5000
    # The constants that everybody uses, of all 60,000.
    assert splits.mean == pytest.approx([0.1307], abs=1e-3)
    assert splits.std == pytest.approx([0.3081], abs=1e-3)


def test_cifar10_is_torchvision_s():
    from torchvision.datasets import CIFAR10 as REFERENCE

    root = real("cifar10", "cifar-10-batches-py/data_batch_1")
    splits = load_splits("cifar10", root=root)
    train, test = REFERENCE(root, train=True), REFERENCE(root, train=False)
    assert np.array_equal(splits.test.images.permute(0, 2, 3, 1).numpy(), test.data)
    assert splits.test.labels.tolist() == test.targets
    whole = ImageSet(
        torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(train.targets)
    )
    assert samples(splits.train, splits.validation) == samples(whole)
    assert splits.validation.labels.bincount().tolist() == [500] * 10
    assert splits.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    assert splits.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-3)
