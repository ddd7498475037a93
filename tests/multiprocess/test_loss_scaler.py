"""The fp16 loss scaler: what it changes of a step, and that it resumes as it was.

Here the scaler by itself, at every step; whole runs are in test_fp16.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from multiprocess.scaler import resume_at_every_step, resume_in_another_precision, update_at_every_scale
from multiprocess.zygote import Zygote


@pytest.mark.parametrize("check", [resume_at_every_step, resume_in_another_precision])
def test_the_scaler_resumes(tmp_path: Path, zygote: Zygote, check: Callable[[], None]) -> None:
    log = tmp_path / "log"
    assert zygote.run(1, check, log=log) == [0], log.read_text()


def test_an_update_does_not_depend_on_the_scale_and_its_growth(tmp_path: Path, zygote: Zygote) -> None:
    log = tmp_path / "log"
    assert zygote.run(1, update_at_every_scale, log=log) == [0], log.read_text()
