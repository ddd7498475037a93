"""The data bench refuses what it cannot measure."""

import pytest

from vitscale.bench.data import DataBench
from vitscale.errors import ConfigError


@pytest.mark.parametrize(("option", "flag"), [("rounds", "--rounds"), ("image_size", "--image-size")])
def test_no_rounds_and_no_pixels_are_refused_with_their_value(option: str, flag: str) -> None:
    DataBench(shards="a.tar", **{option: 1})
    with pytest.raises(ConfigError, match=f"^{flag} -1 must be above 0$"):
        DataBench(shards="a.tar", **{option: -1})
