"""Ends a job that hangs, and says which rank the others wait for, and what each one does.

Every two seconds, a thread of each rank tells a store on rank 0 in which phase of the loop the
rank is, and rank 0 reads them all. When the job hangs (hang.py), rank 0 raises the alarm. Every
rank then hands in the stack of its trainer, rank 0 prints them, and the job ends. If a rank
does not answer, another one of its machine hands in what the kernel says of its process. If
rank 0 does not, each rank ends itself.

Nothing here needs the trainer's thread, which may wait in a collective for ever.
"""

import contextlib
import datetime
import itertools
import json
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from vitscale import distributed, rendezvous
from vitscale.errors import RankLost
from vitscale.guard.hang import Answer, Place, screen, sentence, waited_for
from vitscale.guard.sealed_store import SECRET_BYTES, SealedStore
from vitscale.guard.watch import Watch, lives
from vitscale.progress import Progress

BEAT_SECONDS = 2.0
SILENT_SECONDS = 15.0  # after which a rank without a beat is one that does not answer
ASLEEP_SECONDS = 6.0  # without any thread of a rank at work, after which it counts as suspended
ANSWER_SECONDS = 10.0  # for the stacks of all ranks
STORE_TIMEOUT = datetime.timedelta(minutes=5)
SEEN_TIMEOUT = datetime.timedelta(seconds=5)  # for all that answered to read that it is over
FRAMES = 10  # of a stack, the innermost


