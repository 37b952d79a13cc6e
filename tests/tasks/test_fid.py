"""The Fréchet distance against torchmetrics and the closed form; the extractors and their cache."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from repeatlab.core.tensor_files import write_tensors
from repeatlab.data import DataError, Splits, load_splits
from repeatlab.data.augment import to_uint8
from repeatlab.data.sources import DIRECTORY_VARIABLE
from repeatlab.tasks import fid
from repeatlab.tasks.fid import Fid, gaussian_distance, moments
from repeatlab.tasks.models import norm_cnn

pytestmark = pytest.mark.usefixtures("one_thread")


def distance_of(features: np.ndarray, others: np.ndarray) -> float:
    return gaussian_distance(*moments(features), *moments(others))


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_splits("digits")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty data directory and process cache, and a classifier that is trained briefly."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setattr(fid, "CLASSIFIER_UPDATES", 4)
    monkeypatch.setattr(fid, "_loaded", {})
    return tmp_path / "data"


# --- the distance -------------------------------------------------------------------------------


def commuting(values: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two covariances with the same eigenvectors and these eigenvalues."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(values),) * 2))
    return (basis * values) @ basis.T, (basis * others) @ basis.T


@pytest.mark.parametrize(
    ("values", "others"),
    [
        (np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])),
        (np.array([0.0, 2.0, 5.0]), np.array([3.0, 0.0, 5.0])),  # singular, both
        (np.array([1e-3, 1.0, 1e3]), np.array([1.0, 1e-3, 1e3])),
    ],
)
def test_two_gaussians_have_the_distance_of_the_closed_form(values, others):
    """Commuting covariances: |m1 - m2|^2 + sum of (sqrt(a) - sqrt(b))^2 over eigenvalues."""
    mean, other = np.array([1.0, -2.0, 0.5]), np.array([0.0, 2.0, 1.5])
    expected = 1 + 16 + 1 + ((np.sqrt(values) - np.sqrt(others)) ** 2).sum()
    first, second = commuting(values, others)
    assert gaussian_distance(mean, first, other, second) == pytest.approx(expected, rel=1e-6)
    assert gaussian_distance(other, second, mean, first) == pytest.approx(expected, rel=1e-6)


def test_covariances_that_do_not_commute_agree_with_scipy_s_matrix_root():
    from scipy.linalg import sqrtm

    draws = np.random.default_rng(1)
    scales = draws.uniform(0.2, 3, (2, 6, 1))
    first, second = (np.cov(draws.normal(size=(6, 40)) * scale) for scale in scales)
    mean, other = draws.normal(size=(2, 6))
    expected = np.sum((mean - other) ** 2) + np.trace(first + second - 2 * sqrtm(first @ second))
    assert gaussian_distance(mean, first, other, second) == pytest.approx(expected.real, rel=1e-9)


def test_equal_sets_have_no_distance_and_shifted_ones_that_of_the_shift():
    features = np.random.default_rng(2).normal(size=(50, 8))
    assert distance_of(features, features) == pytest.approx(0, abs=1e-9)
    assert distance_of(features, features + 3) == pytest.approx(8 * 9, rel=1e-9)


class Projection(nn.Module):
    """A fixed random projection of pixels, as torchmetrics wants its extractors."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.projection = torch.randn(3 * 16 * 16, self.num_features, generator=draws)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.projection


def test_it_agrees_with_torchmetrics_on_the_same_features():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance

    draws = torch.Generator().manual_seed(1)
    real = torch.rand((200, 3, 16, 16), generator=draws)
    generated = torch.rand((150, 3, 16, 16), generator=draws) ** 1.3
    extractor = Projection()
    metric = FrechetInceptionDistance(feature=extractor, normalize=True)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    features = [extractor(images).numpy() for images in (generated, real)]
    expected = metric.compute().item()
    assert expected > 1
    assert distance_of(*features) == pytest.approx(expected, rel=1e-3)


# --- images -------------------------------------------------------------------------------------


def test_pixels_are_rounded_to_the_nearest_level():
    values = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 1.2])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_the_metric_is_the_distance_of_its_own_features_under_its_own_name(digits):
    metric = Fid(digits, "classifier")
    assert metric.name == "fid_classifier"
    images = digits.train.images[:200]
    first = metric.features(images)
    assert first.shape == (200, 4 * fid.CLASSIFIER_WIDTH)
    expected = distance_of(first, metric.features(digits.test.images))
    assert metric(images, "test") == pytest.approx(expected, rel=1e-9)
    assert metric(digits.test.images, "test") == pytest.approx(0, abs=1e-6)


def test_the_more_noise_the_further_from_real(digits):
    metric = Fid(digits, "classifier")
    real = digits.train.images[:359]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    images = [to_uint8(real / 255 + amount * noise) for amount in (0.0, 0.1, 0.3)]
    scores = [metric(noisy, "validation") for noisy in images]
    assert scores[0] < scores[1] < scores[2]


def test_the_classifier_knows_its_digits(digits):
    network = fid.load_classifier(digits)
    images = fid.normalize(digits.test.images, digits.mean, digits.std)
    with torch.no_grad():
        guesses = network(images).argmax(1)
    assert (guesses == digits.test.labels).float().mean() > 0.95


