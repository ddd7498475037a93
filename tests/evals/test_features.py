"""Who computes which features: pure arithmetic over a grid of worlds."""

import pytest

from vitscale.evals.features import rank_block


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("num_samples", [1, 2, 5, 15, 16, 17, 100])
def test_the_blocks_of_all_ranks_in_order_are_every_sample_once(num_samples: int, world_size: int):
    blocks = [rank_block(num_samples, rank, world_size) for rank in range(world_size)]
    assert [i for block, _ in blocks for i in block] == list(range(num_samples))
    lengths = {length for _, length in blocks}
    assert len(lengths) == 1
    assert max(len(block) for block, _ in blocks) == lengths.pop()
