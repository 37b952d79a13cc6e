"""The parts of a sampling update are timed in turn, on batches of the asked presample."""

from __future__ import annotations

from repeatlab.studies.diagnostics import sampling
from repeatlab.tasks.supervised import Supervised, SupervisedConfig


def test_every_presample_is_timed_in_every_round(monkeypatch):
    scored, trained = [], []

    class Counted(Supervised):
        def gradient_bounds(self, batch):
            scored.append(len(batch.images))
            return super().gradient_bounds(batch)

        def step(self, batch, report, weights=None):
            trained.append((len(batch.images), float(weights.min()), float(weights.max())))
            super().step(batch, report, weights)

    monkeypatch.setattr(sampling, "load_task", lambda _: Counted)
    config = SupervisedConfig(width=4, batch_size=8, lr=0.05)
    times = sampling.sampling_times(config, [2, 3], rounds=20, device="cpu")
    assert times["presample"].tolist() == [2, 3] * 20
    assert times["round"].tolist() == [n for n in range(20) for _ in (2, 3)]
    assert (times[list(sampling.SAMPLING)] > 0).all(axis=None)
    # Two rounds come first and are not counted.
    assert scored == [8] * (2 + 3) * 22
    assert [size for size, *_ in trained] == [8] * 2 * 22
    # It is an importance sample: the weights differ.
    assert any(low < high for _, low, high in trained)
