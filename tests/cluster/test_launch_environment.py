"""What reaches ranks on other hosts: the variables that they need, each unchanged."""

import shlex

import pytest

from vitscale.cluster.launch_environment import for_deepspeed, for_pdsh, forwarded

ODD = ["plain", "a b", "it's", 'say "a"', "$HOME", "`date`", "a\\b", "100%n", "a;b & c", "{x=1}", "*", ""]


def test_what_ranks_need_is_forwarded_and_nothing_else() -> None:
    needed = {
        "AWS_SECRET_ACCESS_KEY": "s",
        "HF_TOKEN": "t",
        "NCCL_DEBUG": "INFO",
        "https_proxy": "p",
        "DS_A": "1",
    }
    others = {"PATH": "/bin", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "SSH_AUTH_SOCK": "x", "RANK": "0"}
    assert forwarded(needed | others) == needed


@pytest.mark.parametrize("value", ODD)
def test_a_value_survives_deepspeed_pdsh_and_the_shell(value: str) -> None:
    line = for_deepspeed({"A": value})
    assert line.count("\n") == 1
    name, exported = line.split("=", maxsplit=1)
    # What PDSHRunner.add_export does with it, and then pdsh.
    exported = exported.strip()
    if any(not (char.isalnum() or char in "_@%+=:,./-") for char in exported):
        exported = f'"{exported}"'
    assert (name, read_by_shell(exported.replace("%%", "%"))) == ("A", value)


def test_a_value_of_several_lines_is_left_out() -> None:
    assert for_deepspeed({"A": "1\n2", "B": "3"}) == "B=3\n"


@pytest.mark.parametrize("argument", [text for text in ODD if text])
def test_an_argument_survives_deepspeed_pdsh_and_the_shell(argument: str) -> None:
    word = for_pdsh(argument)
    if " " in word:  # as PDSHRunner.parse_user_args
        word = '"{}"'.format(word.replace('"', '\\"'))
    assert read_by_shell(word.replace("%%", "%")) == argument


def read_by_shell(word: str) -> str:
    (text,) = shlex.split(word) or [""]
    # Between double quotes a shell also takes the backslash from these, and shlex leaves it.
    return text.replace("\\$", "$").replace("\\`", "`") if word.startswith('"') else text
