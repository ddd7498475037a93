"""What the ranks of test_collectives.py do."""

import json
from pathlib import Path

from vitscale import distributed, errors
from vitscale.errors import UserError


def fail(folder: Path, way: str, kind: str, failing: int) -> None:
    """Rank `failing` raises an error of `kind`; RANK.json gets what reaches each rank."""
    distributed.initialize()

    def action() -> list[int]:
        if distributed.rank() == failing:
            if kind == "OSError":
                raise OSError(28, "No space left on device", "/full")
            raise getattr(errors, kind)("what is wrong")
        return [distributed.rank(), 7]

    try:
        result = getattr(distributed, way)(action)
    except UserError as error:
        result = {"kind": type(error).__name__, "message": str(error), "shared": error.shared}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(result))


def agree(folder: Path) -> None:
    """Rank 1 raises the first flag in its third call; RANK.json gets every answer."""
    distributed.initialize()
    agreed = distributed.Agreement(2)
    answers = [agreed(call == 2 and distributed.rank() == 1, False) for call in range(5)]
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(answers))
