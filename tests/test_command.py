"""How a program ends: its status, a sentence for the user's mistakes, a traceback for ours."""

import errno
import gc
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import multinode, train
from vitscale import command
from vitscale.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
    StoreDown,
    StoreError,
    UserError,
)

ROOT = Path(__file__).resolve().parents[1]


def raising(error: BaseException):
    def program() -> int:
        raise error

    return program


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, StoreError, BusyError])
def test_what_the_user_can_fix_is_one_line_and_status_2(kind: type[UserError], capsys) -> None:
    assert command.run(raising(kind("the shard is cut; restore it"))) == 2
    assert capsys.readouterr().err == "error: the shard is cut; restore it\n"


def test_a_rank_that_is_no_number_is_one_line_and_status_2(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    assert command.run(lambda: 0) == 2
    assert capsys.readouterr().err.startswith("error: RANK in the environment is 'x', and must be")


def test_no_name_in_an_error_moves_the_cursor_or_sets_the_title(capsys) -> None:
    assert command.run(raising(DataError("\x1b]0;t\x07a\r\x9b2J\u202eb\tc\n\U0001f642"))) == 2
    assert capsys.readouterr().err == "error: \\x1b]0;t\\x07a\\r\\x9b2J\\u202eb\tc\n\U0001f642\n"


def test_what_passes_by_itself_is_one_line_and_status_1(capsys) -> None:
    assert command.run(raising(StoreDown("the store does not answer"))) == 1
    assert capsys.readouterr().err == "error: the store does not answer\n"


def test_a_status_of_the_program_is_kept(capsys) -> None:
    assert command.run(lambda: 75) == 75
    assert capsys.readouterr().err == ""


def test_what_a_program_imports_is_not_searched_for_garbage() -> None:
    cycle: list[object] = []
    with pytest.raises(ImportError), command.importing():
        assert not gc.isenabled()
        cycle.append(cycle)
        raise ImportError
    assert gc.isenabled() and not any(made is cycle for made in gc.get_objects())


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="ours"):
        command.run(raising(ValueError("ours")))
    with pytest.raises(OSError, match="reset"):
        command.run(raising(OSError(errno.ECONNRESET, "connection reset")))


def test_a_disk_that_refuses_is_named(capsys) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/metrics.jsonl")
    assert command.run(raising(full)) == 2
    assert "error: /full/metrics.jsonl: No space left on device; fix the path" in capsys.readouterr().err


