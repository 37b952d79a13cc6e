"""The sampler that looks at few samples from many sides: augmentation multiplicity."""

from __future__ import annotations

from repeatlab.methods.sampling.running import RunningSampler, Selection


class RunningMultiplicity(RunningSampler):
    """See `repeatlab.methods.sampling.Multiplicity`."""

    def fresh_batch(self, index: int) -> Selection:
        views = self.settings.views
        block, part = divmod(index, views)
        samples = self.task.candidates(index, block).indices.chunk(views)[part]
        return self.unweighted(self.task.batch_of(samples.repeat(views), index))
