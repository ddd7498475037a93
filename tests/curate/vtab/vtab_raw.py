"""Miniatures of the data sets of VTAB-1k, in the layouts in which these are distributed.

`make_raw(NAME, folder)` writes one. Every picture has a colour that goes with its label, so a
model can learn something from it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np
from curate.vtab.vtab_files import (
    encoded,
    example_bytes,
    picture,
    tar_bytes,
    write_files,
    write_mat,
    write_norb,
    write_records,
    write_zip,
)

Picture = bytes | np.ndarray | None  # a file, pixels, or what TFDS encodes again


@dataclasses.dataclass(frozen=True)
class Raw:
    """A miniature. examples: by TFDS split and key, the label and the picture."""

    source: Path
    examples: Mapping[str, Mapping[str, tuple[int, Picture]]]
    membership: str = ""


def make_raw(name: str, folder: Path, count: int = 30) -> Raw:
    """Write the data set of the task `name`; each TFDS split has about `count` images."""
    folder.mkdir(parents=True, exist_ok=True)
    return MAKERS[name](folder, count)


def _jpegs(
    names: Iterable[tuple[str, int]], height: int = 24, width: int = 24
) -> Iterator[tuple[str, tuple[int, bytes]]]:
    for number, (name, label) in enumerate(names):
        yield name, (label, encoded(picture(label, number, height, width)))


def _caltech101(folder: Path, count: int) -> Raw:
    """Thirty images of each class train, so that the test set has the rest."""
    classes = ["ant", "BACKGROUND_Google", "Faces", "Faces_easy"]  # in the order of their lower case
    per_class = 30 + max(1, count // 4)
    names = [
        (f"{name}/image_{i:04d}.jpg", label)
        for label, name in enumerate(classes)
        for i in range(1, per_class + 1)
    ]
    images = dict(_jpegs(names))
    inner = {f"101_ObjectCategories/{name}": image for name, (_, image) in images.items()}
    inner["101_ObjectCategories/BACKGROUND_Google/tmp"] = b"not an image"
    files = {"caltech-101/101_ObjectCategories.tar.gz": tar_bytes(inner), "caltech-101/Annotations.tar": b""}
    return Raw(write_zip(folder / "caltech-101.zip", files), {"train": images, "test": images})


def _cifar100(folder: Path, count: int) -> Raw:
    files, examples = {}, {}
    for split in ("train", "test"):
        labels = [number % 100 for number in range(count)]
        pixels = [picture(label, number, 32, 32) for number, label in enumerate(labels)]
        rows = [
            bytes([label // 5, label]) + image.transpose(2, 0, 1).tobytes()
            for label, image in zip(labels, pixels, strict=True)
        ]
        files[f"cifar-100-binary/{split}.bin"] = b"".join(rows)
        examples[split] = {
            str(n): (label, image) for n, (label, image) in enumerate(zip(labels, pixels, strict=True))
        }
    for kind, number in (("fine", 100), ("coarse", 20)):
        names = "".join(f"{kind}_{label}\n" for label in range(number))
        files[f"cifar-100-binary/{kind}_label_names.txt"] = names.encode()
    path = folder / "cifar-100-binary.tar.gz"
    path.write_bytes(tar_bytes(files))
    return Raw(path, examples)


def _dtd(folder: Path, count: int) -> Raw:
    classes, files, examples = ["banded", "blotchy", "braided"], {}, {}
    for part, (split, name) in enumerate((("train", "train"), ("validation", "val"), ("test", "test"))):
        names = [
            (f"{classes[i % 3]}/{classes[i % 3]}_{part * count + i:04d}.jpg", i % 3) for i in range(count)
        ]
        examples[split] = dict(_jpegs(names))
        files.update({f"dtd/images/{key}": image for key, (_, image) in examples[split].items()})
        files[f"dtd/labels/{name}1.txt"] = "".join(f"{key}\n" for key, _ in names).encode()
        files[f"dtd/labels/{name}2.txt"] = b"banded/banded_9999.jpg\n"
    path = folder / "dtd-r1.0.1.tar.gz"
    path.write_bytes(tar_bytes(files))
    return Raw(path, examples)


def _flowers102(folder: Path, count: int) -> Raw:
    images = dict(_jpegs((f"image_{i:05d}.jpg", (i - 1) % 102) for i in range(1, 3 * count + 1)))
    (folder / "102flowers.tgz").write_bytes(
        tar_bytes({f"jpg/{name}": image for name, (_, image) in images.items()})
    )
    labels = np.array([[label + 1 for label, _ in images.values()]], np.uint8)
    write_mat(folder / "imagelabels.mat", labels=labels)
    order = np.random.default_rng(0).permutation(3 * count).astype(np.uint16) + 1
    ids = dict(zip(("trnid", "valid", "tstid"), order.reshape(3, 1, count), strict=True))
    write_mat(folder / "setid.mat", **ids)
    examples = {
        split: {name: images[name] for name in (f"image_{i:05d}.jpg" for i in ids[variable].ravel())}
        for split, variable in (("train", "trnid"), ("validation", "valid"), ("test", "tstid"))
    }
    return Raw(folder, examples)


def _pets(folder: Path, count: int) -> Raw:
    """The archive of the images is a plain tar, as the published one may be."""
    breeds, files, texts, examples = ["Abyssinian", "american_bulldog", "chihuahua"], {}, {}, {}
    for part, (split, name) in enumerate((("train", "trainval"), ("test", "test"))):
        rows = [(f"{breeds[i % 3]}_{200 + part * count + i}", i % 3) for i in range(count)]
        pictures: dict[str, tuple[int, Picture]] = dict(_jpegs((f"{pet}.jpg", label) for pet, label in rows))
        files.update({f"images/{key}": image for key, (_, image) in pictures.items()})
        if split == "train":
            rows.append(("chihuahua_121", 2))
            alpha = np.dstack([picture(2, 7), np.full((24, 24), 128, np.uint8)])
            files["images/chihuahua_121.jpg"] = encoded(alpha, "PNG")
            pictures["chihuahua_121.jpg"] = (2, None)
        lines = "".join(f"{pet} {label + 1} {1 + label // 2} {label + 1}\n" for pet, label in rows)
        texts[f"annotations/{name}.txt"] = lines.encode()
        examples[split] = pictures
    (folder / "images.tar.gz").write_bytes(tar_bytes(files, "w"))
    (folder / "annotations.tar.gz").write_bytes(tar_bytes(texts))
    return Raw(folder, examples)


def _sun397(folder: Path, count: int) -> Raw:
    """The lists are in a folder of their own. One file is a BMP, one a GIF; one is large."""
    classes = ["/a/abbey", "/c/church/outdoor", "/z/zen_garden"]
    examples = {}
    for part, (split, name) in enumerate((("train", "tr"), ("validation", "va"), ("test", "te"))):
        keys = {f"{classes[i % 3]}/sun_{chr(97 + part)}{i:05d}.jpg": i % 3 for i in range(count)}
        for number, (key, label) in enumerate(keys.items()):
            large = (400, 500) if number == 2 else (24, 24)
            kind = {0: "BMP", 1: "GIF"}.get(number, "JPEG")
            write_files(folder / "SUN397", {key[1:]: encoded(picture(label, number, *large), kind)})
        examples[split] = {key: (label, None) for key, label in keys.items()}
        write_files(
            folder / "lists", {f"sun397_tfds_{name}.txt": "".join(f"{key}\n" for key in keys).encode()}
        )
    return Raw(folder / "SUN397", examples, str(folder / "lists"))


def _svhn(folder: Path, count: int) -> Raw:
    examples = {}
    for split in ("train", "test"):
        digits = [number % 10 for number in range(count)]
        pixels = [picture(digit, number, 32, 32) for number, digit in enumerate(digits)]
        y = np.array([[digit or 10] for digit in digits], np.uint8)
        write_mat(folder / f"{split}_32x32.mat", X=np.stack(pixels, axis=-1), y=y)
        examples[split] = {str(n): pair for n, pair in enumerate(zip(digits, pixels, strict=True))}
    return Raw(folder, examples)


def _patch_camelyon(folder: Path, count: int) -> Raw:
    examples = {}
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        labels = [number % 2 for number in range(count)]
        pixels = [picture(label, number, 96, 96) for number, label in enumerate(labels)]
        for kind, values in (("x", np.stack(pixels)), ("y", np.array(labels, np.uint8).reshape(-1, 1, 1, 1))):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{part}_{kind}.h5", "w") as file:
                file.create_dataset(kind, data=values, compression="gzip", compression_opts=1)
        examples[split] = {f"{part}_{n}": pair for n, pair in enumerate(zip(labels, pixels, strict=True))}
    return Raw(folder, examples)


def _eurosat(folder: Path, count: int) -> Raw:
    classes = ["AnnualCrop", "Forest", "SeaLake"]
    names = [(f"{classes[i % 3]}/{classes[i % 3]}_{i // 3 + 1}.jpg", i % 3) for i in range(count)]
    images = dict(_jpegs(names, 64, 64))
    path = write_zip(folder / "EuroSAT.zip", {f"2750/{name}": image for name, (_, image) in images.items()})
    return Raw(path, {"train": {name.replace("/", "_"): pair for name, pair in images.items()}})


def _resisc45(folder: Path, count: int) -> Raw:
    classes = ["airplane", "dense_residential", "palace"]
    names = [(f"{classes[i % 3]}/{classes[i % 3]}_{i // 3 + 1:03d}.jpg", i % 3) for i in range(count)]
    images = dict(_jpegs(names, 64, 64))
    files = {name: image for name, (_, image) in images.items()}
    source = write_files(folder / "NWPU-RESISC45", files)
    return Raw(source, {"train": {name.replace("/", "_"): pair for name, pair in images.items()}})


def _retinopathy(folder: Path, count: int) -> Raw:
    examples: dict[str, dict[str, tuple[int, Picture]]] = {"train": {}, "validation": {}, "test": {}}
    for number in range(3 * count):
        split = ["train", "validation", "test"][number % 3]
        name = f"{number}_{['left', 'right'][number // 3 % 2]}"
        y, x = np.mgrid[:60, :80]
        eye = picture(number % 5, number, 60, 80) * ((y - 30) ** 2 + (x - 40) ** 2 < 28**2)[..., None]
        place = "train" if split == "train" else "test"
        write_files(folder, {f"{place}/{name}.jpeg": encoded(eye.astype(np.uint8))})
        examples[split][name] = (number % 5, None)
    train = "".join(f"{name},{label}\n" for name, (label, _) in examples["train"].items())
    write_files(folder, {"trainLabels.csv": f"image,level\n{train}".encode()})
    rows = [(f"{n},{label},Public\n") for n, (label, _) in examples["validation"].items()]
    rows += [(f"{n},{label},Private\n") for n, (label, _) in examples["test"].items()]
    write_files(folder, {"retinopathy_solution.csv": ("image,level,Usage\n" + "".join(rows)).encode()})
    return Raw(folder, examples)


def _clevr(task: str) -> Callable[[Path, int], Raw]:
    def make(folder: Path, count: int) -> Raw:
        files, examples = {"CLEVR_v1.0/images/test/CLEVR_test_000000.png": encoded(picture(0, 0), "PNG")}, {}
        for split, part in (("train", "train"), ("validation", "val")):
            scenes, examples[split] = [], {}
            for number in range(count):
                depths = [7.5 + 0.5 * (number % 6) + 0.25 + 3 * extra for extra in range(3 + number % 8)]
                scenes.append(
                    {"objects": [{"shape": "cube", "pixel_coords": [9, 8, depth]} for depth in depths]}
                )
                label = number % 8 if task == "clevr_count" else number % 6
                image = encoded(picture(label, number), "PNG")
                files[f"CLEVR_v1.0/images/{part}/CLEVR_{part}_{number:06d}.png"] = image
                examples[split][f"CLEVR_{part}_{number:06d}.png"] = (label, image)
            files[f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json"] = json.dumps(
                {"info": {}, "scenes": scenes}
            ).encode()
        return Raw(write_zip(folder / "CLEVR_v1.0.zip", files), examples)

    return make


def _dmlab(folder: Path, count: int) -> Raw:
    examples = {}
    for split in ("train", "validation", "test"):
        names = [(f"video_{100 * (i % 4)}_{i % 7}_{i}.jpg", i % 6) for i in range(count)]
        examples[split] = dict(_jpegs(names, 36, 48))
        records = [
            example_bytes({"image": image, "filename": key.encode(), "label": label})
            for key, (label, image) in examples[split].items()
        ]
        for part in range(2):
            write_records(folder / f"dmlab-{split}.tfrecord-0000{part}-of-00002", records[part::2])
    return Raw(folder, examples)


def _dsprites(task: str) -> Callable[[Path, int], Raw]:
    def make(folder: Path, count: int) -> Raw:
        draws = np.random.default_rng(0)
        sizes = (1, 3, 6, 40, 32, 32)
        classes = np.stack([draws.integers(0, size, count) for size in sizes], axis=1)  # [n 6]
        images = draws.integers(0, 2, (count, 64, 64), dtype=np.uint8)
        with h5py.File(folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5", "w") as file:
            file.create_dataset("imgs", data=images, compression="gzip")
            file.create_dataset("latents/classes", data=classes)
            file.create_dataset("latents/values", data=classes.astype(np.float64))
        labels = classes[:, 4] // 2 if task == "dsprites_location" else np.floor(classes[:, 3] / 2.5)
        tiled = np.repeat(images[..., None] * np.uint8(255), 3, axis=-1)
        return Raw(folder, {"train": {str(n): (int(labels[n]), tiled[n]) for n in range(count)}})

    return make


def _kitti_distance(folder: Path, count: int) -> Raw:
    """Ten images a video; test and validation get one video of each ten."""
    total, images, labels = 3 * count, {}, {}
    pictures: dict[str, tuple[int, Picture]] = {}
    for number in range(total):
        label = number % 4
        image = encoded(picture(label, number, 20, 60), "PNG")
        depth = [5.0, 15.0, 50.0, 5.0][label]
        kind = ["Car", "Van", "Truck", "Cyclist"][label]
        lines = [f"{kind} 0.00 0 -0.20 1.00 2.00 3.00 4.00 1.5 1.6 3.9 1.0 1.7 {depth:.2f} 0.01"]
        lines += [
            "DontCare -1 -1 -10 0.00 0.00 1.00 1.00 -1 -1 -1 -1000 -1000 -1000 -10",
            "Pedestrian 0.00 0 0.10 1.00 2.00 3.00 4.00 1.8 0.5 0.8 1.0 1.5 2.00 0.01",
        ]
        images[f"training/image_2/{number:06d}.png"] = image
        labels[f"training/label_2/{number:06d}.txt"] = "".join(f"{line}\n" for line in lines).encode()
        pictures[f"{number:06d}.png"] = (label, image)
    write_zip(folder / "data_object_image_2.zip", {**images, "testing/image_2/000000.png": b"unused"})
    write_zip(folder / "data_object_label_2.zip", labels)
    order = np.random.default_rng(0).permutation(total) + 1
    drives = [f"2011_09_26 2011_09_26_drive_{line // 10:04d}_sync {line:010d}\n" for line in range(total)]
    mapping = {"mapping/train_rand.txt": ",".join(map(str, order)).encode()}
    mapping["mapping/train_mapping.txt"] = "".join(drives).encode()
    write_zip(folder / "devkit_object.zip", mapping)
    return Raw(folder, dict.fromkeys(("train", "validation", "test"), pictures))


def _smallnorb(task: str) -> Callable[[Path, int], Raw]:
    def make(folder: Path, count: int) -> Raw:
        examples = {}
        for seed, (split, stem) in enumerate(
            (
                ("train", "smallnorb-5x46789x9x18x6x2x96x96-training"),
                ("test", "smallnorb-5x01235x9x18x6x2x96x96-testing"),
            )
        ):
            draws = np.random.default_rng(seed)
            pairs = draws.integers(0, 256, (count, 2, 96, 96), dtype=np.uint8)
            columns = [draws.integers(0, size, count) for size in (10, 9, 18, 6)]
            columns[2] *= 2
            info = np.stack(columns, axis=1).astype("<i4")  # [n 4]
            write_norb(folder / f"{stem}-dat.mat.gz", pairs)
            write_norb(folder / f"{stem}-info.mat.gz", info)
            write_norb(folder / f"{stem}-cat.mat.gz", np.zeros(count, "<i4"))
            labels = info[:, 2] // 2 if task == "smallnorb_azimuth" else info[:, 1]
            tiled = np.repeat(pairs[:, 0, :, :, None], 3, axis=-1)
            examples[split] = {str(n): (int(labels[n]), tiled[n]) for n in range(count)}
        return Raw(folder, examples)

    return make


MAKERS: Mapping[str, Callable[[Path, int], Raw]] = {
    "caltech101": _caltech101,
    "cifar100": _cifar100,
    "dtd": _dtd,
    "flowers102": _flowers102,
    "pets": _pets,
    "sun397": _sun397,
    "svhn": _svhn,
    "patch_camelyon": _patch_camelyon,
    "eurosat": _eurosat,
    "resisc45": _resisc45,
    "retinopathy": _retinopathy,
    "clevr_count": _clevr("clevr_count"),
    "clevr_distance": _clevr("clevr_distance"),
    "dmlab": _dmlab,
    "dsprites_location": _dsprites("dsprites_location"),
    "dsprites_orientation": _dsprites("dsprites_orientation"),
    "kitti_distance": _kitti_distance,
    "smallnorb_azimuth": _smallnorb("smallnorb_azimuth"),
    "smallnorb_elevation": _smallnorb("smallnorb_elevation"),
}
