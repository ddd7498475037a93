"""What a config expects of a run's metrics ([expect]), and whether they are as expected.

    [expect]
    source = "3 seeds on 2 CPU cores, 2026-03"

    [expect.bands]
    "train/loss_mean" = [[100, 2.9, 3.3], [600, 0.9, 1.4]]    # rows of [step, low, high]

Between the steps of its rows a band is linear; before the first and after the last there is
none. Nothing depends on a verdict: it is said on the console, and shown by tools/report.py.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping

from vitscale.errors import ConfigError

Band = tuple[tuple[int, float, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectConfig:
    """The values that metrics should have at some steps ([expect]).

    source:  where the bands come from: a measurement, a paper
    bands:   by the metric's name in metrics.jsonl, rows of [step, low, high]; [] = none
    """

    source: str = ""
    bands: dict[str, Band] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, band in self.bands.items():
            _check(f"expect.bands.{name}", band)
        if self.bands and not self.source:
            raise ConfigError(
                'expect.source is empty: say where the bands come from, like "3 seeds on 2 CPU cores"'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The last value of a metric within the steps of its band, beside the band there.

    gap: how far the value lies above the band, or below it if negative; 0 within; nan if the
    value is not finite. since: the first of the last steps in a row that are on the same side.
    """

    step: int
    value: float
    low: float
    high: float
    gap: float
    since: int

    @property
    def side(self) -> str:
        """Where the value lies: "within", "above" or "below" the band, or "not finite"."""
        if math.isnan(self.gap):
            return "not finite"
        return "above" if self.gap > 0 else "below" if self.gap < 0 else "within"

    @property
    def on_track(self) -> bool:
        return self.side == "within"

    def __str__(self) -> str:
        """For example "on track", or "0.31 above the band since step 400"."""
        if self.on_track:
            return "on track"
        where = self.side if math.isnan(self.gap) else f"{abs(self.gap):.2g} {self.side} the band"
        return f"{where} since step {self.since:,}"


def limits(band: Band, step: int) -> tuple[float, float] | None:
    """Low and high of a band at a step; None where there is none, as in an empty one.

    Example: [[100, 2.0, 3.0], [200, 1.0, 2.0]] is (1.5, 2.5) at step 150.
    """
    steps = [row[0] for row in band]
    if not steps or not steps[0] <= step <= steps[-1]:
        return None
    place = bisect.bisect_left(steps, step)
    (after, *ends), (before, *starts) = band[place], band[max(0, place - 1)]
    part = (step - before) / (after - before) if after > before else 1.0
    low, high = (start + part * (end - start) for start, end in zip(starts, ends, strict=True))
    return low, high


def judge(band: Band, step: int, value: float, before: Verdict | None = None) -> Verdict | None:
    """The verdict on the value of a step; `before` where the step has no band.

    before: the verdict on the earlier steps, None if there is none.
    """
    at = limits(band, step)
    if at is None:
        return before
    low, high = at
    gap = value - min(max(value, low), high) if math.isfinite(value) else math.nan
    verdict = Verdict(step=step, value=value, low=low, high=high, gap=gap, since=step)
    if before and before.side == verdict.side:
        return dataclasses.replace(verdict, since=before.since)
    return verdict


class Expectations:
    """The verdicts on a run's metrics, brought up to date row by row."""

    def __init__(self, config: ExpectConfig) -> None:
        self._bands = {name: band for name, band in config.bands.items() if band}
        self.verdicts = dict[str, Verdict | None].fromkeys(self._bands)

    def add(self, step: int, numbers: Mapping[str, float | int]) -> list[str]:
        """Take in a row. Returns a sentence for each metric whose verdict is another now."""
        changed = []
        for name in self._bands.keys() & numbers.keys():
            before = self.verdicts[name]
            verdict = judge(self._bands[name], step, float(numbers[name]), before)
            self.verdicts[name] = verdict
            if verdict and (before is None or before.side != verdict.side):
                changed.append(name)
        return [_sentence(name, self.verdicts[name]) for name in sorted(changed)]

    def sentences(self) -> list[str]:
        """How all metrics that have a band stand, one sentence each."""
        return [_sentence(name, verdict) for name, verdict in self.verdicts.items()]


def _sentence(name: str, verdict: Verdict | None) -> str:
    """For example "train/loss: on track, 1.52 at step 400 (expected 1.4 to 1.7)"."""
    if verdict is None:
        return f"{name}: not judged, no value yet within the steps of its band"
    at = f"{verdict.value:.4g} at step {verdict.step:,}"
    return f"{name}: {verdict}, {at} (expected {verdict.low:.4g} to {verdict.high:.4g})"


def _check(where: str, band: Band) -> None:
    for step, low, high in band:
        if step < 0 or low > high:
            raise ConfigError(
                f"{where} has the row {[step, low, high]}; a step must not be negative, and low must be the "
                "lower one"
            )
    for (step, *_), (following, *_) in itertools.pairwise(band):
        if following <= step:
            raise ConfigError(
                f"{where} has step {following} after step {step}; write its steps in rising order"
            )
