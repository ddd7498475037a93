"""A plan as text for people, and as numbers for JSON."""

import dataclasses
import textwrap
from typing import Any

from vitscale.image_size import pixels
from vitscale.memory import more_room
from vitscale.objectives.distillation import DistillationConfig
from vitscale.plan import formulas
from vitscale.plan.make import FITS_WHOLE, Option, Plan, Saving
from vitscale.plan.speed import DECODE_RATE, Speed
from vitscale.quantities import counted
from vitscale.redaction import redact

POLICY_NAMES = {
    "none": "no recomputation",
    "selective": "selective recomputation",
    "full": "full recomputation",
}
SLOW_SHARE = 0.1  # of a step, from which on communication is worth a line
LOST_MORE = 0.001  # of the time, from which on another interval of saves is
NAME_COLUMNS, COLUMNS = 18, 110
Line = tuple[str, str]


def render(plan: Plan) -> str:
    """The whole plan: the table of options, what follows from the best, advice, guesses."""
    parts = [_head(plan), _table(plan)]
    if plan.best and plan.saving:
        parts.append(_section("the best of them", _rest(plan, plan.best, plan.saving)))
    advice = _advice(plan, plan.best, plan.saving) if plan.best and plan.saving else [_too_large(plan)]
    parts += [_section("recommendation", advice), _section("guessed or measured", _sources(plan))]
    return "\n\n".join(parts)


def results(plan: Plan) -> dict[str, Any]:
    """The plan as nested plain values, with units in the names."""
    return {
        "model": _model_name(plan),
        "cluster": dataclasses.asdict(plan.cluster),
        "parameters": plan.num_params,
        "total_steps": plan.total_steps,
        "first_step": plan.first_step,
        "global_batch": plan.config.global_batch,
        "calibrated_on": plan.speed.device if plan.speed.rows else "",
        "options": [_numbers(option) for option in plan.options],
        "best": _numbers(plan.best) if plan.best else None,
        "loader_cores_per_node": plan.loader_cores,
        "storage_gb_per_s": plan.storage_gb_per_s,
        "checkpoints": dataclasses.asdict(plan.saving) if plan.saving else None,
        "days": plan.days,
        "cost": plan.cost,
    }


def _numbers(option: Option) -> dict[str, Any]:
    values = dataclasses.asdict(option)
    memory = {f"{name}_bytes": size for name, size in values.pop("memory").items()}
    memory["total_bytes"] = option.memory.total
    return values | {"step_seconds": option.step_seconds, "memory": memory}


def _model_name(plan: Plan) -> str:
    return f"{plan.config.model.title} at {pixels(plan.config.model.image_size)}"


def _head(plan: Plan) -> str:
    cluster, batch = plan.cluster, plan.config.global_batch
    where = f"{cluster.gpus:,} x {cluster.gpu.upper()} in {counted(cluster.nodes, 'node')}"
    lines = [
        ("parameters", f"{plan.num_params:,}"),
        ("run", f"{plan.num_images:,} images in {plan.steps_left:,} steps of {batch:,}{_continued(plan)}"),
        ("of a GPU", f"{plan.per_gpu:,} images of a step, {cluster.memory_bytes / 1e9:g} GB"),
    ]
    if isinstance(plan.config.objective, DistillationConfig):
        lines.append(("not counted", "the forward pass of the teacher, and its memory"))
    if plan.first_step is None:
        place = redact(plan.config.init.checkpoint)
        lines.append(("not counted", f"the steps that {place} has done, which cannot be read from here"))
    return _section(f"{_model_name(plan)} on {where}: estimates, nothing was run", lines)


def _continued(plan: Plan) -> str:
    return f", after {plan.first_step:,} of another run" if plan.first_step else ""


def _table(plan: Plan) -> str:
    rows = ["ZeRO  recomputed  micro batch  memory GB   step ms    images/s   MFU %"]
    for option in plan.options:
        cut = f"{option.micro_batch:,} x {option.accumulation:,}" if option.fits else "none fits"
        size = f"{option.memory.total / 1e9:,.1f}"
        row = f"{option.zero_stage:>4}  {option.checkpointing:<10}{cut:>13}{size:>11}"
        if option.fits:
            milliseconds, speed = f"{1e3 * option.step_seconds:,.0f}", f"{option.images_per_second:,.0f}"
            row += f"{milliseconds:>10}{speed:>12}{100 * option.mfu:>8.1f}"
        rows.append(row + ("  <" if option is plan.best else ""))
    return "\n".join(rows)


