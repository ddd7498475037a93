"""Every pointer in README.md, CHANGELOG.md and docs/ is true: paths, commands, keys, links.

Each check takes the text of a page and returns what is wrong in it, so that it can be tried on
text that is known to be broken.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from vitscale import command
from vitscale.study.config import StudyConfig
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = sorted(path for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(
    r"(?<![\w./:-])(?:(?:vitscale|launch|tools|tests|configs|docs|\.ci)/[\w./*-]*"
    r"|(?:README|CHANGELOG)\.md|pyproject\.toml|constraints\.txt|LICENSE)"
)
NAME = re.compile(r"(?<![\w./])vitscale(?:\.[A-Za-z_]\w*)+")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SECTION = re.compile(r"\[{1,2}([\w.]+)\]{1,2}(?: (\w+)(?: = .*)?)?")
DOTTED = re.compile(r"(\w+(?:\.\w+)+)(?:\s?=.*)?")
PROGRAM = re.compile(r"(?:launch|tools)/\w+\.py")


def fences(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def spans(text: str) -> list[str]:
    """Inline code, as it is rendered: in tables a bar is escaped."""
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]


def broken_paths(text: str) -> list[str]:
    paths = [path.rstrip(".") for path in PATH.findall(text)]
    return [path for path in paths if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())]


def broken_names(text: str) -> list[str]:
    return [name for name in NAME.findall(text) if not resolves(name)]


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what one defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        with contextlib.suppress(AttributeError):
            functools.reduce(getattr, parts[length:], value)
            return True
    return False


def broken_keys(text: str) -> list[str]:
    """Keys that no config has: in inline code, in TOML blocks, in overrides of commands."""
    named = [
        [*match[1].split("."), *filter(None, [match[2]])] for match in full_matches(SECTION, spans(text))
    ]
    words = [*spans(text), *(word for words in commands(text) for word in words if "=" in word)]
    dotted = [match[1].split(".") for match in full_matches(DOTTED, words)]
    named += [keys for keys in dotted if keys[0] in get_type_hints(TrainConfig)]
    for block in fences(text, "toml"):
        named += key_paths(tomllib.loads(block))
    return [".".join(keys) for keys in named if not any(has_key(c, keys) for c in (TrainConfig, StudyConfig))]


def full_matches(pattern: re.Pattern[str], texts: list[str]) -> Iterator[re.Match[str]]:
    return (match for match in map(pattern.fullmatch, texts) if match)


def key_paths(values: dict[str, Any]) -> Iterator[list[str]]:
    for key, value in values.items():
        yield [key]
        tables = value if isinstance(value, list) else [value]
        for table in tables:
            if isinstance(table, dict):
                yield from ([key, *rest] for rest in key_paths(table))


def has_key(hint: Any, keys: list[str]) -> bool:
    """Whether a config of this type may have these nested keys; the keys of a dict are free."""
    if not keys or hint is Any:
        return True
    if get_origin(hint) is dict:
        return has_key(get_args(hint)[1], keys[1:])
    if get_origin(hint):  # a tuple or a union
        return any(has_key(part, keys) for part in get_args(hint))
    known = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    return keys[0] in known and has_key(known[keys[0]], keys[1:])


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command: lines of bash blocks, and inline code with `python` first."""
    lines = [line for block in fences(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(text) if span.startswith("python ")]
    for line in lines:
        for part in re.split(r" && ", line):
            yield shlex.split(part, comments=True)


def broken_commands(text: str) -> list[str]:
    """Commands that the parser of their program refuses."""
    refused = []
    for words in commands(text):
        place = next((number for number, word in enumerate(words) if PROGRAM.fullmatch(word)), None)
        if place is not None and (complaint := refusal(words[place], words[place + 1 :])):
            refused.append(f"{shlex.join(words)}: {complaint}")
    for span in spans(text):  # `tools/data.py demo | pack`: its subcommands
        program, _, rest = span.partition(" ")
        if PROGRAM.fullmatch(program) and re.fullmatch(r"[a-z]+( \| [a-z]+)*", rest):
            names = rest.split(" | ")
            refused += [f"{program} {name}" for name in names if refusal(program, [name, "--help"])]
    return refused


def refusal(program: str, arguments: list[str]) -> str:
    """Why the program's parser refuses the arguments; "" if it takes them. Nothing is run."""
    return parsed(program, tuple(arguments))[0]


@functools.cache
def parsed(program: str, arguments: tuple[str, ...]) -> tuple[str, str]:
    """The parser's complaint, or "", and what it printed."""
    if not (ROOT / program).is_file():
        return f"there is no {program}", ""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    said, printed, run = io.StringIO(), io.StringIO(), command.run
    command.run = lambda program: 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            module.main(list(arguments))
    except SystemExit as end:
        if end.code:
            return said.getvalue().strip().splitlines()[-1], ""
    finally:
        command.run = run
    return "", printed.getvalue()


def broken_flags(text: str) -> list[str]:
    return [flag for flag in FLAG.findall(text) if flag not in known_flags()]


@functools.cache
def known_flags() -> set[str]:
    """The options of our programs, the tests, launchers, docker and pip that the pages name."""
    flags = {"--shm-size", "--no-deps"}
    for path in TOOLS:
        program = str(path.relative_to(ROOT))
        _, shown = parsed(program, ("--help",))
        flags.update(FLAG.findall(shown))
        usage = re.search(r"\{([\w,-]+)\}", shown)
        for name in usage[1].split(",") if usage else ():
            flags.update(FLAG.findall(parsed(program, (name, "--help"))[1]))
    sources = [ROOT / "tests" / "conftest.py"]
    for package, file in (
        ("deepspeed", "launcher/runner.py"),
        ("torch", "distributed/run.py"),
        ("tensorboard", "plugins/core/core_plugin.py"),
    ):
        spec = importlib.util.find_spec(package)
        assert spec and spec.origin
        sources.append(Path(spec.origin).parent / file)
    flags.update(FLAG.findall((ROOT / "launch" / "slurm.sbatch").read_text()))
    for source in sources:
        flags.update(re.findall(r'"(--[\w-]+)"', source.read_text()))
    return flags


def broken_links(text: str, page: Path = ROOT / "README.md") -> list[str]:
    targets = [target for target in LINK.findall(FENCE.sub("", text)) if "://" not in target]
    return [target for target in targets if not leads_somewhere(page, target)]


def leads_somewhere(page: Path, target: str) -> bool:
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    if not path.is_relative_to(ROOT) or not path.exists():
        return False
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE) if anchor else []
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return not anchor or anchor in slugs


