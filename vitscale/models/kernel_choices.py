"""Which kernels torch.compile makes of a block, where its own choice reads memory twice."""

import hashlib
from pathlib import Path
from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.scheduler import MixOrderReduction
from torch._inductor.virtualized import V

LONGEST_ROW = 4096  # values that a kernel keeps in registers; torch: 1,024
LARGE = 2**22  # bytes; smaller inputs cost nothing beside the others


class KernelChoices(InductorChoices):
    """torch's choices, but for two that took 1.6% of the time of a ViT-Huge's block."""

    def uuid(self) -> str:
        """For the key of torch's cache: other choices are other kernels."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """A LayerNorm wider than torch's 1,024 still reads its row once, not once a pass."""
        if features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction:
            return V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW)
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    @staticmethod
    def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        """Sums for the parameters of two norms are not merged for the one input they share.

        Merged, neither can be made in the pass over its own norm.
        """
        fuses = InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)
        both_reduce = node1.is_reduction() and node2.is_reduction()
        if not (fuses and both_reduce) or MixOrderReduction.can_fuse(node1, node2):
            return fuses
        one, other = _large_inputs(scheduler, node1), _large_inputs(scheduler, node2)
        return one <= other or other <= one


def _large_inputs(scheduler: Any, node: Any) -> set[str]:
    return {read.name for read in node.read_writes.reads if scheduler.dep_size_hint(read) > LARGE}
