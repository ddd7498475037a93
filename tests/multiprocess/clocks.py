"""What the ranks of test_preflight.py do."""

import os
import time

from vitscale.cluster.preflight import facts, rounds


def compare(config: str) -> None:
    """Compare the clocks of two hosts of one rank; the first looks at its shards for long."""
    look = facts._check_start
    facts._check_start = lambda *arguments: time.sleep(2) or look(*arguments)
    os.environ["LOCAL_RANK"] = "0"
    clocks = [answer.facts.clock for answer in rounds.among_ranks([config]) if answer.facts]
    assert len(clocks) == 2 and max(map(abs, clocks)) < 1, clocks
