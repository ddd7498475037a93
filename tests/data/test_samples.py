"""Which file of a tar belongs to which sample, and what its labels are."""

import pytest

from vitscale.data.samples import DEFAULT_KEYS, Choice, LabelError, SampleKeys, read_labels, split_name


@pytest.mark.parametrize(
    ("extension", "content", "labels"),
    [
        ("cls", b"7\n", (7,)),
        ("cls", b"0", (0,)),
        ("cls", b"3 17,4", (3, 17, 4)),
        ("json", b"7", (7,)),
        ("json", b"[2, 0]", (2, 0)),
        ("json", b'{"labels": [2, 5]}', (2, 5)),
        ("json", b'{"label": 2}', (2,)),
        ("json", b'{"cls": 2}', (2,)),
        ("json", b"[]", ()),
        ("json", b'{"labels": []}', ()),
    ],
)
def test_labels_are_read_from_cls_and_json(extension: str, content: bytes, labels: tuple[int, ...]) -> None:
    assert read_labels(Choice("jpg", extension), content, DEFAULT_KEYS) == labels


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        *(("cls", content) for content in (b"-1", b"1.5", b"", b"a", b"1_0", b"3 -1", b"\xff")),
        *(
            ("json", content)
            for content in (b"-1", b"true", b"null", b"[2, 1.5]", b"{}", b"x", b"[" * 100_000)
        ),
    ],
    ids=range(14),
)
def test_labels_that_are_not_whole_numbers_from_0_are_refused(extension: str, content: bytes) -> None:
    with pytest.raises(LabelError):
        read_labels(Choice("jpg", extension), content, DEFAULT_KEYS)


def test_for_an_index_of_version_2_an_empty_list_and_a_number_in_quotes_remain_damage() -> None:
    strict = SampleKeys(strict=True)
    assert read_labels(Choice("jpg", "json"), b"[4]", strict) == (4,)
    assert read_labels(Choice("jpg", "cls"), b"3 17", strict) == (3, 17)
    with pytest.raises(LabelError, match="no field labels"):
        read_labels(Choice("jpg", "json"), b"[]", strict)
    with pytest.raises(LabelError, match="not a whole number"):
        read_labels(Choice("jpg", "json"), b'["4"]', strict)
    assert read_labels(Choice("jpg", "json"), b'["4"]', DEFAULT_KEYS) == (4,)


def test_keys_end_at_the_first_dot_of_the_file_name() -> None:
    assert split_name("a.b/n01.x.JPG") == ("a.b/n01", "x.jpg")
