"""Imports run in one direction, file by file: layers point down, no folder hides a cycle."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Units of one layer do not import one another; a unit is a file or folder of vitscale/ itself.
LAYERS = [
    ["redaction", "quantities", "toml"],
    ["errors", "image_size", "progress"],
    ["system", "slurm", "vtab", "rendezvous"],
    ["config", "distributed", "rng"],
    ["stores", "command", "metrics"],
    ["models", "optim", "data"],
    ["objectives", "curate"],
    ["engine", "evals"],
    ["checkpoint", "guard", "memory"],
    ["weights", "train_config"],
    ["job", "teacher", "shared_memory"],
    ["meter", "evaluate", "cooldown", "profiler", "inspection"],
    ["run_dir"],
    ["start", "dry_run", "plan", "report"],
    ["step", "validation"],
    ["train"],
    ["finetune"],
    ["bench", "cluster", "study"],
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
MODULES = sorted((ROOT / "vitscale").rglob("*.py"))
EXISTING = set(MODULES)


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT / "vitscale").parts[0].removesuffix(".py")


def imported_files(path: Path) -> set[Path]:
    """The files of the package that a file imports, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    files = set()
    for name in names:
        if name.partition(".")[0] == "vitscale":
            place = ROOT / name.replace(".", "/")
            # `from vitscale.a import b`: b is a module, or what the module or package a defines
            for candidate in (place.with_suffix(".py"), place.parent.with_suffix(".py")):
                if candidate in EXISTING:
                    files.add(candidate)
                    break
            else:
                files.add(place / "__init__.py" if place.is_dir() else place.parent / "__init__.py")
    return files - {path}


IMPORTS = {path: imported_files(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return  # vitscale itself offers load_model
    for other in {unit_of(imported) for imported in IMPORTS[path]} - {unit, "__init__"}:
        assert LEVEL[other] < LEVEL[unit], f"{unit} imports {other}"


def test_every_module_has_its_layer() -> None:
    assert {unit_of(path) for path in MODULES} - {"__init__"} == set(LEVEL)


PACKAGE = ROOT / "vitscale"
FOLDERS = sorted({folder for path in MODULES for folder in path.parents if folder.is_relative_to(PACKAGE)})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_inside_a_folder_run_in_one_direction(folder: Path) -> None:
    """A subfolder counts as one unit, so that a cycle between two subfolders is found too."""
    graph: dict[str, set[str]] = {}
    for path, imported in IMPORTS.items():
        if folder in path.parents and path != ROOT / "vitscale" / "__init__.py":
            unit = path.relative_to(folder).parts[0]
            others = {p.relative_to(folder).parts[0] for p in imported if folder in p.parents}
            graph.setdefault(unit, set()).update(others - {unit, "__init__.py"})
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"{folder.relative_to(ROOT)}: imports form a cycle: {' <- '.join(error.args[1])}")


def deepspeed_touches(tree: ast.AST) -> list[str]:
    """Imports of DeepSpeed, and uses of attributes that only its objects have."""
    touches = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            touches += [name for name in names if name.partition(".")[0] == "deepspeed"]
        elif isinstance(node, ast.Attribute) and node.attr in DEEPSPEED_ATTRIBUTES:
            touches.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            words = [part.value for part in node.args if isinstance(part, ast.Constant)]
            touches += [word for word in words if word in DEEPSPEED_ATTRIBUTES]
        elif isinstance(node, ast.arg) and node.arg in ("engine", "ds") and node.annotation:
            touches += [f"{node.arg}: Any"] if ast.unparse(node.annotation) == "Any" else []
    return touches


def attributes_of(tree: ast.AST, name: str) -> set[str]:
    """The attributes read in expressions that begin with `name`: name.a, name.a().b."""
    attributes = set()
    for node in ast.walk(tree):
        inner = node.value if isinstance(node, ast.Attribute) else None
        while isinstance(inner, ast.Attribute | ast.Call | ast.Subscript):
            inner = inner.func if isinstance(inner, ast.Call) else inner.value
        if isinstance(inner, ast.Name) and inner.id == name and isinstance(node, ast.Attribute):
            attributes.add(node.attr)
    return attributes


ZERO = ast.parse((PACKAGE / "engine" / "zero.py").read_text())
# Attributes that other objects have too.
COMMON = {"module", "optimizer", "state", "loss_scaler", "get", "named_parameters"}
# What zero.py reads of DeepSpeed's engine, optimizer and parameters, and where ours keeps them.
DEEPSPEED_ATTRIBUTES = {
    "_ds",
    "ds_id",
    "ds_tensor",
    "ds_shape",
    "ds_numel",
    "_hp_mapping",
    "get_global_grad_norm",
}
DEEPSPEED_ATTRIBUTES |= (attributes_of(ZERO, "ds") | attributes_of(ZERO, "optimizer")) - COMMON
# The bench measures our checkpoints beside DeepSpeed's own save and load.
BASELINE = {"vitscale/bench/ranks.py": {"_ds", "basic_optimizer"}}
PROGRAMS = [*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")]


@pytest.mark.parametrize("path", [*MODULES, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_engine_touches_deepspeed(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    if not name.startswith("vitscale/engine/"):
        assert set(deepspeed_touches(ast.parse(path.read_text()))) == BASELINE.get(name, set())


def test_the_search_for_deepspeed_knows_what_the_engine_reads() -> None:
    assert {"basic_optimizer", "update_lp_params", "grad_position", "micro_steps"} <= DEEPSPEED_ATTRIBUTES


@pytest.mark.parametrize(
    "code",
    [
        "import deepspeed.ops",
        "from deepspeed import DeepSpeedEngine",
        "run.engine._ds.optimizer",
        "for group in engine.basic_optimizer.param_groups: pass",
        "param.ds_tensor",
        "getattr(optimizer, 'fp32_partitioned_groups_flat')",
        "def save(engine: Any) -> None: pass",
    ],
)
def test_the_search_for_deepspeed_finds_each_way_to_touch_it(code: str) -> None:
    assert deepspeed_touches(ast.parse(code))


def dangers(node: ast.AST) -> list[str]:
    """What in a piece of syntax could execute the data that it reads."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
        return [name for name in names if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")]
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    calls = [called] if called in ("eval", "exec", "torch.load", "torch.save", "os.system") else []
    calls += [called] if called.endswith(("_object", "_object_list")) else []  # collectives that pickle
    return calls + [
        keyword.arg
        for keyword in node.keywords
        if keyword.arg in ("shell", "allow_pickle") and ast.unparse(keyword.value) != "False"
    ]


def test_no_code_can_execute_the_data_it_reads() -> None:
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
        "run(x, shell=choice)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_for_dangers_finds_each_kind(code: str) -> None:
    assert any(dangers(node) for node in ast.walk(ast.parse(code)))
