"""The device that a bench measures: this process's GPU, or the CPU."""

import gc

import torch


def name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def wait() -> None:
    """Until all that was started on the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nothing holds any more, also to what allocates beside torch."""
    gc.collect()
    torch.cuda.empty_cache()
