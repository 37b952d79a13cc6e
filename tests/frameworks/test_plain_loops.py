"""Recipes for plain scripts: torch alone, streams, a replay buffer, samplers."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from recipes import (
    BATCH,
    CLASSES,
    DATA,
    IMAGES,
    LABELS,
    REPEATS,
    Stopped,
    T,
    by_hand,
    check_loop,
    counts,
    one_update,
    partial,
    problem,
    run,
    same,
    sections,
    state_of,
    weights,
)
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import IterableDataset

from repeatlab import BatchRepeater, grouped
from repeatlab.methods import draws


def test_no_recipe_is_longer_than_ten_lines_and_none_is_forgotten():
    for title, blocks in sections().items():
        assert blocks, title
        for block in blocks:
            assert len([line for line in block.splitlines() if line.strip()]) <= 10, title
    assert list(sections())[:2] == ["Plain loop", "Epochs"]


def test_a_plain_loop():
    check_loop("Plain loop", problem, one_update)


def test_it_goes_on_in_a_fresh_script_by_what_was_saved(tmp_path):
    whole = run("Plain loop", problem() | {"BatchRepeater": BatchRepeater})
    first = problem() | {"BatchRepeater": partial(until=10), "path": tmp_path / "state.pt"}
    run("Plain loop", run("Plain loop", first), block=1)
    second = problem(seed=5) | {"path": first["path"]}

    def load(repeater):
        run("Plain loop", second | {"repeater": repeater}, block=2)

    run("Plain loop", second | {"BatchRepeater": partial(load)})
    assert same(second["model"], whole["model"])
    assert len(second["steps"]) == T - 10


@pytest.mark.parametrize("stop", [1, 3])
def test_epochs(stop):
    epochs, updates = 4, 4 * 5

    def make():
        names = problem() | {"epochs": epochs, "BatchRepeater": BatchRepeater, "validated": []}
        names["validate"] = lambda model: names["validated"].append(copy.deepcopy(model))
        names["scheduler"] = torch.optim.lr_scheduler.StepLR(names["optimizer"], 1, gamma=0.7)
        return names

    names, plain = run("Epochs", make()), make()
    step, made = one_update(plain), []

    def update(batch):
        loss = step(batch)
        made.append(loss)
        if len(made) % 5 == 0:
            plain["scheduler"].step()
        return loss

    assert counts(names["repeater"]) == by_hand(plain["loader"], update, updates=updates)
    assert len(names["steps"]) == updates
    assert len(names["validated"]) == epochs
    assert same(names["model"], plain["model"])

    first = make()

    def validate(model):
        first["validated"].append(model)
        if len(first["validated"]) == stop:
            raise Stopped

    first["validate"] = validate
    with pytest.raises(Stopped):
        run("Epochs", first)
    load, second = state_of(first, "model", "optimizer", "scheduler"), make()

    class Resumed(BatchRepeater):
        def epochs(self, n):
            load(second, self)
            return super().epochs(n)

    run("Epochs", second | {"BatchRepeater": Resumed})
    assert len(second["validated"]) == epochs - stop
    assert same(second["model"], names["model"])


# --- torch's own ----------------------------------------------------------------------------------


def test_gradient_accumulation():
    k = 2

    def update_of(names):
        def update(group):
            names["optimizer"].zero_grad()
            losses = [names["loss_fn"](names["model"](x), y) / len(group) for x, y in group]
            for loss in losses:
                loss.backward()
            names["optimizer"].step()
            return float(sum(losses).detach())

        return update

    def groups(names):
        class Groups:
            def __iter__(self):
                batches = list(names["loader"])
                return iter([batches[:2], batches[2:4], batches[4:]])

        return Groups()

    def make():
        return problem() | {"k": k, "grouped": grouped}

    check_loop("Gradient accumulation", make, update_of, hand=groups)


def test_grad_scaler():
    def make():
        names = problem()
        names["loss_fn"] = lambda logits, labels: cross_entropy(logits.float(), labels)
        return names | {"device": "cpu", "dtype": torch.bfloat16}

    def update_of(names):
        scaler = torch.amp.GradScaler("cpu")

        def update(batch):
            with torch.autocast("cpu", torch.bfloat16):
                loss = names["loss_fn"](names["model"](batch[0]), batch[1])
            names["optimizer"].zero_grad()
            scaler.scale(loss).backward()
            scaler.step(names["optimizer"])
            scaler.update()
            return loss.item()

        return update

    check_loop("GradScaler", make, update_of)


def test_torch_compile():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def make():
        torch.compiler.reset()
        compilations.clear()
        return problem() | {"options": {"backend": backend}}

    check_loop("torch.compile", make, one_update)
    run("torch.compile", make() | {"BatchRepeater": BatchRepeater})
    assert 1 <= len(compilations) <= 2  # a last batch that is smaller may be another


def test_lbfgs():
    def make():
        return problem(optimizer=lambda weights: torch.optim.LBFGS(weights, lr=0.1, max_iter=3))

    def update_of(names):
        def update(batch):
            def closure():
                names["optimizer"].zero_grad()
                loss = names["loss_fn"](names["model"](batch[0]), batch[1])
                loss.backward()
                return loss

            return names["optimizer"].step(closure).item()

        return update

    check_loop("LBFGS", make, update_of)


# --- what is no data set --------------------------------------------------------------------------


class Agent:
    """Acts in CartPole by the larger of two logits; samples of its buffer by (seed, index)."""

    def __init__(self):
        self.environment = gymnasium.make("CartPole-v1")
        self.state, _ = self.environment.reset(seed=0)
        self.buffer, self.steps = [], 0

    def act(self, model):
        with torch.no_grad():
            action = int(model(torch.as_tensor(self.state))[:2].argmax())
        after, reward, ended, *_ = self.environment.step(action)
        self.buffer.append((self.state, action, reward, after, ended))
        self.state = self.environment.reset()[0] if ended else after
        self.steps += 1

    def sample(self, index):
        places = np.random.default_rng((0, index)).integers(len(self.buffer), size=16)
        states, actions, rewards, after, ended = zip(*(self.buffer[i] for i in places), strict=True)
        values = torch.tensor(np.array(after)), torch.tensor(rewards), torch.tensor(ended)
        return (torch.tensor(np.array(states)), torch.tensor(actions)), values


def test_deep_q_learning():
    def make():
        names = problem() | {"agent": Agent(), "warm_up": 20, "steps_per_batch": 3}
        target = copy.deepcopy(names["model"])

        def td_loss(values, rest):
            after, rewards, ended = rest
            with torch.no_grad():
                best = target(after).max(dim=1).values * ~ended
            return 2 * nn.functional.smooth_l1_loss(values, rewards.float() + 0.9 * best)

        return names | {"loss_fn": td_loss}

    def update_of(names):
        return one_update(
            names | {"model": lambda s: names["model"](s[0]).gather(1, s[1][:, None])[:, 0]}
        )

    def train(names, repeater):
        model = names["model"]
        for (states, actions), rest in repeater:
            values = model(states).gather(1, actions[:, None])[:, 0]
            loss = names["loss_fn"](values, rest)
            repeater.report(loss)
            names["optimizer"].zero_grad()
            loss.backward()
            names["optimizer"].step()

    class Acting:
        """By hand: steps of the environment, then a batch."""

        def __init__(self, names):
            self.names, self.index = names, 0

        def __iter__(self):
            agent = self.names["agent"]
            while True:
                wanted = 20 if self.index == 0 else 3
                for _ in range(wanted):
                    agent.act(self.names["model"])
                yield agent.sample(self.index)
                self.index += 1

    for repeats in (1, REPEATS):
        names = make() | {"repeats": repeats, "BatchRepeater": BatchRepeater}
        train(names, run("Deep Q-learning", names)["repeater"])
        plain = make()
        expected = by_hand(Acting(plain), update_of(plain), repeats)
        assert counts(names["repeater"]) == expected
        assert len(names["steps"]) == T
        assert names["agent"].steps == plain["agent"].steps == 20 + 3 * (len(expected) - 1)
        assert same(names["model"], plain["model"])
    assert len(set(expected)) > 1
    for stop in (2, 9, 17):
        first = make() | {"BatchRepeater": partial(until=stop)}
        train(first, run("Deep Q-learning", first)["repeater"])
        load = state_of(first, "model", "optimizer")
        second = make() | {"agent": copy.deepcopy(first["agent"])}
        second["BatchRepeater"] = partial(lambda repeater: load(second, repeater))  # noqa: B023
        train(second, run("Deep Q-learning", second)["repeater"])
        assert same(second["model"], names["model"])
        assert second["agent"].steps == names["agent"].steps


class Stream(IterableDataset):
    """Samples in an order of its own in every epoch, a share of them for each worker."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(DATA)).tolist()
        worker = torch.utils.data.get_worker_info()
        part = slice(None) if worker is None else slice(worker.id, None, worker.num_workers)
        return (DATA[i] for i in order[part])


