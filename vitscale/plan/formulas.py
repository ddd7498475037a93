"""The arithmetic of a plan: time of a step, communication, data, checkpoints, days.

Pure functions of numbers, whose units are in their names. What they guess stands in constants
at the top. Bytes are counted in 10^9 (GB), and N is the number of parameters.
"""

import dataclasses
import math

from vitscale.engine.ds_config import has_bf16_optimizer
from vitscale.memory import MAX_REUSE_DISTANCE, REDUCE_BUCKET

# The share of the peak that matmuls reach: 732 of 989 TFLOP/s in a trace of H/14 on an H200.
MATMUL_SHARE = 0.74
# Bytes that compiled blocks read and write for each byte of activations that the backward pass
# needs, if memory reaches its bandwidth. On an H200 (docs/measurements.md) S/16 and B/16 take
# 9.4, L/16 8.7, and H/14 12.4, whose heads of 80 channels fill the attention's tiles badly.
VIT_TRAFFIC = 10
# A guess for BiT ResNets, which gives R50x1 a little less than NVIDIA publishes for ResNet-50:
# GroupNorm is not fused into the convolutions, and each forward pass standardises the kernels.
RESNET_TRAFFIC = 24
# What a training step computes, in units of the forward pass: 3 without recomputation. The
# matmuls that selective recomputation keeps are nearly all of it; full recomputation does the
# forward pass twice.
FORWARD_PASSES = {"none": 3.0, "selective": 3.05, "full": 4.0}
# What stages 2 and 3 cost beside communication, in hooks and copies of every gradient: stage 2
# made B/16 9% slower on one H200, in a single trial (docs/measurements.md). Of 3 it is a guess.
STAGE_WORK = {1: 1.0, 2: 1.09, 3: 1.09}
# Share of the links' bandwidth that NCCL's large collectives reach, and seconds that a bucket
# takes for each doubling of the ranks.
LINK_SHARE, BUCKET_LATENCY_SECONDS = 0.8, 20e-6
WEIGHT_BYTES = 2  # parameters travel in bf16 or fp16
# Communication hides behind so much of the backward pass, which is two thirds of the compute,
# and slows it down by so much of its own time.
HIDING_SHARE, BACKWARD_SHARE, DISTURBANCE = 0.7, 2 / 3, 0.1
# AdamW reads and writes the weights, two moments and gradients, and writes the bf16 weights.
UPDATE_BYTES, MEMORY_SHARE = 30, 0.8
# Seconds of an update on the CPU for each parameter of a rank's share, with the copies. A step
# of B/16, which has 86.6e6, took 88 ms longer than with an update on the GPU, of about 1 ms, on
# one H200 in a single trial (docs/measurements.md).
OFFLOADED_SECONDS = 1e-9
# What a step loses for each doubling of the nodes, to stragglers above all.
LOSS_PER_DOUBLING = 0.01
# Saving: seconds until all ranks have begun, and the copy of a rank's share to pinned memory.
SAVE_SECONDS, COPY_GB_PER_S = 1.0, 25.0
SECONDS_PER_DAY = 86_400


def bus_gb_per_s(gpus: int, gpus_per_node: int, link_gb_per_s: float, nic_gbit: float) -> float:
    """What a GPU's ring sends per second: the slower of its node's links and the network.

    nic_gbit: of the network card that each GPU has, in Gbit/s. All cards of a node carry one
    collective together. Each reaches LINK_SHARE of its bandwidth (nccl-tests call it busbw).
    """
    if gpus <= gpus_per_node:
        return LINK_SHARE * link_gb_per_s
    return LINK_SHARE * min(link_gb_per_s, gpus_per_node * nic_gbit / 8)


@dataclasses.dataclass(frozen=True)
class Communication:
    """Elements that a GPU sends in an optimizer step, before the factor (n - 1) / n."""

    gradients: int
    weights: int


