"""Calls tools/checkpoint.py as a user does, and makes what it is called on."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from make import state_of

from tools.checkpoint import main
from vitscale.checkpoint.safetensors import write_safetensors

NOW = datetime.datetime(2026, 1, 2, 5, 4, 5, tzinfo=datetime.UTC)
Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of tools/checkpoint.py."""
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def call_json(capsys: Capture, *arguments: object) -> Any:
    """What tools/checkpoint.py prints with --json, which must be strict JSON, without NaN."""

    def refuse_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(call(capsys, *arguments, "--json")[1], parse_constant=refuse_constant)


def export(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, tensors, {f"vitscale.{name}": value for name, value in metadata.items()})
    return path


def weights(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor for (slot, name), tensor in state_of(step).items() if slot in ("fp32", "fixed")}
