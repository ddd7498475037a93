"""Miniatures of the transfer sets, in the layouts in which these are distributed.

`make_raw(NAME, folder)` writes one. Pictures are JPEGs or PNGs with a colour of their label.
"""

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from curate.vtab.vtab_files import encoded, picture, tar_bytes, write_files
from curate.vtab.vtab_raw import make_raw as make_vtab

# Real names at their real indices, in the real mappings; all other classes are "class 17".
NAMES = {
    0: "tench, Tinca tinca",
    134: "crane",
    278: "kit fox, Vulpes macrotis",
    409: "analog clock",
    517: "crane",
    518: "crash helmet",
    530: "digital clock",
    550: "espresso maker",
    560: "football helmet",
    729: "plate rack",
    999: "toilet tissue, toilet paper, bathroom tissue",
}
FOLDERS = {
    "air_freshener": "Air freshener",
    "alarm_clock": "Alarm clock",
    "coffee_french_press": "Coffee/French press",
    "drying_rack_for_dishes": "Drying rack for plates",
    "helmet": "Helmet",
    "toilet_paper_roll": "Toilet paper roll",
    "t-shirt": "T-shirt",
}
OVERLAP = {
    "Alarm clock": "analog clock; digital clock",
    "Coffee/French press": "espresso maker",
    "Drying rack for plates": "plate rack",
    "Helmet": "football helmet; crash helmet",
    "Toilet paper roll": "toilet tissue, toilet paper, bathroom tissue",
}
FOLDER_CLASSES = {
    "alarm_clock": (409, 530),
    "coffee_french_press": (550,),
    "drying_rack_for_dishes": (729,),
    "helmet": (518, 560),
    "toilet_paper_roll": (999,),
}
REAL = [[65], [795, 970], [230, 231], [809], [], [57, 334, 700], [3], [10], [0], [9], [999], []]
V2_CLASSES = (0, 1, 2, 9, 10, 100, 999)


@dataclasses.dataclass(frozen=True)
class Raw:
    """A miniature. samples: by split and stem of the file, the labels and the image.

    The image is the file's bytes; for pixels, that of any PNG; None, where it is encoded again.
    """

    source: Path
    samples: Mapping[str, Mapping[str, tuple[tuple[int, ...], bytes | np.ndarray | None]]]
    val_labels: str = ""


def make_raw(name: str, folder: Path) -> Raw:
    folder.mkdir(parents=True, exist_ok=True)
    return MAKERS[name](folder)


def _pets(folder: Path) -> Raw:
    """Train is the list trainval, as it is."""
    raw = make_vtab("pets", folder)
    return Raw(folder, {split: _stems(rows) for split, rows in raw.examples.items()})


def _flowers102(folder: Path) -> Raw:
    """Train is trnid and valid."""
    splits = {split: _stems(rows) for split, rows in make_vtab("flowers102", folder).examples.items()}
    return Raw(folder, {"train": splits["train"] | splits["validation"], "test": splits["test"]})


def _stems(rows: Mapping[str, tuple[int, bytes | np.ndarray | None]]):
    return {name.removesuffix(".jpg"): ((label,), image) for name, (label, image) in rows.items()}


def write_real(folder: Path, labels: list[list[int]], images: list[bytes]) -> Raw:
    """ILSVRC2012_img_val.tar and real.json: image n of the tar has the list n."""
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, len(images) + 1)]
    # The members of the published tar are not in the order of their names.
    shuffled = np.random.default_rng(0).permutation(len(images))
    content = tar_bytes({f"{names[i]}.JPEG": images[i] for i in shuffled}, "w")
    (folder / "ILSVRC2012_img_val.tar").write_bytes(content)
    (folder / "real.json").write_text(json.dumps(labels))
    samples = {name: (tuple(row), image) for name, row, image in zip(names, labels, images, strict=True)}
    return Raw(folder / "ILSVRC2012_img_val.tar", {"val": samples}, str(folder / "real.json"))


def _imagenet_real(folder: Path) -> Raw:
    images = [encoded(picture(number, number)) for number in range(len(REAL))]
    images[3] = encoded(picture(3, 3), "PNG")  # as one file of the published set is
    return write_real(folder, REAL, images)


def _imagenet_v2(folder: Path) -> Raw:
    """Folders in the order of text, with entries of their own, and a file of macOS."""
    root, samples = "imagenetv2-matched-frequency-format-val", {}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:

        def add(name: str, content: bytes | None) -> None:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))

        add(root, None)
        for label in sorted(V2_CLASSES, key=str):
            add(f"{root}/{label}", None)
            for number in range(3):
                image, stem = encoded(picture(label, number)), f"{label:03x}{number}9f0c2a"
                add(f"{root}/{label}/{stem}.jpeg", image)
                samples[stem] = ((label,), image)
        add(f"{root}/9/.DS_Store", b"\0\1")
    path = folder / "imagenetv2-matched-frequency.tar.gz"
    path.write_bytes(buffer.getvalue())
    return Raw(path, {"test": samples})


def bordered(inside: np.ndarray) -> bytes:
    """A PNG of an image in a red border of one pixel; the pixels next to it are doubled."""
    padded = np.pad(inside, ((1, 1), (1, 1), (0, 0)), "edge")
    framed = np.pad(padded, ((1, 1), (1, 1), (0, 0)))
    framed[[0, -1]] = framed[:, [0, -1]] = (255, 0, 0)
    return encoded(framed, "PNG")


def write_objectnet(folder: Path, images_per_folder: int = 3, size: int = 12) -> Raw:
    """The folder objectnet-1.0 as the zip unpacks to it."""
    root, files, samples = folder / "objectnet-1.0", {"README": b"ObjectNet", "LICENSE": b"..."}, {}
    for place, name in enumerate(FOLDERS):
        for number in range(images_per_folder):
            inside, stem = picture(place, 100 * place + number, size, size), f"{place:04x}{number:03x}f9a7"
            files[f"images/{name}/{stem}.png"] = bordered(inside)
            if name in FOLDER_CLASSES:
                samples[stem] = (FOLDER_CLASSES[name], inside)
    lines = np.random.default_rng(0).permutation(1000)  # lines[c]: where the name of class c is
    names = [""] * 1000
    for index, line in enumerate(lines):
        names[line] = NAMES.get(index, f"class {index}")
    files |= {
        "mappings/folder_to_objectnet_label.json": json.dumps(FOLDERS).encode(),
        "mappings/objectnet_to_imagenet_1k.json": json.dumps(OVERLAP).encode(),
        "mappings/imagenet_to_label_2012_v2": "".join(f"{name}\n" for name in names).encode(),
        "mappings/pytorch_to_imagenet_2012_id.json": json.dumps(
            {str(index): int(line) for index, line in enumerate(lines)}
        ).encode(),
    }
    return Raw(write_files(root, files), {"test": samples})


MAKERS: dict[str, Callable[[Path], Raw]] = {
    "pets": _pets,
    "flowers102": _flowers102,
    "imagenet_real": _imagenet_real,
    "imagenet_v2": _imagenet_v2,
    "objectnet": write_objectnet,
}
