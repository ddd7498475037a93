"""The labels that VTAB derives from annotations (google-research/task_adaptation)."""

from collections.abc import Iterable, Sequence

import numpy as np

CLEVR_DEPTHS = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DEPTHS = (-100.0, 8.0, 20.0, 999.0)
KITTI_VEHICLES = ("Car", "Van", "Truck")
KITTI_NO_VEHICLE = 1000.0
CLEVR_FEWEST_OBJECTS = 3


def bin_above(value: float, thresholds: Sequence[float]) -> int:
    """The last threshold that is below the value, in float32; -1 if none is.

    A value that equals a threshold belongs to the bin before it: 8.0 of CLEVR is in bin 0.
    """
    return int(np.flatnonzero(np.asarray(thresholds, np.float32) < np.float32(value)).max(initial=-1))


def clevr_count(num_objects: int) -> int:
    """3 to 10 objects become the classes 0 to 7 (clevr.py, count_all)."""
    return num_objects - CLEVR_FEWEST_OBJECTS


def clevr_distance(depths: Iterable[float]) -> int:
    """The bin of the smallest depth, pixel_coords[2] (clevr.py, closest_object_distance)."""
    return bin_above(min(depths), CLEVR_DEPTHS)


def kitti_distance(objects: Iterable[tuple[str, float]]) -> int:
    """The bin of the closest vehicle of (type, z); 3 without any (closest_vehicle_distance)."""
    depths = (z for kind, z in objects if kind in KITTI_VEHICLES)
    return bin_above(min(depths, default=KITTI_NO_VEHICLE), KITTI_DEPTHS)


def dsprites_location(x: int) -> int:
    """The 32 positions in 16 classes of two (dsprites.py, label_x_position)."""
    return x // 2


def dsprites_orientation(orientation: int) -> int:
    """The 40 orientations in 16 classes of 3, 2, 3, 2, ... (dsprites.py: floor(i / 2.5))."""
    return orientation * 2 // 5


def smallnorb_azimuth(azimuth: int) -> int:
    """0, 2, ... 34 become the classes 0 to 17 (TFDS smallnorb)."""
    return azimuth // 2


def smallnorb_elevation(elevation: int) -> int:
    """Already 0 to 8."""
    return elevation


def svhn_digit(y: int) -> int:
    """1 to 10, where 10 is the digit 0 (TFDS svhn_cropped)."""
    return y % 10
