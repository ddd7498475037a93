"""Who computes which features: pure arithmetic over a grid of worlds."""

import numpy as np
import pytest

from vitscale.evals.features import own_indices, rank_block


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("num_samples", [1, 2, 5, 15, 16, 17, 100])
def test_the_blocks_of_all_ranks_in_order_are_every_sample_once(num_samples: int, world_size: int):
    blocks = [rank_block(num_samples, rank, world_size) for rank in range(world_size)]
    assert [i for block, _ in blocks for i in block] == list(range(num_samples))
    lengths = {length for _, length in blocks}
    assert len(lengths) == 1
    assert max(len(block) for block, _ in blocks) == lengths.pop()


def test_a_set_of_one_image_is_evaluated():
    own, count = own_indices(np.array([7]))
    assert (own.tolist(), count) == ([7], 1)
