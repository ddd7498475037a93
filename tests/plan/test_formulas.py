"""The arithmetic of a plan: single formulas by hand, and rows that were worked out before.

The rows assume nodes of 8 H100s with links of 450 GB/s, a network of 400 Gbit/s a GPU, an
efficiency of 0.5, and ZeRO as in its paper, in bf16: stage 1 sends N gradients and N weights,
stage 3 N and 2 N, all of it beside the backward pass. DeepSpeed sends more, and at stage 1 not
beside it: test_make.py has what this costs.
"""

import pytest

from vitscale.models.flops import train_flops
from vitscale.models.vit_config import ViTConfig
from vitscale.plan import formulas

PEAK, MEMORY_TB_PER_S = 989e12, 3.35  # of an H100
JFT_14_EPOCHS = 14 * 303_000_000
VIT_22B = ViTConfig(variant="G/14", width=6144, depth=48, mlp_dim=24_576, num_heads=48)
# Of the paper, by stage, in units of N.
PAPER = {1: formulas.Communication(1, 1), 3: formulas.Communication(1, 2)}
NUM_PARAMS = {"H/14": 630_800_000, "g/14": 1_011_000_000, "G/14": 1_843_000_000, "22B": 21_752_000_000}


def worked_step(
    name: str, images: int, nodes: int, *, stage: int = 1, work: float = 1.0, doubling: bool = True
) -> float:
    """Seconds of a step as in the rows, without accumulation."""
    gpus = 8 * nodes
    model = VIT_22B if name == "22B" else ViTConfig(variant=name)
    compute = formulas.compute_seconds(images, train_flops(model), 0.5, PEAK, work)
    communication = paper_seconds(name, stage, gpus)
    exposed = formulas.exposed_seconds(communication, compute, overlapped=True)
    update = formulas.update_seconds(NUM_PARAMS[name], gpus, MEMORY_TB_PER_S)
    return formulas.step_seconds(compute, exposed, update, nodes if doubling else 1)


def paper_seconds(name: str, stage: int, gpus: int) -> float:
    of_one, num_params = PAPER[stage], NUM_PARAMS[name]
    elements = formulas.Communication(of_one.gradients * num_params, of_one.weights * num_params)
    return formulas.communication_seconds(elements, 2, gpus, formulas.bus_gb_per_s(gpus, 8, 450.0, 400.0))


@pytest.mark.parametrize(
    ("name", "images", "nodes", "stage", "work", "milliseconds", "images_per_second"),
    [
        ("H/14", 128, 1, 1, 1.0, 261, 3_919),
        ("g/14", 64, 1, 1, 1.0, 210, 2_441),
        ("G/14", 64, 1, 1, 1.0, 380, 1_347),
        ("22B", 32, 1, 3, 4 / 3, 2_960, 86),
    ],
)
def test_a_step_is_that_of_its_row(
    name: str, images: int, nodes: int, stage: int, work: float, milliseconds: int, images_per_second: int
) -> None:
    seconds = worked_step(name, images, nodes, stage=stage, work=work)
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.006)
    assert 8 * nodes * images / seconds == pytest.approx(images_per_second, rel=0.006)


@pytest.mark.parametrize(
    ("name", "images", "stage", "work", "doubling", "images_per_second"),
    [
        ("H/14", 128, 1, 1.0, False, 62_900),
        ("H/14", 128, 1, 1.0, True, 60_400),
        ("g/14", 64, 1, 1.0, False, 39_300),
        ("g/14", 64, 1, 1.0, True, 37_700),
        ("G/14", 64, 1, 1.0, False, 21_700),
        ("22B", 32, 3, 4 / 3, False, 1_386),
    ],
)
def test_sixteen_nodes_are_as_fast_as_in_their_row(
    name: str, images: int, stage: int, work: float, doubling: bool, images_per_second: int
) -> None:
    seconds = worked_step(name, images, 16, stage=stage, work=work, doubling=doubling)
    assert 128 * images / seconds == pytest.approx(images_per_second, rel=0.004)


