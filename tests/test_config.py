"""The config system: what it fills in, what it refuses, and what it writes back."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest

from vitscale.config import differing_keys, from_dict, load, resolve, to_dict, to_toml
from vitscale.curate.pack.config import PackConfig
from vitscale.errors import ConfigError
from vitscale.train_config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    ALTERNATIVES = ("seconds", "minutes")

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    steps: tuple[int, ...] = (1, 5)
    seconds: int = 0
    minutes: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    ALTERNATIVES = ("metres", "feet")

    run_dir: str
    metres: float = 0.0
    feet: int = 0
    warmup: int = 0
    flip: bool = True
    optim: Inner = dataclasses.field(default_factory=Inner)
    evals: dict[str, Inner] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    side: float = 1.0

    def check(self, where: str) -> None:
        if self.side > 100:
            raise ConfigError(f"{where} is too large")

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"side" if key == "length" else key: value for key, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius: float = 1.0
    centre: tuple[float, float] = (0.0, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    frame: Square | Circle = dataclasses.field(default_factory=Square)
    shapes: dict[str, Square | Circle] = dataclasses.field(default_factory=dict)
    order: tuple[Square | Circle, ...] = ()
    hole: Circle = dataclasses.field(default_factory=Circle)


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
    assert load(Outer, one) == load(Outer, str(one)) == load(Outer, [one])
    assert config.optim == Inner(name="sgd", lr=0.5, betas=(0.8, 0.9))
    assert config.evals == {"a": Inner(lr=2.0)}


@pytest.mark.parametrize(
    ("first", "second", "overrides", "expected"),
    [
        ("metres = 2", "", ["feet=7"], (0.0, 7)),
        ("metres = 2", "feet = 7", [], (0.0, 7)),
        ("metres = 2", "feet = 7", ["metres=3"], (3.0, 0)),
        ("metres = 2", "", ["feet=7", "metres=3"], (3.0, 0)),
        ("metres = 2", "feet = 0", [], (0.0, 0)),
        ("metres = 2", "metres = 0\nfeet = 0", [], (0.0, 0)),
        ("metres = 0\nfeet = 7", "metres = 2\nfeet = 0", [], (2.0, 0)),  # a resolved config names all
        ("metres = 2\nfeet = 7", "", [], (2.0, 7)),  # both at once: the section refuses it
    ],
)
def test_a_later_alternative_replaces_an_earlier_one(
    tmp_path: Path, first: str, second: str, overrides: list[str], expected: tuple[float, int]
) -> None:
    files = [write(tmp_path / "1.toml", f'run_dir = "a"\n{first}\n'), write(tmp_path / "2.toml", second)]
    config = load(Outer, files, overrides)
    assert (config.metres, config.feet) == expected


def test_a_later_alternative_replaces_an_earlier_one_in_a_section(tmp_path: Path) -> None:
    one = write(tmp_path / "1.toml", 'run_dir = "a"\n[optim]\nseconds = 5\nlr = 2.0\n')
    two = write(tmp_path / "2.toml", "[optim]\nminutes = 0.5\n")
    assert load(Outer, [one, two]).optim == Inner(lr=2.0, minutes=0.5)
    assert load(Outer, [one, two], ["optim.seconds=7"]).optim == Inner(lr=2.0, seconds=7)
    assert load(Outer, [two, one], ["optim.minutes=0"]).optim == Inner(lr=2.0)


def test_false_leaves_out_a_named_section_that_was_set_before(tmp_path: Path) -> None:
    one = write(tmp_path / "1.toml", 'run_dir = "a"\n[evals.x]\nlr = 1\n[evals.y]\nlr = 2\n')
    two = write(tmp_path / "2.toml", "[evals]\nx = false\n")
    assert load(Outer, [one], ["evals.y=false"]).evals == {"x": Inner(lr=1.0)}
    assert load(Outer, [one, two]).evals == {"y": Inner(lr=2.0)}
    assert load(Outer, [one, two], ["evals.x.lr=3"]).evals == {"y": Inner(lr=2.0), "x": Inner(lr=3.0)}
    with pytest.raises(ConfigError) as error:
        load(Outer, [one, two], ["evals.x=false"])
    assert str(error.value) == (
        "evals.x = false leaves out a section that was set before, and there is none of that name; "
        "there are: y"
    )
    for override in ("optim=false", "evals=false"):
        with pytest.raises(ConfigError, match="must be a table, not False"):
            load(Outer, [one], [override])


@pytest.mark.parametrize(
    "text", ['a "quoted" \\ path é', "\U0001f642", "\x7f", "\0\b\n\x1f\x85\u2028", "", "a.b"]
)
def test_the_resolved_config_loads_as_it_is(tmp_path: Path, text: str) -> None:
    evals = {"x-1": Inner(), "with space": Inner(lr=3), text: Inner()}
    config = Outer(run_dir=text, optim=Inner(lr=1e-7), evals=evals)
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
        ({"run_dir": "caf\udce9"}, r"run_dir 'caf\\udce9' is not UTF-8; rename it"),
        ({"run_dir": "a", "evals": {"\udce9": {}}}, r"evals: '\\udce9' is not UTF-8; rename it"),
    ],
)
def test_mistakes_are_refused_with_what_to_write_instead(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("total_epochs=inf", "total_epochs must be a finite number, not inf"),
        ("total_epochs=nan", "total_epochs must be a finite number, not nan"),
        ("optim.lr=inf", "optim.lr must be a finite number, not inf"),
        ("optim.lr=1e400", "optim.lr must be a finite number, not inf"),
        ("optim.eps=inf", "optim.eps must be a finite number, not inf"),
        ("optim.clip_norm=nan", "optim.clip_norm must be a finite number, not nan"),
        ("optim.weight_decay=nan", "optim.weight_decay must be a finite number, not nan"),
        ("schedule.end_lr=nan", "schedule.end_lr must be a finite number, not nan"),
        ("augment.mixup=nan", "augment.mixup must be a finite number, not nan"),
        ("model.head_bias=-inf", "model.head_bias must be a finite number, not -inf"),
        ("finetune.learning_rates=[1, nan]", "finetune.learning_rates[1] must be a finite number, not nan"),
        ("total_steps=inf", "total_steps must be a whole number, not inf"),
        ("total_steps=1e308", "total_steps must fit in 64 bits"),
        (f"seed={2**63}", "seed must fit in 64 bits"),
        (f"optim.lr={'9' * 400}", "optim.lr must fit in 64 bits"),
        (f"optim.lr={'9' * 5000}", "optim.lr must fit in 64 bits"),
        *(
            (f"{key}=0x{'f' * 5000}", f"{key} must fit in 64 bits")
            for key in (
                "seed",
                "optim.lr",
                "run_dir",
                "precision",
                "model",
                "model.image_size",
                "engine.compile",
            )
        ),
        (f"seed={'[' * 900}", "seed must be a whole number, not '[["),
        (f"seed{'.a' * 900}=1", "override 'seed.a.a.a"),
        ("engine.deepspeed_extra.x=[1979-05-27]", "engine.deepspeed_extra.x holds a date or a time, which"),
        ("model.variant=B/²", 'model.variant "B/²" is not NAME/PATCH with a name of '),
        (f"model.variant=B/{'9' * 5000}", 'model.variant "B/9999'),
    ],
    ids=lambda text: text[:32],
)
def test_values_that_no_run_can_have_are_refused(override: str, message: str) -> None:
    base = {"run_dir": "a", "data": {"index": "x"}}
    with pytest.raises(ConfigError) as error:
        resolve(TrainConfig, [base], [override])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("key", ["optim.clip_norm", "guard.spike_deviations", "guard.step_minutes"])
def test_inf_is_the_zero_that_it_meant_where_runs_began_with_it(key: str) -> None:
    base = {"run_dir": "a", "data": {"index": "x"}, "total_steps": 1}
    assert resolve(TrainConfig, [base], [f"{key}=inf"]) == resolve(TrainConfig, [base], [f"{key}=0"])


def test_the_largest_number_is_one_of_64_bits() -> None:
    config = resolve(Outer, [{"run_dir": "a"}], [f"warmup={2**63 - 1}", f"optim.lr={-(2**63)}"])
    assert (config.warmup, config.optim.lr) == (2**63 - 1, -(2.0**63))


@pytest.mark.parametrize("epochs", ["1e308", "1e17"])
def test_steps_beyond_64_bits_are_refused(epochs: str) -> None:
    values = {"run_dir": "a", "data": {"index": "x"}, "global_batch": 8}
    config = resolve(TrainConfig, [values], [f"total_epochs={epochs}"])
    with pytest.raises(ConfigError, match="makes more steps than fit in 64 bits; lower it"):
        config.num_steps(1_000)


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        load(Outer, [tmp_path / "none.toml"])
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        load(Outer, [write(tmp_path / "bad.toml", "run_dir = ")])
    with pytest.raises(ConfigError, match=r"long\.toml has a number of thousands of digits"):
        load(Outer, [write(tmp_path / "long.toml", f"warmup = {'9' * 5000}")])
    for text in (f"x = {'[' * 900}", f"seed{'.a' * 900} = 1", f"seed{'.a' * 60} = 1"):
        with pytest.raises(ConfigError, match=r"deep\.toml is not valid TOML: .* more than 50 levels deep"):
            load(Outer, [write(tmp_path / "deep.toml", text)])
    with pytest.raises(ConfigError, match=rf"^{tmp_path} is a folder; name a \.toml file in it$"):
        load(Outer, [tmp_path])
    with pytest.raises(ConfigError, match=r"must read section.key=value"):
        load(Outer, [], ["=3"])


def test_differing_keys_are_dotted() -> None:
    old = to_dict(Outer(run_dir="a"))
    new = to_dict(Outer(run_dir="b", optim=Inner(lr=2.0)))
    assert differing_keys(old, new) == ["run_dir", "optim.lr"]


def test_the_kind_chooses_the_class_and_without_one_it_is_the_first() -> None:
    values = {
        "frame": {"kind": "circle", "radius": 2},
        "shapes": {"a": {"side": 3}, "b": {"kind": "circle"}},
        "order": [{"kind": "circle"}, {}],
        "hole": {"kind": "circle"},
    }
    drawing = from_dict(Drawing, values)
    assert drawing.frame == Circle(radius=2.0)
    assert drawing.shapes == {"a": Square(side=3.0), "b": Circle()}
    assert drawing.order == (Circle(), Square())
    assert from_dict(Drawing, {}).frame == Square()
    assert from_dict(Drawing, to_dict(drawing)) == drawing
    assert from_dict(Square | Circle, {"kind": "circle"}) == Circle()


def test_an_override_changes_the_kind_of_a_section(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", "[frame]\nside = 2\n")
    assert load(Drawing, [path]).frame == Square(side=2.0)
    assert load(Drawing, [], ["shapes.a={kind='circle', radius=3}"]).shapes == {"a": Circle(radius=3.0)}
    with pytest.raises(ConfigError, match=r'unknown key frame.side: only kind = "square" reads it'):
        load(Drawing, [path], ["frame.kind=circle"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"shapes": {"a": {"kind": "squair"}}},
            "shapes.a.kind 'squair' is not one of 'square', 'circle'; did you mean \"square\"?",
        ),
        ({"frame": {"kind": 3}}, "frame.kind 3 is not one of 'square', 'circle'"),
        ({"frame": {"kind": []}}, "frame.kind [] is not one of 'square', 'circle'"),
        ({"frame": "circle"}, "frame must be a table, not 'circle'"),
        (
            {"shapes": {"a": {"radius": 2}}},
            'unknown key shapes.a.radius: only kind = "circle" reads it; remove it or set '
            'shapes.a.kind = "circle"',
        ),
        ({"order": [{}, {"sid": 2}]}, "unknown key order[1].sid in [order[1]]; did you mean order[1].side?"),
        ({"hole": {"kind": "square"}}, "hole.kind 'square' is not one of 'circle'"),
        ({"shapes": {"a": {"side": 101}}}, "shapes.a is too large"),
    ],
)
def test_mistakes_in_a_kind_are_refused_by_the_place_of_the_section(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Drawing, values)
    assert str(error.value) == message


def test_a_section_reads_what_earlier_versions_wrote() -> None:
    assert from_dict(Drawing, {"frame": {"length": 4}}).frame == Square(side=4.0)
    with pytest.raises(ConfigError, match=r"unknown key hole.length"):
        from_dict(Drawing, {"hole": {"length": 4}})


def test_a_field_of_two_plain_types_is_our_mistake() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Vague:
        size: int | str = 0

    with pytest.raises(TypeError, match="size: a config field has one type, or is a union of dataclasses"):
        from_dict(Vague, {"size": 1})


def sections_of(hint: Any) -> Iterator[type]:
    """The dataclasses in a type, and in the types of their fields."""
    if dataclasses.is_dataclass(hint):
        yield hint
    for part in get_type_hints(hint).values() if dataclasses.is_dataclass(hint) else get_args(hint):
        yield from sections_of(part)


CHOICES = [
    pytest.param(section, key, id=f"{section.__name__}.{key}")
    for section in dict.fromkeys([*sections_of(TrainConfig), PackConfig])
    for key, hint in get_type_hints(section).items()
    if "Literal" in str(hint)
]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("section", "key"), CHOICES)
def test_a_section_built_in_python_takes_no_other_word_either(section: type, key: str) -> None:
    required = {"run_dir": "a"} if section is TrainConfig else {}
    with pytest.raises(ConfigError, match=rf"^{section.__name__}\.{key} 'Inception' is not one of '"):
        section(**required, **{key: "Inception"})


def test_the_sections_built_in_python_are_all_there() -> None:
    keys = {parameters.id for parameters in CHOICES}
    assert len(keys) == len(CHOICES) > 30
    assert {"TrainConfig.precision", "AugmentConfig.crop", "KnnConfig.crop", "HybridConfig.pool"} < keys
