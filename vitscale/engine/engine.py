"""A model in training: DeepSpeed's ZeRO around it, and the average of its weights.

Only the folder engine/ knows DeepSpeed. What [engine] sets changes speed and memory; results
stay the same up to rounding.
"""

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitscale import distributed
from vitscale.engine import gradients, setup, sliced, zero
from vitscale.engine.batches import BatchPlan
from vitscale.engine.ds_config import EngineConfig, Precision, check_compiled, make_ds_config
from vitscale.engine.ema import Ema
from vitscale.engine.fragments import (
    EMA,
    FP32,
    OPTIMIZER_SLOTS,
    UNTRAINED,
    Counters,
    Fragment,
    FragmentSource,
    Untrained,
    Wanted,
)
from vitscale.errors import ConfigError
from vitscale.models import Model
from vitscale.models.corruption import Corruption
from vitscale.optim.optimizers import OptimConfig, build_optimizer
from vitscale.system import hardware

logger = logging.getLogger(__name__)
NO_STEPS = Counters()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """A model under ZeRO, its optimizer and, with optim.ema_decay, the average of its weights.

    Every rank has one, and all call its methods in the same order, since most of them
    communicate. An optimizer step is grad_accum_steps times forward, backward and step.
    """

    def __init__(
        self,
        module: Model,
        optim: OptimConfig,
        config: EngineConfig,
        plan: BatchPlan,
        precision: Precision,
    ) -> None:
        """Hand the module to DeepSpeed, which moves it to this rank's device.

        module: a whole model, or an empty_model, which gets memory for fill or restore to set.
        Raises ConfigError for a precision that the device does not have, and for sizes and a
        cache with which torch.compile cannot be used; StoreError if offload_folder cannot be
        written.
        """
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        setup.prepare()
        ds_config = make_ds_config(config, plan, precision, optim.clip_norm)
        if any(param.is_meta for param in module.parameters()):
            setup.allocate(module, ds_config, DTYPES[precision])
        module.set_activation_checkpointing(config.activation_checkpointing)
        if config.compile:
            check_compiled(config, module.config, precision)
            distributed.together(module.compile_blocks)
        hardware.allow_tf32(config.tf32)
        accelerator = get_accelerator()
        if precision == "fp16" and accelerator and not accelerator.is_fp16_supported():
            raise ConfigError('precision "fp16" does not run on this device; use "bf16" or "fp32"')
        self.module = module
        self.optimizer_name = optim.name
        self.zero_stage = config.zero_stage
        self._dtype = DTYPES[precision]
        self._ds: zero.DeepSpeed
        with _debug_prints(), setup.on_device(distributed.device()):
            self._ds, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(optim, module, self._dtype),
                config=ds_config,
            )
        distributed.wait_longer(self._ds.data_parallel_group)
        gradients.correct(self._ds)
        sliced.place(self._ds)
        if config.offload_folder:
            zero.map_moments(self._ds, OPTIMIZER_SLOTS[optim.name], config.offload_folder)
        if config.activation_checkpointing == "selective":
            zero.hide_gathering(self._ds)
        assert self._ds.gradient_accumulation_steps() == plan.grad_accum_steps
        self._ema = Ema(self._ds, optim.ema_decay) if optim.ema_decay else None

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        features_only: bool = False,
        kept: Tensor | None = None,
        corruption: Corruption | None = None,
        separate_heads: bool = False,
    ) -> Float[Tensor, "B *rest"]:
        """Logits in fp32, or features in the run's precision; images in [-1, 1].

        kept, corruption, separate_heads: as the model's forward takes them.
        """
        # DeepSpeed's forward counts as part of a training step, so evaluation calls the module.
        network = self._ds if self._ds.training else self.module
        given = {"kept": kept, "corruption": corruption, "separate_heads": separate_heads or None}
        options = {name: value for name, value in given.items() if value is not None}
        return network(images.to(self._dtype), features_only=features_only, **options)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradients of the mean loss of one micro batch."""
        self._ds.backward(loss)

    def step(self) -> None:
        """End a micro step; the last of a step clips, and updates weights and average."""
        skipped = self.counters.skipped_steps
        self._ds.step()
        if self.counters.skipped_steps > skipped:
            gradients.drop(self._ds)
        if self._ema:
            self._ema.update()

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate for the coming step; a parameter group has its share of it."""
        for group in self._ds.basic_optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]

    def grad_norm(self) -> Float[Tensor, ""]:
        """The global gradient norm of the last step before clipping, on the device.

        NaN if there is none.
        """
        norm = self._ds.get_global_grad_norm()
        value = float("nan") if norm is None else norm
        return torch.as_tensor(value, dtype=torch.float32, device=distributed.device())

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block: evaluation mode, and the average, if any, as the weights."""
        self._ds.eval()
        try:
            # Eagerly: a set's short last batch is of another shape than training's graphs.
            with (
                torch.compiler.set_stance("force_eager"),
                self._ema.as_weights() if self._ema else contextlib.nullcontext(),
            ):
                yield
        finally:
            self._ds.train()

    @property
    def counters(self) -> Counters:
        return zero.counters(self._ds)

    @property
    def loss_scaler(self) -> dict[str, int | float | bool]:
        """The numbers of the fp16 loss scaler; empty in other precisions."""
        return zero.loss_scaler(self._ds)

    @property
    def slots(self) -> tuple[str, ...]:
        """What is kept of every trained parameter now: "fp32", the optimizer's slots, "ema"."""
        # The optimizer has no state before its first update.
        optimizer = OPTIMIZER_SLOTS[self.optimizer_name] if self.counters.updates else ()
        return (FP32, *optimizer, *((EMA,) if self._ema else ()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every parameter and persistent buffer."""
        return zero.shapes(self.module)

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of the trained parameters, in the module's order."""
        return zero.fragments(self._ds)

    def untrained(self) -> Iterator[Untrained]:
        """The frozen parameters and persistent buffers."""
        return zero.untrained(self._ds)

    def statistics(self) -> Iterator[Untrained]:
        """What the optimizer keeps of whole parameters: Adafactor's second moments."""
        return sliced.statistics(self._ds)

    def owned(self) -> dict[str, dict[str, Tensor]]:
        """{slot: {parameter: 1-D fragment}} of this rank, as views of the live state.

        A slot of the optimizer may lack parameters of which it keeps nothing so.

        Raises RuntimeError on every rank if the map of fragments does not fit the live weights.
        """
        optimizer = [slot for slot in self.slots if slot != EMA]
        owned = zero.owned(self._ds, optimizer)
        if self._ema:
            owned[EMA] = self._ema.owned()
        return owned

    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Set every weight from whole tensors by name; the average starts there, too.

        Only one of them needs to be in memory at a time. Of a name that comes twice, the last
        value counts. A UserError that `values` raises on one rank is raised on all.
        """
        distributed.together(lambda: zero.fill(self._ds, values))
        zero.refresh_live(self._ds)
        zero.check_mapping(self._ds)
        if self._ema:
            self._ema.start(at_weights=True)

    def restore(
        self,
        source: FragmentSource,
        slots: Sequence[str] = (FP32,),
        counters: Counters = NO_STEPS,
        loss_scaler: Mapping[str, int | float | bool] | None = None,
    ) -> None:
        """Fill weights, optimizer slots, the average and the untrained tensors from `source`.

        slots: those that the source has; an average that it lacks starts at the weights.
        counters: without updates in it, the optimizer starts fresh.

        Parameter groups are not restored: learning rate and weight decay come from the config.
        """
        known = OPTIMIZER_SLOTS[self.optimizer_name]
        optimizer = {slot: dtype for slot, dtype in known.items() if slot in slots}
        average = self._ema.wanted() if self._ema and EMA in slots else None
        others = [*(average or ()), *self._wanted_statistics(counters.updates)]
        zero.restore(self._ds, source, optimizer, counters.updates, others)
        zero.restore_counters(self._ds, counters, loss_scaler or {})
        if self._ema:  # after the counters: it notes how many updates were made
            self._ema.start(at_weights=average is None)

    def _wanted_statistics(self, updates: int) -> Iterator[Wanted]:
        for statistic in self.statistics() if updates else ():
            yield Wanted(statistic.held, UNTRAINED, statistic.name, statistic.held_start)

    def forget_step(self, counters: Counters, loss_scaler: Mapping[str, int | float | bool]) -> None:
        """Undo a step that was skipped: it has changed nothing but these, from before it."""
        zero.restore_counters(self._ds, counters, loss_scaler)

    def close(self) -> None:
        """Free what DeepSpeed holds, so that another engine can follow in this process."""
        self._ds.destroy()


@contextlib.contextmanager
def _debug_prints() -> Iterator[None]:
    """Log what the block prints, for debugging: in bf16, DeepSpeed prints its memory."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.debug("DeepSpeed: %s", line)
