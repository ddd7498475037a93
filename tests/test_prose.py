"""Docstrings and comments are set by hand, so they have no orphan lines.

An orphan is a line of under 25 characters between two of over 60 in one paragraph.
"""

import ast
import io
import itertools
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHORT, LONG = 25, 60
FOLDERS = ("vitscale", "tools", "launch", "tests", "configs")
ENDINGS = (".py", ".toml", ".sh")
FILES = sorted(
    [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    + [ROOT / "pyproject.toml"]
)


def orphans(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    blocks = [*docstrings(text), *python_comments(text)] if path.suffix == ".py" else [*comments(text)]
    return [orphan for block in blocks for orphan in orphans_of(block)]


def orphans_of(lines: list[str]) -> Iterator[str]:
    """The orphans among consecutive lines; a change of indentation ends a paragraph."""
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        lengths = [len(text.strip()) for text in (before, line, after)]
        indents = {len(text) - len(text.lstrip()) for text in (before, line, after)}
        if len(indents) == 1 and lengths[0] > LONG and 0 < lengths[1] < SHORT and lengths[2] > LONG:
            yield line.strip()


def docstrings(text: str) -> Iterator[list[str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring.splitlines()


def python_comments(text: str) -> Iterator[list[str]]:
    """Comments on lines of their own, joined where no other line is between them."""
    numbered = [
        (token.start[0], token.string.removeprefix("#"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    ]
    return joined(numbered)


def comments(text: str) -> Iterator[list[str]]:
    """As python_comments, of a TOML file or a shell script."""
    lines = enumerate(text.splitlines())
    return joined([(number, line.lstrip()[1:]) for number, line in lines if line.lstrip().startswith("#")])


def joined(numbered: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Lines whose numbers follow one another, as blocks."""
    for _, block in itertools.groupby(enumerate(numbered), lambda item: item[1][0] - item[0]):
        yield [line for _, (_, line) in block]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_orphan_lines(path: Path) -> None:
    assert orphans(path) == []


LINES = ["x" * 70, "the end of it", "y" * 70]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", '"""{}\n{}\n{}\n"""\n'.format(*LINES)),
        ("a.py", 'def f():\n    """A.\n\n    {}\n    {}\n    {}\n    """\n'.format(*LINES)),
        ("a.py", "x = 1\n# {}\n# {}\n# {}\n".format(*LINES)),
        ("a.py", "if x:\n    # {}\n    # {}\n    # {}\n    pass\n".format(*LINES)),
        ("a.toml", "# {}\n# {}\n# {}\nx = 1\n".format(*LINES)),
        ("a.sh", "echo\n# {}\n# {}\n# {}\n".format(*LINES)),
    ],
)
def test_an_orphan_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert orphans(tmp_path / name) == [LINES[1]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", '"""{}\n\n{}\n\n{}\n"""\n'.format(*LINES)),
        ("a.py", '"""{}\n    {}\n{}\n"""\n'.format(*LINES)),
        ("a.py", 'x = """{}\n{}\n{}\n"""\n'.format(*LINES)),
        ("a.py", "# {}\n# {}\nx = 1\n# {}\n".format(*LINES)),
        ("a.toml", "# {}\n# {}\n\n# {}\n".format(*LINES)),
        ("a.sh", "# {}\n# {} and enough words\n# {}\n".format(*LINES)),
    ],
)
def test_what_only_looks_like_an_orphan_is_not(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert orphans(tmp_path / name) == []
