"""Random numbers as a function of (seed, stream, index), whatever was drawn before."""

from __future__ import annotations

import torch

from repeatlab.core.seeding import BLOCK, EndlessDraws, generator


def draw(g: torch.Generator, numbers: range) -> list[tuple[int, float]]:
    return list(zip(numbers, torch.rand(len(numbers), generator=g).tolist(), strict=True))


def test_a_row_is_the_same_whichever_was_asked_for_before():
    rows = [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 7]
    forwards, backwards = EndlessDraws(3, "s", draw), EndlessDraws(3, "s", draw)
    found = {row: forwards[row] for row in rows}
    assert {row: backwards[row] for row in reversed(rows)} == found
    for row, (number, value) in found.items():
        block, place = divmod(row, BLOCK)
        assert number == row
        assert value == torch.rand(BLOCK, generator=generator(3, "s", block))[place].item()


def test_tables_of_other_seeds_and_streams_are_others():
    tables = [EndlessDraws(seed, stream, draw) for seed in (0, 1) for stream in ("a", "b")]
    assert len({table[5] for table in tables}) == 4
