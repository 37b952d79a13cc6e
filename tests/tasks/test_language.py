"""The language task: against tensor code written by hand, and what its data may show when."""

from __future__ import annotations

from collections import Counter
from math import gcd, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from repeatlab.core.schema import ConfigError, parse
from repeatlab.data import DataError
from repeatlab.data.sequences import load
from repeatlab.tasks.language import Language, LanguageConfig
from repeatlab.training.config import RunConfig
from repeatlab.training.making import train

SMALL = {"context": 12, "width": 12, "heads": 3, "batch_size": 4}


def build(seed: int = 0, **fields) -> Language:
    return Language(LanguageConfig(**SMALL | fields), seed=seed, device="cpu")


def numbers(rows: torch.Tensor, base: int, digits: int) -> list[tuple[int, int, int]]:
    """Return what lines of arithmetic say: left, right and the result, from their digits."""
    found = []
    for row in rows.tolist():
        left, right, result = (
            row[:digits],
            row[digits + 1 : 2 * digits + 1],
            row[2 * digits + 2 :],
        )
        assert (row[digits], row[2 * digits + 1], len(result)) == (base, base + 1, digits)
        value = [sum(d * base**k for k, d in enumerate(part[::-1])) for part in (left, right)]
        found.append((*value, sum(d * base**k for k, d in enumerate(result[::-1]))))
    return found


# --- the network ----------------------------------------------------------------------------------


