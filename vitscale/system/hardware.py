"""What GPUs can do, by the data sheets of their vendors, and how torch uses them."""

import dataclasses
import os
import re
from pathlib import Path

import torch

from vitscale.errors import ConfigError

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # where the driver has a folder for each


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    flops: peak FLOP/s of dense matmuls in bf16 (V100: fp16), without sparsity.
    memory_gb: as it is sold, in 10^9 bytes.
    memory_tb_per_s: bandwidth of its memory, in 10^12 bytes/s.
    link_gb_per_s: one direction of the links to the other GPUs of its node, all together:
        NVLink, Infinity Fabric, or PCIe where there is neither; in 10^9 bytes/s.
    """

    flops: float
    memory_gb: float
    memory_tb_per_s: float
    link_gb_per_s: float


# The first name that is part of a device's counts.
GPUS = {
    "GB300": Gpu(2500e12, 288.0, 8.0, 900.0),
    "GB200": Gpu(2500e12, 186.0, 8.0, 900.0),
    "B300": Gpu(2250e12, 288.0, 8.0, 900.0),
    "B200": Gpu(2250e12, 180.0, 8.0, 900.0),
    "GH200": Gpu(989e12, 96.0, 4.0, 450.0),
    "H200 NVL": Gpu(835e12, 141.0, 4.8, 450.0),
    "H200": Gpu(989e12, 141.0, 4.8, 450.0),
    "H100 NVL": Gpu(835e12, 94.0, 3.9, 300.0),
    "H100 PCIe": Gpu(756e12, 80.0, 2.0, 64.0),
    "H100": Gpu(989e12, 80.0, 3.35, 450.0),
    "H800": Gpu(989e12, 80.0, 3.35, 200.0),
    "H20": Gpu(148e12, 96.0, 4.0, 450.0),
    "A100": Gpu(312e12, 80.0, 2.0, 300.0),  # the one of 80 GB; there is one of 40 GB
    "A800": Gpu(312e12, 80.0, 2.0, 200.0),
    "A40": Gpu(150e12, 48.0, 0.696, 32.0),
    "A10G": Gpu(70e12, 24.0, 0.6, 32.0),
    "A10": Gpu(125e12, 24.0, 0.6, 32.0),
    "L40S": Gpu(362e12, 48.0, 0.864, 32.0),
    "L40": Gpu(181e12, 48.0, 0.864, 32.0),
    "L4": Gpu(121e12, 24.0, 0.3, 32.0),
    "RTX 4090": Gpu(165e12, 24.0, 1.008, 32.0),
    "RTX 3090": Gpu(71e12, 24.0, 0.936, 32.0),
    "V100": Gpu(125e12, 32.0, 0.9, 150.0),  # the one of 32 GB; there is one of 16 GB
    "MI355X": Gpu(2500e12, 288.0, 8.0, 537.0),
    "MI325X": Gpu(1307e12, 256.0, 6.0, 448.0),
    "MI300X": Gpu(1307e12, 192.0, 5.3, 448.0),
    "MI250X": Gpu(191.5e12, 64.0, 1.6, 200.0),  # one half: torch has each as a device of its own
}


def gpu_name(written: str) -> str:
    """The name in GPUS that a user wrote as in "h100" or "h100-pcie". Raises ConfigError."""
    wanted = re.sub(r"[\s_-]+", " ", written).strip().lower()
    for name in GPUS:
        if name.lower() == wanted:
            return name
    known = ", ".join(name.lower().replace(" ", "-") for name in GPUS)
    raise ConfigError(f'--gpu "{written}" is not known; use one of {known}')


def lacks_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory was too small for what raised the error.

    Torch's allocator has a class of its own for that. Kernels, cuBLAS and the driver, which
    allocate beside it, have the CUDA error or the library's status in the text.
    """
    texts = ("out of memory", "ALLOC_FAILED")
    if isinstance(error, torch.distributed.DistError):  # of NCCL, whose memory is not ours to lower
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def allow_tf32(allowed: bool) -> None:
    """Whether fp32 matmuls and convolutions on GPUs may round their inputs to TF32.

    By itself torch lets convolutions do so, such as those of a ResNet or a patch embedding.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def peak_flops() -> float:
    """The bf16 peak of this device in FLOP/s, or 0 if it is not known (as for any CPU)."""
    gpu = gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return gpu.flops if gpu else 0.0


def unused_gpus() -> str:
    """A sentence about NVIDIA GPUs of this host that torch does not use; "" if all is well.

    It is well, too, where the user chose the CPU: DS_ACCELERATOR=cpu, or no visible devices.
    """
    chose_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    chose_none = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    number = len(list(NVIDIA_GPUS.glob("*")))
    if chose_cpu or chose_none or not number or torch.cuda.is_available():
        return ""
    way_out = "delete .venv and run bash tools/setup.sh on a host with a GPU"
    if torch.version.cuda:
        way_out = f"update the driver, which may be too old for CUDA {torch.version.cuda}"
    return (
        f"this host has {number} NVIDIA GPU{'s' if number > 1 else ''}, and torch {torch.__version__} uses "
        f"none of them; {way_out}, or set DS_ACCELERATOR=cpu"
    )


def gpu_of(device: str) -> Gpu | None:
    """The kind of a GPU by the name that torch reports, or None if it is not known."""
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device)), None)
