"""A trace of all steps that were asked for, or a line that says why there is none."""

import json
import logging
from pathlib import Path

import pytest

from vitscale.data.data_config import DataConfig
from vitscale.profiler import Profiler
from vitscale.progress import Phases, Progress
from vitscale.train_config import LogConfig, TrainConfig


@pytest.mark.parametrize(
    ("first", "until", "sentence"),
    [
        (0, 9, ""),
        (2, 9, ""),
        (3, 9, "this start begins after step 3"),
        (5, 9, ""),  # an earlier start has done them
        (0, 4, "this start ends after step 4"),
        (0, 2, ""),  # a later start may do them
    ],
)
def test_a_start_that_does_not_do_all_steps_of_a_trace_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int, until: int, sentence: str
) -> None:
    data, log = DataConfig(index="-"), LogConfig(profile=(3, 5))
    config = TrainConfig(run_dir=str(tmp_path), total_steps=9, data=data, log=log)
    with Profiler(config, at := Progress(step=first)) as profiler:
        phases = Phases(profiler)
        while at.step < until:
            with phases("data"), phases("step"):
                pass
            at.advance(8)
    said = f"there will be no trace of log.profile [3, 5]: {sentence}"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ([said] if sentence else [])
    traces = [json.loads(path.read_text()) for path in tmp_path.glob("profile/steps-3-5.pt.trace.json")]
    assert len(traces) == (first < 3 and until > 5)
    for trace in traces:
        names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
        assert (names.count("data"), names.count("step")) == (3, 3)