def _rest(plan: Plan, best: Option, saving: Saving) -> list[Line]:
    cluster, memory, cores = plan.cluster, best.memory, counted(plan.loader_cores, "core")
    cost = f"{_figure(plan.cost)} at {cluster.price:g} a GPU hour" if cluster.price else "not known: --price"
    repeats, at_rate = plan.config.augment.repeats, f"at {plan.decode_rate:,.0f} images/s a core"
    shared = f"; fewer will do, since {repeats} views share a decoding" if repeats > 1 else ""
    stored = f"an image{f', read once for {repeats} views' if repeats > 1 else ''}"
    minutes, steps = f"{saving.interval_seconds / 60:,.1f} min", f"{saving.interval_steps:,} steps"
    best_saved = "at the end alone" if _is_short(plan, saving) else f"every {minutes}, which is {steps}"
    return [
        (
            "step",
            f"{1e3 * best.step_seconds:,.0f} ms: compute {1e3 * best.compute_seconds:,.0f}, communication "
            f"{1e3 * best.exposed_seconds:,.1f}, update {1e3 * best.update_seconds:,.1f}, stragglers"
            f"{' and waiting for data' if best.loader_bound else ''} {1e3 * best.waiting_seconds:,.1f}",
        ),
        (
            "memory of a GPU",
            f"state {memory.state / 1e9:,.1f} GB, activations {memory.activations / 1e9:,.1f}, buffers "
            f"{memory.buffers / 1e9:,.1f}, context and fragmentation {memory.overhead / 1e9:,.1f}",
        ),
        ("loader", f"{cores} of each node, {at_rate}{shared}"),
        ("storage", f"{plan.storage_gb_per_s:,.2f} GB/s, at {cluster.image_kb:,.0f} kB {stored}"),
        (
            "checkpoint",
            f"{saving.num_bytes / 1e9:,.1f} GB, written in {saving.write_seconds:,.1f} s at "
            f"{cluster.store_gb_per_s:g} GB/s, while training goes on after {saving.blocking_seconds:,.1f} s",
        ),
        (
            "failures",
            f"one in {saving.between_failures_seconds / 3600:,.0f} h; best saved {best_saved}; saves and "
            f"failures make the run {100 * saving.lost_share:.2f}% longer",
        ),
        ("time", f"{_time(plan.days)}, {_figure(24 * cluster.gpus * plan.days)} GPU hours"),
        ("cost", cost),
    ]


def _is_short(plan: Plan, saving: Saving) -> bool:
    """Whether the best interval of saves is longer than the run."""
    return saving.interval_steps >= plan.steps_left


def _time(days: float) -> str:
    if days >= 1:
        return f"{days:,.2f} days"
    number, unit = (24 * days, "hour") if 24 * days >= 1 else (24 * 60 * days, "minute")
    text = f"{number:.2g}"
    return f"{text} {unit}{'' if text == '1' else 's'}"