def test_the_features_are_those_before_the_classifier_s_last_layer(digits):
    network, metric = fid.load_classifier(digits), Fid(digits, "classifier")
    images = digits.test.images[:7]
    with torch.no_grad():
        logits = network(fid.normalize(images, digits.mean, digits.std))
        features = torch.from_numpy(metric.features(images)).float()
        torch.testing.assert_close(network[-1](features), logits)


# --- the cache ----------------------------------------------------------------------------------


def parameters(network: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in network.state_dict().values()])


def test_the_classifier_is_trained_once_and_the_same_each_time(digits, own_cache, monkeypatch):
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = parameters(fid.load_classifier(digits))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    (file,) = own_cache.rglob("*.pt")
    assert not [path for path in own_cache.rglob("*") if path.name.startswith(".write")]

    file.unlink()
    torch.manual_seed(8)
    assert torch.equal(parameters(fid.load_classifier(digits)), first)

    monkeypatch.setattr(fid, "train_classifier", lambda *_: pytest.fail("trained a second time"))
    loaded = fid.load_classifier(digits)
    assert torch.equal(parameters(loaded), first)
    assert not loaded.training


@pytest.mark.parametrize("content", ["nothing", "torn", "a list", "another network", "flipped"])
def test_a_damaged_file_or_one_of_something_else_is_made_anew(digits, own_cache, content):
    first = parameters(fid.load_classifier(digits))
    (file,) = own_cache.rglob("*.pt")
    whole = file.read_bytes()
    spoilt = {"nothing": [b""], "torn": [whole[:1000]], "flipped": flips(whole, 40)}
    for damage in spoilt.get(content, [None]):
        if content == "a list":
            write_tensors(file, [1, 2])
        elif content == "another network":
            write_tensors(file, norm_cnn(3, 7, width=16).state_dict())
        else:
            file.write_bytes(damage)
        assert torch.equal(parameters(fid.load_classifier(digits)), first)
        assert file.read_bytes() == whole


def flips(content: bytes, count: int):
    """Yield `content` with one bit flipped, at so many places."""
    for place in range(0, len(content), len(content) // count):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << place % 8
        yield spoilt


def test_a_directory_that_cannot_be_written_is_no_obstacle(digits, own_cache, monkeypatch):
    own_cache.write_text("a file where the directory should be")
    assert not fid.load_classifier(digits).training
    assert own_cache.is_file()


def test_preparing_leaves_the_weights_on_disk_for_the_workers(own_cache):
    fid.prepare("classifier", "digits")
    assert len(list(own_cache.rglob("*.pt"))) == 1


# --- Inception ----------------------------------------------------------------------------------


def test_inception_without_its_weights_says_what_to_do(digits, own_cache, monkeypatch):
    from torchvision.models import Inception_V3_Weights

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(Inception_V3_Weights, "get_state_dict", unreachable)
    with pytest.raises(DataError, match=r"no route to host.*extractor: classifier"):
        fid.prepare("inception", "digits")


@pytest.fixture
def torchvision_s(monkeypatch):
    """torchvision's own network for its weights, in whose place weights are drawn here."""
    from torchvision.models import Inception_V3_Weights, inception_v3

    torch.manual_seed(0)
    state = inception_v3(weights=None, init_weights=False).state_dict()
    monkeypatch.setattr(Inception_V3_Weights, "get_state_dict", lambda *_, **__: state)
    return inception_v3(weights=Inception_V3_Weights.IMAGENET1K_V1).eval()


def first_inputs(network: nn.Module) -> list[torch.Tensor]:
    """Return a list of what the first convolution will have been given."""
    seen: list[torch.Tensor] = []
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    return seen


def test_inception_gives_the_pooled_features_of_torchvision_s_network(
    digits, own_cache, torchvision_s
):
    from torchvision.models import Inception_V3_Weights

    pooled, theirs = [], first_inputs(torchvision_s)
    torchvision_s.avgpool.register_forward_hook(lambda module, given, out: pooled.append(out))
    images = digits.test.images[:2]
    preprocess = Inception_V3_Weights.IMAGENET1K_V1.transforms(resize_size=299, crop_size=299)
    with torch.no_grad():
        torchvision_s(preprocess(images.expand(-1, 3, -1, -1)))

    metric = Fid(digits, "inception")
    assert metric.name == "fid_inception"
    network = fid.load_extractor("inception", digits, images.device)
    ours = first_inputs(network.network)
    features = metric.features(images)
    assert features.shape == (2, 2048)
    # The preset rounds the enlarged images to bytes again: half a level of 1 / 127.5.
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0.5 / 127.5 + 1e-5)
    expected = pooled[0].flatten(1).double().numpy()
    np.testing.assert_allclose(features, expected, rtol=0.05, atol=0.02 * expected.max())


@pytest.mark.parametrize(("pixel", "value"), [(0, -1.0), (51, -0.6), (255, 1.0)])
def test_inception_sees_pixels_from_minus_one_to_one(
    digits, own_cache, torchvision_s, pixel, value
):
    network = fid.load_extractor("inception", digits, torch.device("cpu"))
    seen = first_inputs(network.network)
    network(torch.full((1, 3, 32, 32), pixel, dtype=torch.uint8))
    torch.testing.assert_close(seen[0], torch.full((1, 3, 299, 299), value), rtol=0, atol=1e-5)