def broken_python(text: str) -> list[str]:
    broken = []
    for block in fences(text, "python"):
        try:
            compile(block, "example", "exec")
        except SyntaxError as error:
            broken.append(str(error))
    return broken


Check = Callable[[str], list[str]]
CHECKS: list[Check] = [
    broken_paths, broken_names, broken_keys, broken_commands, broken_flags, broken_links, broken_python,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path, check: Check) -> None:
    text = page.read_text(encoding="utf-8")
    assert (broken_links(text, page) if check is broken_links else check(text)) == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (broken_paths, "see `vitscale/state.py`"),
        (broken_paths, "see `vitscale/models/`, `configs/*/nothing.toml`."),
        (broken_paths, "```\nlaunch/train.py   vitscale/mix.py\n```\n"),
        (broken_names, "an `vitscale.errors.StateError`"),
        (broken_names, "```python\nvitscale.load_models('x')\n```\n"),
        (broken_keys, "set `data.lane = 4`"),
        (broken_keys, "with `[chekpoint] every_steps = 1`"),
        (broken_keys, "with `[init] full_states`"),
        (broken_keys, "`[evals.NAME] shot`"),
        (broken_keys, "```toml\n[[data.sources]]\nindex = 'a'\nweigth = 1.0\n```\n"),
        (broken_keys, "```bash\npython launch/train.py a.toml engine.microbatch=4\n```\n"),
        (broken_commands, "```bash\npython tools/data.py pick a b\n```\n"),
        (broken_commands, "```bash\npython tools/data.py pack a b \\\n    --short-sides 256\n```\n"),
        (broken_commands, "```bash\nsource x && python tools/checkpoint.py reshard A B\n```\n"),
        (broken_commands, "```bash\npython tools/nothing.py\n```\n"),
        (broken_commands, "`python tools/checkpoint.py export A B --format pickle`"),
        (broken_commands, "| `tools/data.py demo \\| fetch` |"),
        (broken_flags, "pass `--decoded`"),
        (broken_flags, "```bash\ntorchrun --nproc_per_nodes 2 launch/train.py a.toml\n```\n"),
        (broken_links, "[guide](docs/nothing.md)"),
        (broken_links, "[guide](docs/data.md#nothing)"),
        (broken_links, "[outside](../README.md)"),
        (broken_python, "```python\nmodel = (\n```\n"),
    ],
)
def test_a_broken_pointer_is_found(check: Check, text: str) -> None:
    assert len(check(text)) == 1


def test_every_guide_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text())}
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= linked


def sections(hint: Any, where: str = "") -> Iterator[tuple[str, str, str]]:
    """(section, dataclass, file) of a config type and of all sections in it."""
    if get_origin(hint):
        free = get_origin(hint) is dict
        for part in get_args(hint):
            yield from sections(part, f"{where}.NAME" if free else where)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        file = Path(inspect.getsourcefile(hint) or "").relative_to(ROOT)
        yield where or "top level", hint.__name__, str(file)
        for key, value in get_type_hints(hint).items():
            yield from sections(value, f"{where}.{key}".lstrip("."))


def test_the_table_of_sections_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(
        r"^\| (?:`\[{1,2}([\w.]+)\]{1,2}`|(top level)) \| `(\w+)` \| `([\w/.]+)` \|$", page, re.M
    )
    listed = [(section or top, name, file) for section, top, name, file in rows]
    assert sorted(listed) == sorted(set(sections(TrainConfig)))


def test_the_table_of_format_versions_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| [^|]+ \| `([\w/.]+)` \| (\d+) \| ([\d, ]+) \|$", PAGES[1].read_text(), re.M)
    assert len(rows) == 5
    for file, written, read in rows:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        readable = getattr(module, "READABLE", (module.VERSION,))
        assert (int(written), tuple(map(int, read.split(", ")))) == (module.VERSION, readable), file


def test_the_quickstart_refuses_other_systems_with_the_sentence_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "uname").write_text("#!/bin/sh\necho Darwin\n")
    (tmp_path / "uname").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    quickstart = ["bash", str(ROOT / "launch" / "quickstart.sh")]
    ended = subprocess.run(quickstart, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and not ended.stdout
    assert " ".join(ended.stderr.split()) in " ".join(PAGES[0].read_text().split())
