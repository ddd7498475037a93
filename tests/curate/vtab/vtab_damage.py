"""Changes that damage a source of VTAB-1k: each takes the folder that holds it."""

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from curate.vtab.vtab_files import write_files, write_zip


def cut(name: str, share: float = 0.6) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: write_files(folder, {name: content}) and None


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def flip(name: str, place: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 0x40
        (folder / name).write_bytes(data)

    return change


def edit_zip(name: str, edit: Callable[[dict[str, bytes]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / name) as archive:
            files = {member: archive.read(member) for member in archive.namelist()}
        edit(files)
        write_zip(folder / name, files)

    return change


def edit_hdf5(name: str, array: str, values: np.ndarray | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with h5py.File(folder / name, "a") as file:
            del file[array]
            if values is not None:
                file[array] = values

    return change


def pack_gzip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()

    return change


def drop_scene(files: dict[str, bytes]) -> None:
    name = "CLEVR_v1.0/scenes/CLEVR_val_scenes.json"
    files[name] = json.dumps({"scenes": json.loads(files[name])["scenes"][1:]}).encode()


def set_scene(**scene: object) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        name = "CLEVR_v1.0/scenes/CLEVR_train_scenes.json"
        scenes = json.loads(files[name])["scenes"]
        files[name] = json.dumps({"scenes": [scene, *scenes[1:]]}).encode()

    return change
