"""The stored order against known answers, and against the published lists where they are.

The known answers are the first five names and a digest of all names. The published lists come
from the authors of VPT; their training lists are shuffled, so they are compared as sets.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from vitscale.curate.pack.vtab.archives import open_files
from vitscale.errors import DataError
from vitscale.vtab.membership import Key, Slice, key_bytes, members, parse_slice, slices_of, stored_order
from vitscale.vtab.tasks import TASKS

# CLASS_NUMBER.jpg, of 3,000 images but for some
EUROSAT_SIZES = {
    **dict.fromkeys(("AnnualCrop", "Forest", "HerbaceousVegetation", "Residential", "SeaLake"), 3000),
    **dict.fromkeys(("Highway", "Industrial", "PermanentCrop", "River"), 2500),
    "Pasture": 2000,
}
RESISC45_CLASSES = [
    "airplane",
    "airport",
    "baseball_diamond",
    "basketball_court",
    "beach",
    "bridge",
    "chaparral",
    "church",
    "circular_farmland",
    "cloud",
    "commercial_area",
    "dense_residential",
    "desert",
    "forest",
    "freeway",
    "golf_course",
    "ground_track_field",
    "harbor",
    "industrial_area",
    "intersection",
    "island",
    "lake",
    "meadow",
    "medium_residential",
    "mobile_home_park",
    "mountain",
    "overpass",
    "palace",
    "parking_lot",
    "railway",
    "railway_station",
    "rectangular_farmland",
    "river",
    "roundabout",
    "runway",
    "sea_ice",
    "ship",
    "snowberg",
    "sparse_residential",
    "stadium",
    "storage_tank",
    "tennis_court",
    "terrace",
    "thermal_power_station",
    "wetland",
]


def all_keys(name: str) -> dict[str, Sequence[Key]]:
    """The keys of a data set that follow from its numbers of images alone."""
    sizes = TASKS[name].sizes
    if name.startswith("clevr"):
        parts = {"train": "train", "validation": "val"}
        return {s: [f"CLEVR_{parts[s]}_{i:06d}.png" for i in range(n)] for s, n in sizes.items()}
    if name == "patch_camelyon":
        parts = {"train": "train", "validation": "valid", "test": "test"}
        return {s: [f"{parts[s]}_{i}" for i in range(n)] for s, n in sizes.items()}
    if name == "eurosat":
        return {"train": [f"{c}_{c}_{i}.jpg" for c, n in EUROSAT_SIZES.items() for i in range(1, n + 1)]}
    if name == "resisc45":
        return {"train": [f"{c}_{c}_{i:03d}.jpg" for c in RESISC45_CLASSES for i in range(1, 701)]}
    return {split: range(size) for split, size in sizes.items()}


@functools.cache
def derived(name: str) -> dict[str, list[str]]:
    """names_in of all_keys."""
    return names_in(name, all_keys(name))


def names_in(name: str, keys: Mapping[str, Sequence[Key]]) -> dict[str, list[str]]:
    """The names of the keys in each slice of a task, in stored order."""
    return {
        part: [key_bytes(keys[split][row]).decode() for row in rows]
        for part, (split, rows) in members(TASKS[name], keys).items()
    }


def digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


KNOWN = {
    "cifar100": (
        ("16399 1680 47917 17307 27051", "5b25ee0661c3bc4a"),
        ("13431 9237 17462 32685 9518", "93377e439662509b"),
    ),
    "clevr_count": (
        (
            "CLEVR_train_043876.png CLEVR_train_033421.png CLEVR_train_062025.png CLEVR_train_021419.png "
            "CLEVR_train_004851.png",
            "5dc1033102716488",
        ),
        (
            "CLEVR_train_035084.png CLEVR_train_029360.png CLEVR_train_004525.png CLEVR_train_024831.png "
            "CLEVR_train_021255.png",
            "9a9150228251ccef",
        ),
    ),
    "patch_camelyon": (
        ("train_251464 train_132287 train_133786 train_86259 train_230288", "c1122cb7e413b8b3"),
        ("valid_3270 valid_10310 valid_20603 valid_11608 valid_13337", "b3998b44bc8423a1"),
    ),
    "eurosat": (
        ("Forest_Forest_687.jpg Residential_Residential_188.jpg", "7dac90dec1b73063"),
        ("SeaLake_SeaLake_804.jpg Forest_Forest_1554.jpg", "5c9a3ab3702faf20"),
    ),
    "resisc45": (
        ("dense_residential_dense_residential_068.jpg palace_palace_207.jpg", "7c42d524f21f8a68"),
        ("cloud_cloud_238.jpg roundabout_roundabout_303.jpg", "2a2bb0da49b4bb17"),
    ),
    "dsprites_location": (
        ("16399 634903 206287 470425 352707", "54130b46ffd22579"),
        ("220697 85843 84902 106270 175044", "86005e8c04783edc"),
    ),
    "svhn": (
        ("16399 1680 47917 17307 27051", "901fe4f6d4f65bc8"),
        ("21145 64736 23870 1919 26393", "36ae944d2e322a4f"),
    ),
    "smallnorb_azimuth": (
        ("16399 1680 17307 1456 19135", "438b845e2bd4a468"),
        ("23018 16932 19084 9933 24157", "d9fca0e85af945f0"),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_stored_order_gives_the_known_answers(name: str) -> None:
    names = derived(name)
    for part, (begins, expected) in zip(("train800", "val200"), KNOWN[name], strict=True):
        first = begins.split()
        assert names[part][: len(first)] == first
        assert digest(names[part]) == expected
    assert [len(names[part]) for part in ("train800", "val200")] == [800, 200]
    assert not set(names["train800"]) & set(names["val200"]) or TASKS[name].val200.startswith("test")


def test_the_test_set_of_smallnorb_is_the_second_half() -> None:
    names = derived("smallnorb_azimuth")["test"]
    assert names[:5] == ["299", "2838", "15595", "9948", "17287"] and digest(names) == "f5e0032ca6dc71ce"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("clevr_count", "clevr_distance"),
        ("dsprites_location", "dsprites_orientation"),
        ("smallnorb_azimuth", "smallnorb_elevation"),
    ],
)
def test_two_tasks_of_one_data_set_have_the_same_members(name: str, other: str) -> None:
    first, second = TASKS[name], TASKS[other]
    assert (first.sizes, first.slices()) == (second.sizes, second.slices())


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict[str, dict[str, list[str]]]:
    path = shared_data / "vtab_1k_membership.json"
    if not path.exists():
        pytest.skip(f"the published lists are not here: {path} is missing")
    return json.loads(path.read_bytes())


def without_class(name: str) -> str:
    """Forest_Forest_687.jpg as the lists write it, Forest_687.jpg."""
    words = name.split("_")
    half = len(words) // 2
    return "_".join(words[half:])


def padded(name: str) -> str:
    return f"train_{int(name):05d}"


@pytest.mark.parametrize(
    ("name", "title", "written"),
    [
        ("cifar100", "cifar(num_classes=100)", padded),
        ("clevr_count", 'clevr(task="count_all")', str),
        ("clevr_distance", 'clevr(task="closest_object_distance")', str),
        ("patch_camelyon", "patch_camelyon", str),
        ("eurosat", "eurosat", without_class),
        ("resisc45", "resisc45", without_class),
    ],
)
def test_all_members_are_those_of_the_published_lists(name: str, title: str, written, published) -> None:
    ours = derived(name)
    for part, theirs in (("train800", "train"), ("val200", "val")):
        assert {written(member) for member in ours[part]} == set(published[title][theirs])


def test_all_members_of_sun397_are_those_of_the_published_lists(published) -> None:
    lists = os.environ.get("VITSCALE_TEST_SUN397", "")
    if not lists:
        pytest.skip("TFDS's lists are not here (VITSCALE_TEST_SUN397: the wheel, or a folder of the lists)")
    files = open_files(lists, "")
    skipped = "/t/track/outdoor/sun_aophkoiosslinihb.jpg"
    keys = {
        split: [key for key in files.lines(f"sun397_tfds_{part}.txt") if key != skipped]
        for split, part in (("train", "tr"), ("validation", "va"), ("test", "te"))
    }
    assert {split: len(names) for split, names in keys.items()} == TASKS["sun397"].sizes
    ours = names_in("sun397", keys)
    for part, theirs, expected in (
        ("train800", "train", "bbfe318c912bf278"),
        ("val200", "val", "ed3f4079a4f342a7"),
    ):
        assert set(ours[part]) == set(published["sun397"][theirs]) and digest(ours[part]) == expected


def position(split: str, key: Key) -> float:
    """Where the digest of a key is between the smallest, 0, and the largest, 1."""
    return int.from_bytes(hashlib.md5(split.encode() + key_bytes(key)).digest()[:8], "big") / 2**64


# Only the data set itself has all names here, so the published ones must fill their range: the
# digests of train[:800] of 1,880 names are below 800/1,880 of the largest digest there can be,
# give or take five standard deviations of a random sample.
RANGES = [
    ("dtd", "dtd", "train", "train", "616c0cbf9e27772d"),
    ("dtd", "dtd", "val", "validation", "559c9d46db9b06e7"),
    ("pets", "oxford_iiit_pet", "train", "train", "d25e517477870861"),
    ("pets", "oxford_iiit_pet", "val", "train", "2205e2e97bbd6520"),
    ("dmlab", "dmlab", "train", "train", "3c95edfda5b29009"),
    ("dmlab", "dmlab", "val", "validation", "178d43b74c7b3298"),
    ("retinopathy", 'diabetic_retinopathy(config="btgraham-300")', "train", "train", "791f64de0577c42d"),
    ("retinopathy", 'diabetic_retinopathy(config="btgraham-300")', "val", "validation", "2f0e505845102cf5"),
    ("flowers102", "oxford_flowers102", "train", "train", "a850e1e5fbcf84fc"),
    ("flowers102", "oxford_flowers102", "val", "validation", "d5b13b788e23d308"),
    ("kitti_distance", 'kitti(task="closest_vehicle_distance")', "train", "train", "672f709eeee9eb44"),
    ("kitti_distance", 'kitti(task="closest_vehicle_distance")', "val", "validation", "ac4167613b6a2171"),
]


@pytest.mark.parametrize(("name", "title", "part", "split", "expected"), RANGES)
def test_the_digests_of_the_published_names_fill_their_range(
    name: str, title: str, part: str, split: str, expected: str, published
) -> None:
    task, names = TASKS[name], published[title][part]
    ordered = [names[row] for row in stored_order(split, names)]
    assert digest(ordered) == expected and len(names) == {"train": 800, "val": 200}[part]
    size = task.sizes[split]
    cut = parse_slice(task.slices()[{"train": "train800", "val": "val200"}[part]], size)
    ranks = sorted(position(split, key) * size for key in names)
    margin = 5 * (size * 0.25) ** 0.5  # the rank at a quantile has a deviation of sqrt(n p (1 - p))
    assert cut.start - margin <= ranks[0] and ranks[-1] <= cut.stop + margin
    wrong = sorted(position("train" if split != "train" else "test", key) * size for key in names)
    assert bisect.bisect(wrong, cut.stop + margin) < len(wrong) or cut.stop > size / 2


def test_keys_are_hashed_by_what_they_say_not_by_their_type() -> None:
    assert key_bytes(16399) == key_bytes("16399") == key_bytes(b"16399") == b"16399"
    assert key_bytes("a\\b.jpg") == key_bytes("a/b.jpg") and key_bytes(b"a\\b") == b"a\\b"
    assert key_bytes("é") == "é".encode()
    names = [f"video_{n}.jpg" for n in range(50)]
    assert stored_order("train", names) == stored_order("train", [name.encode() for name in names])
    assert stored_order("train", range(50)) == stored_order("train", [str(n) for n in range(50)])
    assert stored_order("train", names) != stored_order("test", names)


@pytest.mark.parametrize("keys", [[1, "1"], ["a", b"a"], ["a\\b", "a/b"]])
def test_equal_keys_are_refused(keys: list[Key]) -> None:
    with pytest.raises(DataError, match=r"the train split has .* 2 times; keep one of them"):
        stored_order("train", keys)
    assert len(stored_order("train", [keys[0], "other"])) == 2


def test_the_published_sizes_are_cut_as_published() -> None:
    assert slices_of(TASKS["eurosat"], {"train": 27_000}) == {
        "train800": Slice("train", 0, 800),
        "val200": Slice("train", 16_200, 16_400),
        "test": Slice("train", 21_600, 27_000),
    }
    assert slices_of(TASKS["smallnorb_azimuth"], {"train": 24_300, "test": 24_300}) == {
        "train800": Slice("train", 0, 800),
        "val200": Slice("test", 0, 200),
        "test": Slice("test", 12_150, 24_300),
    }


@pytest.mark.parametrize(
    ("size", "bounds"),
    [
        (3, [0, 1, 2, 3]),
        (100, [0, 12, 15, 100]),
        (6_399, [0, 799, 999, 6_399]),
        (6_400, [0, 800, 1_000, 6_400]),
        (26_999, [0, 800, 1_000, 6_400]),
    ],
)
def test_other_sizes_are_cut_in_order_and_in_proportion(size: int, bounds: list[int]) -> None:
    slices = slices_of(TASKS["eurosat"], {"train": size})
    assert [(cut.start, cut.stop) for cut in slices.values()] == list(itertools.pairwise(bounds))


@pytest.mark.parametrize("name", TASKS)
def test_the_slices_of_any_size_are_disjoint_and_none_is_empty(name: str) -> None:
    task = TASKS[name]
    for size in (3, 7, 60, 999, 1_000, 5_000, 10**6):
        slices = slices_of(task, dict.fromkeys(task.sizes, size))
        for split in task.sizes:
            cuts = sorted((cut.start, cut.stop) for cut in slices.values() if cut.split == split)
            ends = [0, *(stop for _, stop in cuts)]
            assert all(end <= start < stop for end, (start, stop) in zip(ends, cuts, strict=False))
            assert ends[-1] <= size


def test_a_split_with_fewer_examples_than_slices_is_refused() -> None:
    with pytest.raises(
        DataError, match="the train split has 2 examples, too few for train800 and val200 and"
    ):
        slices_of(TASKS["eurosat"], {"train": 2})
    assert slices_of(TASKS["eurosat"], {"train": 3})["test"] == Slice("train", 2, 3)


def test_the_table_has_the_groups_and_sizes_of_the_paper() -> None:
    groups = [task.group for task in TASKS.values()]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    num_test = [parse_slice(task.test, task.sizes[task.test.partition("[")[0]]) for task in TASKS.values()]
    assert [cut.stop - cut.start for cut in num_test] == (
        [
            6084,
            10000,
            1880,
            6149,
            3669,
            21750,
            26032,
            32768,
            5400,
            6300,
            42670,
            15000,
            15000,
            22735,
            73728,
            73728,
            711,
            12150,
            12150,
        ]
    )
    for task in TASKS.values():
        val = parse_slice(task.val200, 0)
        assert val.stop - val.start == 200 and val.stop <= task.sizes[val.split]
