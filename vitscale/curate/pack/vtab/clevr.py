"""CLEVR: images, and scenes that describe them in the same order."""

import json
import re
from collections.abc import Callable
from typing import Any

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.vtab.archives import Files, open_files
from vitscale.curate.pack.vtab.examples import Examples, held, make_listing
from vitscale.errors import DataError
from vitscale.vtab import labels as rules
from vitscale.vtab.tasks import TASKS

_ADVICE = "vtab/{} reads CLEVR_v1.0.zip, or the folder that it unpacks to"


def list_clevr(source: str, config: PackConfig, *, task: str) -> Listing:
    """CLEVR_v1.0.zip: images/val is the TFDS split "validation", which is the test set here.

    The official test images have no scenes and are not read.
    """
    files = open_files(source, _ADVICE.format(task), ("CLEVR_v1.0",))
    rule = {"clevr_count": _count, "clevr_distance": _distance}[task]
    splits = {
        split: _list_split(files, part, rule) for split, part in (("train", "train"), ("validation", "val"))
    }
    return make_listing(TASKS[task], source, splits)


def _list_split(files: Files, part: str, rule: Callable[[list[dict[str, Any]]], int]) -> Examples:
    """Image i of a split, by name, belongs to scene i."""
    scenes_file = f"scenes/CLEVR_{part}_scenes.json"
    pattern = re.compile(rf"(?:.*/)?images/{part}/(CLEVR_{part}_\d+\.png)")
    images = {match[1]: file for name, file in files.by_name.items() if (match := pattern.fullmatch(name))}
    keys = sorted(images)
    try:
        scenes = json.loads(files.read(scenes_file))["scenes"]
        labels = [rule(scene["objects"]) for scene in scenes]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{scenes_file} in {files.source} is not a list of scenes with objects ({error!r}); "
            "download it again"
        ) from None
    if len(keys) != len(labels):
        raise DataError(
            f"{files.source} holds {len(keys):,} images in images/{part} and {len(labels):,} scenes in "
            f"{scenes_file}; they belong together by position, so restore what is missing"
        )
    return Examples(keys=keys, labels=labels, images=held([images[key] for key in keys]))


def _count(objects: list[dict[str, Any]]) -> int:
    return rules.clevr_count(len(objects))


def _distance(objects: list[dict[str, Any]]) -> int:
    return rules.clevr_distance(float(thing["pixel_coords"][2]) for thing in objects)