def test_no_log_line_holds_the_secret_of_a_url(tmp_path: Path) -> None:
    program = (
        "import logging\n"
        "from vitscale import command\n"
        "url = 'https://me:secret@host/index.json?sig=secret'\n"
        "def program():\n"
        "    try:\n"
        "        open(url)\n"
        "    except OSError:\n"
        "        logging.getLogger('vitscale.data').warning('%s: label 5', url, exc_info=True)\n"
        "    raise OSError(13, 'Permission denied', url)\n"
        "raise SystemExit(command.run(program))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "WARNING https://host/index.json?***: label 5" in done.stderr
    assert "error: https://host/index.json?***: Permission denied" in done.stderr
    assert "secret'" not in done.stderr and "=secret" not in done.stderr, done.stderr


def test_no_traceback_holds_the_secret_of_a_url() -> None:
    program = (
        "import sys\n"
        "from vitscale import command\n"
        "def program():\n"
        "    raise RuntimeError('GET https://me:' + 'secret@host/a.tar?sig=' + 'secret')\n"
        "sys.exit(command.run(program))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("RuntimeError: GET https://host/a.tar?***\n"), done.stderr


def test_an_interrupt_ends_without_a_traceback(capsys) -> None:
    assert command.run(raising(KeyboardInterrupt())) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["launch/train.py", "a.toml"],
        ["launch/preflight.py", "a.toml"],
        ["launch/ended.py", "a.toml"],
        ["launch/multinode.py", "hostfile", "a.toml"],
        ["tools/checkpoint.py", "list", "a"],
    ],
    ids=lambda words: words[0],
)
def test_an_interrupt_of_the_imports_ends_alike_also_without_stdout(words: list[str], tmp_path: Path) -> None:
    """Importing torch takes the first second of a program; here Ctrl-C comes in it."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    program = shlex.join([sys.executable, str(ROOT / words[0]), *words[1:]])
    done = subprocess.run(
        ["bash", "-c", f"{program} >&-"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr
    assert done.stderr.startswith("stopped; ")


def test_what_a_terminal_cannot_show_is_escaped() -> None:
    program = "from vitscale import command; print(command.run(lambda: 0), 'na\\u00efve')"
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ascii_only, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "0 na\\xefve\n"), done.stderr


@pytest.mark.parametrize(
    ("rank", "shared", "printed"),
    [("0", True, True), ("0", False, True), ("1", True, False), ("1", False, True)],
)
def test_what_all_ranks_raise_is_printed_by_rank_0_alone(
    rank: str, shared: bool, printed: bool, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert command.run(raising(DataError("cut", shared=shared))) == 2
    assert capsys.readouterr().err == ("error: cut\n" if printed else "")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_program_runs_without_standard_streams(closed: str) -> None:
    program = (
        "import os, subprocess, sys\n"
        "from vitscale import command\n"
        "def program():\n"
        "    print(sys.stdout.isatty(), sys.stderr.isatty(), file=sys.stderr)\n"
        "    print('a')\n"
        "    child = 'import sys; sys.exit(None in (sys.stdin, sys.stdout, sys.stderr))'\n"
        "    alone = subprocess.call([sys.executable, '-c', child])\n"
        "    return 7 if os.open('/dev/null', 0) > 2 and not alone else 8\n"
        "command.leave(command.run(program))\n"
    )
    words = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-c", program]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 7


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    row = '{"step": 1, "train/loss": 1.0}\n'
    (tmp_path / "run" / "metrics.jsonl").write_text(row)
    many = " ".join(["run"] * 2000)
    piped = f"{sys.executable} {ROOT / 'tools' / 'report.py'} {many} | head -n 1"
    done = subprocess.run(["bash", "-c", piped], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("run ") and done.stderr == ""


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("plot", "error: there is no extra plot; use one of: s3, gcs, http, vtab, plots, onnx, dev"),
        ("s3,plot", "error: there is no extra plot; use one of: s3, gcs, http, vtab, plots, onnx, dev"),
        ("s3,plots", "vitscale needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"),
        ("", "vitscale needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"),
    ],
)
def test_an_unknown_extra_is_refused_before_anything_is_installed(
    tmp_path: Path, extra: str, said: str
) -> None:
    """In a copy, with a Python that is too old: nothing can be installed."""
    for name in ("tools/setup.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    environment = {**os.environ, "PYTHON": "false"}
    words = ["bash", str(tmp_path / "tools" / "setup.sh"), *filter(None, [extra])]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{said}\n")


def test_an_environment_without_pip_is_made_again(tmp_path: Path) -> None:
    """In a copy, where programs that install nothing say how they are called as Python."""
    called = tmp_path / "called"
    for name, status in (("python3", "[ $1 = -c ] || exit 3"), (".venv/bin/python", "exit 1")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$0 $1 $2 $3" >>{called}\n{status}\n')
        (tmp_path / name).chmod(0o755)
    for name in ("tools/setup.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python3")}
    words = ["bash", str(tmp_path / "tools" / "setup.sh")]
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert done.returncode == 3 and called.read_text().endswith("/python3 -m venv .venv\n")


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "tools/setup.sh", "tools/test.sh"])
def test_help_of_a_script_is_its_head_and_does_nothing(script: str, tmp_path: Path) -> None:
    """In a copy, where nothing can be installed."""
    copy, text = tmp_path / script, (ROOT / script).read_text()
    copy.parent.mkdir()
    copy.write_text(text)
    done = subprocess.run(["bash", copy, "--help"], capture_output=True, text=True, check=False)
    head = text.partition("\nset ")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
    assert f"bash {script}" in done.stdout and (done.returncode, done.stderr) == (0, "")


def test_the_quickstart_refuses_arguments_in_one_sentence(tmp_path: Path) -> None:
    """In a copy, where nothing can be installed."""
    (tmp_path / "launch").mkdir()
    words = ["bash", shutil.copy(ROOT / "launch/quickstart.sh", tmp_path / "launch"), "configs/starter.toml"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: launch/quickstart.sh takes no arguments, and was given configs/")


@pytest.mark.parametrize("devices", ["GPU-8932f937-d72c", "0,MIG-GPU-8932f937/1/0"])
def test_the_quickstart_refuses_names_of_gpus_in_one_sentence(tmp_path: Path, devices: str) -> None:
    """In a copy, where nothing can be installed."""
    (tmp_path / "launch").mkdir()
    words = ["bash", shutil.copy(ROOT / "launch/quickstart.sh", tmp_path / "launch")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: CUDA_VISIBLE_DEVICES={devices} has names, and ")


@pytest.mark.parametrize("hyphen", ["-", "_"])
def test_multinode_takes_options_as_ours_and_as_those_of_deepspeed_are_written(hyphen: str, capsys) -> None:
    options = "--no-ssh --min-hosts=1 --max-vain=3 --master-port=4 --node-rank=0"
    with pytest.raises(SystemExit):  # without an address
        multinode.main(["hostfile", "a.toml", *re.sub(r"\b-\b", hyphen, options).split()])
    assert "error: --no-ssh needs --node-rank N" in capsys.readouterr().err


def test_flags_of_other_trainers_are_answered_with_what_takes_their_place(capsys) -> None:
    for words in ("--resume runs/a c.toml", "c.toml --deepspeed_config ds.json", "c.toml --optim.lr=1"):
        with pytest.raises(SystemExit) as end:
            train.main(words.split())
        flag = next(word for word in words.split() if word.startswith("--"))
        message = f"error: there is no {flag}: settings are section.key=value words, "
        assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["launch/train.py", "nowhere.toml", "--dry-run"],
        ["tools/data.py", "verify", "nowhere.json"],
        ["tools/checkpoint.py", "show", "nowhere"],
        ["tools/evaluate.py", "classify", "nowhere", "--data", "nowhere/test-*.tar"],
        ["tools/plan.py", "nowhere.toml", "--gpus", "8"],
        ["tools/report.py", "nowhere"],
        ["tools/study.py", "list", "nowhere"],
        ["tools/bench.py", "data", "--shards", "nowhere/*.tar"],
    ],
    ids=lambda words: words[0],
)
def test_all_eight_programs_end_with_one_sentence_and_status_2(words: list[str], tmp_path: Path) -> None:
    program = [sys.executable, ROOT / words[0], *words[1:]]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    logged = ("WARNING", "INFO", "reading nowhere/*.tar ...")  # the last is what bench.py is doing
    lines = [line for line in done.stderr.splitlines() if not line.startswith(logged)]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "nowhere" in lines[0], done.stderr
