"""What data workers spend their time on, and the line that says what would help."""

from pathlib import Path

import pytest
from make import write_index

from vitscale.data import AugmentConfig, load
from vitscale.data.stages import Stages, advice


def test_stages_add_up() -> None:
    total = Stages.total([Stages(1, 2, 3, 4), Stages(0.5, 0, 0, 1)])
    assert total == Stages(1.5, 2, 3, 5)
    assert total.fractions() == pytest.approx(
        {"read": 1.5 / 11.5, "decode": 2 / 11.5, "finish": 3 / 11.5, "idle": 5 / 11.5}
    )
    assert set(Stages().fractions().values()) == {0.0}


def say(stages: Stages, wait: float, elapsed: float = 10.0, num_workers: int = 8) -> str:
    return advice(stages, wait_fraction=wait, elapsed=elapsed, num_workers=num_workers)


def test_workers_that_decode_all_the_time_need_more_cores() -> None:
    # 8 cores are busy, and would have to be 16 to halve the time: 8 more.
    assert "data 50% of the time; CPU-bound: 8 more cores would keep up" in say(Stages(0, 70, 10, 0), 0.5)
    assert "CPU-bound: 1 more core would keep up" in say(Stages(0.1, 9, 1, 0), 0.2)
    # They wait for shards, but not as long as they work.
    assert "CPU-bound: 2 more cores would" in say(Stages(5, 3, 3, 0), 0.75)
    # They are idle for half of their time, and still the trainer waits: 4 busy ones are 5 then.
    assert "CPU-bound: 1 more core would" in say(Stages(0, 35, 5, 40), 0.2)


def test_workers_that_wait_for_shards_do_not_need_cores() -> None:
    said = say(Stages(60, 15, 5, 0), 0.3)
    assert said.startswith(
        "training waits for data 30% of the time; storage-bound: data workers wait for shards 75%"
    )


def test_a_trainer_without_workers_is_told_of_them() -> None:
    assert "set engine.num_workers to 1 or more" in say(Stages(0, 3, 0, 7), 0.3, num_workers=0)


def test_nothing_is_said_where_little_is_waited() -> None:
    assert say(Stages(0, 80, 0, 0), 0.1) == "" != say(Stages(0, 80, 0, 0), 0.11)
    assert say(Stages(0, 3, 0, 7), 0.1, num_workers=0) == ""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_batch_brings_the_time_of_its_workers(tmp_path: Path, num_workers: int) -> None:
    index = write_index(tmp_path, [40])
    batches = load(index, global_batch=8, image_size=16, augment=AugmentConfig(), num_workers=num_workers)
    first, second = next(batches).stages, next(batches).stages
    batches.close()
    assert min(first.decode, first.finish, second.decode, second.finish) > 0 and first.read >= 0
    assert first.idle == 0 < second.idle
