"""Pure parts of a chart: where a value lies, which are labelled, and which are drawn at all."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

from vitscale.metrics.writer import is_score

HUGE = 1e300  # beyond, differences overflow
LOG_RATIO = 100.0  # from the lowest to the highest value, above which a log scale is used
_MAX_EXPONENT = 305.0
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_SUFFIXES = ((1e9, "G"), (1e6, "M"), (1e4, "k"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps values from low to high to pixels from start to end, others to the edges."""

    low: float
    high: float
    start: int | float
    end: int | float
    log: bool = False

    @classmethod
    def fit(
        cls,
        values: Float64[np.ndarray, " n"],
        start: int | float,
        end: int | float,
        *,
        margin: float = 0.05,
        may_log: bool = False,
    ) -> "Scale":
        """The scale of all finite values; of 0 to 1 if there are none.

        margin: the part of the range that stays free at each end. may_log: be logarithmic where
        all values are above 0 and differ by more than LOG_RATIO.
        """
        finite = np.clip(values[np.isfinite(values)], -HUGE, HUGE)
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        log = may_log and low > 1 / HUGE and high / low > LOG_RATIO
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # all equal
            free = abs(low) / 10 or 1.0
        else:
            free = margin * (high - low)
        low, high = low - free, high + free
        if log:
            low, high = 10.0 ** max(low, -_MAX_EXPONENT), 10.0 ** min(high, _MAX_EXPONENT)
        return cls(low=low, high=high, start=start, end=end, log=log)

    def __call__(self, values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """The pixels of values; nan for nan."""
        parts = (self._inner(np.clip(values, self.low, self.high)) - self._low) / (self._high - self._low)
        return self.start + parts * (self.end - self.start)

    def at(self, value: int | float) -> float:
        return float(self(np.array([value], dtype=np.float64))[0])

    def ticks(self, wanted: int) -> list[float]:
        """About so many round values within the scale."""
        if not self.log:
            return linear_ticks(self.low, self.high, wanted)
        first, last = math.ceil(self._low), math.floor(self._high)
        every = max(1, math.ceil((last - first + 1) / wanted))
        powers = [10.0**exponent for exponent in range(first, last + 1, every)]
        return powers if len(powers) > 1 else linear_ticks(self.low, self.high, wanted)

    def _inner(self, values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        return np.log10(values) if self.log else values

    @property
    def _low(self) -> float:
        return math.log10(self.low) if self.log else self.low

    @property
    def _high(self) -> float:
        return math.log10(self.high) if self.log else self.high


def linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` multiples of a round step from low to high, for low < high."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in _STEPS if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(
    xs: Float64[np.ndarray, " n"], ys: Float64[np.ndarray, " n"], columns: int
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """The points of a line that make a difference where it is `columns` pixels wide.

    xs rise. Of each column, the lowest and the highest value stay, so that no spike is lost,
    and one value that is not finite, as nan. Up to two points a column stay as they are.
    """
    ys = np.where(np.isfinite(ys), ys, np.nan)
    if len(xs) <= 2 * columns:
        return xs, ys
    edges = np.linspace(xs[0], xs[-1], columns + 1)[1:-1]
    kept = set[int]()
    for part in np.split(np.arange(len(xs)), np.searchsorted(xs, edges)):
        missing = np.isnan(ys[part])
        if missing.any():
            kept.add(int(part[missing.argmax()]))
        if not missing.all():
            kept |= {int(part[np.nanargmin(ys[part])]), int(part[np.nanargmax(ys[part])])}
    places = np.array(sorted(kept))
    return xs[places], ys[places]


def short(value: float) -> str:
    """A number in few characters: "0.25", "12k", "3e-4"."""
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    for unit, suffix in _SUFFIXES:
        if unit <= size < 1e13:
            return f"{value / (1e3 if suffix == 'k' else unit):.4g}{suffix}"
    mantissa, _, exponent = (f"{value:.5g}" if 1e-4 <= size < 1e5 else f"{value:.2e}").partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if exponent else mantissa


def percent(value: float) -> str:
    """A fraction as a percentage: "52.3%"."""
    return f"{100 * value:.4g}%" if math.isfinite(value) else str(value)


def form(name: str) -> Callable[[float], str]:
    """How values of a metric are written: accuracies and shares of time as percentages."""
    is_fraction = is_score(name) or name.startswith("time/")
    return percent if is_fraction and not name.endswith("loss") else short
