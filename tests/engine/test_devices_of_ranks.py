"""Which GPU DeepSpeed takes for a rank."""

import os

import pytest
import torch

from vitscale.engine import setup


@pytest.mark.parametrize(
    ("device", "taken"),
    [("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "3")],  # of rank 3 of a machine
)
def test_a_rank_that_sees_its_own_gpu_alone_gets_that_one(
    monkeypatch: pytest.MonkeyPatch, device: str, taken: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(KeyError), setup.on_device(torch.device(device)):
        assert os.environ["LOCAL_RANK"] == taken
        raise KeyError
    assert os.environ["LOCAL_RANK"] == "3"