def test_streaming_data_sets():
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        names = problem() | {"stream": Stream(), "workers": 0}
        return names | {"StatefulDataLoader": stateful.StatefulDataLoader}

    def by_plain_torch(names):
        class Epochs:
            def __init__(self):
                self.loader = torch.utils.data.DataLoader(names["stream"], BATCH)

            def set_epoch(self, epoch):
                names["stream"].set_epoch(epoch)

            def __iter__(self):
                return iter(self.loader)

        return Epochs()

    check_loop("Streaming data sets", make, one_update, hand=by_plain_torch)


# --- samplers -------------------------------------------------------------------------------------


def sampling(title, **more):
    names = problem() | more | {"batch_size": BATCH, "seed": 7, "cross_entropy": cross_entropy}
    run("Samplers in a loop of your own", names)
    return run(title, names)


def mean_step(names, losses):
    names["optimizer"].zero_grad()
    losses.mean().backward()
    names["optimizer"].step()


def places_by(p, count, generator):
    """Return places drawn in proportion to p, by inversion."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
    return np.searchsorted(np.cumsum(p), uniform * p.sum(), side="right").tolist()


def test_online_selection():
    names = sampling("Online selection", images=IMAGES, labels=LABELS)
    assert len(names["steps"]) == T
    # By hand: ranks of what was seen last, what was never seen first, as equation 3 says.
    plain, last, largest = problem(), np.full(len(DATA), np.nan), 1.0
    for update in range(T):
        order = np.argsort(-np.where(np.isnan(last), largest, last), kind="stable")
        p = 100.0 ** (-np.arange(len(order)) / len(order))
        places, generator = {}, draws(7, update)
        while len(places) < BATCH:
            places |= dict.fromkeys(places_by(p, 2 * BATCH, generator))
        chosen = order[list(places)[:BATCH]]
        losses = cross_entropy(plain["model"](IMAGES[chosen]), LABELS[chosen], reduction="none")
        mean_step(plain, losses)
        last[chosen] = losses.detach().numpy()
        largest = max(largest if update else 0.0, np.nanmax(last))
    assert same(names["model"], plain["model"])


def test_importance_sampling():
    random = torch.Generator().manual_seed(0)
    chunks = [torch.randperm(len(DATA), generator=random)[: 3 * BATCH] for _ in range(60)]
    presamples = [(IMAGES[chunk], LABELS[chunk]) for chunk in chunks]
    names = problem() | {"presamples": presamples, "one_hot": one_hot, "classes": CLASSES}
    names |= {"batch_size": BATCH, "seed": 7, "cross_entropy": cross_entropy}
    names["step"] = lambda losses: mean_step(names, losses)
    run("Samplers in a loop of your own", names)
    names["tau_threshold"] = lambda presample, k: 1.02  # so that it is on for a part of the run
    run("Importance sampling", names)
    assert len(names["steps"]) == len(presamples)
    # By hand: algorithm 1, places in proportion to the scores, weights 1 / (B p).
    plain, average, on = problem(), 0.0, []
    for update, (x, y) in enumerate(presamples):
        on.append(average > 1.02)
        x, y = x[: 3 * BATCH if on[-1] else BATCH], y[: 3 * BATCH if on[-1] else BATCH]
        with torch.no_grad():
            logits = plain["model"](x).double().numpy()
        share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        share[np.arange(len(y)), y] -= 1
        p = np.linalg.norm(share, axis=1)
        p /= p.sum()
        average = 0.9 * average + 0.1 * len(p) ** 0.5 * np.linalg.norm(p)
        chosen, factors = np.arange(BATCH), np.ones(BATCH)
        if on[-1]:
            chosen = places_by(p, BATCH, draws(7, update))
            factors = 1 / (len(p) * p[chosen])
        losses = cross_entropy(plain["model"](x[chosen]), y[chosen], reduction="none")
        mean_step(plain, torch.tensor(factors).float() * losses)
    assert 5 < sum(on) < 55
    torch.testing.assert_close(weights(names["model"]), weights(plain["model"]))
