"""What every kind of loader is held to: the plain loop's order, and a resume at every position."""

import subprocess
import sys

import loader_kinds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_kinds import (
    KINDS,
    LIBRARIES,
    LOADERS,
    by_hand,
    plain,
    repeater_of,
    run,
    seed_all,
)

from repeatlab.repetition.mappings import Constant, Linear, Quantile, Trace, Uniform, Until
from repeatlab.repetition.repeater import BatchRepeater

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [
    pytest.param(
        name,
        marks=[] if name in KINDS else pytest.mark.skip(f"{LIBRARIES[name][0]} is not installed"),
    )
    for name in LOADERS | LIBRARIES
]


# --- The contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_three_passes_are_those_of_the_plain_loop(name):
    seed_all(5)
    expected = by_hand(KINDS[name]())
    seed_all(5)
    with BatchRepeater(KINDS[name](), max_updates=len(expected)) as repeater:
        seen = []
        for batch in repeater:
            seen.append(plain(batch))
            repeater.report(1.0)
    assert seen == expected
    assert repeater.epoch == 2
    assert len(expected) >= 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every kind's visits, its states after each, and what another process made of those."""
    runs = {}
    for name in KINDS:
        seed_all(11)
        updates = len(by_hand(KINDS[name](), passes=1)) * 4 + 3  # over two passes of 7/4 visits
        seed_all(11)
        states = []
        runs[name] = updates, run(repeater_of(name, updates), states), states
    path = tmp_path_factory.mktemp("states") / "states.pt"
    torch.save({name: (updates, states) for name, (updates, _, states) in runs.items()}, path)
    process = subprocess.run(
        [sys.executable, loader_kinds.__file__, str(path)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stderr
    return runs, torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_another_process_goes_on_the_same_from_every_position(whole, name):
    runs, answers = whole
    updates, visits, _ = runs[name]
    assert len(visits) == updates + 1  # and what the generators give after it
    for made, rest in enumerate(answers[name], start=1):
        assert rest == visits[made:], f"resumed after update {made}"


WORKERS = ["workers", "persistent", "workers' stream"]
MAPPINGS = st.one_of(
    st.builds(Constant, st.integers(1, 3)),
    st.builds(Uniform, st.just(1), st.integers(1, 4), st.integers(0, 9)),
    st.builds(Linear, st.floats(0.1, 1.0)),
    st.builds(Until, st.floats(0.1, 1.0), st.integers(1, 4)),
    st.builds(Quantile, st.just((0.5, 0.8)), st.integers(1, 4)),
    st.builds(Trace, st.lists(st.integers(1, 4), min_size=30, max_size=30)),
)


@pytest.mark.parametrize("made", range(1, 9))
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_loader_that_was_restored_beside_the_repeater_loses_no_batch(made, repeats):
    """As checkpoints of frameworks do, that hold the states of all they have prepared."""
    stateful_loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def new():
        loader = stateful_loader(list(range(12)), batch_size=3)
        return loader, BatchRepeater(loader, repeats=Constant(repeats), max_updates=12)

    def visits(repeater, states, loader):
        for batch in repeater:
            repeater.report(torch.tensor(1.0))
            states.append((repeater.state_dict(), loader.state_dict(), batch.tolist()))

    loader, repeater = new()
    whole: list = []
    visits(repeater, whole, loader)
    state, own, _ = whole[made - 1]
    again, resumed = new()
    again.load_state_dict(own)
    resumed.load_state_dict(state)
    rest: list = []
    visits(resumed, rest, again)
    assert [batch for *_, batch in rest] == [batch for *_, batch in whole[made:]]


@settings(max_examples=200, deadline=None)
@given(
    # One in twenty with workers, which take their time to start.
    name=st.integers(0, 19).flatmap(
        lambda i: st.sampled_from(WORKERS if i == 0 else sorted(KINDS.keys() - set(WORKERS)))
    ),
    mapping=MAPPINGS,
    updates=st.integers(2, 25),
    stop=st.integers(1, 24),
    seed=st.integers(0, 99),
)
def test_a_resume_is_the_unbroken_run(name, mapping, updates, stop, seed):
    seed_all(seed)
    states = []
    visits = run(repeater_of(name, updates, mapping), states)
    made = min(stop, updates)
    seed_all(seed + 1)
    resumed = repeater_of(name, updates, mapping)
    resumed.load_state_dict(states[made - 1])
    assert len(resumed) == updates - made
    assert run(resumed) == visits[made:]
