"""Features that were computed before: in memory, and in a folder for later commands."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitscale import distributed
from vitscale.models.model import CommonConfig
from vitscale.models.transfer import backbone_of
from vitscale.system import atomic

logger = logging.getLogger(__name__)


class FeatureStore:
    """Tables of one model's features, by the name of the data.

    folder: where they are kept as safetensors; "" = in memory alone. All ranks must see it.
    model: names the model (model_digest).
    """

    def __init__(self, folder: str = "", model: str = "") -> None:
        self._folder, self._model = folder, model
        self._tables: dict[str, Mapping[str, Tensor]] = {}

    def get(self, data: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tables of `data`, computed if they are not here; every rank calls it.

        compute: gives whole tables, equal on all ranks.
        """
        if data not in self._tables:
            path = Path(self._folder) / f"{self._model}-{data}.safetensors"
            if self._folder and distributed.on_main(lambda: _is_whole(path)):
                self._tables[data] = distributed.together(lambda: load_file(path))
            else:
                self._tables[data] = compute()
                if self._folder:
                    distributed.on_main(lambda: _write(path, self._tables[data]))
        return self._tables[data]


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A name of a model's tensors, by their names: the same where all values are equal."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def model_digest(weights: str, config: CommonConfig) -> str:
    """A name of a model, by digest_of its tensors and what else its features follow from.

    Models with other heads or another GELU may have the same tensors.
    """
    values = json.dumps(backbone_of(config), sort_keys=True)
    return xxhash.xxh3_128(f"{weights} {values}".encode()).hexdigest()


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:  # its header must fit the file's length
            tables = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            if digest_of(tables) == (file.metadata() or {}).get("digest"):
                return True
            reason = "its checksum differs, or it has none"
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy lacks
        reason = str(error)
    logger.warning("%s cannot be read (%s): its features are computed again", path, reason)
    return False


def _write(path: Path, tables: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.named(path), atomic.appearing(path) as temporary:
        save_file(dict(tables), temporary, {"digest": digest_of(sorted(tables.items()))})
        temporary.chmod(0o644)  # it makes a file that only its owner can read
