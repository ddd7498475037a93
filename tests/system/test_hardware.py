"""GPUs: peaks by name, names that a user writes, and GPUs of a host that torch does not use."""

import json
from pathlib import Path

import psutil
import pytest
import torch

from launch.preflight import main as preflight
from vitscale import distributed, rendezvous
from vitscale.errors import ConfigError
from vitscale.system import hardware
from vitscale.system.hardware import GPUS, gpu_name, gpu_of


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
    gpu = gpu_of(device)
    assert (gpu.flops if gpu else 0) == tera * 1e12


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError("Tried to allocate 20.00 MiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 300000"), False),
    ],
)
def test_a_lack_of_memory_has_many_names(error: RuntimeError, lacks: bool) -> None:
    assert hardware.lacks_memory(error) == lacks


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


def put_gpus(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the driver say that this host has so many GPUs; what else matters is unset."""
    for n in range(number):
        (folder / f"0000:{n:02x}:00.0").mkdir()
    monkeypatch.setattr(hardware, "NVIDIA_GPUS", folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as of a build for CPUs
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")


UNUSED = f"this host has 8 NVIDIA GPUs, and torch {torch.__version__} uses none of them; "


@pytest.mark.parametrize(
    ("environment", "warns"),
    [
        ({}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"DS_ACCELERATOR": "cpu"}, False),
        ({"LOCAL_RANK": "1"}, False),
    ],
)
def test_a_start_warns_of_gpus_that_torch_does_not_use(
    tmp_path: Path, environment: dict[str, str], warns: bool, monkeypatch, caplog
) -> None:
    put_gpus(tmp_path, 8, monkeypatch)
    # A launcher's world of one; without it, LOCAL_RANK is always 0.
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**launched, "MASTER_PORT": str(rendezvous.free_port()), **environment}.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    distributed.shutdown()
    assert [text.startswith(UNUSED) for text in caplog.messages] == [True] * warns


def test_a_process_alone_takes_connections_from_nobody_else(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()
    listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    distributed.shutdown()
    assert not {"0.0.0.0", "::"} & set(listening)


def test_preflight_refuses_a_host_whose_gpus_torch_does_not_use(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "gpus").mkdir()
    put_gpus(tmp_path / "gpus", 8, monkeypatch)
    demo = Path(__file__).resolve().parents[2] / "configs" / "demo" / "shapes.toml"
    assert preflight([str(demo), f"run_dir={tmp_path}/run", "--facts"]) == 0
    assert any(error.startswith(UNUSED) for error in json.loads(capsys.readouterr().out)["errors"])


def test_a_host_without_gpus_has_no_unused_ones(tmp_path: Path, monkeypatch) -> None:
    put_gpus(tmp_path, 0, monkeypatch)
    assert hardware.unused_gpus() == ""
    monkeypatch.setattr(hardware, "NVIDIA_GPUS", tmp_path / "missing")
    assert hardware.unused_gpus() == ""
