"""The Trainer of Hugging Face's transformers."""

import pytest
import torch
from recipes import BATCH, CLASSES, DATA, REPEATS, T, by_hand, counts, run, same
from torch import nn

from repeatlab import BatchRepeater

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


class Model(nn.Module):
    """As the library wants them: a dict with the loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, images, labels):
        logits = self.layer(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


SAMPLES = [{"images": image, "labels": label} for image, label in DATA]


def make(folder, repeats=None, **options):
    """Return a Trainer, the recipe's where there are `repeats`."""
    names = {"Trainer": transformers.Trainer, "TrainerCallback": transformers.TrainerCallback}
    names |= {"BatchRepeater": BatchRepeater, "repeats": repeats, "torch": torch}
    run("Hugging Face Trainer", names)
    run("Hugging Face Trainer", names, block=1)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=T,
        ignore_data_skip=repeats is not None,
        per_device_train_batch_size=BATCH,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    torch.manual_seed(0)
    if repeats is None:
        return transformers.Trainer(Model(), arguments, train_dataset=SAMPLES)
    callbacks = [names["KeepRepeater"]()]
    return names["RepeatingTrainer"](Model(), arguments, train_dataset=SAMPLES, callbacks=callbacks)


def test_once_each_it_trains_the_same_weights(tmp_path):
    plain, ours = make(tmp_path / "plain"), make(tmp_path / "ours", 1)
    for trainer in (plain, ours):
        torch.manual_seed(1)
        trainer.train()
        assert trainer.state.global_step == T
    assert counts(ours.repeater) == [1] * T
    assert same(ours.model, plain.model)


@pytest.mark.parametrize("seedable", [True, False])
def test_it_repeats_as_a_loop_by_hand_and_resumes(tmp_path, seedable):
    options = {"accelerator_config": {"use_seedable_sampler": seedable}, "save_steps": 1}
    ours = make(tmp_path / "ours", REPEATS, **options)
    ours.train()
    assert ours.state.global_step == T

    plain = make(tmp_path / "plain", **options)  # for its loader, optimizer and schedule
    loader = plain.get_train_dataloader()
    plain.create_optimizer_and_scheduler(T)

    def update(batch):
        loss = plain.model(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(plain.model.parameters(), plain.args.max_grad_norm)
        plain.optimizer.step()
        plain.lr_scheduler.step()
        plain.optimizer.zero_grad()
        return loss.item()

    transformers.set_seed(plain.args.seed)
    expected = by_hand(loader, update)
    assert counts(ours.repeater) == expected
    assert len(set(expected)) > 1
    assert same(ours.model, plain.model)

    for stop in (2, 9, 17):
        rest = make(tmp_path / "ours", REPEATS, **options)
        rest.train(resume_from_checkpoint=str(tmp_path / "ours" / f"checkpoint-{stop}"))
        assert rest.state.global_step == T
        assert rest.repeater.drain()["update"].tolist() == list(range(stop, T))
        assert same(rest.model, ours.model)
