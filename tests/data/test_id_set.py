"""A set of ids as bits, against the arrays and the mask that it stands for."""

import numpy as np
import pytest

from vitscale.data.id_set import NO_IDS, IdSet


@pytest.mark.parametrize("num_ids", [1, 63, 64, 65, 997, 1024])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_it_counts_and_numbers_as_the_mask_does(num_ids: int, share: float) -> None:
    mask = np.random.default_rng(num_ids).random(num_ids) < share
    mask[: num_ids // 4] |= share == 0.97  # words without and with all ids, too
    ids, members = np.arange(num_ids), IdSet.where(mask)
    assert len(members) == mask.sum() and [i in members for i in ids.tolist()] == mask.tolist()
    ends = np.arange(num_ids + 1)
    assert members.count_below(ends).tolist() == [int(mask[:end].sum()) for end in ends]
    absent = np.flatnonzero(~mask)
    assert members.absent(np.arange(len(absent))).tolist() == absent.tolist()
    assert IdSet.of(np.flatnonzero(mask), num_ids).digest() == members.digest()


def test_a_union_and_a_digest_are_of_the_members() -> None:
    some, more = (IdSet.of(np.array(ids), 100) for ids in ([3, 64, 99], [3, 70]))
    both = some.union(more)
    assert [i for i in range(100) if i in both] == [3, 64, 70, 99]
    assert len({s.digest() for s in (some, more, both)}) == 3
    assert not len(NO_IDS) and 0 not in NO_IDS and 10**9 not in NO_IDS
