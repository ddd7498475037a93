"""The config system: what it fills in, what it refuses, and what it writes back."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from vitscale.config import ConfigError, differing_keys, from_dict, load, to_dict, to_toml


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    steps: tuple[int, ...] = (1, 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    run_dir: str
    warmup: int = 0
    flip: bool = True
    optim: Inner = dataclasses.field(default_factory=Inner)
    evals: dict[str, Inner] = dataclasses.field(default_factory=dict)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_files_and_then_overrides_win(tmp_path: Path) -> None:
    one = write(tmp_path / "1.toml", 'run_dir = "a"\n[optim]\nlr = 1\nname = "sgd"\n')
    two = write(tmp_path / "2.toml", "[optim]\nlr = 0.5\n")
    config = load(
        Outer, [one, two], ["optim.betas=[0.8, 0.9]", "run_dir=runs/x y", "warmup=1e4", "evals.a.lr=2"]
    )
    assert config.run_dir == "runs/x y" and config.warmup == 10_000
    assert config.optim == Inner(name="sgd", lr=0.5, betas=(0.8, 0.9))
    assert config.evals == {"a": Inner(lr=2.0)}


def test_the_resolved_config_loads_as_it_is(tmp_path: Path) -> None:
    config = Outer(
        run_dir='a "quoted" \\ path é',
        optim=Inner(lr=1e-7),
        evals={"x-1": Inner(), "with space": Inner(lr=3)},
    )
    assert load(Outer, [write(tmp_path / "c.toml", to_toml(config))]) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run_dir": "a", "wramup": 3}, r"unknown key wramup in the top level; did you mean warmup\?"),
        ({"run_dir": "a", "optim": {"rl": 3}}, r"unknown key optim.rl in \[optim\]; did you mean optim.lr\?"),
        ({"run_dir": "a", "optim": {"xyzzy": 3}}, "known keys: name, lr, betas, steps"),
        ({"run_dir": "a", "optim": 3}, "optim must be a table, not 3"),
        ({"run_dir": 3}, "run_dir must be a string, not 3"),
        ({"run_dir": "a", "warmup": 1.5}, "warmup must be a whole number, not 1.5"),
        ({"run_dir": "a", "warmup": True}, "warmup must be a whole number, not true"),
        ({"run_dir": "a", "flip": 1}, "flip must be true or false, not 1"),
        (
            {"run_dir": "a", "optim": {"name": "adam"}},
            "optim.name 'adam' is not one of 'adamw', 'sgd'; did you mean \"adamw\"",
        ),
        ({"run_dir": "a", "optim": {"betas": [0.9]}}, r"optim.betas \[0.9\] must have 2 values, not 1"),
        ({"run_dir": "a", "optim": {"steps": [1, "x"]}}, r"optim.steps\[1\] must be a whole number, not 'x'"),
        ({}, "run_dir is missing"),
    ],
)
def test_mistakes_are_refused_with_what_to_write_instead(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, values)


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        load(Outer, [tmp_path / "none.toml"])
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        load(Outer, [write(tmp_path / "bad.toml", "run_dir = ")])
    with pytest.raises(ConfigError, match=r"must read section.key=value"):
        load(Outer, [], ["=3"])


def test_differing_keys_are_dotted() -> None:
    old = to_dict(Outer(run_dir="a"))
    new = to_dict(Outer(run_dir="b", optim=Inner(lr=2.0)))
    assert list(differing_keys(old, new)) == ["run_dir", "optim.lr"]
