"""Classifiers of frozen features give the numbers of scikit-learn and of plain PyTorch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evals.test_tasks import ColourModel, write_shard
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from vitscale.config import from_dict
from vitscale.errors import ConfigError, DataError
from vitscale.evals import EvalConfig, KMeansConfig, KnnConfig, LinearConfig, open_task
from vitscale.evals.kmeans import agreement
from vitscale.evals.knn import votes
from vitscale.evals.linear import MOMENTUM, predict, train_heads
from vitscale.evals.logistic import fit
from vitscale.evals.probe import best_of, dev_split

CLASSES = 5


def drawn(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of very different scales, as a network has them, in classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % CLASSES
    centres = torch.randn(CLASSES, 24, generator=torch.Generator().manual_seed(99))
    rows = centres[labels] + 2 * torch.randn(num, 24, generator=generator)
    return 3 + rows * torch.logspace(-2, 1, 24), labels


@pytest.mark.parametrize("temperature", [1e-4, 0.07, 0.5])
def test_each_vote_is_that_of_scikit_learn(temperature: float):
    train, labels = drawn(400, 0)
    queries, _ = drawn(300, 1)
    # the mean is taken off, or all would look in one direction
    train, queries = (normalize(rows - 3, dim=1).double() for rows in (train, queries))
    predictions = votes(train, labels, queries, (1, 10, 60), temperature)
    for k, prediction in zip((1, 10, 60), predictions, strict=True):
        reference = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distances: np.exp((distances[:, :1] - distances) / temperature)
        ).fit(train.numpy(), labels.numpy())
        assert np.array_equal(prediction.numpy(), reference.predict(queries.numpy()))


def test_votes_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch):
    (train, labels), (queries, _) = drawn(100, 0), drawn(50, 1)
    whole = votes(train, labels, queries, (5, 20), 1.0)
    monkeypatch.setattr("vitscale.evals.knn._SIMILARITIES", 700)  # 7 queries at a time
    parts = votes(train, labels, queries, (5, 20), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_logistic_regression_finds_the_minimum_of_scikit_learn(c: float):
    rows, labels = drawn(300, 2)
    x = rows.double()
    weights, bias = fit(x, labels, CLASSES, c)
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=1000, solver="newton-cg").fit(
        x.numpy(), labels.numpy()
    )

    def objective(w: Tensor, b: Tensor) -> float:
        return float(w.square().sum() / 2 + c * cross_entropy(x @ w + b, labels, reduction="sum"))

    other = objective(torch.from_numpy(reference.coef_.T), torch.from_numpy(reference.intercept_))
    assert objective(weights, bias) <= other * (1 + 1e-7)
    theirs = torch.from_numpy(reference.predict_proba(x.numpy()))
    assert torch.allclose((x @ weights + bias).softmax(1), theirs, atol=1e-5)


def test_logistic_regression_on_fewer_samples_than_features():
    rows, labels = drawn(15, 3)
    weights, _ = fit(rows.double(), labels, CLASSES, 1.0)
    reference = LogisticRegression(C=1.0, tol=1e-10, solver="newton-cg").fit(
        rows.double().numpy(), labels.numpy()
    )
    assert np.allclose(weights.numpy(), reference.coef_.T, atol=1e-3)


def test_heads_that_are_trained_together_are_those_of_pytorch_one_by_one():
    rows, labels = drawn(70, 4)
    x = ((rows - rows.mean(0)) / rows.std(0)).double()
    config = LinearConfig(train="a", test="b", epochs=3, batch=16)
    rates = [0.01, 0.3]
    heads = train_heads(x, labels, CLASSES, rates, config)
    for rate, head in zip(rates, heads, strict=True):
        (alone,) = train_heads(x, labels, CLASSES, [rate], config)
        assert torch.allclose(head, alone, atol=1e-12)
        assert torch.allclose(head, plain_sgd(x, labels, rate, config), atol=1e-10)


def test_a_single_step_trains() -> None:
    labels = torch.arange(100) % 2
    x = (2.0 * labels - 1)[:, None].double()
    (head,) = train_heads(x, labels, 2, [0.1], LinearConfig(train="a", test="b", epochs=1))
    assert torch.equal(predict(x, head), labels)


def plain_sgd(x: Tensor, labels: Tensor, rate: float, config: LinearConfig) -> Tensor:
    from vitscale import rng

    layer = torch.nn.Linear(x.shape[1], CLASSES).double()
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=MOMENTUM)
    per_epoch = len(x) // config.batch
    total = config.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    for step in range(total):
        epoch, position = divmod(step, per_epoch)
        order = torch.from_numpy(rng.permutation(len(x), config.seed, "linear", epoch))
        chosen = order[position * config.batch : (position + 1) * config.batch]
        optimizer.zero_grad()
        cross_entropy(layer(x[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return torch.cat([layer.weight.T, layer.bias[None]]).detach()


def test_the_dev_part_is_seeded_and_disjoint():
    fit_on, choose_by = dev_split(50, 0.1, seed=3)
    assert len(choose_by) == 5
    assert sorted([*fit_on.tolist(), *choose_by.tolist()]) == list(range(50))
    assert torch.equal(choose_by, dev_split(50, 0.1, seed=3)[1])
    assert not torch.equal(choose_by, dev_split(50, 0.1, seed=4)[1])


def test_the_first_of_the_best_choices_is_taken():
    scores = {1.0: 0.5, 2.0: 0.75, 3.0: 0.75}
    assert best_of([1.0, 2.0, 3.0], lambda choices: [scores[choice] for choice in choices]) == 2.0
    assert best_of([4.0], lambda _: pytest.fail("one alone needs no score")) == 4.0


def test_agreement_is_1_for_renamed_classes_and_counts_the_best_assignment():
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert agreement(np.array([2, 2, 0, 0, 1, 1]), labels) == (pytest.approx(1.0), 1.0)
    nmi, accuracy = agreement(np.array([0, 0, 0, 1, 1, 1]), labels)  # two clusters for three classes
    assert accuracy == pytest.approx(4 / 6) and 0 < nmi < 1


@pytest.fixture
def colour_sets(tmp_path: Path) -> dict[str, str]:
    train = write_shard(tmp_path / "train.tar", [str(i % 7) for i in range(210)], seed=1)
    return {
        "train": train,
        "test": write_shard(tmp_path / "test.tar", [str(i * 3 % 7) for i in range(70)], 2),
    }


@pytest.mark.parametrize(
    ("kind", "values", "names"),
    [
        ("knn", {"k": [5, 20]}, ["5nn", "20nn"]),
        ("logistic", {"c": [1e-6, 1e-2]}, ["top1", "c"]),
        ("linear", {"learning_rates": [1e-6, 0.1], "batch": 64}, ["top1", "learning_rate"]),
    ],
)
def test_each_kind_learns_colours(
    colour_sets: dict[str, str], kind: str, values: dict[str, object], names: list[str]
):
    model = ColourModel()
    config = from_dict(EvalConfig, {"kind": kind, **colour_sets, **values, "batch_size": 32}, "evals.colours")
    results = open_task("colours", config, model.image_size).run(model)
    assert list(results) == names
    assert results[names[0]] > 0.8
    assert model.images_seen == 280
    # The features of this model are known now, also to other kinds.
    again = LinearConfig(**colour_sets, learning_rates=(0.1,))
    assert open_task("colours", again, model.image_size).run(model)["top1"] > 0.8
    assert model.images_seen == 280


def test_clusters_of_colours_are_their_classes(colour_sets: dict[str, str]):
    model = ColourModel()
    task = open_task("colours", KMeansConfig(test=colour_sets["test"]), model.image_size)
    results = task.run(model)
    assert results["accuracy"] > 0.8 and results["nmi"] > 0.8


def test_more_neighbours_than_images_are_refused(colour_sets: dict[str, str]):
    with pytest.raises(DataError, match=r"train.tar holds 210 images, fewer than the 211 neighbours of k"):
        open_task("colours", KnnConfig(**colour_sets, k=(10, 211)), 4)


def test_more_clusters_than_images_are_refused(colour_sets: dict[str, str]):
    with pytest.raises(DataError, match=r"test.tar holds 70 images, fewer than the 71 clusters; lower"):
        open_task("colours", KMeansConfig(test=colour_sets["test"], clusters=71), 4)


@pytest.mark.parametrize("kind", ["fewshot", "knn", "logistic", "linear", "kmeans"])
def test_several_labels_are_refused_before_any_image_is_read(
    tmp_path: Path, colour_sets: dict[str, str], kind: str
):
    several = write_shard(tmp_path / "several.tar", ["0", "1 2"] * 40)
    for changed in ("test",) if kind == "kmeans" else ("train", "test"):
        sets = {name: colour_sets[name] for name in (("test",) if kind == "kmeans" else colour_sets)}
        section = from_dict(EvalConfig, {"kind": kind, **sets, changed: several}, "evals.a")
        with pytest.raises(DataError, match=f"several.tar: there are samples with 2 labels, but {kind}"):
            open_task("colours", section, 4)


def test_a_dev_part_has_an_image_at_least():
    assert [len(part) for part in dev_split(10, 0.01, seed=0)] == [9, 1]


@pytest.mark.parametrize("kind", ["logistic", "linear"])
def test_a_dev_part_of_all_images_is_refused_where_one_is_needed(colour_sets: dict[str, str], kind: str):
    values = {"kind": kind, **colour_sets, "dev_fraction": 0.999}
    with pytest.raises(DataError, match=r"dev_fraction 0.999 holds out 210 of the 210 images in .*train.tar"):
        open_task("colours", from_dict(EvalConfig, values, "evals.a"), 4)
    single = {"c": [0.1]} if kind == "logistic" else {"learning_rates": [0.1]}
    assert open_task("colours", from_dict(EvalConfig, values | single, "evals.a"), 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "knn", "k": []}, r"evals.a.k \[\] must list different whole numbers from 1 up"),
        ({"kind": "knn", "temperature": 0}, "evals.a.temperature 0.0 must be above 0"),
        ({"kind": "knn", "train": ""}, "evals.a.train is empty: knn needs training shards"),
        ({"kind": "logistic", "c": [0]}, r"evals.a.c \[0.0\] must list numbers above 0"),
        ({"kind": "logistic", "dev_fraction": 1}, r"evals.a.dev_fraction 1.0 must lie in \(0, 1\)"),
        ({"kind": "linear", "learning_rates": []}, r"evals.a.learning_rates \[\] must list numbers above 0"),
        ({"kind": "linear", "epochs": 0}, "evals.a.epochs 0 must be above 0"),
        ({"kind": "linear", "seed": -1}, "evals.a.seed -1 must not be negative"),
    ],
)
def test_a_wrong_value_is_refused(values: dict[str, object], message: str):
    good = {"train": "a.tar", "test": "b.tar"}
    assert from_dict(EvalConfig, good | {"kind": values["kind"]}, "evals.a")
    with pytest.raises(ConfigError, match=message):
        from_dict(EvalConfig, good | values, "evals.a")


def test_a_single_cluster_is_refused():
    with pytest.raises(ConfigError, match=r"evals\.a\.clusters 1 must be 0, for as many as classes"):
        from_dict(EvalConfig, {"kind": "kmeans", "test": "b.tar", "clusters": 1}, "evals.a")
