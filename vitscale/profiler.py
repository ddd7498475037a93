"""A trace of some steps (log.profile), for Perfetto, chrome://tracing or TensorBoard."""

import contextlib
import logging
from pathlib import Path

from torch.profiler import profile, record_function

from vitscale import distributed
from vitscale.progress import Progress
from vitscale.train_config import TrainConfig

logger = logging.getLogger(__name__)


class Profiler:
    """Traces rank 0 from the first to the last of the steps; a listener of the loop's phases.

    It writes RUN/profile/steps-100-110.pt.trace.json, in which the phases have their names. Use
    it as a context manager: where a start does not do all of the steps, a line says so.
    """

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._first, self._last = (config.log.profile if distributed.is_main() else ()) or (0, 0)
        folder = Path(config.run_dir) / "profile"
        self._path = folder / f"steps-{self._first}-{self._last}.pt.trace.json"
        self._progress = progress
        self._profile: profile | None = None
        self._spans = contextlib.ExitStack()

    def __enter__(self) -> "Profiler":
        if self._first <= self._progress.step < self._last and not self._path.exists():
            self._no_trace("begins")
        return self

    def __exit__(self, *_: object) -> None:
        self._spans.close()
        if self._profile:
            self._profile.stop()
            self._no_trace("ends")

    def started(self, phase: str) -> None:
        if self._first and phase == "data" and self._progress.step + 1 == self._first:
            self._profile = profile()  # of the CPU and, where there is one, the GPU
            self._profile.start()
        if self._profile:
            self._spans.enter_context(record_function(phase))

    def ended(self, phase: str, seconds: float) -> None:
        self._spans.close()
        if self._profile and phase == "step" and self._progress.step + 1 == self._last:
            self._profile.stop()
            self._path.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None
            logger.info("%s is a trace of steps %d to %d", self._path, self._first, self._last)

    def _no_trace(self, what: str) -> None:
        logger.warning(
            "there will be no trace of log.profile [%d, %d]: this start %s after step %d",
            self._first,
            self._last,
            what,
            self._progress.step,
        )
