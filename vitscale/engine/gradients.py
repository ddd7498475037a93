"""How DeepSpeed 0.19.8 treats gradients from the backward pass to the update, corrected.

A changed private name of DeepSpeed fails loudly here, as in zero.py.
"""

from vitscale.engine.zero import DeepSpeed


def correct(ds: DeepSpeed) -> None:
    """Replace what an engine would do; every rank calls it, before the first step."""
    if ds.fp16_enabled():
        _grow_scale_after_update(ds)


def _grow_scale_after_update(ds: DeepSpeed) -> None:
    """Let the loss scale grow after the update, not before the gradients are divided by it.

    DeepSpeed doubles it first, so that in such a step the gradients, which the old scale
    multiplied, would come out as half of what they are.
    """
    optimizer = ds.optimizer
    update_scale, step = optimizer._update_scale, optimizer.step

    def only_fall(overflow: bool) -> None:
        if overflow:
            update_scale(overflow)

    def step_and_grow() -> None:
        step()
        if not optimizer.overflow:
            update_scale(False)

    optimizer._update_scale, optimizer.step = only_fall, step_and_grow


def drop(ds: DeepSpeed) -> None:
    """Forget the gradients of a step that was skipped.

    With offload in 16 bits, DeepSpeed adds those of the next step to them, at ZeRO 1 and 2, so
    that one NaN would make it skip all steps from then on.
    """
    if getattr(ds.optimizer, "cpu_offload", False):  # of all optimizers, that one alone has it
        for group in ds.optimizer.averaged_gradients:
            ds.optimizer.averaged_gradients[group] = None
