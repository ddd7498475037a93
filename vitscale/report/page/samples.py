"""What a model was fed and what it says now: inputs as training made them, and predictions."""

import dataclasses
import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.verify import at_a_glance, open_directory
from vitscale.data.evalset import EvaluationSet
from vitscale.data.loader import Batch, batches
from vitscale.evals import ClassifyConfig
from vitscale.evals.adapters import FrozenModel
from vitscale.evals.classify import ClassifyTask
from vitscale.evaluate import training_data
from vitscale.job import Job, derive
from vitscale.models import Model
from vitscale.models.vit import ViT
from vitscale.report.page.html import Html, element, joined, note
from vitscale.report.page.learned import learned
from vitscale.report.page.pictures import card, channels_last, gallery, picture
from vitscale.report.page.records import VERIFIED_BYTES, Record
from vitscale.report.page.scale import percent
from vitscale.report.page.shards import Shards
from vitscale.train_config import TrainConfig
from vitscale.weights.saved import SavedModel, Slot, locate

NUM_INPUTS = 16
NUM_PREDICTIONS = 12
NUM_GUESSES = 3


def inputs(record: Record, shards: Shards) -> Html:
    """The first model inputs of a run, made again by the code that made them for training."""
    config = record.config
    if config is None or shards.problem:
        return note(f"The inputs cannot be shown: {shards.problem}.")
    job = derive(config, 1, tuple(shards.sources))
    batch = first_batch(job)
    names = [_named(job, batch, number) for number in range(min(NUM_INPUTS, len(batch.images)))]
    cards = [
        card(picture(channels_last(image), f"model input of class {name}"), f"class {name}")
        for image, name in zip(batch.images, names, strict=False)
    ]
    texts = [f"The first {len(cards)} images of step 1, in the order of the data, after augmentation."]
    if config.augment.mixup or config.augment.cutmix:
        texts.append("Mixup and cutmix follow on the device, and are not shown.")
    if (fingerprint := _fingerprint(record)) and fingerprint != job.data_fingerprint:
        texts.append("The data are others now than those of the run, so training saw other images.")
    return joined([note(" ".join(texts)), gallery(cards)])


def first_batch(job: Job) -> Batch:
    """What the first lanes make of the first global batch: NUM_INPUTS images or more."""
    per_lane = job.config.global_batch // job.mixture.lanes
    lanes = range(min(job.mixture.lanes, -(-NUM_INPUTS // per_lane)))
    return next(iter(batches(job.stream(lanes, range(1)), 0)))


def predictions(record: Record) -> Html:
    """What the newest good checkpoint says of some images that it was not trained on."""
    config = record.config
    if config is None:
        return note(f"{record.problem}.")
    if record.checkpoints is None:
        return note("There is no checkpoint to ask.")
    classify = [(name, task) for name, task in config.evals.items() if isinstance(task, ClassifyConfig)]
    if not classify:
        return note('The config has no evaluation of kind "classify", whose images could be shown.')
    name, section = classify[0]
    # By the sizes of files alone, before all of a large one is read.
    size = 4 * sum(map(math.prod, SavedModel(open_directory(record.path, at_a_glance)).shapes.values()))
    if size > VERIFIED_BYTES:
        return note(f"The model has {size / 1e9:,.1f} GB of weights, too many to load for a page.")
    slot: Slot = "ema" if config.optim.ema_decay else "fp32"
    place = locate(record.path)
    saved = SavedModel(place, slot=slot)
    source = training_data(place)[0] if section.split else None
    test = ClassifyTask.open(name, section, config.model.image_size, source).test
    network = saved.load()
    shown = _predict(network, test, config)
    num_right = sum(prediction.is_right for prediction in shown)
    weights = "the average of the weights" if slot == "ema" else "the weights"
    text = (
        f"By {weights} of step {saved.step:,}, on {len(shown)} images spread over evals.{name}: {num_right} "
        "right. Below each image are the true class and the classes that the model holds most likely."
    )
    cards = [_card(prediction, test) for prediction in shown]
    parts = [note(text), gallery(cards, "predictions")]
    if isinstance(network, ViT):
        parts.append(learned(network, torch.stack([prediction.image for prediction in shown])))
    return joined(parts)


def probabilities(logits: Float[Tensor, "B C"], config: TrainConfig) -> Float[Tensor, "B C"]:
    """How likely each class is, as the loss of the run means it."""
    return logits.sigmoid() if config.loss.name == "sigmoid" else logits.softmax(dim=1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Prediction:
    """An image, its true classes, and how likely the model holds each class."""

    image: UInt8[Tensor, "3 H W"]
    true: set[int]
    scores: Float[Tensor, " C"]

    @property
    def is_right(self) -> bool:
        return int(self.scores.argmax()) in self.true


def _predict(network: Model, test: EvaluationSet, config: TrainConfig) -> list[_Prediction]:
    """Of NUM_PREDICTIONS images, or fewer, spread evenly over the set."""
    model = FrozenModel(network, torch.device("cpu"))
    count = min(NUM_PREDICTIONS, test.num_samples)
    chosen = np.linspace(0, test.num_samples - 1, count).astype(int)
    images, labels = next(test.batches(chosen, count, num_classes=model.num_classes))
    scores = probabilities(model.logits(images), config)
    true = [{label for label in row if label >= 0} for row in labels.tolist()]
    return [_Prediction(*one) for one in zip(images, true, scores, strict=True)]


def _card(prediction: _Prediction, test: EvaluationSet) -> Html:
    """An image with its true classes and the likeliest ones."""
    image, true, scores = prediction.image, prediction.true, prediction.scores
    best = scores.topk(min(NUM_GUESSES, len(scores)))
    names = ", ".join(map(test.named, true))
    verdict, class_ = "\u2717 wrong", "wrong-guess"
    if not true:
        verdict, class_ = "without a label", ""
    elif prediction.is_right:
        verdict, class_ = "\u2713 right", "right-guess"
    lines = [
        f"{test.named(label)}: {percent(round(score, 3))}"
        for label, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    shown = picture(channels_last(image), f"image of class {names or 'unknown'}")
    said = element("span", verdict, class_="verdict")
    return card(shown, said, joined(["true: ", element("b", names)]), *lines, class_=class_)


def _named(job: Job, batch: Batch, number: int) -> str:
    """The classes of an image of a batch, by the names of the source that it comes from."""
    source = job.sources[int(np.searchsorted(job.mixture.first_ids, batch.ids[number], side="right")) - 1]
    return ", ".join(source.named(label) for label in batch.labels[number].tolist() if label >= 0)


def _fingerprint(record: Record) -> str:
    """The data that the newest readable checkpoint was trained on; "" if there is none."""
    rows = record.checkpoints.checkpoints if record.checkpoints else ()
    good = [row for row in rows if not row.problem]
    return Manifest.load(good[-1].path).train.data_fingerprint if good else ""
