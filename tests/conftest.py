"""What all tests share: the option --sweep, a small index, and real images if there are any."""

import os
from collections.abc import Generator
from pathlib import Path

import jaxtyping
import pytest
import torch
from make import write_index

from vitscale import command
from vitscale.data.index import Index

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sweep", action="store_true", help="run exhaustive tables whole, not a seeded sample of each"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported is no garbage; to search it takes a third of this time."""
    with command.importing():
        return (yield)


@pytest.fixture(scope="session")
def sweep(pytestconfig: pytest.Config) -> bool:
    """Whether exhaustive tables run whole (--sweep), or each as a sample of a constant seed."""
    return bool(pytestconfig.getoption("--sweep"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with cifar10/ and imagenet_samples/.

    VITSCALE_TEST_DATA names it; without, it is ../shared/data beside the checkout.
    """
    folder = Path(os.environ.get("VITSCALE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"real images are not here: {folder}/cifar10 is missing (set VITSCALE_TEST_DATA)")
    return folder


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of the tests, functions take arguments of any type."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """97 samples in three shards of unequal size, in chunks of 4."""
    return Index.load(str(write_index(tmp_path / "shards", [40, 37, 20])))
