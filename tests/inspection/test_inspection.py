"""What a ViT has learned: known answers, and attention as the model itself computes it."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make import write_shards
from PIL import Image
from torch import Tensor
from weights.foreign_models import TINY, images, randomise, saved_model

from tools.visualize import main
from vitscale.errors import ConfigError, DataError
from vitscale.inspection.attention import Rollout, attention_distance, attention_maps, observe_attention
from vitscale.inspection.figures import draw_distances
from vitscale.inspection.live import observe
from vitscale.inspection.mosaics import enlarged, lit, position_mosaic
from vitscale.inspection.run import Pictures, distances, read_images, visualize
from vitscale.inspection.weights import input_positions, position_similarity, principal_components
from vitscale.models import build_model
from vitscale.models.hybrid import HybridConfig
from vitscale.models.posemb import sincos2d
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig
from vitscale.report.page.learned import learned

ROOT = Path(__file__).resolve().parents[2]
REGISTERS = {"num_registers": 2}


def tiny(**changes: object) -> ViT:
    sizes = {"width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 80, "patch_size": 4, "image_size": 12}
    model = randomise(build_model(ViTConfig(**{**sizes, "num_classes": 5, **changes}), seed=0))
    assert isinstance(model, ViT)
    return model


def test_principal_components_find_the_directions_that_filters_are_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 3, generator=generator))[0].T  # [3, I] for P = 2
    amounts = torch.randn(500, 3, generator=generator) * torch.tensor([4.0, 2.0, 1.0])
    kernel = amounts @ directions + 7  # a mean that is no component
    filters, shares = principal_components(kernel, 2, count=3)
    assert filters.shape == (3, 2, 2, 3) and 0.999 < shares.sum() <= 1.0001
    assert shares.tolist() == pytest.approx([16 / 21, 4 / 21, 1 / 21], abs=0.05)
    for found, planted in zip(filters, directions, strict=True):
        planted = planted.reshape(3, 2, 2).permute(1, 2, 0)  # inputs are channel, row, column
        assert abs((found * planted).sum()) > 0.98
        assert found.flatten()[found.abs().argmax()] > 0
    assert len(principal_components(torch.randn(4, 12), 2).filters) == 3  # of 4 filters


def test_positions_are_compared_by_row_and_column() -> None:
    table = sincos2d((3, 5), 32)[0]
    similarity = position_similarity(torch.cat([torch.ones(1, 32), table]), (3, 5))
    assert similarity.shape == (3, 5, 3, 5)
    for row, col in [(0, 0), (2, 1)]:
        assert similarity[row, col, row, col] == pytest.approx(1)
        assert similarity[row, col].argmax() == row * 5 + col
    a, b = table[1 * 5 + 4].double(), table[2 * 5 + 0].double()
    assert similarity[1, 4, 2, 0] == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-6)


@pytest.mark.parametrize(
    ("side", "patch", "pixels"), [(14, 16, 116.49), (7, 32, 115.50), (16, 14, 116.57), (8, 4, 16.55)]
)
def test_the_distance_of_uniform_attention_is_known(side: int, patch: int, pixels: float) -> None:
    uniform = torch.full((2, 3, side**2, side**2), 1 / side**2)
    assert attention_distance(uniform, (side, side), patch).tolist() == pytest.approx([pixels] * 3, abs=0.005)


def test_the_distances_of_a_model_come_with_that_of_uniform_attention() -> None:
    layers, uniform = distances(tiny(image_size=(12, 8)), torch.zeros(2, 3, 12, 8, dtype=torch.uint8))
    expected = attention_distance(torch.full((1, 1, 6, 6), 1 / 6), (3, 2), 4).item()
    assert len(layers) == 2 and uniform == pytest.approx(expected)


def test_distances_are_those_of_patches_whatever_goes_to_other_tokens() -> None:
    weights = torch.zeros(1, 2, 7, 7)  # a class token and 2 x 3 patches
    weights[..., 0] = 0.9
    weights[0, 0, 1:, 1:] = 0.1 * torch.eye(6)
    weights[0, 1, 1:, 1] = 0.1  # all look at the first patch
    to_first = [0, 1, 2, 1, math.sqrt(2), math.sqrt(5)]
    found = attention_distance(weights, (2, 3), 10)
    assert found.tolist() == pytest.approx([0, 10 * sum(to_first) / 6], abs=1e-4)
    weights[0, 1, 6, 1] = 0  # the last patch, which is farthest, looks at the class token alone
    found = attention_distance(weights, (2, 3), 10)
    assert found.tolist() == pytest.approx([0, 10 * sum(to_first[:5]) / 5], abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"pool": "mean"}, REGISTERS, {"posemb": "relative"}])
def test_observed_attention_is_what_the_model_computes(changes: dict[str, object]) -> None:
    model, seen = tiny(**changes), dict[int, Tensor]()
    before = model.features(images(TINY))
    observe_attention(model, images(TINY), seen.__setitem__)
    assert list(seen) == [0, 1]
    assert torch.equal(model.features(images(TINY)), before) and len(seen) == 2  # no hook is left
    mixed = []
    block = model.blocks[1]
    handles = [
        block.attn.qkv.register_forward_hook(lambda _, __, qkv: mixed.append(qkv)),
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0])),
    ]
    model.features(images(TINY), tokens=True)  # else the last block does not compute all
    for handle in handles:
        handle.remove()
    qkv, output = mixed
    value = qkv.unflatten(2, (3, 4, 8))[:, :, 2].transpose(1, 2)  # [B, K, N, d]
    assert torch.allclose((seen[1] @ value).transpose(1, 2).flatten(2), output, atol=1e-5)
    assert torch.allclose(seen[1].sum(-1), torch.ones(()))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_observed_in_eval_mode_and_leaves_in_its_own(training: bool) -> None:
    model, seen = tiny(dropout=0.5).train(training), dict[int, Tensor]()
    modes = set[bool]()
    model.blocks[0].register_forward_hook(lambda block, _, __: modes.add(block.training))
    observe_attention(model, images(TINY), seen.__setitem__)
    assert modes == {False}
    assert {module.training for module in model.modules()} == {training}
    with pytest.raises(ValueError, match="images of 8 x 8 pixels"):
        attention_maps(model, torch.zeros(1, 3, 8, 8))
    assert model.training == training


def test_a_rollout_multiplies_the_layers_in_their_order() -> None:
    first, second = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(1)).softmax(-1), None
    second = torch.eye(3)[[1, 2, 0]].expand(1, 2, 3, 3)
    rollout = Rollout()
    rollout(0, first)
    rollout(1, second)
    assert rollout.product is not None
    mixed = [(layer.mean(1) + torch.eye(3)) / 2 for layer in (first, second)]
    assert torch.allclose(rollout.product, mixed[1] @ mixed[0])
    assert not torch.allclose(rollout.product, mixed[0] @ mixed[1])
    assert torch.allclose(rollout.product.sum(-1), torch.ones(()))
    identity = Rollout()
    identity(0, torch.eye(3).expand(1, 2, 3, 3))
    assert identity.product is not None and torch.equal(identity.product[0], torch.eye(3))


@pytest.mark.parametrize("changes", [{}, {"pool": "mean"}, REGISTERS])
def test_a_map_shows_where_information_comes_from(changes: dict[str, object]) -> None:
    """Keys and queries that single out one patch: with depth 1, it gets the most attention."""
    model = tiny(depth=1, num_heads=1, **changes)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, -9 + 5, 0] = 50.0  # the patch in row 1, column 2
        qkv = model.blocks[0].attn.qkv
        qkv.weight.zero_()
        qkv.bias.zero_()
        qkv.bias[0] = 1.0  # every query asks for the first channel
        qkv.weight[32, 0] = 5.0  # and the keys are it
    maps = attention_maps(model, images(TINY))
    assert maps.shape == (3, 3, 3)
    assert (maps.flatten(1).argmax(1) == 5).all()


# files

DRAW_POSITIONS = """
import json, torch
from vitscale.inspection.figures import draw_positions
axes, colorbar = draw_positions(torch.arange(225.0).reshape(3, 5, 3, 5)).axes
labels = [[text.get_text() for text in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels())]
shown = axes.images[0].get_array()
centres = [float(shown[int(y), int(x)]) for y in axes.get_yticks() for x in axes.get_xticks()]
print(json.dumps([labels, centres, colorbar.get_ylabel()]))
"""


def test_every_figure_is_drawn_by_the_command(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    write_shards(tmp_path, [5])
    arguments = {
        "filters": [],
        "posemb": [],
        "attention-distance": ["--data", f"{tmp_path}/train-*.tar", "--count", "3"],
        "attention-map": ["--images", f"{tmp_path}/a.jpg", f"{tmp_path}/a.jpg"],
    }
    script = (
        "import sys; sys.path.insert(0, 'tools'); import visualize\n"
        "for line in sys.stdin: print(visualize.main(line.split()))\n"
    )
    lines = [
        " ".join([name, f"{tmp_path}/ours.safetensors", f"{tmp_path}/out/{name}.png", *options])
        for name, options in arguments.items()
    ]
    maps = f"attention-map {tmp_path}/ours.safetensors {tmp_path}/out"
    lines += [f"{maps}/some.png --data {tmp_path}/train-*.tar", f"{maps}/none.png"]
    done = subprocess.run(
        [sys.executable, "-c", script + DRAW_POSITIONS],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    said, _, positions = done.stdout.rstrip().rpartition("\n")
    assert said.split()[1::2] == ["0"] * 5 and said.split()[-1] == "2", done.stderr
    assert "give --data SHARDS or --images FILE ..., one of them" in done.stderr
    for name in (*arguments, "some"):
        with Image.open(tmp_path / "out" / f"{name}.png") as figure:
            drawn = np.asarray(figure.convert("RGB"))
        assert min(drawn.shape[:2]) > 200 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20, name
    labels, centres, meaning = json.loads(positions)  # of one picture of all tiles
    assert labels == [["1", "2", "3"], ["1", "2", "3", "4", "5"]] and meaning == "cosine similarity"
    assert centres == [15 * patch + 7 for patch in range(15)]


@pytest.mark.parametrize("lowest", [0.0, 110.0, 116.0])
def test_the_distances_of_heads_lie_between_0_and_a_margin(lowest: float) -> None:
    figure = draw_distances([torch.linspace(lowest, 120.0, 4)] * 2, uniform=lowest)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["...", "head 1", "head 2", "head 3", "uniform attention"]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom == 0 and 1.03 * 120 < top < 1.1 * 120


def test_images_are_drawn_evenly_from_a_set(tmp_path: Path) -> None:
    write_shards(tmp_path, [9])
    all_images = read_images(Pictures(data=f"{tmp_path}/train-*.tar"), 12, 100)
    assert len(all_images) == 9
    some = read_images(Pictures(data=f"{tmp_path}/train-*.tar"), 12, 3)
    assert torch.equal(some, all_images[[0, 4, 8]])


def test_what_cannot_be_drawn_is_refused_in_a_sentence(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    (tmp_path / "text.jpg").write_text("no image")
    out = str(tmp_path / "out.png")
    for name, message in [("none.jpg", "none.jpg: No such file"), ("text.jpg", "text.jpg: ")]:
        pictures = Pictures(files=(f"{tmp_path}/{name}",))
        with pytest.raises(DataError, match=message):
            visualize("attention-map", f"{tmp_path}/ours.safetensors", out, pictures)
    with pytest.raises(ConfigError, match="give --data SHARDS or --images FILE"):
        both = Pictures(data="x", files=("y",))
        visualize("attention-map", f"{tmp_path}/ours.safetensors", out, both)
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("figure", "options"),
    [
        ("filters", ["--data", "a.tar"]),
        ("posemb", ["--images", "a.jpg"]),
        ("filters", ["--count", "3"]),
        ("attention-map", ["--images", "a.jpg", "--count", "3"]),
    ],
)
def test_options_that_a_figure_does_not_read_are_refused(capsys, figure: str, options: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main([figure, "nowhere", "out.png", *options])
    said = "--count is of the images from --data" if figure == "attention-map" else "shows weights alone"
    assert refused.value.code == 2 and said in capsys.readouterr().err


def test_no_images_are_refused_as_fewer_are(capsys) -> None:
    for count in ("0", "-1"):
        with pytest.raises(SystemExit):
            main(["attention-map", "nowhere", "maps.png", "--data", "a.tar", "--count", count])
        assert f"--count {count} must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("posemb", ["none", "relative"])
def test_a_model_without_positions_of_tokens_shows_the_rest(tmp_path: Path, posemb: str) -> None:
    path = tmp_path / "ours.safetensors"
    model = saved_model(path, dataclasses.replace(TINY, posemb=posemb))
    assert isinstance(model, ViT)
    with pytest.raises(ConfigError, match=rf'model.posemb = "{posemb}" adds no position embeddings'):
        visualize("posemb", str(path), str(tmp_path / "none.png"), Pictures())
    page = str(learned(model, torch.zeros(1, 3, *images(TINY).shape[2:], dtype=torch.uint8)))
    assert "attention rollout" in page and "filter" in page and "position" not in page
    seen = observe(model, lambda pixels: model(pixels), torch.zeros(1, 3, 12, 12, dtype=torch.uint8))
    assert set(seen.pictures) == {"filters", "attention"} and len(seen.distances) == 2


def test_the_positions_of_two_axes_are_shown_joined() -> None:
    model = tiny(posemb="learned2d", posemb_at="every_layer")
    with torch.no_grad():
        model.pos_embed_x.normal_()
        model.pos_embed_y.normal_()
    positions = input_positions(model)
    assert positions is not None
    x, y = model.pos_embed_x[0].detach(), model.pos_embed_y[0].detach()
    assert torch.equal(positions[1 + 5], torch.cat([x[2], y[1]]))  # row 1, column 2, of 3 x 3
    observed = observe(model, lambda pixels: model(pixels), torch.zeros(1, 3, 12, 12, dtype=torch.uint8))
    mosaic = position_mosaic(position_similarity(positions, (3, 3)))
    shown = enlarged(mosaic, 448).permute(2, 0, 1)[None]
    assert torch.equal(observed.pictures["positions"], shown)


def test_a_hybrid_shows_its_positions_and_attention_but_no_filters(tmp_path: Path) -> None:
    config = HybridConfig(
        variant="R+mu/16", stem_width=32, patch_size=8, num_heads=2, image_size=32, num_classes=5
    )
    model = saved_model(tmp_path / "hybrid.safetensors", config)
    assert isinstance(model, ViT)
    maps = attention_maps(model, images(config))
    assert maps.shape == (3, 4, 4) and maps.std() > 0
    with pytest.raises(ConfigError, match=r'of kind "hybrid" are of features.* draw posemb'):
        visualize("filters", f"{tmp_path}/hybrid.safetensors", str(tmp_path / "none.png"), Pictures())
    page = learned(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert "attention rollout" in str(page) and "filters" not in str(page)


def test_an_image_is_as_bright_as_it_is_attended_to() -> None:
    white = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    shown = lit(white, torch.tensor([[[0.5, 0.25], [0.0, 0.0]]]))[0, 0]
    assert shown[0, 0] == 200 and shown[0, 3] == 100 and shown[3, 0] == 0
    assert not lit(white, torch.zeros(1, 2, 2)).any()
