"""A run's data as the shards hold them now, opened once for all that the page shows of them."""

from collections.abc import Sequence

from vitscale.data.decode import DamagedImage, decode
from vitscale.data.index import Index
from vitscale.data.reader import describe, parse_place
from vitscale.data.samples import BadSample, RawSample, parse_samples
from vitscale.data.sources import Source, open_sources
from vitscale.errors import StoreError, UserError
from vitscale.report.page.html import Html, note, reason
from vitscale.report.page.pictures import picture
from vitscale.report.page.records import Record
from vitscale.stores import storage

NOT_WANTED = "they were left out"


class Shards:
    """The sources of a run's data. problem: why nothing in them is looked at; "" if it is."""

    def __init__(self, record: Record, *, with_images: bool) -> None:
        self.problem = "" if with_images else NOT_WANTED
        self.sources: Sequence[Source] = ()
        if not self.problem:
            self._open(record)

    def look(self, sentence: str) -> tuple[Html, str]:
        """The picture of the sample whose place begins a sentence, and its key.

        In place of the picture, the reason why there is none. A store that does not answer is
        not asked again: every question takes minutes.
        """
        if self.problem:
            return note("No picture: the same"), ""
        try:
            sample = self._find(sentence)
            if isinstance(sample, BadSample):
                return note(f"No picture: {sample.why()}"), sample.key
            return picture(decode(sample.image), f"sample {sample.key}"), sample.key
        except StoreError as error:
            self.problem = str(error)
            return note(f"No picture: {error}"), ""
        except (UserError, DamagedImage, OSError) as error:
            return note(f"No picture: {reason(error)}"), ""

    def _open(self, record: Record) -> None:
        if record.config is None:
            self.problem = record.problem
            return
        try:
            self.sources = open_sources(record.config.data)
        except (UserError, OSError) as error:
            self.problem = reason(error)

    def _find(self, sentence: str) -> RawSample | BadSample:
        place = parse_place(sentence)
        for source in self.sources:
            index = source.index
            if place and place.sample_id < index.num_samples:
                where = describe(index, place.sample_id)
                if sentence == where or sentence.startswith(f"{where}:"):
                    return read_as_it_is(index, place.sample_id)
        return BadSample("?", "the index has no such sample any more")


def read_as_it_is(index: Index, sample_id: int) -> RawSample | BadSample:
    """A sample that the bytes hold now, even of a chunk that was damaged after indexing."""
    chunk = index.layout.chunk_with(sample_id)
    shard, start, end = index.chunk_range(chunk)
    ids = index.layout.chunk_ids(chunk)
    samples = parse_samples(storage.read_range(shard.url, start, end), start, len(ids), index.keys)
    return samples[sample_id - ids.start]
