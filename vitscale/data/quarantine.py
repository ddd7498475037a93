"""Samples that could not be used: counted over all ranks, named; too many end a run."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from vitscale import distributed
from vitscale.system import atomic

logger = logging.getLogger(__name__)
FILE_NAME = "quarantine.jsonl"
MIN_SAMPLES = 1000  # a fraction is taken of at least as many: one bad sample early is no reason


class Quarantine:
    """RUN/quarantine.jsonl: a line for every replaced sample.

        {"step": 8, "data_step": 8, "sample": "..."}

    The steps are those of the row, save or roll-back at which it was written.

    bad_samples, samples_seen: the run's counts at this start. The limit is for what comes after
    it: damage that was fixed between two starts no longer counts.
    """

    def __init__(
        self, run_dir: str, max_bad_fraction: float, *, bad_samples: int = 0, samples_seen: int = 0
    ) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self._max_bad_fraction = max_bad_fraction
        self._bad_before, self._seen_before = bad_samples, samples_seen
        self._sentences: list[str] = []

    def add(self, sentences: Sequence[str]) -> None:
        """Note what this rank could not use: a sentence for each sample."""
        self._sentences += sentences

    def flush(self, step: int, data_step: int) -> int:
        """Write what all ranks have noted since the last call, and return their number.

        Every rank calls it.
        """
        (count,) = distributed.all_reduce_sum_int([len(self._sentences)])
        if count:
            everyone = distributed.gather_json_to_main(self._sentences)
            self._sentences = []
            if distributed.is_main():
                steps = {"step": step, "data_step": data_step}
                self._write(steps, [sentence for sentences in everyone for sentence in sentences])
        return count

    def is_over(self, bad_samples: int, samples_seen: int) -> bool:
        """Whether more had to be replaced than data.max_bad_fraction allows."""
        seen = max(samples_seen - self._seen_before, MIN_SAMPLES)
        return bad_samples - self._bad_before > self._max_bad_fraction * seen

    def verdict(self, bad_samples: int, samples_seen: int, step: int) -> str:
        """The sentence that ends a run for which is_over holds."""
        bad, seen = bad_samples - self._bad_before, samples_seen - self._seen_before
        return (
            f"{bad:,} of the {seen:,} samples since this start could not be used, more than "
            f"data.max_bad_fraction {self._max_bad_fraction} allows; {self.path} lists them. A checkpoint "
            f"was saved at step {step}: fix the shards, index them again and run the same command, or raise "
            "data.max_bad_fraction"
        )

    def _write(self, steps: dict[str, int], sentences: list[str]) -> None:
        logger.warning(
            "%d samples could not be used and were replaced, the first: %s", len(sentences), sentences[0]
        )
        with atomic.named(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**steps, "sample": sentence}) + "\n" for sentence in sentences)
