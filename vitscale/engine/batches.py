"""How a global batch is cut among ranks and micro steps: pure arithmetic."""

import dataclasses

from vitscale.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """global_batch = world_size x micro_batch x grad_accum_steps.

    For example, 4096 = 8 x 64 x 8: each of 8 ranks takes 512 images a step, 64 at a time.
    """

    global_batch: int
    world_size: int
    micro_batch: int
    grad_accum_steps: int

    @property
    def per_rank(self) -> int:
        """Images of one rank in one step."""
        return self.micro_batch * self.grad_accum_steps


def plan_batches(global_batch: int, micro_batch: int, world_size: int) -> BatchPlan:
    """Cut a global batch among ranks and micro steps.

    micro_batch: 0 = no accumulation.

    Raises ConfigError if the batch cannot be divided so; the message names what would fit.
    """
    if global_batch % world_size:
        fitting = [w for w in range(1, global_batch + 1) if global_batch % w == 0]
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of world_size {world_size}; start one of "
            f"{_listed(fitting)} processes, or use global_batch = "
            f"{max(1, global_batch // world_size) * world_size}"
        )
    per_rank = global_batch // world_size
    micro = micro_batch or per_rank
    if per_rank % micro:
        near = min((m for m in range(1, per_rank + 1) if per_rank % m == 0), key=lambda m: abs(m - micro))
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of engine.micro_batch {micro} x world_size "
            f"{world_size} = {micro * world_size}; use engine.micro_batch = {near}"
        )
    return BatchPlan(
        global_batch=global_batch,
        world_size=world_size,
        micro_batch=micro,
        grad_accum_steps=per_rank // micro,
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) <= 12 else [*numbers[:8], "...", numbers[-1]]))
