"""What keeps hosts from running a job together, as sentences, and a table of what they are.

Nothing here asks a host: facts come in, and text goes out.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vitscale import shared_memory
from vitscale.quantities import size_text
from vitscale.system import open_files

CHECKING = "checking"  # the first host looks for all shards next
CLOCK_SECONDS = 30.0  # stores refuse requests that are signed minutes away from their own time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a host says of itself, for one config.

    address: where other hosts reach it. loopback: its own name leads to 127.*, and no interface
        was chosen for gloo, so that it would tell others to look there.
    code: a digest of vitscale's source files. config, index: digests; "" = they cannot be read.
    errors: sentences about what the config needs and this host does not give.
    store_is_down: one of them is about a store that may answer later.
    shared: run_dir must be one folder for all hosts. saw: how many hosts' probes it sees there;
        0 = it could not write its own.
    shm_needed: bytes of /dev/shm that one process fills.
    clock: seconds that its clock is ahead of the asking host's.
    speed: bytes a second that arrive from the host before it; 0 = not measured. refused: why no
        connection came about.
    """

    host: str
    address: str = ""
    loopback: bool = False
    checkout: str = ""
    python: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    code: str = ""
    config: str = ""
    index: str = ""
    errors: tuple[str, ...] = ()
    store_is_down: bool = False
    run_dir: str = ""
    shared: bool = True
    saw: int = 0
    free: int = 0
    cores: int = 0
    shm_free: int = 0
    shm_needed: int = 0
    open_files: int = 0
    gpus: tuple[str, ...] = ()
    clock: float = 0.0
    speed: float = 0.0
    refused: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A host of the job, and its facts; without any, trouble says why.

    unreachable: it did not answer at all, as when it is switched off.
    """

    name: str
    slots: int
    facts: Facts | None = None
    trouble: str = ""
    unreachable: bool = False


def facts_of(values: dict[str, Any]) -> Facts:
    """Facts that have travelled as JSON, without those that other source files have."""
    names = {field.name for field in dataclasses.fields(Facts)}
    known = {name: value for name, value in values.items() if name in names}
    return Facts(**{**known, **{name: tuple(known.get(name, ())) for name in ("errors", "gpus")}})


def problems(answers: Sequence[Answer]) -> list[str]:
    """One sentence for each thing that must be fixed before the hosts can run the job."""
    found = [answer.trouble for answer in answers if answer.trouble]
    known = [(answer, answer.facts) for answer in answers if answer.facts]
    if not known:
        return found
    world_size = sum(answer.slots for answer in answers)
    found += _shared_errors(known)
    for what, value, way_out in _MUST_BE_EQUAL:
        found += _differing(known, what, value, way_out)
    found += _not_shared(known)
    needs_gpus = any(facts.gpus for _, facts in known)
    for answer, facts in known:
        found += _lacking(answer, facts, world_size, needs_gpus=needs_gpus)
        if facts.loopback and len(answers) > 1:
            found.append(
                f"{answer.name}: its own name {facts.host} leads to a loopback address, where other hosts "
                "would look for it; set GLOO_SOCKET_IFNAME to its network interface, like eth0"
            )
        if abs(facts.clock) > CLOCK_SECONDS:
            direction = "ahead" if facts.clock > 0 else "behind"
            found.append(
                f"{answer.name}: its clock is {abs(facts.clock):,.0f} s {direction}, and {CLOCK_SECONDS:.0f} "
                "s are allowed; start a time service (chrony, systemd-timesyncd) there"
            )
        if facts.refused:
            found.append(facts.refused)
    return found


_Known = Sequence[tuple[Answer, Facts]]
_MUST_BE_EQUAL: list[tuple[str, Callable[[Facts], str], str]] = [
    ("Python", lambda f: f.python, "make .venv with the same Python on all hosts"),
    *(
        (name, lambda f, name=name: f.versions.get(name, "none"), "run bash tools/setup.sh there")
        for name in ("torch", "deepspeed", "vitscale")
    ),
    ("vitscale's source files", lambda f: f.code, "check out the same commit on all hosts"),
    ("the config", lambda f: f.config, "copy the same config files to all hosts"),
    ("the index of the data", lambda f: f.index, "copy the same index to all hosts, or name it by URL"),
]


def _differing(known: _Known, what: str, value: Callable[[Facts], str], way_out: str) -> list[str]:
    """A sentence if the hosts differ in a value. Most of them are right; of two, the first."""
    values = [(answer.name, value(facts)) for answer, facts in known if value(facts)]
    if len({text for _, text in values}) < 2:
        return []
    usual = Counter(text for _, text in values).most_common(1)[0][0]
    first = next(name for name, text in values if text == usual)
    others: dict[str, list[str]] = {}
    for name, text in values:
        if text != usual:
            others.setdefault(text, []).append(name)
    differ = "; ".join(f"{text} on {_names(names)}" for text, names in others.items())
    return [f"{what} differs: {usual} on {first}, {differ}; {way_out}"]


def _shared_errors(known: _Known) -> list[str]:
    """The hosts' own sentences, each once, with the names of those that say it."""
    saying: dict[str, list[str]] = {}
    for answer, facts in known:
        for error in facts.errors:
            saying.setdefault(error, []).append(answer.name)
    everyone = len(known)
    return [
        error if len(names) == everyone else f"{_names(names)}: {error}" for error, names in saying.items()
    ]


