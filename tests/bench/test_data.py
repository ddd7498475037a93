"""The data bench refuses what it cannot measure."""

from typing import get_args, get_type_hints

import pytest

from tools.bench import parse
from vitscale.bench.data import DataBench
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError


@pytest.mark.parametrize(("option", "flag"), [("rounds", "--rounds"), ("image_size", "--image-size")])
def test_no_rounds_and_no_pixels_are_refused_with_their_value(option: str, flag: str) -> None:
    DataBench(shards="a.tar", **{option: 1})
    with pytest.raises(ConfigError, match=f"^{flag} -1 must be above 0$"):
        DataBench(shards="a.tar", **{option: -1})


def test_every_crop_of_training_can_be_measured() -> None:
    for crop in get_args(get_type_hints(AugmentConfig)["crop"]):
        arguments = parse(["data", "--shards", "a.tar", "--crop", crop])
        assert crop in get_args(get_type_hints(DataBench)["crop"]) and arguments.crop == crop
