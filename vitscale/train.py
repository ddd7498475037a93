"""Training: one straight loop. Fine-tuning is the same loop with [init] (start.py)."""

import contextlib
import functools
import gc
import importlib.metadata
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vitscale import __version__, distributed, shared_memory
from vitscale import config as configs
from vitscale.checkpoint.manifest import TrainState
from vitscale.checkpoint.store import step_of
from vitscale.errors import PREEMPTED, DataError, Diverged, UserError
from vitscale.guard.ending import Ending
from vitscale.guard.health import Health
from vitscale.guard.watch import Watch
from vitscale.guard.watchdog import Watchdog
from vitscale.job import Job, Tasks, open_tasks, prepare
from vitscale.meter import Meter
from vitscale.metrics.goodput import Ledger, summary
from vitscale.optim.schedule import learning_rate
from vitscale.profiler import Profiler
from vitscale.progress import Due, Phases, Progress
from vitscale.run_dir import history
from vitscale.run_dir.directory import claimed, note_refusal, write_config
from vitscale.start import Run, enough_memory, started
from vitscale.step import skipped_step, train_step
from vitscale.system import processes
from vitscale.teacher import Teacher
from vitscale.train_config import TrainConfig
from vitscale.validation import best_so_far, draw, evaluate

logger = logging.getLogger(__name__)

STOP_NAME = "stop"  # RUN/stop asks the run to save and end
SHOWN_IMAGES = 16


def train(config: TrainConfig, began: float | None = None) -> int:
    """Run the config to its end, resuming what there is; every rank calls it.

    began: since when this start takes time, in seconds since the epoch; None = since now.
    Returns the exit status: 0, or 75 if it was stopped. Raises a UserError for what the user
    can fix. A process may call it again unless it raised.
    """
    began = began or time.time()
    stop_file = Path(config.run_dir) / STOP_NAME
    distributed.initialize()
    try:
        job = prepare(config, distributed.world_size())
        tasks = distributed.together(lambda: open_tasks(job))
        distributed.together(lambda: shared_memory.check(config, tasks))
    except UserError as error:
        distributed.on_main(functools.partial(note_refusal, config.run_dir, error))
        raise
    with (
        claimed(job),
        Ending(config.run_dir, job.total_steps) as ending,
        Watch(ending.tell, stop_file) as watch,
        Watchdog(config.guard.limit_seconds(), watch, ending.tell) as watchdog,
    ):
        ending.lost = watch.lost
        ledger, done = Ledger(config.run_dir, began, writes=distributed.is_main()), None
        rolled_back = None
        while done is None:
            gc.collect()  # the engine that was rolled back is gone before there is another one
            try:
                done = attempt(job, tasks, rolled_back, ending, watch, watchdog, ledger)
            except RolledBack:
                rolled_back = ending.progress
                ledger.rolled_back()
        # A launcher may kill all ranks when the first ends with status 75.
        reasons = [reason for reason in distributed.gather_json(watch.reason) if reason]
        distributed.on_main(lambda: conclude(ending, stop_file, None if done else reasons))
    return 0 if done else PREEMPTED


def conclude(ending: Ending, stop_file: Path, reasons: Sequence[str] | None) -> None:
    """Write how this start ended without a failure, and take the stop file away.

    Rank 0 calls it. reasons: why it was stopped; None = it is done. A stop file counts whatever
    else asked, and whenever it came.
    """
    if reasons is None:
        ending.write("done")
        logger.info("all %s steps are done", f"{ending.progress.step:,}")
    else:
        wanted = any(reason.startswith(f"the file {stop_file}") for reason in reasons)
        with contextlib.suppress(OSError):  # of a file server
            wanted = wanted or stop_file.exists()
        reason = f"the file {stop_file}" if wanted else reasons[0]
        ending.write("stopped" if wanted else "preempted", reason)
        step = ending.progress.step
        saved = ", saved" if step else ""
        logger.info("stopped by %s at step %d%s; the same command continues", reason, step, saved)
    with contextlib.suppress(OSError):  # the run has ended well, and its state is written
        stop_file.unlink(missing_ok=True)