@pytest.mark.parametrize(
    ("name", "stage", "one_node", "sixteen_nodes"),
    [("H/14", 1, 6, 8), ("g/14", 1, 10, 13), ("G/14", 1, 18, 23), ("22B", 3, 317, 407)],
)
def test_communication_is_that_of_its_row(name: str, stage: int, one_node: int, sixteen_nodes: int) -> None:
    """In ms; the rows have no time for each bucket, which is 0.2 to 20 ms here."""
    for gpus, expected in ((8, one_node), (128, sixteen_nodes)):
        assert 1e3 * paper_seconds(name, stage, gpus) == pytest.approx(expected, rel=0.05, abs=0.6)


@pytest.mark.parametrize(
    ("name", "exaflops", "gpu_hours", "days", "dollars"),
    [
        ("B/16", 447, 279, 0.09, 700),
        ("L/16", 1_567, 978, 0.32, 2_400),
        ("H/14", 4_258, 2_658, 0.87, 6_600),
        ("g/14", 6_796, 4_242, 1.4, 10_600),
        ("G/14", 12_312, 7_685, 2.5, 19_000),
        ("22B", 143_241, 89_400, 29, 224_000),
    ],
)
def test_fourteen_epochs_of_jft_cost_what_their_row_says(
    name: str, exaflops: int, gpu_hours: int, days: float, dollars: int
) -> None:
    """At an MFU of 45% on 128 H100s, for 2.5 an hour."""
    flops = train_flops(VIT_22B if name == "22B" else ViTConfig(variant=name))
    assert JFT_14_EPOCHS * flops / 1e18 == pytest.approx(exaflops, rel=0.002)
    images_per_second = 0.45 * 128 * PEAK / flops
    planned = formulas.training_days(JFT_14_EPOCHS, images_per_second, 0.0)
    assert 24 * 128 * planned == pytest.approx(gpu_hours, rel=0.002)
    assert planned == pytest.approx(days, abs=0.006 if days < 1 else 0.12)
    assert formulas.cost(planned, 128, 2.5) == pytest.approx(dollars, rel=0.02)
    assert formulas.model_flops_utilization(images_per_second, flops, 128, PEAK) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("nodes", "blocking", "restart_minutes", "hours", "minutes", "lost_percent"),
    [
        (16, 1.0, 10, 231, 21, 0.23),
        (16, 60.0, 10, 231, 2.8 * 60, 1.3),
        (128, 1.0, 10, 28.8, 7.6, 1.0),
        (128, 60.0, 15, 28.8, 59, 4.3),
        (2048, 1.0, 10, 1.8, 1.9, 11),
        (2048, 60.0, 15, 1.8, 14.7, 27),
    ],
)
def test_saves_and_failures_cost_what_their_row_says(
    nodes: int, blocking: float, restart_minutes: int, hours: float, minutes: float, lost_percent: float
) -> None:
    """0.0065 failures a node and day; restarts of 10 to 15 minutes."""
    between = formulas.seconds_between_failures(nodes, 0.0065)
    assert between / 3600 == pytest.approx(hours, rel=0.003)
    restart = 60.0 * restart_minutes
    interval = formulas.checkpoint_interval_seconds(blocking, between)
    assert interval / 60 == pytest.approx(minutes, rel=0.03)
    lost = formulas.lost_share(interval, blocking, between, restart)
    assert 100 * lost == pytest.approx(lost_percent, rel=0.04)


@pytest.mark.parametrize(("between", "restart"), [(100_000.0, 600.0), (3_600.0, 1_800.0)])
def test_no_other_interval_loses_less(between: float, restart: float) -> None:
    blocking = 20.0
    best = formulas.checkpoint_interval_seconds(blocking, between)
    lost = formulas.lost_share(best, blocking, between, restart)
    assert all(formulas.lost_share(factor * best, blocking, between, restart) > lost for factor in (0.9, 1.1))


