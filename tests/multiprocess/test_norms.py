"""Norms of weights, gradients and updates per layer (log.norms) are those of plain PyTorch."""

import math
from pathlib import Path

import pytest
import torch
from multiprocess.job import Job
from multiprocess.plain import plain_losses
from multiprocess.zygote import Zygote
from torch import Tensor, nn

STEPS = 6
KINDS = ("weight_norm", "grad_norm", "update_norm")
LAYERS = {"embeddings": ("patch_embed", "cls_token", "pos_embed"), "blocks.0": ("blocks.0",)}
LAYERS |= {"blocks.1": ("blocks.1",), "head": ("norm", "pre_logits", "head")}
SGD = ("optim.name=sgd", "optim.weight_decay=0", "optim.lr=0.05")
LAYOUTS = [
    (1, ("engine.zero_stage=1",)),
    (2, ("engine.zero_stage=1",)),
    (2, ("engine.zero_stage=2",)),
    (3, ("engine.zero_stage=3", "data.lanes=6", "global_batch=6")),
    (2, ("engine.zero_stage=2", "engine.offload_optimizer=true")),
    (2, SGD),
    (2, ("optim.name=muon", "engine.zero_stage=2")),
]


@pytest.mark.parametrize("world_size, layout", LAYOUTS, ids=str)
def test_norms_per_layer_are_those_of_plain_pytorch(
    tmp_path: Path, index: Path, zygote: Zygote, world_size: int, layout: tuple[str, ...]
) -> None:
    # A small bound: some steps are clipped.
    always = ("log.norms=true", "schedule.decay=constant", f"total_steps={STEPS}", "optim.clip_norm=0.3")
    options = (*always, *layout)
    job = Job(tmp_path, index)
    assert zygote.train(job, world_size, *options) == [0] * world_size, job.output()
    expected = plain_norms(job.config, *options)
    rows = job.rows()
    assert len(rows) == STEPS
    assert any(row["train/grad_norm"] > 0.3 for row in rows)
    for row, by_layer in zip(rows, expected, strict=True):
        for (kind, layer), value in by_layer.items():
            assert row[f"{kind}/{layer}"] == pytest.approx(value, rel=1e-4, abs=1e-7), (kind, layer)
        whole = math.sqrt(sum(row[f"grad_norm/{layer}"] ** 2 for layer in LAYERS))
        assert whole == pytest.approx(row["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bf16_the_layers_together_have_the_norm_of_the_whole(
    tmp_path: Path, index: Path, zygote: Zygote, stage: int
) -> None:
    job = Job(tmp_path, index)
    options = ("log.norms=true", "precision=bf16", f"engine.zero_stage={stage}", "total_steps=6")
    assert zygote.train(job, 2, *options) == [0, 0], job.output()
    for row in job.rows():
        whole = math.sqrt(sum(row[f"grad_norm/{layer}"] ** 2 for layer in LAYERS))
        assert whole == pytest.approx(row["train/grad_norm"], rel=1e-4)


def test_adafactor_has_norms_of_weights_and_updates_alone(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    options = ("log.norms=true", "schedule.decay=constant", f"total_steps={STEPS}", "optim.name=adafactor")
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, *options) == [0, 0], job.output()
    for row, by_layer in zip(job.rows(), plain_norms(job.config, *options), strict=True):
        for (kind, layer), value in by_layer.items():
            if kind == "grad_norm":
                assert f"{kind}/{layer}" not in row
            else:
                # A bias of k has gradients of rounding errors alone, which Adafactor scales up.
                rel = 1e-2 if kind == "update_norm" else 1e-4
                assert row[f"{kind}/{layer}"] == pytest.approx(value, rel=rel, abs=1e-7), (kind, layer)


def test_rows_have_norms_only_if_asked(uninterrupted: Job) -> None:
    assert not [name for name in uninterrupted.rows()[3] if name.startswith(KINDS)]


def plain_norms(path: Path, *overrides: str) -> list[dict[tuple[str, str], float]]:
    """Those of every step, from one plain loop of one step more."""
    weights: list[dict[str, Tensor]] = []
    gradients: list[dict[str, Tensor]] = []

    def look(model: nn.Module) -> None:
        named = dict(model.named_parameters())
        weights.append({name: param.detach().clone() for name, param in named.items()})
        gradients.append(
            {name: param.grad.clone() for name, param in named.items() if param.grad is not None}
        )

    plain_losses(path, *overrides, f"total_steps={STEPS + 1}", look=look)
    norms = []
    for step in range(STEPS):
        update = {name: weights[step + 1][name] - weights[step][name] for name in weights[step]}
        tensors = dict(zip(KINDS, (weights[step + 1], gradients[step], update), strict=True))
        norms.append(
            {
                (kind, layer): norm_of(tensors[kind], prefixes)
                for kind in KINDS
                for layer, prefixes in LAYERS.items()
            }
        )
    return norms


def norm_of(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> float:
    chosen = [tensor.flatten() for name, tensor in tensors.items() if name.startswith(prefixes)]
    return float(torch.linalg.vector_norm(torch.cat(chosen)))
