"""DeiT's distilled models in timm's and transformers' names, and teachers of timm."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import OUR_PIXELS, TINY, images, logits, randomise, resolved, same_weights, saved_model
from make import write_step
from safetensors.torch import load_file, save_file

from vitscale import load_model
from vitscale.checkpoint.verify import open_directory
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models.vit_config import ViTConfig
from vitscale.objectives.distillation import DistillationConfig
from vitscale.run_dir.continuation import check_teacher
from vitscale.teacher import load_teacher
from vitscale.weights.foreign.convert import export_model, import_model

DISTILLED = dataclasses.replace(TINY, distilled=True)


def test_timm_computes_the_logits_of_an_export(tmp_path: Path, timm: Any) -> None:
    model = saved_model(tmp_path / "ours.safetensors", DISTILLED)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    other = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert type(other).__name__ == "VisionTransformerDistilled"
    assert (logits(model, DISTILLED) - logits(other, DISTILLED)).abs().max() < 1e-5
    back = load_model(import_model(out, tmp_path / "back", format="timm"))
    assert same_weights(back, model) and resolved(back.config) == resolved(DISTILLED)


def test_timms_deit_tiny_distilled_is_imported(tmp_path: Path, timm: Any) -> None:
    other = randomise(timm.create_model("deit_tiny_distilled_patch16_224"))
    timm.models.save_for_hf(other, tmp_path / "timm", data_config=OUR_PIXELS, safe_serialization=True)
    model = load_model(import_model(tmp_path / "timm", tmp_path / "ours", format="timm"))
    expected = ViTConfig(variant="Ti/16", distilled=True, gelu="exact")
    assert model.config == expected
    assert sum(param.numel() for param in model.parameters()) == 5_910_800
    shown = images(expected, 2)
    with torch.no_grad():
        mean = other(shown)
        assert (model(shown) - mean).abs().max() < 3e-5 * mean.abs().max()
        other.set_distilled_training(True)
        both = torch.stack(other.train()(shown), dim=1)  # [B, 2, C]
        assert (model(shown, separate_heads=True) - both).abs().max() < 3e-5 * both.abs().max()
    again = export_model(tmp_path / "ours", tmp_path / "again", format="timm")
    assert (
        json.loads((again / "config.json").read_text())["architecture"] == other.default_cfg["architecture"]
    )
    theirs, ours = load_file(tmp_path / "timm" / "model.safetensors"), load_file(again / "model.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_transformers_deit_is_imported(tmp_path: Path, transformers: Any) -> None:
    config = transformers.DeiTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        patch_size=4,
        image_size=12,
        num_labels=5,
    )
    other = randomise(transformers.DeiTForImageClassificationWithTeacher(config))
    other.save_pretrained(tmp_path / "deit")
    model = load_model(
        import_model(tmp_path / "deit", tmp_path / "ours", format="transformers", pixels="half")
    )
    assert resolved(model.config) == resolved(dataclasses.replace(DISTILLED, gelu="exact", norm_eps=1e-12))
    with torch.no_grad():
        outputs = other(images(TINY))
        assert (outputs.logits - model(images(TINY))).abs().max() < 1e-5
        both = model(images(TINY), separate_heads=True)
        assert (outputs.distillation_logits - both[:, 1]).abs().max() < 1e-5
    alone = randomise(transformers.DeiTForImageClassification(config))
    alone.save_pretrained(tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"classifier\.\w+ has no place in a ViT"):
        import_model(tmp_path / "alone", tmp_path / "out", format="transformers")


@pytest.mark.parametrize(
    ("format", "dialect"),
    [("transformers", "original"), ("npz", "original"), ("npz", "linen"), ("npz", "big_vision")],
)
def test_other_formats_have_no_place_for_the_token(tmp_path: Path, format: Any, dialect: Any) -> None:
    saved_model(tmp_path / "ours.safetensors", DISTILLED)
    out = tmp_path / ("a.npz" if format == "npz" else "a")
    with pytest.raises(CheckpointError, match=r"model\.distilled True cannot .* has no distillation token"):
        export_model(tmp_path / "ours.safetensors", out, format=format, dialect=dialect)
    assert not out.exists()
    saved_model(tmp_path / "plain.safetensors", TINY)
    plain = export_model(tmp_path / "plain.safetensors", tmp_path / "plain.npz", format="npz")
    with pytest.raises(ConfigError, match=r"model\.distilled True must be False: models of original"):
        import_model(plain, tmp_path / "b", format="npz", overrides=["model.distilled=true"])


# teachers

STUDENT = ViTConfig(variant="Ti/8", image_size=64, num_classes=5)


def teacher_of(weights: str, dtype: torch.dtype = torch.float32, **student: int) -> Any:
    config = DistillationConfig(teacher="timm:regnety_002", teacher_weights=weights)
    config_of_student = dataclasses.replace(STUDENT, **student)
    return load_teacher(config, config.teacher, config_of_student, torch.device("cpu"), dtype)


def test_equal_weights_in_another_model_are_another_teacher(tmp_path: Path) -> None:
    """What an earlier version saved names the weights alone, and is continued."""
    teachers = []
    for gelu in ("tanh", "exact"):
        path = tmp_path / f"{gelu}.safetensors"
        saved_model(path, dataclasses.replace(TINY, gelu=gelu))
        device, config = torch.device("cpu"), DistillationConfig(teacher=str(path))
        teachers.append(load_teacher(config, str(path), TINY, device, torch.float32))
    first, other = teachers
    assert first.weights == other.weights
    for number, saved in enumerate((first.digest, first.weights)):
        step = write_step(tmp_path / str(number), 1, {("fp32", "a"): torch.zeros(2)}, teacher=saved)
        check_teacher(open_directory(str(step)), first.digest, first.weights)
    check_teacher(open_directory(str(step)), other.digest, other.weights)
    with pytest.raises(ConfigError, match=f"of digest {first.digest}, and .*{other.digest};"):
        check_teacher(open_directory(str(tmp_path / "0")), other.digest, other.weights)


def test_timms_regnet_sees_the_students_images_as_it_was_trained(tmp_path: Path, timm: Any) -> None:
    """DeiT's teacher is of this kind: BatchNorm, and ImageNet's means and deviations."""
    module = timm.create_model("regnety_002", num_classes=5).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
    file = tmp_path / "regnet.safetensors"
    save_file(module.state_dict(), file)
    pixels = images(STUDENT, 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = module(((pixels + 1) / 2 - mean[:, None, None]) / std[:, None, None])
    teacher = teacher_of(str(file))
    answers = teacher(pixels.requires_grad_())
    assert not answers.requires_grad and answers.dtype == torch.float32
    assert torch.allclose(answers, expected, atol=1e-4 * expected.abs().max())
    half = teacher_of(str(file), torch.bfloat16)
    assert half.digest == teacher.digest
    assert 1e-4 < (half(pixels) - expected).abs().max() / expected.abs().max() < 0.1
    with torch.no_grad():
        module.head.fc.bias += 1
    save_file(module.state_dict(), file)
    assert teacher_of(str(file)).digest != teacher.digest


def test_a_teacher_of_timm_that_does_not_fit_is_refused(tmp_path: Path, timm: Any) -> None:
    module, file = timm.create_model("regnety_002", num_classes=5), tmp_path / "regnet.safetensors"
    save_file(module.state_dict(), file)
    assert teacher_of(str(file)).num_bytes > 4 * sum(param.numel() for param in module.parameters())
    with pytest.raises(CheckpointError, match=r"with this number of classes: head\.fc\.bias is \(5,\), and"):
        teacher_of(str(file), num_classes=7)
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04K\x01.")
    for path in ("pickle.pth", "nowhere.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            teacher_of(str(tmp_path / path))
    device = torch.device("cpu")
    unknown = DistillationConfig(teacher="timm:no_such_net", teacher_weights=str(file))
    with pytest.raises(ConfigError, match=r"timm cannot make this model .* name one of"):
        load_teacher(unknown, unknown.teacher, STUDENT, device, torch.float32)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    sized = DistillationConfig(
        teacher="timm:vit_tiny_patch16_224", teacher_weights=str(tmp_path / "vit.safetensors")
    )
    with pytest.raises(ConfigError, match=r"takes images of 224 px, and model\.image_size is 64"):
        load_teacher(sized, sized.teacher, STUDENT, device, torch.float32)


def test_without_timm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"needs timm, which cannot be imported .* pip install timm"):
        teacher_of("")


def test_a_timm_whose_torchvision_is_for_another_torch_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "operator torchvision::nms does not exist"
    (tmp_path / "timm.py").write_text(f'raise RuntimeError("{reason}")\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ConfigError, match=rf"\({reason}\); install it with the torchvision for torch 2"):
        teacher_of("")