def attempt(
    job: Job,
    tasks: Tasks,
    rolled_back: Progress | None,
    ending: Ending,
    watch: Watch,
    watchdog: Watchdog,
    ledger: Ledger,
) -> bool:
    """Start the run and train; every rank calls it. Nothing of the run outlives the call.

    rolled_back: where it was before it was rolled back; None = it was not. Returns what loop
    returns, and raises what loop raises.
    """
    watchdog.starting()
    with (
        started(job, tasks, rolled_back) as run,
        Profiler(job.config, run.progress) as profiler,
    ):
        ending.progress = run.progress
        watchdog.ready(run.progress)
        phases = Phases(watchdog, ledger, profiler)
        try:
            with processes.no_garbage_collection():
                return loop(run, watch, phases, ledger)
        except RolledBack:
            raise
        except BaseException as error:  # at once: what the run has open may take long to close
            watch.failing = True
            ending.note(error)
            raise


def loop(run: Run, watch: Watch, phases: Phases, ledger: Ledger) -> bool:
    """Train from where the run is to its end, or until asked to stop; every rank calls it.

    Returns whether it came to its end: all steps are done, and the evaluations after them.
    Raises RolledBack if it is to be started again from an earlier checkpoint, and Diverged if
    that did not help, or if it ends without a healthy checkpoint.
    """
    job, engine, at, metrics, saver = run.job, run.engine, run.progress, run.metrics, run.saver
    meter, health = Meter(job, run.pace), Health(engine, job.config.guard.skipped_steps)
    agreed = distributed.Agreement(2)
    phases.listen(meter)
    ledger.ready(at)
    saved_step = at.step

    def save() -> None:
        nonlocal saved_step
        with phases("save"):
            at.bad_samples += run.quarantine.flush(at.step, at.data_step)
            at.healthy = health.since_last_save()
            saver.save(engine, train_state(job, at, run.teacher))
        ledger.mark()
        saved_step = at.step

    # At step 0, what an untrained model gives: the line to beat. Later, what was broken off.
    evaluations = due_after(at.step, job).evaluate
    missing = distributed.on_main(lambda: metrics.without(evaluations))
    with phases("evaluate"):
        going_on = evaluate(run, missing, watch)
    if going_on:  # not before: a mistake that shows in the evaluation binds nobody
        write_start(run)
        if best_so_far(run, evaluations):  # a kill may come between its numbers and this
            saver.keep_best()

    while going_on and at.step < job.total_steps:
        with phases("data"):
            batch = watch.unless_asked(lambda: next(run.batches))
        with phases("step"):
            lr = learning_rate(at.step + 1, job.total_steps, job.config.optim.lr, job.config.schedule)
            engine.set_learning_rate(lr)
            meter.before_step(engine, logged=due_after(at.step + 1, job).log)
            before = engine.counters, engine.loss_scaler
            with enough_memory(job):
                loss = train_step(run, batch, at.step + 1) if batch else skipped_step(run)
        was_skipped = engine.counters.skipped_steps > before[0].skipped_steps
        if was_skipped and distributed.any_of(batch is None):  # stopped while it waited for data
            engine.forget_step(*before)
            if at.step > saved_step:
                save()
            break
        assert batch
        at.advance(job.config.global_batch)
        meter.add(batch, loss)
        health.add(loss)
        run.quarantine.add(batch.bad)
        run.spikes.add(at.step, at.data_step, loss, batch.ids)
        if health.diverged:
            roll_back(run)
        stopping, save_failed = agreed(watch.asked, saver.failed)  # of the step before
        if save_failed:
            saver.wait()  # raises

        due = due_after(at.step, job, stopping=stopping)
        if due.log:
            with phases("log"):
                at.bad_samples += run.quarantine.flush(at.step, at.data_step)
                run.spikes.write()
                metrics.write(at.step, {**meter.read(engine, loss, lr, at), **ledger.write()})
                gc.collect()
        if at.step == 1:
            metrics.write_images("inputs", batch.images[:SHOWN_IMAGES], at.step)
        for step, cost in saver.finished():
            metrics.write(step, cost)
        if due.save:  # before the evaluations: a failure in a long one loses no steps
            save()
        if due.draw:
            with phases("evaluate"):
                draw(run, batch.images)
        if due.evaluate:
            with phases("evaluate"):
                going_on = not stopping and evaluate(run, due.evaluate, watch)
            if not going_on:
                due = due_after(at.step, job, stopping=True)
        if saved_step == at.step:  # also what came after the save: a resume does not repeat it
            ledger.mark()
        is_best = best_so_far(run, due.evaluate)
        damaged = run.quarantine.is_over(at.bad_samples, at.samples_seen)
        if (due.save or damaged or is_best) and saved_step < at.step:
            save()
        elif is_best:
            saver.keep_best()
        if damaged:
            raise DataError(run.quarantine.verdict(at.bad_samples, at.samples_seen, at.step), shared=True)
        if due.end:
            break
    with phases("save"):
        saver.wait()
    for step, cost in saver.finished():
        metrics.write(step, cost)
    metrics.conclude()
    logger.info("wall time since the first start: %s", summary(ledger.write()))
    if at.step == job.total_steps and not at.healthy:
        finding = "losses or gradients before the last checkpoint were not finite"
        raise diverged(run, finding, newest_healthy(run))
    return going_on and at.step == job.total_steps


