"""Imports point down, and units of one layer do not import one another (the layers stand in this table)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    ["config", "distributed", "storage", "rng", "processes"],
    ["models", "data", "losses", "optim", "schedule", "metrics"],
    ["engine", "evals", "plan"],
    ["checkpoint"],
    ["job", "evaluate"],
    ["meter", "dry_run"],
    ["train"],
    ["bench"],
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# Within the foundation, a user's mistakes are ConfigErrors.
ALLOWED = {("storage", "config"), ("processes", "config")}
MODULES = sorted((ROOT / "vitscale").rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT / "vitscale").parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        units |= {
            name.split(".")[1]
            for name in names
            if name.startswith("vitscale.") and name.split(".")[1] in LEVEL
        }
    return units


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return  # the package's front door reaches for load_model
    for other in imported_units(path) - {unit}:
        assert LEVEL[other] < LEVEL[unit] or (unit, other) in ALLOWED, f"{unit} imports {other}"


def test_every_module_has_its_layer() -> None:
    assert {unit_of(path) for path in MODULES} - {"__init__"} == set(LEVEL)


def test_deepspeed_is_known_to_the_engine_and_the_checkpoint_state_only() -> None:
    knowing = {str(path.relative_to(ROOT)) for path in MODULES if "import deepspeed" in path.read_text()}
    assert knowing == {"vitscale/engine.py"}


def dangers(node: ast.AST) -> list[str]:
    """The ways in which a piece of syntax could execute what it reads."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
        return [name for name in names if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")]
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    found = [called] if called in ("eval", "exec", "torch.load", "torch.save", "os.system") else []
    found += [called] if called.endswith(("_object", "_object_list")) else []  # collectives that pickle
    return found + [
        keyword.arg
        for keyword in node.keywords
        if keyword.arg in ("shell", "allow_pickle") and ast.unparse(keyword.value) != "False"
    ]


def test_nothing_can_execute_the_data_it_reads() -> None:
    for path in [*MODULES, *(ROOT / "tools").glob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not dangers(node), f"{path}:{getattr(node, 'lineno', 0)}: {dangers(node)}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "torch.load(f)",
        "torch.save(x, f)",
        "dist.all_gather_object(o, x)",
        "run(x, shell=True)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_for_dangers_finds_them(code: str) -> None:
    assert any(dangers(node) for node in ast.walk(ast.parse(code)))
