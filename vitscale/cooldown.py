"""Any checkpoint becomes a finished model: a run that continues it while its rate falls to 0.

The run that it comes from, the trunk, stays as it is and can go on.
"""

import dataclasses
from pathlib import Path

from vitscale import config as configs
from vitscale.checkpoint.manifest import saved_config
from vitscale.checkpoint.verify import open_directory
from vitscale.errors import ConfigError
from vitscale.metrics.expect import ExpectConfig
from vitscale.optim.schedule import ScheduleConfig, learning_rate
from vitscale.stores import storage
from vitscale.system import atomic
from vitscale.train_config import InitConfig, TrainConfig


def write_cooldown(checkpoint: str, run_dir: str, steps: int) -> Path:
    """Write the config of a cooldown run into its run directory, and return its path.

    checkpoint: a run directory (its newest good checkpoint) or a step directory, whose full
        state and data the run continues. steps: over which the learning rate, from what it was
        at the checkpoint, falls linearly to 0.

    Raises ConfigError for what makes no sense, and CheckpointError for a damaged checkpoint.
    """
    path = Path(run_dir) / "config.toml"
    if steps < 1:
        raise ConfigError(
            f"--steps {steps} must be 1 or more; a tenth to a fifth of the run's steps is usual"
        )
    configs.check_utf8("run_dir", run_dir)
    if path.exists():
        raise ConfigError(f"{path} exists and is not overwritten; choose another run directory")
    found = open_directory(checkpoint)
    train = found.manifest.train
    trunk = saved_config(TrainConfig, train.config, "", found.folder, train.writer)
    lr = learning_rate(train.step, trunk.num_steps(train.steps_per_epoch), trunk.optim.lr, trunk.schedule)
    if not lr:
        raise ConfigError(
            f"the learning rate at {found.folder} is 0: its run was finished there; give an earlier step"
        )
    config = dataclasses.replace(
        trunk,
        run_dir=run_dir,
        total_steps=train.step + steps,
        total_epochs=0.0,
        total_samples=0,
        optim=dataclasses.replace(trunk.optim, lr=lr),
        schedule=ScheduleConfig(decay="wsd", cooldown_steps=steps),
        init=InitConfig(checkpoint=storage.absolute(found.folder), full_state=True),
        checkpoint=dataclasses.replace(trunk.checkpoint, store=""),
        expect=ExpectConfig(),  # its bands are of the trunk's rate
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, configs.to_toml(config).encode())
    return path