class AwakeClock:
    """The seconds in which this process was not suspended (by SIGSTOP, Ctrl-Z, a scheduler).

    Some thread has to read it every BEAT_SECONDS. For example, read at 10, 12, 312 (after five
    minutes of scontrol suspend) and 314 s, it shows 10, 12, 12 and 14.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read, self._asleep = time.monotonic(), 0.0

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            gap, self._read = now - self._read, now
            self._asleep += gap if gap > ASLEEP_SECONDS else 0.0
            return now - self._asleep


class Watchdog:
    """Watches over the phases of a run within the block; every rank enters it.

    limits: how many seconds each phase may take; inf = any time.
    watch: knows the processes of all ranks. What asks one rank to stop is told to all.
    tell(error, details): says why this process ends, and gives the exit status.
    """

    def __init__(
        self, limits: Mapping[str, float], watch: Watch, tell: Callable[[BaseException, str], int]
    ) -> None:
        self._limits, self._watch, self._tell_why = limits, watch, tell
        self._identities, self._peers = watch.identities, watch.peers
        self._trainer = threading.get_ident()
        self._closing, self._clock = threading.Event(), AwakeClock()
        self.starting()
        self._rank, self._ranks = distributed.rank(), range(distributed.world_size())
        self._store = _open_store() if len(self._ranks) > 1 else None
        self._heard = dict.fromkeys(self._ranks, self._clock())  # when a rank's last beat was read
        self._beats: dict[int, list[Any]] = {}

    def __enter__(self) -> "Watchdog":
        if self._store:
            self._beat(self._store, 0)
            distributed.barrier()
            threading.Thread(target=self._keep_in_touch, name="watchdog store", daemon=True).start()
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not kind:  # else this process is about to end, and may hang on the way
            self._closing.set()

    def starting(self) -> None:
        """The run starts, also when it is rolled back."""
        self._progress, self._stepped = Progress(), False  # behind every rank that is in the loop
        self._enter("start")

    def ready(self, progress: Progress) -> None:
        """The loop begins there."""
        self._progress = progress

    def started(self, phase: str) -> None:
        self._enter(phase)

    def ended(self, phase: str, seconds: float) -> None:
        # Until the next one begins, the rank counts as in this phase.
        self._stepped = self._stepped or phase == "step"

    def _enter(self, phase: str) -> None:
        # The first step compiles, and the first batch has to be read from the beginning.
        is_first = phase in ("data", "step") and not self._stepped
        self._now = (
            self._progress.step,
            phase,
            self._clock(),
            self._limits["start" if is_first else phase],
        )

    def place(self) -> Place:
        """Where this rank is."""
        step, phase, since, limit = self._now
        return Place(step, phase, self._clock() - since, limit)

    def _look(self) -> None:
        """The thread that needs no other rank: of a rank alone, or one that is left alone."""
        while not self._closing.wait(BEAT_SECONDS):
            place, silence = self.place(), self._clock() - self._heard[0]
            if place.seconds <= place.limit:
                continue
            if not self._store:
                self._end({self._rank: self._answer()}, {})
            if silence > SILENT_SECONDS and self._rank:
                last = self._last_place(0)
                self._end({self._rank: self._answer(), 0: Answer(last, ())}, {0: self._kernel_state(0)})

    def _keep_in_touch(self) -> None:
        """The thread that talks to the store, and waits for it if rank 0 is stopped."""
        store = self._store
        assert store
        for number in itertools.count(1):
            if self._closing.wait(BEAT_SECONDS):
                return
            try:
                self._beat(store, number)
                self._hear(store, self._ranks if self._rank == 0 else [0])
                if self._rank == 0:
                    self._judge(store)
                elif store.get("alarm") is not None:
                    self._hand_in(store)
                self._share_stop(store)
            except RuntimeError:  # rank 0 has ended, or its machine: what hangs here is found by _look
                return

    def _share_stop(self, store: SealedStore) -> None:
        """Tell the others that this rank is asked to stop, or learn it in any phase."""
        if self._watch.asked:
            store.set("stop", self._watch.reason)
        elif (reason := store.get("stop")) is not None:
            self._watch.ask(reason)

    def _last_place(self, rank: int) -> Place:
        """Where a rank was at its last beat, with the time since then."""
        place = Place(*self._beats[rank][1]) if rank in self._beats else self.place()
        return place._replace(seconds=place.seconds + self._clock() - self._heard[rank])

    def _beat(self, store: SealedStore, number: int) -> None:
        store.set(f"place/{self._rank}", json.dumps([number, self.place()]))

    def _hear(self, store: SealedStore, ranks: Sequence[int]) -> None:
        now = self._clock()
        for rank, text in zip(ranks, store.get_all([f"place/{rank}" for rank in ranks]), strict=True):
            beat = json.loads(text) if text else None
            if beat and beat != self._beats.get(rank):
                self._beats[rank], self._heard[rank] = beat, now

    def _judge(self, store: SealedStore) -> None:
        """Rank 0 raises the alarm if the job hangs, and ends it."""
        now = self._clock()
        places = {rank: self._last_place(rank) for rank in self._ranks}
        silent = [rank for rank in self._ranks if now - self._heard[rank] > SILENT_SECONDS]
        if not waited_for(places, silent):
            return
        store.set("alarm", "")
        answers = {0: self._answer()}
        self._describe_others(store)
        deadline = self._clock() + ANSWER_SECONDS
        missing = [rank for rank in self._ranks[1:] if rank not in silent]
        while missing and self._clock() < deadline:
            for rank in tuple(missing):
                if text := store.get(f"answer/{rank}"):
                    values, stack = json.loads(text)
                    answers[rank] = Answer(Place(*values), tuple(stack))
                    missing.remove(rank)
            time.sleep(0.1)
        states = dict.fromkeys((*silent, *missing), "")
        for rank in states:
            answers[rank] = Answer(places[rank], ())
            states[rank] = store.get(f"kernel/{rank}") or ""
        self._end(answers, states, lambda: self._let_go(store, states))

    def _hand_in(self, store: SealedStore) -> NoReturn:
        """What any other rank does after an alarm."""
        store.set(f"answer/{self._rank}", json.dumps(self._answer()))
        self._describe_others(store)
        with contextlib.suppress(RuntimeError):  # rank 0 is gone
            store.wait(["over"], datetime.timedelta(seconds=2 * ANSWER_SECONDS))
            not_answering = json.loads(store.get("over") or "[]")
            store.set(f"seen/{self._rank}", "")
            self._kill(not_answering)
        os._exit(RankLost.status)

    def _let_go(self, store: SealedStore, states: Mapping[int, str]) -> None:
        """Tell the others that it is over, and wait for them: the store ends with rank 0."""
        store.set("over", json.dumps(list(states)))
        seen = [f"seen/{rank}" for rank in self._ranks[1:] if rank not in states]
        if seen:
            store.wait(seen, SEEN_TIMEOUT)

    def _describe_others(self, store: SealedStore) -> None:
        """For each rank of this machine, in case it cannot answer."""
        for rank in self._ranks:
            if rank != self._rank and (text := self._kernel_state(rank)):
                store.set(f"kernel/{rank}", text)

    def _kernel_state(self, rank: int) -> str:
        """What the kernel says of a rank's process; "" if it is on another machine."""
        if rank not in self._peers:
            return ""
        if not lives(self._peers[rank]):
            return "dead"
        pid = self._identities[rank].pid
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            state = next(line.split(None, 1)[1] for line in status.splitlines() if line.startswith("State:"))
            return f"{state}, in {Path(f'/proc/{pid}/wchan').read_text()} of the kernel"
        return ""

    def _kill(self, ranks: Sequence[int]) -> None:
        """Kill ranks of this machine that do not answer: a stopped one would live on."""
        for rank in ranks:
            if self._kernel_state(rank) not in ("", "dead"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._identities[rank].pid, signal.SIGKILL)

    def _answer(self) -> Answer:
        frames = _stack(self._trainer)[-FRAMES:]
        lines = (f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in frames)
        return Answer(self.place(), tuple(lines))

    def _end(
        self,
        answers: Mapping[int, Answer],
        states: Mapping[int, str],
        release: Callable[[], object] = lambda: None,
    ) -> NoReturn:
        """Say why, end the ranks that do not answer, and this process.

        states: what the kernel says of those ranks. release(): lets the others end.
        """
        processes = {rank: f"process {who.pid} on {who.host}" for rank, who in enumerate(self._identities)}
        error = RankLost(sentence(answers, states, processes))
        status = self._tell_why(error, screen(answers))
        with contextlib.suppress(RuntimeError):
            release()
        self._kill(list(states))
        os._exit(status)


def _stack(thread: int) -> list[traceback.FrameSummary]:
    """The stack of a thread, outermost first, followed by that of the thread that it joins."""
    innermost = sys._current_frames().get(thread)
    if not innermost:
        return []
    for frame in (innermost, innermost.f_back):  # join is one of the two, by the version of Python
        if frame and frame.f_code is threading.Thread.join.__code__:
            return [*traceback.extract_stack(frame), *_stack(frame.f_locals["self"].ident)]
    return traceback.extract_stack(innermost)


def _open_store() -> SealedStore:
    """A store of its own on rank 0, to which every rank connects; every rank calls it.

    In the store where the ranks meet, the trainer may wait for long, and hold its connection.
    """
    if distributed.is_main():
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
        secret = secrets.token_hex(SECRET_BYTES)
        distributed.broadcast_json([rendezvous.address_here(), store.port, secret])
    else:
        address, port, secret = distributed.broadcast_json(None)
        store = TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT)
    return SealedStore(store, bytes.fromhex(secret))
