"""The label rules at the edges of their bins."""

import numpy as np
import pytest

from vitscale.vtab import labels


@pytest.mark.parametrize(
    ("depth", "label"),
    [(0.1, 0), (8.0, 0), (8.0001, 1), (8.5, 1), (8.6, 2), (9.0, 2), (9.4, 3), (10.0, 4), (10.5, 5)],
)
def test_the_distance_of_clevr_is_the_bin_of_the_closest_object(depth: float, label: int) -> None:
    assert labels.clevr_distance([20.0, depth, 11.0]) == label


def test_depths_outside_of_all_bins_give_labels_that_no_task_has() -> None:
    assert labels.clevr_distance([0.0]) == -1 and labels.clevr_distance([100.5]) == 6
    assert labels.clevr_distance([100.0]) == 5


@pytest.mark.parametrize(
    ("objects", "label"),
    [
        ([("Car", 8.0)], 0),
        ([("Car", 8.0001)], 1),
        ([("Van", 20.0)], 1),
        ([("Truck", 20.5)], 2),
        ([("Truck", -2.0)], 0),
        ([("Car", 50.0), ("Van", 9.0)], 1),
        ([("Pedestrian", 2.0), ("Tram", 3.0), ("Car", 30.0)], 2),
        ([("Cyclist", 2.0)], 3),
        ([], 3),
    ],
)
def test_the_distance_of_kitti_is_the_bin_of_the_closest_vehicle(
    objects: list[tuple[str, float]], label: int
) -> None:
    assert labels.kitti_distance(objects) == label


def test_bins_are_compared_in_float32() -> None:
    assert labels.bin_above(8.5 + 1e-9, labels.CLEVR_DEPTHS) == 1
    assert labels.bin_above(float(np.nextafter(np.float32(8.5), np.float32(9))), labels.CLEVR_DEPTHS) == 2


def test_counts_positions_and_angles_become_classes() -> None:
    assert [labels.clevr_count(count) for count in (3, 10)] == [0, 7]
    assert [labels.dsprites_location(x) for x in (0, 1, 2, 31)] == [0, 0, 1, 15]
    assert [labels.smallnorb_azimuth(azimuth) for azimuth in (0, 2, 34)] == [0, 1, 17]
    assert [labels.smallnorb_elevation(elevation) for elevation in (0, 8)] == [0, 8]
    assert [labels.svhn_digit(y) for y in (1, 9, 10)] == [1, 9, 0]


def test_orientations_have_classes_of_three_and_two() -> None:
    classes = [labels.dsprites_orientation(orientation) for orientation in range(40)]
    assert classes == [int(np.floor(orientation / 2.5)) for orientation in range(40)] and classes[39] == 15
    assert [classes.count(label) for label in range(16)] == [3, 2] * 8
