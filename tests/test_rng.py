"""Keyed random numbers: those of many streams at once are those of each one alone."""

import numpy as np
import pytest

from vitscale import rng


@pytest.mark.parametrize("num_rows", [1, 3, 12, 13, 200])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_rows_are_the_numbers_of_each_stream(num_rows: int, n: int, seed: int) -> None:
    ids = np.random.default_rng(0).integers(0, 2**63, (num_rows, 3))
    ids[0] = 0
    rows = rng.uniform_rows(n, seed, ("crop", "flip", "erase"), ids)
    expected = [
        [rng.uniform(n, seed, domain, *row) for row in ids.tolist()] for domain in ("crop", "flip", "erase")
    ]
    assert rows.shape == (3, num_rows, n) and np.array_equal(rows, np.array(expected))


def test_the_numbers_of_a_stream_never_change() -> None:
    rows = rng.uniform_rows(2, 3, ("flip", "crop"), np.arange(60).reshape(20, 3))
    assert rows[:, ::9].tolist() == RECORDED


RECORDED = [
    [
        [0.33869416008100606, 0.8156692804922735],
        [0.9532739638548857, 0.508497326023791],
        [0.6883985121214359, 0.22000001679379622],
    ],
    [
        [0.5560701381758191, 0.6506957534342154],
        [0.676679083511316, 0.2241764488741652],
        [0.4946087699942101, 0.7367911032845434],
    ],
]