def write_start(run: Run) -> None:
    """Write the config and what else is known of this start; every rank calls it."""
    job, metrics = run.job, run.metrics
    # A run that begins with another's full state has no step 0.
    if run.progress.step == 0 or not (Path(job.config.run_dir) / history.FILE_NAME).exists():
        metrics.write_hparams(configs.to_dict(job.config))
    row = write_config(job, run.progress, versions())
    metrics.write_texts(
        {
            "start": history.card(row),
            "config": configs.to_toml(job.config),
            "command": shlex.join(sys.argv),
            "versions": "\n".join(f"{name} {version}" for name, version in versions().items()),
        }
    )


class RolledBack(Exception):
    """The run is to be started again from its newest checkpoint, a healthy one."""


def roll_back(run: Run) -> NoReturn:
    """Leave the loop, for the newest healthy checkpoint if there is one; every rank calls it.

    The checkpoints beyond it are deleted. Raises RolledBack, or Diverged if there is no healthy
    one, or the run has been rolled back guard.rollbacks times.
    """
    guard, at = run.job.config.guard, run.progress
    finding = f"the gradients of {guard.skipped_steps} steps in a row were not finite"
    if at.rollbacks:
        finding += f" again, after {at.rollbacks} roll-backs"
    # What these batches showed: they are not read again.
    at.bad_samples += run.quarantine.flush(at.step, at.data_step)
    run.spikes.write()
    healthy = newest_healthy(run)
    if not healthy or at.rollbacks >= guard.rollbacks:
        raise diverged(run, finding, healthy)
    step = step_of(healthy)
    assert step is not None
    distributed.on_main(lambda: run.saver.delete_beyond(step))
    if distributed.is_main():
        logger.warning(
            "step %d: %s; going back to the healthy checkpoint of step %d and passing over the %d batches "
            "since then (%d of %d times)",
            at.step,
            finding,
            step,
            at.step - step,
            at.rollbacks + 1,
            guard.rollbacks,
        )
    raise RolledBack


def newest_healthy(run: Run) -> str:
    """The folder of the newest healthy checkpoint; "" if there is none. Every rank calls it."""
    run.saver.wait()
    return distributed.on_main(run.saver.newest_healthy)


def diverged(run: Run, finding: str, healthy: str) -> Diverged:
    """The error for a run that must not go on. healthy: its newest healthy checkpoint or ""."""
    way_out = (
        f'continue from its newest healthy checkpoint in a new run_dir: [init] checkpoint = "{healthy}", '
        "full_state = true, and a lower optim.lr"
        if healthy
        else "start again in a new run_dir with a lower optim.lr, a longer warmup or optim.clip_norm"
    )
    return Diverged(f"the run has diverged by step {run.progress.step:,}: {finding}; {way_out}", shared=True)


def due_after(step: int, job: Job, *, stopping: bool = False) -> Due:
    config = job.config
    return Due.after(
        step,
        job.total_steps,
        stopping=stopping,
        log_every=config.log.every_steps,
        save_every=config.checkpoint.every_steps,
        evaluate_every={name: section.every_steps for name, section in config.evals.items()},
        draw_every=config.log.figures_every_steps,
    )


def train_state(job: Job, progress: Progress, teacher: Teacher | None) -> TrainState:
    """The trainer's part of a checkpoint's manifest."""
    config = job.config
    return TrainState(
        **vars(progress),
        steps_per_epoch=job.mixture.steps_per_epoch,
        data_fingerprint=job.data_fingerprint,
        decoder=job.decoder,
        precision=config.precision,
        config=configs.to_dict(config),
        versions=versions(),
        teacher=teacher.digest if teacher else "",
    )


@functools.cache
def versions() -> dict[str, str]:
    """The packages whose versions may change results."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "numpy")}
    return {"vitscale": __version__, **others}
