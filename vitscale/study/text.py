"""A study as text: its models before it is run, and Table 2 with what was run."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pvariance

from vitscale.memory import count_params
from vitscale.models.flops import forward_macs, train_flops
from vitscale.plan.make import num_steps
from vitscale.report.text import table
from vitscale.study.cells import Cell, finetuned, num_images, on_test_set
from vitscale.study.config import StudyConfig
from vitscale.study.paper import AVERAGE5, TABLE2, TABLE6, TARGETS, TEST_SET_OF, TPUV3_CORE_FLOPS
from vitscale.study.points import chosen, groups, points, value_of

# What stands in a table for a number that is not there.
NOTHING = "-"


def listed(study: StudyConfig, cells: Sequence[Cell]) -> str:
    """The runs of a study: size, compute and the paper's, and how far each is."""
    header = [
        "model",
        "data",
        "images",
        "seed",
        "params",
        "GMACs",
        "exaFLOPs",
        "paper",
        "state",
        study.metric,
    ]
    rows = [
        [
            " ".join([cell.model.name, *cell.swept]),
            f"{cell.fraction:g}",
            _images(cell),
            str(cell.seed),
            f"{count_params(cell.config.model) / 1e6:,.3g}M",
            f"{forward_macs(cell.config.model) / 1e9:,.3g}",
            _exaflops(cell),
            f"{TABLE6[cell.model.paper].exaflops:,.0f}" if cell.model.paper else NOTHING,
            *_state(study, cell),
        ]
        for cell in cells
    ]
    lines = table(header, rows, left=(0, 8))
    missing = sorted(
        {cell.model.name for cell in cells} - {point.model.name for point in points(study, cells)}
    )
    return "\n".join([*lines, f"{len(cells)} runs; to do: {', '.join(missing) or 'none'}"])


def table2(study: StudyConfig, cells: Sequence[Cell]) -> str:
    """The paper's Table 2, and beside it a column for each model that was fine-tuned here.

    A cell has the mean and the deviation over the runs of the recipe of that name, those of all
    seeds of the pretraining together, in percent; Average-5 is the mean of five of those means.
    TPUv3-core-days of our own are by arithmetic: the run's exaFLOPs at what such a core
    sustained for the paper's ViT-L/16. Device-days are measured, on whatever device it was.
    """
    ours = {_title(group): group for group in groups(chosen(study, cells), with_swept=False)}
    names = [*TARGETS, *_other_recipes(study)]
    columns = [
        *(_paper_column(name, names) for name in TABLE2),
        *(_our_column(study, title, group, names) for title, group in ours.items()),
    ]
    labels = ["", *(TARGETS.get(name, name) for name in names)]
    labels += ["Average-5", "TPUv3-core-days", "device-days"]
    rows = [list(row) for row in zip(labels, *columns, strict=True)]
    lines = table(rows[0], rows[1:], left=(0,))
    if not ours:
        lines.append("Nothing was run here: python tools/study.py run STUDY.toml")
    return "\n".join(lines)


def _other_recipes(study: StudyConfig) -> list[str]:
    """The names of recipes whose data the paper did not use."""
    names = [name for model in study.models for name in study.recipes_of(model)]
    return [name for name in dict.fromkeys(names) if name not in TARGETS]


def _paper_column(title: str, names: Sequence[str]) -> list[str]:
    headline = TABLE2[title]
    cells = [headline.accuracy.get(name) for name in names]
    shown = [f"{cell[0]:.2f} ± {cell[1]:.2f}" if cell else NOTHING for cell in cells]
    known = [headline.accuracy[name][0] for name in AVERAGE5 if name in headline.accuracy]
    average = f"{fmean(known):.2f}" if len(known) == len(AVERAGE5) else NOTHING
    return [title, *shown, average, f"{headline.core_days:,.0f}", NOTHING]


def _our_column(study: StudyConfig, title: str, group: Sequence[Cell], names: Sequence[str]) -> list[str]:
    recipes = study.recipes_of(group[0].model)

    def score(cell: Cell, name: str) -> dict[str, float] | None:
        if name in TEST_SET_OF and name not in recipes:
            return on_test_set(cell, TEST_SET_OF[name], name)
        return finetuned(cell, name)

    results = [result for cell in group if (result := cell.result())]
    tuned = {name: [found for cell in group if (found := finetuned(cell, name))] for name in AVERAGE5}
    means = [fmean(found["mean"] for found in runs) for runs in tuned.values() if runs]
    core_days = fmean(result.exaflops for result in results) * 1e18 / TPUV3_CORE_FLOPS / 86_400
    return [
        title,
        *(_mean_and_deviation([score(cell, name) for cell in group]) for name in names),
        f"{100 * fmean(means):.2f}" if len(means) == len(AVERAGE5) else NOTHING,
        f"{core_days:.3g}",
        f"{fmean(result.device_days for result in results):.3g}",
    ]


def _mean_and_deviation(results: Sequence[Mapping[str, float] | None]) -> str:
    known = [result for result in results if result]
    if not known:
        return NOTHING
    means = [result["mean"] for result in known]
    # Of all fine-tunings together, equally many for each pretrained model: the variance is the
    # mean of those within the models, plus that between them.
    variance = fmean(result["std"] ** 2 for result in known) + pvariance(means)
    return f"{100 * fmean(means):.2f} ± {100 * variance**0.5:.2f}"


def _title(group: Sequence[Cell]) -> str:
    cell = group[0]
    return cell.model.name + (f", {cell.fraction:.3g} of the data" if cell.fraction < 1 else "")


def _images(cell: Cell) -> str:
    """Of the data, where the config says how many there are."""
    sections = cell.config.data.all_sources()
    return f"{num_images(cell.config):,}" if all(section.num_samples for section in sections) else NOTHING


def _exaflops(cell: Cell) -> str:
    config = cell.config
    exaflops = train_flops(config.model) * num_steps(config) * config.global_batch / 1e18
    return f"{exaflops:,.0f}" if exaflops >= 100 else f"{exaflops:,.3g}"


def _state(study: StudyConfig, cell: Cell) -> tuple[str, str]:
    result = cell.result()
    if result:
        value = value_of(study, cell, result)
        return "done", NOTHING if value is None else f"{value:.2%}"
    if cell.has_diverged():
        return "diverged", NOTHING
    step = cell.last_step()
    return (f"step {step:,}" if step else NOTHING), NOTHING