def _not_shared(known: _Known) -> list[str]:
    # A host that could not write there has said so.
    writers = [(answer.name, facts.saw) for answer, facts in known if facts.shared and facts.saw]
    lonely = [name for name, saw in writers if saw < len(writers)]
    if not lonely:
        return []
    folder = known[0][1].run_dir
    return [
        f"run_dir {folder} is not one folder on all hosts: {_names(lonely)} cannot see what the others write "
        'there; put it on a file system that all share, or set checkpoint.store = "s3://..."'
    ]


def _lacking(answer: Answer, facts: Facts, world_size: int, *, needs_gpus: bool) -> list[str]:
    """What a single host has too little of. needs_gpus: others have some."""
    found = []
    if needs_gpus and len(facts.gpus) != answer.slots:
        way_out = (
            "start one process per GPU"
            if facts.gpus
            else "look at its driver (nvidia-smi), or leave the host out"
        )
        found.append(f"{answer.name}: it has {len(facts.gpus)} GPUs and slots={answer.slots}; {way_out}")
    if len(set(facts.gpus)) > 1:
        found.append(
            f"{answer.name}: its GPUs differ ({', '.join(sorted(set(facts.gpus)))}); leave the odd ones out"
        )
    needed = open_files.needed(world_size)
    if 0 < facts.open_files < needed:
        found.append(
            f"{answer.name}: each of {world_size:,} ranks needs {needed:,} open files, and the hard limit "
            f"there is {facts.open_files:,}; raise it (nofile in /etc/security/limits.conf)"
        )
    if sentence := shared_memory.shortage(facts.shm_free, answer.slots, facts.shm_needed):
        found.append(f"{answer.name}: {sentence}")
    return found


def table(answers: Sequence[Answer]) -> str:
    """A row for each host."""
    rows = [
        ["host", "slots", "python", "torch", "deepspeed", "GPUs", "cores", "/dev/shm", "files",
         "run_dir free", "clock", "from the one before"]
    ]  # fmt: skip
    for answer in answers:
        facts = answer.facts
        if not facts:
            rows.append([answer.name, str(answer.slots), "no answer", *[""] * 9])
            continue
        gpus = ", ".join(f"{number} {name}" for name, number in Counter(facts.gpus).items()) or "none"
        rows.append(
            [
                answer.name, str(answer.slots), facts.python, facts.versions.get("torch", "none"),
                facts.versions.get("deepspeed", "none"), gpus, str(facts.cores), size_text(facts.shm_free),
                f"{facts.open_files:,}" if facts.open_files > 0 else "any", size_text(facts.free),
                f"{facts.clock:+.2f} s", f"{size_text(facts.speed)}/s" if facts.speed else "",
            ]
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _names(names: Sequence[str]) -> str:
    """Like "node1, node2 and 6 more"."""
    shown = list(names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(shown) + more