def norm(x: torch.Tensor, weights: dict, name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def by_hand(weights: dict, characters: list[int], *, heads: int, layers: int) -> torch.Tensor:
    """Return the logits after every character of one sequence, one head and one place at a time."""
    x = weights["characters.weight"][characters] + weights["places.weight"][: len(characters)]
    length, width = x.shape
    size = width // heads
    for layer in range(layers):
        within = f"layers.{layer}."
        own = {k.removeprefix(within): w for k, w in weights.items() if k.startswith(within)}
        inner = norm(x, own, "attention_norm") @ own["attention.weight"].T + own["attention.bias"]
        mixed = torch.zeros(length, width, dtype=x.dtype)
        for head in range(heads):
            q, k, v = (
                inner[:, part * width + head * size : part * width + (head + 1) * size]
                for part in range(3)
            )
            for place in range(length):
                scores = (k @ q[place]) / size**0.5
                scores[place + 1 :] = -torch.inf
                odds = (scores - scores.max()).exp()
                mixed[place, head * size : (head + 1) * size] = (odds / odds.sum()) @ v
        x = x + mixed @ own["mixed.weight"].T + own["mixed.bias"]
        hidden = norm(x, own, "norm") @ own["hidden.weight"].T + own["hidden.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + hidden @ own["out.weight"].T + own["out.bias"]
    return norm(x, weights, "norm") @ weights["head.weight"].T


@pytest.mark.parametrize(
    "fields", [{}, {"tied": True, "layers": 1}, {"dataset": "gcd", "heads": 1, "layers": 3}]
)
def test_the_losses_are_those_of_a_forward_written_by_hand(fields):
    task = build(**fields)
    for index in range(5):  # weights that are no longer the first
        task.step(task.fresh_batch(index), lambda loss: None)
    batch, config = task.fresh_batch(5), task.config
    weights = {name: weight.double() for name, weight in task.model.state_dict().items()}
    losses, bounds = [], []
    for row in batch.characters.tolist():
        logits = by_hand(weights, row[:-1], heads=config.heads, layers=config.layers)
        answer = config.context if config.dataset == "english" else 2
        odds = logits.softmax(1)[-answer:]
        told = list(enumerate(row[-answer:]))
        losses.append(sum(-odds[place, character].log().item() for place, character in told))
        squares = sum(
            (odds[place] - torch.eye(odds.shape[1])[character]).square().sum().item()
            for place, character in told
        )
        bounds.append(squares**0.5 / answer)
        losses[-1] /= answer
    assert task.sample_losses(batch).tolist() == pytest.approx(losses, rel=1e-5)
    assert task.gradient_bounds(batch).tolist() == pytest.approx(bounds, rel=1e-4)
    reported = []
    task.step(batch, lambda *told: reported.append(told[0].item()))
    assert reported == [pytest.approx(sum(losses) / 4, rel=1e-5)]


def test_the_bound_is_the_norm_of_the_gradient_at_a_sequence_s_logits():
    task = build()
    batch = task.fresh_batch(0)
    logits = task.outputs(batch).detach().requires_grad_()
    losses, _ = task.losses(logits, batch)
    losses.sum().backward()
    expected = logits.grad.flatten(1).norm(dim=1).tolist()
    assert task.gradient_bounds(batch).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dataset", ["english", "addition"])
def test_at_first_all_characters_are_about_equally_likely(tied, dataset):
    task = build(dataset=dataset, tied=tied, width=64, heads=2)
    # Logits have a variance of 1/3 at first, which adds 1/6.
    expected = log(task.data.classes)
    assert expected - 0.1 < task.evaluate("train")["loss"] < expected + 0.4


def test_tied_logits_are_made_with_the_embedding_which_learns_from_both():
    tied, own = build(tied=True), build()
    assert tied.model.head.weight is tied.model.characters.weight
    sizes = [sum(w.numel() for w in task.model.parameters()) for task in (tied, own)]
    assert sizes[1] - sizes[0] == 12 * own.data.classes
    tied.step(tied.fresh_batch(0), lambda loss: None)
    assert tied.model.head.weight is tied.model.characters.weight
    again = build(tied=True, seed=1)
    again.load_state_dict(tied.state_dict())
    assert again.model.head.weight is again.model.characters.weight
    assert torch.equal(again.model.head.weight, tied.model.head.weight)


@given(st.integers(0, 11), st.integers(0, 50))
def test_what_comes_later_changes_no_earlier_output(place, character):
    task = CAUSAL
    before = task.stream.data[:2, :-1].long()
    after = before.clone()
    after[:, place] = (after[:, place] + 1 + character) % task.data.classes
    with torch.no_grad():
        first, second = task.model(before), task.model(after)
    assert torch.equal(first[:, :place], second[:, :place])
    assert not torch.isclose(first[:, place], second[:, place]).all()


CAUSAL = build()


def test_at_its_defaults_it_has_the_size_that_is_stated():
    task = Language(LanguageConfig(), seed=0, device="cpu")
    classes = task.data.classes
    layer = 4 * 64 + 64 * 192 + 192 + 64 * 64 + 64 + 64 * 256 + 256 + 256 * 64 + 64
    count = sum(weight.numel() for weight in task.model.parameters())
    assert count == 2 * classes * 64 + 64 * 64 + 2 * layer + 2 * 64
    assert count == pytest.approx(117_000, rel=0.05)
    assert task.tokens == 16 * 64


# --- the data -------------------------------------------------------------------------------------


def test_a_text_is_cut_into_stretches_that_hold_all_of_it_in_order(tmp_path):
    text = "".join(chr(97 + (k * k) % 23) for k in range(505)) + "\nüé☃"
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    data = load(f"{tmp_path}/own.txt", context=12, numbers=10, base=10)
    known = sorted(set(text))
    assert data.classes == len(known)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [42 - 4, 2, 2]
    rows = torch.cat([data.train, data.validation, data.test]).tolist()
    assert "".join(known[c] for row in rows for c in row[:-1]) == text[: 42 * 12]
    assert [row[-1] for row in rows[:-1]] == [row[0] for row in rows[1:]]


def test_a_text_is_named_by_what_it_holds(tmp_path):
    def name(text: str) -> str:
        (tmp_path / "own.txt").write_text(text)
        return load(f"{tmp_path}/own.txt", context=5, numbers=10, base=10).name

    first = name("abc" * 99)
    assert first.startswith("own-")
    assert name("abd" * 99) != first
    assert name("abc" * 99) == first
    assert load("english", context=5, numbers=10, base=10).name.startswith("english-")


def test_what_is_no_text_is_refused_with_its_file(tmp_path):
    (tmp_path / "short.txt").write_text("abc" * 20)
    (tmp_path / "latin.txt").write_bytes("für".encode("latin1") * 999)
    for name, message in {
        "missing": "dataset .* must be a text file in UTF-8; there is neither",
        "short": "short: a text must have 481 characters or more, 40 times the context of 12; not",
        "latin": "latin.txt must be a text file in UTF-8",
    }.items():
        with pytest.raises(DataError, match=message):
            load(f"{tmp_path}/{name}.txt", context=12, numbers=10, base=10)


@pytest.mark.parametrize(("count", "base", "digits"), [(23, 10, 2), (12, 2, 4), (17, 40, 1)])
@pytest.mark.parametrize("name", ["gcd", "addition"])
def test_arithmetic_is_right_and_has_every_pair_once(name, count, base, digits):
    data = load(name, context=64, numbers=count, base=base)
    rows = torch.cat([data.train, data.validation, data.test])
    lines = numbers(rows, base, digits)
    first = 1 if name == "gcd" else 0
    every = range(first, first + count)
    assert sorted(line[:2] for line in lines) == [(a, b) for a in every for b in every]
    for left, right, result in lines:
        assert result == (gcd(left, right) if name == "gcd" else (left + right) % count)
    assert (data.answer, data.classes) == (digits, base + 2)
    assert len(data.validation) == len(data.test) == count**2 // 20
    # In no order: what validates is not the largest numbers.
    assert len({line[0] for line in numbers(data.validation, base, digits)}) > 5


def test_an_answer_is_right_where_all_of_it_is_when_it_is_written_one_by_one():
    task = build(dataset="gcd", numbers=20, lr=0.01)
    for index in range(100):
        task.step(task.fresh_batch(index), lambda loss: None)
    rows = task.stream.data[-len(task.data.validation) :].long()
    right = 0
    for row in rows:
        written = row[: -task.data.answer]
        while len(written) < len(row):
            with torch.no_grad():
                logits = task.model(written[None])[0, -1]
            written = torch.cat([written, logits.argmax()[None]])
        right += int(torch.equal(written, row))
    assert 0 < right < len(rows)
    assert task.evaluate("train")["accuracy"] == pytest.approx(right / len(rows))


def test_bits_are_those_of_the_loss_over_all_of_a_split():
    task = build()
    rows = task.data.test.long()
    with torch.no_grad():
        logits = task.model(rows[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1).double(), rows[:, 1:].flatten()).item()
    found = task.evaluate("test")
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(loss / log(2), rel=1e-5)


# --- passes and sets ------------------------------------------------------------------------------


def drawn(task: Language, batches: int) -> list[int]:
    return torch.cat([task.stream.indices(index) for index in range(batches)]).tolist()


@given(samples=st.integers(12, 40), batch=st.integers(1, 60), seed=st.integers(0, 99))
def test_no_sequence_comes_again_before_a_pass_is_over(samples, batch, seed):
    task = build(seed, samples=samples, batch_size=batch)
    numbers = drawn(task, 3 * samples // batch + 3)
    passes = [numbers[at : at + samples] for at in range(0, len(numbers) - samples + 1, samples)]
    assert len(passes) >= 3
    assert all(sorted(one) == list(range(samples)) for one in passes)
    assert passes[0] != passes[1]
    # In any order that batches are asked for.
    assert task.stream.indices(1).tolist() == numbers[batch : 2 * batch]


def test_which_sequences_are_trained_on_is_the_seed_s_and_of_the_training_split():
    fields = {"dataset": "addition", "samples": 50}
    rows = [{*map(tuple, build(seed, **fields).stream.data.tolist())} for seed in range(2)]
    every = {*map(tuple, build(**fields).data.train.tolist())}
    assert len(rows[0]) == len(rows[1]) == 50 < len(rows[0] | rows[1])
    assert rows[0] | rows[1] <= every


@given(
    share=st.floats(0.01, 0.95), few=st.integers(1, 20), batch=st.integers(1, 9), k=st.integers(1)
)
def test_a_share_of_the_first_batches_is_of_the_repeated_set(share, few, batch, k):
    k %= 60
    task = build(samples=200, repeated_set=few, repeated_share=share, batch_size=batch)
    numbers = drawn(task, k) if k else []
    again = [number for number in numbers if number < few]
    assert len(again) == int(k * batch * share)
    # The others are still in passes.
    once = [number for number in numbers if number >= few]
    assert sorted(once[: 200 - few]) == sorted({*once[: 200 - few]})
    for index in range(k):  # a batch has what the share says, to the next whole one
        members = sum(n < few for n in numbers[index * batch : (index + 1) * batch])
        assert abs(members - batch * share) < 1


def test_the_repeated_set_is_drawn_evenly_and_both_sets_are_in_most_batches():
    task = build(samples=500, repeated_set=10, repeated_share=0.25, batch_size=8)
    batches = [task.stream.indices(index).tolist() for index in range(2_000)]
    assert {sum(number < 10 for number in batch) for batch in batches} == {2}
    counts = Counter(number for batch in batches for number in batch if number < 10)
    assert len(counts) == 10
    assert max(abs(count - 400) for count in counts.values()) < 5 * 400**0.5


def test_arms_with_a_repeated_set_are_arms_of_a_study_and_train(tmp_path):
    sets = {"samples": 300, "repeated_set": 20, "repeated_share": 0.5}
    task = SMALL | {"name": "language", "dataset": "gcd", "numbers": 30} | sets
    fields = {"task": task, "max_updates": 40, "evaluation": {"every": 20}, "device": "cpu"}
    run = train(parse(RunConfig, fields), tmp_path)
    assert set(run.evals["metric"]) == {"loss", "accuracy"}
    # 40 batches of 4: 80 draws from a set of 20, 80 others.
    distinct = run.summary["ledger"]["distinct_samples"]
    assert 80 + 10 <= distinct <= 80 + 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "englich"}, "dataset: unknown dataset 'englich'; did you mean 'english'?"),
        ({"heads": 5}, "heads must divide the width of 64; not 5"),
        ({"repeated_set": 5}, "repeated_set and repeated_share must both be above 0, or both 0"),
        ({"repeated_share": 0.5}, "repeated_set and repeated_share must both be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse(RunConfig, {"task": {"name": "language"} | fields, "max_updates": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 10**6}, "task.samples: must be at most the [0-9]+ sequences that english"),
        ({"samples": 10}, "task.batch_size: 16 exceeds the 10 samples that english trains on"),
        (
            {"samples": 30, "repeated_set": 20, "repeated_share": 0.5},
            "task.batch_size: 16 exceeds the 10 samples that english without its repeated set",
        ),
    ],
)
def test_sizes_that_the_data_do_not_have_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        LanguageConfig(**fields).prepare()
    LanguageConfig().prepare()
    with pytest.raises(ValueError, match="samples must be more than the repeated set's 20"):
        build(samples=20, repeated_set=20, repeated_share=0.5)


@pytest.mark.parametrize("sampler", ["hard_mining", "online", "rho_loss"])
def test_samplers_that_would_undo_the_share_are_refused(sampler):
    task = {"name": "language", "repeated_set": 50, "repeated_share": 0.25}
    fields = {"task": task, "method": {"sampler": {"name": sampler}}, "max_updates": 1}
    with pytest.raises(ConfigError, match="repeated_share means nothing"):
        parse(RunConfig, fields)
