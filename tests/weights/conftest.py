"""The libraries that exports and imports are compared with."""

from typing import Any

import pytest
from foreign_models import import_timm


@pytest.fixture(scope="session")
def transformers() -> Any:
    return pytest.importorskip("transformers")  # before timm: it must not see the stub of torchvision


@pytest.fixture(scope="session")
def timm(transformers: Any) -> Any:
    pytest.importorskip("huggingface_hub")
    return import_timm()