def _figure(number: float) -> str:
    """A whole number, or two digits of a small one."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _too_large(plan: Plan) -> Line:
    least = min(plan.options, key=lambda option: option.memory.total)
    need, have = least.memory.total / 1e9, plan.cluster.memory_bytes / 1e9
    policy, config = POLICY_NAMES[least.checkpointing], plan.config
    engine = dataclasses.replace(config.engine, zero_stage=least.zero_stage)
    # All policies were tried.
    others = more_room(
        config.model, engine, plan.cluster.gpus, config.precision, config.optim.name, activations=False
    )
    return (
        "memory",
        f"nothing fits: ZeRO {least.zero_stage} with the smallest micro batch and {policy} needs {need:,.1f} "
        f"of {have:g} GB; use {others} or GPUs with more memory",
    )


def _advice(plan: Plan, best: Option, saving: Saving) -> list[Line]:
    config, policy = plan.config, POLICY_NAMES[best.checkpointing]
    lines = [
        ("use", f"ZeRO {best.zero_stage}, micro batch {best.micro_batch:,}, {policy}"),
        ("set", _overrides(plan, best)),
        ("stage", _stage_advice(plan, best)),
    ]
    if not config.engine.compile and best.zero_stage < 3:
        compiled, eager = (
            plan.speed.efficiency(config.model, plan.cluster.kind, compiled=mode) for mode in (True, False)
        )
        if compiled > 1.01 * eager:
            lines.append(("compile", f"engine.compile=true is faster, by about {compiled / eager - 1:.0%}"))
    share = best.exposed_seconds / best.step_seconds
    if share > SLOW_SHARE:
        text = f"communication is {share:.0%} of a step: fewer GPUs or a larger global_batch waste less"
        if config.engine.reduce_precision != config.precision:
            text += f"; engine.reduce_precision={config.precision} halves the bytes of gradients, inexactly"
        lines.append(("batch", text))
    if best.loader_bound:
        cores = counted(plan.cluster.cores_per_node, "core")
        text = f"{cores} of a node decode less than its GPUs train: use more, or store smaller images"
        lines.append(("loader", text))
    return lines + _save_advice(plan, best, saving)


def _save_advice(plan: Plan, best: Option, saving: Saving) -> list[Line]:
    """What to say where the config saves so rarely or often that it costs more than it must."""
    every = plan.config.checkpoint.every_steps
    if not every or _is_short(plan, saving):
        return []
    lost = formulas.lost_share(
        every * best.step_seconds,
        saving.blocking_seconds,
        saving.between_failures_seconds,
        60 * plan.cluster.restart_minutes,
    )
    if lost <= saving.lost_share + LOST_MORE:
        return []
    least, text = f"{100 * saving.lost_share:.2f}%", f"{every:,} steps, as in the config, {100 * lost:.2f}%"
    return [("saves", f"checkpoint.every_steps={saving.interval_steps} costs {least} of the time; {text}")]


def _overrides(plan: Plan, best: Option) -> str:
    """What to set, for whatever the config says otherwise."""
    engine = plan.config.engine
    says = {
        "zero_stage": (engine.zero_stage, best.zero_stage),
        "micro_batch": (engine.micro_batch or plan.per_gpu, best.micro_batch),
        "activation_checkpointing": (engine.activation_checkpointing, best.checkpointing),
        "compile": (engine.compile, best.compiled),
    }
    changed = [f"engine.{key}={str(new).lower()}" for key, (old, new) in says.items() if old != new]
    return " ".join(changed) or "nothing: the config says so"


def _stage_advice(plan: Plan, best: Option) -> str:
    beside = {
        option.zero_stage: option.step_seconds / best.step_seconds - 1
        for option in plan.options
        if option.fits and option.checkpointing == best.checkpointing and option.zero_stage != best.zero_stage
    }
    said = " and ".join(f"ZeRO {stage} takes {longer:+.0%}" for stage, longer in beside.items())
    others = f"; {said} time" if beside else ""
    if plan.config.optim.name == "muon":
        return f"Muon is refused at ZeRO 3{others}"
    if best.zero_stage == 3 and any(option.fits for option in plan.options if option.zero_stage < 3):
        return f"ZeRO 3 hides more of its communication here{others}"
    if best.zero_stage == 3:
        return f"ZeRO 3 is what lets {plan.num_params / 1e9:,.1f} billion parameters train here{others}"
    if 3 not in beside:
        return f"ZeRO 3 does not fit with the same recomputation{others}"
    if plan.num_params < FITS_WHOLE and beside[3] >= 0:
        return f"ZeRO 3 gains nothing below about 2 billion parameters{others}"
    return f"the state fits without ZeRO 3, whose speed is a guess{others}"


def _sources(plan: Plan) -> list[Line]:
    """Where the speeds come from."""
    speed, compiled = plan.speed, plan.config.engine.compile
    efficiency = speed.efficiency(plan.config.model, plan.cluster.kind, compiled=compiled)
    share = f"{100 * efficiency:.1f}% of the peak at ZeRO 1 without recomputation"
    if not speed.rows:
        kind = plan.config.model.kind
        lacking = f"the file of --calibrate has no {kind}: measure one" if speed.device else ""
        text = f"a guess: {share}; {lacking or 'measure it, and pass --calibrate'}"
    else:
        text = f"{share}, {_measured(plan, speed)}"
        guessed = [p for p in ("selective", "full") if not speed.is_measured(p, compiled=compiled)]
        if guessed:
            text += f"; the cost of {' and '.join(guessed)} recomputation is a guess"
    if plan.cluster.decode_rate:
        decoding = "as given by --decode-rate"
    elif speed.decode_rate:
        decoding = f"measured by an end-to-end run: at least {speed.decode_rate:,.0f} images/s a core"
    else:
        decoding = f"a guess: {DECODE_RATE:,.0f} images/s a core"
    offloaded = ("update", "a guess: 1 ns on the CPU for each parameter of a GPU's share")
    return [
        ("efficiency", text),
        *([offloaded] if plan.config.engine.offload_optimizer else []),
        ("decoding", decoding),
        ("the rest", "links, stragglers, failures, stores: guesses, listed in docs/planning.md"),
    ]


def _measured(plan: Plan, speed: Speed) -> str:
    names = dict.fromkeys(row.model.title for row in speed.rows)
    exact = speed.has_measured(plan.config.model, compiled=plan.config.engine.compile)
    how = "measured" if exact else f"a guess that is corrected by {', '.join(names)}, measured"
    other = "" if speed.rows[0].gpu == plan.cluster.kind else ", another kind of GPU"
    return f"{how} on {speed.device}{other}"


def _section(title: str, lines: list[Line]) -> str:
    return "\n".join([title, *(_line(name, value) for name, value in lines)])


def _line(name: str, value: str) -> str:
    start, indent = f"  {name}".ljust(NAME_COLUMNS), " " * NAME_COLUMNS
    return textwrap.fill(
        value, COLUMNS, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False
    )
