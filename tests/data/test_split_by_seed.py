"""The split between training and validation that is drawn by seed."""

from __future__ import annotations

import pytest
import torch

from repeatlab.core.schema import ConfigError
from repeatlab.core.seeding import derive
from repeatlab.data import load_splits
from repeatlab.training import making
from repeatlab.training.config import RunConfig


def run_config(name: str = "supervised", *, seed: int = 0, split: str = "by_seed", **fields):
    sizes = {"model": "mlp"} if name == "supervised" else {}
    task = {"name": name, "split": split, "batch_size": 8} | sizes
    return RunConfig.from_json({"task": task, "max_updates": 4, "seed": seed} | fields)


def images(split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_fixed_is_the_default_and_the_same_for_every_seed():
    data = [making.build_task(run_config(split="fixed", seed=s), "cpu").data for s in (0, 1)]
    assert RunConfig.from_json({"task": {"name": "supervised"}, "max_updates": 1}).task.split == (
        "fixed"
    )
    for one in data:
        assert torch.equal(one.validation.images, load_splits("digits").validation.images)


def test_by_seed_other_images_validate_and_the_test_split_stays():
    first, second = (making.build_task(run_config(seed=s), "cpu").data for s in (0, 1))
    assert images(first.validation) != images(second.validation)
    assert torch.equal(first.test.images, second.test.images)
    assert len(first.validation) == len(second.validation)
    for one in (first, second):
        assert not images(one.validation) & images(one.test)
        together = torch.cat([one.train.images, one.validation.images])
        whole = load_splits("digits")
        assert sorted(map(bytes, together.numpy())) == sorted(
            map(bytes, torch.cat([whole.train.images, whole.validation.images]).numpy())
        )


def test_all_arms_of_a_seed_have_one_split():
    arms = [{}, {"mapping": {"name": "constant", "repeats": 3}}, {"rate": 0.5}]
    data = [making.build_task(run_config(method=arm), "cpu").data for arm in arms]
    for other in data[1:]:
        assert torch.equal(data[0].train.images, other.train.images)


def test_what_is_pretrained_never_sees_the_run_s_validation_images(monkeypatch):
    """The first half is learnt beforehand: on the training part of the same split."""
    from repeatlab.tasks import pretraining

    seen = []
    make = pretraining.make_stream

    def watched(train, *arguments, **settings):
        seen.append(train)
        return make(train, *arguments, **settings)

    monkeypatch.setattr(pretraining, "make_stream", watched)
    task = {"name": "continual", "split": "by_seed", "pretraining": {"updates": 1}}
    config = RunConfig.from_json({"task": task, "max_updates": 1, "seed": 11})
    built = making.build_task(config, "cpu")
    (train,) = seen
    assert images(train) <= images(built.data.train)
    assert not images(train) & images(built.data.validation)


def test_arms_with_models_of_other_seeds_are_refused():
    method = {"sampler": {"name": "rho_loss"}}
    with pytest.raises(ConfigError, match="by_seed"):
        run_config(method=method)
    run_config(split="fixed", method=method)


def test_the_split_is_that_of_the_seed_of_the_run_s_streams():
    config = run_config(seed=5)
    expected = load_splits("digits", split_seed=derive(config.stream_seed, "split"))
    found = making.build_task(config, "cpu").data
    assert torch.equal(found.validation.images, expected.validation.images)
