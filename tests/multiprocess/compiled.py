"""What a rank of test_compiled.py does: pytest's type checks would be compiled, too."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from vitscale import config as configs
from vitscale import distributed
from vitscale.bench import step
from vitscale.bench.step import Case, StepBench
from vitscale.job import prepare
from vitscale.models import ModelConfig, build_model
from vitscale.models.hybrid import HybridConfig
from vitscale.models.kernel_choices import KernelChoices
from vitscale.models.layers import Checkpointing
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.start import started
from vitscale.step import skipped_step, train_step
from vitscale.train_config import TrainConfig

# The graphs of the default backend, forward and backward, without its kernels: those take a C++
# compiler half a minute of a model.
WITHOUT_KERNELS = "aot_eager_decomp_partition"
VIT = ViTConfig(variant="Ti/4", width=32, depth=2, num_heads=4, mlp_dim=48, image_size=8, num_classes=5)
MODELS: dict[str, ModelConfig] = {
    "vit": dataclasses.replace(VIT, distilled=True, posemb="learned2d", posemb_at="every_layer"),
    "relative": dataclasses.replace(VIT, pool="mean", posemb="relative"),
    "axial": dataclasses.replace(VIT, pool="mean", attention="axial", depth=4),
    "hybrid": HybridConfig(
        variant="R+Ti/16",
        stem_width=32,
        stem_stages=(1,),
        patch_size=8,
        width=32,
        depth=2,
        num_heads=4,
        mlp_dim=48,
        image_size=16,
        num_classes=5,
    ),
    "resnet": ResNetConfig(width=32, stages=(2,), image_size=16, num_classes=5),
}


def compile_by(backend: str | Callable[..., object]) -> None:
    """From now on, blocks of this process are compiled by that backend of torch.compile."""

    def compile(module: nn.Module, dynamic: bool, **_: object) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, dynamic=dynamic)

    nn.Module.compile = compile


def compare(folder: Path, kind: str, mode: Checkpointing, kernels: bool) -> None:
    """Train a compiled model beside an eager one; evaluate another batch after each step.

    In fp64, where the order of additions does not matter: a compiler chooses it for each CPU.
    kernels: whether they are made, by the C++ compiler; else graphs run by torch's own.
    """
    chosen: list[KernelChoices] = []
    if not kernels:
        compile_by(WITHOUT_KERNELS)
    KernelChoices.__init__ = lambda self: chosen.append(self)
    eager, compiled = (build_model(MODELS[kind], 0).double() for _ in range(2))
    side = MODELS[kind].image_size
    compiled.set_activation_checkpointing(mode)
    compiled.compile_blocks()
    for batch in torch.randn(3, 4, 3, side, side, dtype=torch.float64):
        for model in (eager, compiled):
            with torch.no_grad():  # not all alike: after a LayerNorm that would give no gradients
                model.head.weight.copy_(torch.linspace(-1, 1, model.head.weight.numel()).view(5, -1))
            for name, param in model.named_parameters():
                if "norm" in name and name.endswith("bias"):
                    # With 0, rounding decides whether a map of zeros passes a ResNet's ReLU.
                    nn.init.constant_(param, 0.1)
            model(batch).square().sum().backward()
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            compiled.eval()(batch[:3])
            compiled.train()
    grads = [[param.grad for param in model.parameters()] for model in (eager, compiled)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
    counts = torch._dynamo.utils.counters
    (folder / "graphs").write_text(str(counts["stats"]["unique_graphs"]))
    assert chosen or not kernels  # also where graphs come from torch's cache: they are part of its key


def count_runs(folder: Path) -> None:
    """Bench two compiled cases of 5 graphs each; write how many graphs a step of each runs."""
    runs, before = 0, list[int]()

    def counted(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*values: object) -> object:
            nonlocal runs
            runs += 1
            return graph(*values)

        return run

    def progress(stage: str) -> None:
        if "round" in stage:
            before.append(runs)

    compile_by(counted)
    model = ResNetConfig(width=32, stages=(1,) * 5, image_size=32, num_classes=5)
    cases = Case(loop="vitscale", compile=True), Case(loop="plain", compile=True)
    step.run(StepBench(model=model, batch=2, precision="fp32", cases=cases, rounds=1, steps=1), progress)
    first, second = before
    (folder / "runs").write_text(f"{second - first} {runs - second}")


def skip_after_a_step(config: Path, folder: Path) -> None:
    """A step of a run, and one that is skipped for want of data. `folder` gets the graphs."""
    options = ["engine.compile=true", "model.drop_path=0.2"]
    compile_by(WITHOUT_KERNELS)
    loaded = configs.load(TrainConfig, [config], options)
    distributed.initialize()
    with started(prepare(loaded, world_size=1), {}) as run:
        train_step(run, next(run.batches), 1)
        skipped_step(run)
    (folder / "graphs").write_text(str(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