def communication(
    num_params: int, zero_stage: int, accumulation: int, precision: str, *, offload: bool
) -> Communication:
    """What is sent in bf16 or fp16, for a = accumulation micro steps.

                   gradients  weights
        stage 1    N          N            gradients to their owner alone, at the end of a step
                   2 N        N            in fp16, or with offload: all to every rank
        stage 2    2 N a      N            the same in each micro step
        stage 3    N a        (N + R) a    gradients to their owner alone; weights are gathered
                                           for the forward pass, and R again for the backward

    R is N but for the last 5e8, which the backward pass needs within MAX_REUSE_DISTANCE.

    ZeRO's paper (arXiv 1910.02054, section 7) has N gradients where this has 2 N: there
    DeepSpeed 0.19 takes all-reduces (runtime/zero/stage_1_and_2.py).
    """
    if has_bf16_optimizer(zero_stage, precision, offload=offload):
        return Communication(num_params, num_params)
    if zero_stage < 3:
        return Communication(2 * num_params * (accumulation if zero_stage == 2 else 1), num_params)
    again = max(0, num_params - MAX_REUSE_DISTANCE // 2)
    return Communication(num_params * accumulation, (num_params + again) * accumulation)


def communication_seconds(
    elements: Communication, gradient_bytes: int, gpus: int, bus_gb_per_s: float
) -> float:
    """Seconds to send them in rings of all GPUs, bucket by bucket.

    gradient_bytes: of one gradient, as it travels.
    """
    if gpus == 1:
        return 0.0
    num_bytes = elements.gradients * gradient_bytes + elements.weights * WEIGHT_BYTES
    buckets = math.ceil((elements.gradients + elements.weights) / REDUCE_BUCKET)
    seconds = num_bytes * (gpus - 1) / gpus / (bus_gb_per_s * 1e9)
    return seconds + buckets * BUCKET_LATENCY_SECONDS * math.log2(gpus)


def exposed_seconds(communication_seconds: float, compute_seconds: float, *, overlapped: bool) -> float:
    """What communication adds to a step.

    overlapped: it runs during the backward pass, in part. DeepSpeed's default (overlap_comm) is
    to do so at stage 3 only.
    """
    if not overlapped:
        return communication_seconds
    hidden = HIDING_SHARE * BACKWARD_SHARE * compute_seconds
    return max(0.0, communication_seconds - hidden) + DISTURBANCE * communication_seconds


def pass_seconds(train_flops: int, memory_traffic: int, peak_flops: float, memory_tb_per_s: float) -> float:
    """Seconds of an image's forward and backward pass: matmuls, and then all the rest.

    memory_traffic: bytes that norms, activations, attention and residuals read and write, which
    takes all their time.
    """
    return train_flops / (MATMUL_SHARE * peak_flops) + memory_traffic / (memory_tb_per_s * 1e12)


def compute_seconds(
    images: int, train_flops: int, efficiency: float, peak_flops: float, work: float
) -> float:
    """Seconds of the forward and backward passes of one GPU's images.

    train_flops: of an image, 3 x forward (vitscale/models/flops.py). efficiency: the share of
    the peak that a step without recomputation reaches. work: what recomputation multiplies.
    """
    return images * train_flops * work / (efficiency * peak_flops)


def update_seconds(num_params: int, gpus: int, memory_tb_per_s: float) -> float:
    """Seconds of AdamW on a GPU's share of the parameters, which memory bounds."""
    return UPDATE_BYTES * num_params / gpus / (MEMORY_SHARE * memory_tb_per_s * 1e12)


def offloaded_update_seconds(num_params: int, gpus: int) -> float:
    """Seconds of an update on the CPU, of a GPU's share of the parameters."""
    return OFFLOADED_SECONDS * num_params / gpus


def step_seconds(compute_seconds: float, exposed_seconds: float, update_seconds: float, nodes: int) -> float:
    """Seconds of an optimizer step on so many nodes.

    Published weak scaling loses 0.6% to 2% for each doubling: NeMo's ViT g/14 94.4% from 1 to
    16 nodes of H100, torchtitan's Llama 3 97.3% from 8 to 128 GPUs, open_clip's L/14 98.3% from
    768 to 1,024 GPUs.
    """
    return (compute_seconds + exposed_seconds + update_seconds) * (1 + LOSS_PER_DOUBLING * math.log2(nodes))


def model_flops_utilization(
    images_per_second: float, train_flops: int, gpus: int, peak_flops: float
) -> float:
    """MFU, in [0, 1]: recomputed FLOPs do not count."""
    return images_per_second * train_flops / (gpus * peak_flops)


def loader_cores(images_per_second: float, nodes: int, images_per_core_second: float) -> int:
    """Cores of a node that decode and augment its share of the images."""
    return math.ceil(images_per_second / nodes / images_per_core_second)


def storage_gb_per_s(images_per_second: float, image_kb: float) -> float:
    """What all nodes read together, in 10^9 bytes/s."""
    return images_per_second * image_kb * 1e3 / 1e9


def save_blocking_seconds(checkpoint_bytes: int, gpus: int) -> float:
    """Seconds that training stands still for a save, which is then written beside it.

    SAVE_SECONDS is the largest that docs/measurements.md has, for the first save of a run.
    """
    return SAVE_SECONDS + checkpoint_bytes / gpus / (COPY_GB_PER_S * 1e9)


def seconds_between_failures(nodes: int, failures_per_node_day: float) -> float:
    """Mean seconds from one failure to the next. Published: 0.0038 to 0.021 a node and day."""
    return SECONDS_PER_DAY / (nodes * failures_per_node_day)


def checkpoint_interval_seconds(blocking_seconds: float, between_failures_seconds: float) -> float:
    """The interval of saves that loses the least time: sqrt(2 C M).

    For C = blocking_seconds, M = between_failures_seconds. It is where lost_share is least, and
    the time of a restart does not change it. Source: Young (1974), "A first order approximation
    to the optimum checkpoint interval".
    """
    return math.sqrt(2 * blocking_seconds * between_failures_seconds)


def lost_share(
    interval_seconds: float, blocking_seconds: float, between_failures_seconds: float, restart_seconds: float
) -> float:
    """Time lost to saves and failures, relative to the time that trains: C/T + T/2M + R/M.

    C is the time of a save, T the interval, M the time between failures, R that of a restart. A
    failure loses half an interval on average.
    """
    failures = (interval_seconds / 2 + restart_seconds) / between_failures_seconds
    return blocking_seconds / interval_seconds + failures


def training_days(images: int, images_per_second: float, lost_share: float) -> float:
    """Days of the whole run, with what is lost to saves and failures."""
    return images / images_per_second * (1 + lost_share) / SECONDS_PER_DAY


def cost(days: float, gpus: int, price_per_gpu_hour: float) -> float:
    """What the GPUs cost, in the currency of the price."""
    return days * 24 * gpus * price_per_gpu_hour