@pytest.mark.parametrize(
    ("gpus", "link", "nic_gbit", "expected"),
    [
        (8, 450.0, 400.0, 360.0),  # one node: 0.8 * 450
        (16, 450.0, 400.0, 320.0),  # 0.8 * 8 * 50
        (9, 450.0, 400.0, 320.0),
        (16, 450.0, 800.0, 360.0),  # the network is the faster one
        (16, 64.0, 400.0, 51.2),
    ],
)
def test_the_bus_by_hand(gpus: int, link: float, nic_gbit: float, expected: float) -> None:
    assert formulas.bus_gb_per_s(gpus, 8, link, nic_gbit) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_params", "stage", "accumulation", "precision", "offload", "gradients", "weights"),
    [
        (10, 1, 1, "bf16", False, 10, 10),
        (10, 1, 4, "bf16", False, 10, 10),
        (10, 1, 4, "bf16", True, 20, 10),
        (10, 1, 4, "fp16", False, 20, 10),
        (10, 2, 1, "bf16", False, 20, 10),
        (10, 2, 4, "bf16", False, 80, 10),
        (10, 3, 1, "bf16", False, 10, 10),
        (10, 3, 4, "bf16", False, 40, 40),
        (5 * 10**8, 3, 1, "bf16", False, 5 * 10**8, 5 * 10**8),
        (2 * 10**9, 3, 4, "bf16", False, 8 * 10**9, 4 * 35 * 10**8),
    ],
)
def test_elements_by_hand(
    num_params: int,
    stage: int,
    accumulation: int,
    precision: str,
    offload: bool,
    gradients: int,
    weights: int,
) -> None:
    """test_reduction.py counts them on real ranks."""
    expected = formulas.Communication(gradients, weights)
    assert formulas.communication(num_params, stage, accumulation, precision, offload=offload) == expected


def test_communication_by_hand() -> None:
    """2e9 elements on 4 GPUs: 4e9 bytes * 3/4 at 100 GB/s, and 4 buckets of 20 us * 2 each."""
    elements = formulas.Communication(1_500_000_000, 500_000_000)
    more = formulas.Communication(1_500_000_000, 500_000_001)
    assert formulas.communication_seconds(elements, 2, 4, 100.0) == pytest.approx(0.03 + 160e-6)
    assert formulas.communication_seconds(more, 2, 4, 100.0) == pytest.approx(0.03 + 200e-6)
    assert formulas.communication_seconds(elements, 4, 4, 100.0) == pytest.approx(0.0525 + 160e-6)
    assert formulas.communication_seconds(elements, 2, 1, 100.0) == 0


@pytest.mark.parametrize(
    ("communication", "overlapped", "expected"),
    [(0.3, False, 0.3), (0.3, True, 0.03), (1.0, True, 0.3 + 0.1)],
)
def test_exposed_by_hand(communication: float, overlapped: bool, expected: float) -> None:
    """Of 1.5 s of compute, 0.7 * 2/3 hide 0.7 s."""
    assert formulas.exposed_seconds(communication, 1.5, overlapped=overlapped) == pytest.approx(expected)


def test_the_parts_of_a_step_by_hand() -> None:
    assert formulas.compute_seconds(10, 10**12, 0.5, 100e12, 1.2) == pytest.approx(0.24)
    assert formulas.update_seconds(8_000_000_000, 4, 2.0) == pytest.approx(6e10 / 1.6e12)
    assert formulas.step_seconds(1.0, 0.5, 0.25, 8) == pytest.approx(1.75 * 1.03)
    assert formulas.step_seconds(1.0, 0.5, 0.25, 1) == 1.75


def test_data_and_saves_by_hand() -> None:
    assert formulas.loader_cores(10_000.0, 2, 500.0) == 10
    assert formulas.loader_cores(10_001.0, 2, 500.0) == 11
    assert formulas.storage_gb_per_s(10_000.0, 110.0) == pytest.approx(1.1)
    assert formulas.save_blocking_seconds(100_000_000_000, 4) == pytest.approx(2.0)
    assert formulas.training_days(86_400_000, 1_000.0, 0.5) == pytest.approx(1.5)
