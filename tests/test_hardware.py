"""GPUs by name: peaks of the devices that torch reports, and the names that a user writes."""

import pytest

from vitscale.errors import ConfigError
from vitscale.hardware import GPUS, gpu_name, peak_flops_of


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-16GB", 125),
        ("AMD Instinct MI250X", 191.5),
        ("NVIDIA RTX A4000", 0),  # no A40
        ("NVIDIA T1000", 0),
    ],
)
def test_the_peak_of_a_gpu_goes_by_its_whole_name(device: str, tera: float) -> None:
    assert peak_flops_of(device) == tera * 1e12


@pytest.mark.parametrize(
    ("written", "name"), [("h100", "H100"), ("H100-PCIe", "H100 PCIe"), (" rtx_4090", "RTX 4090")]
)
def test_a_user_may_write_a_name_in_several_ways(written: str, name: str) -> None:
    assert gpu_name(written) == name


@pytest.mark.parametrize("written", ["tpu", "h10", "", "h100 sxm"])
def test_an_unknown_gpu_is_one_sentence_with_those_that_are_known(written: str) -> None:
    with pytest.raises(ConfigError) as raised:
        gpu_name(written)
    assert str(raised.value).startswith(f'--gpu "{written}" is not known; use one of gb300, ')
    assert "h100-pcie, h100, " in str(raised.value)


def test_every_gpu_has_plausible_sizes() -> None:
    """In the units of Gpu, each within a factor of what has been built so far."""
    for name, gpu in GPUS.items():
        assert 70e12 <= gpu.flops <= 2500e12 and 24 <= gpu.memory_gb <= 288, name
        assert 0.3 <= gpu.memory_tb_per_s <= 8 and 32 <= gpu.link_gb_per_s <= 900, name
