"""Which matrices a parameter consists of, and which parts of them a slice has."""

import pytest

from vitscale.models import empty_model
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.adafactor import second_size
from vitscale.optim.slices import Layout, Part, Slice, matrices


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.0.attn.qkv.weight", (192, 64), (3, 64, 64)),
        ("blocks.0.attn.qkv.bias", (192,), (1, 192, 1)),
        ("attn_pool.kv.weight", (128, 64), (2, 64, 64)),
        ("attn_pool.q.weight", (64, 64), (1, 64, 64)),
        ("blocks.0.mlp.fc1.weight", (256, 64), (1, 256, 64)),
        ("blocks.3.conv2.weight", (64, 32, 3, 3), (1, 64, 288)),
        ("pos_embed", (1, 197, 64), (1, 197, 64)),
        ("cls_token", (1, 1, 64), (1, 64, 1)),
        ("head.weight", (1, 64), (1, 64, 1)),
        ("head.bias", (1,), (1, 1, 1)),
    ],
)
def test_a_parameter_is_these_matrices(
    name: str, shape: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    assert matrices(name, shape) == expected


def test_every_fused_weight_of_a_model_is_known() -> None:
    """A linear layer with more outputs than inputs is fused, or the MLP's first."""
    model = empty_model(ViTConfig(variant="Ti/16", pool="map", num_classes=3))
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    for name, shape in shapes.items():
        if name.endswith("weight") and len(shape) == 2 and shape[0] > shape[1] and ".fc1." not in name:
            assert matrices(name, shape) == (shape[0] // shape[1], shape[1], shape[1]), name
    assert matrices("attn_pool.kv.weight", shapes["attn_pool.kv.weight"])[0] == 2


def test_slices_are_cut_where_matrices_end() -> None:
    shapes = {"norm.bias": (5,), "attn.qkv.weight": (6, 2)}
    layout = Layout(shapes, [Slice("norm.bias", 2, 3, 0), Slice("attn.qkv.weight", 3, 7, 3)])
    assert list(layout.parts()) == [
        Part("norm.bias", 0, 2, 3, 0),
        Part("attn.qkv.weight", 0, 3, 1, 3),
        Part("attn.qkv.weight", 1, 0, 4, 4),
        Part("attn.qkv.weight", 2, 0, 2, 8),
    ]


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("fc.weight", (32, 32), 64),
        ("fc.weight", (31, 900), 31 * 900),
        ("fc.weight", (900, 31), 31 * 900),
        ("attn.qkv.weight", (96, 32), 3 * 64),
        ("attn.qkv.weight", (93, 31), 93 * 31),
        ("norm.bias", (900,), 900),
        ("pos_embed", (1, 40, 50), 90),
    ],
)
def test_the_second_moment_of_a_large_matrix_is_of_rows_and_columns(
    name: str, shape: tuple[int, ...], size: int
) -> None:
    assert second_size(name, shape) == size
