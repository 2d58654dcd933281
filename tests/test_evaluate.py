"""Protocols against slow references and cases with known answers."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from papers import gidaris_rotation as rotation
from replicate import evaluate, trainer
from replicate.data import ImageSet, Resident


def clusters(count, dimension=20, classes=4, spread=0.5, seed=0):
    centres = torch.randn(classes, dimension, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, dimension, generator=generator), labels


def test_linear_probe_separates_what_is_separable_and_guesses_what_is_not():
    assert evaluate.linear_probe(*clusters(400), *clusters(400, seed=1)) > 95
    x, y = clusters(400)
    noise = torch.randn(400, 20, generator=torch.Generator().manual_seed(5))
    assert abs(evaluate.linear_probe(noise, y, torch.randn(2000, 20, generator=torch.Generator().manual_seed(6)),
                                     torch.arange(2000) % 4) - 25) < 6


def test_linear_probe_reaches_the_optimum_of_its_objective():
    """Against 3,000 steps of plain gradient descent in float64."""
    x, y = clusters(200, dimension=5, spread=2.0)
    x = (x - x.mean(0)) / x.std(0)
    weight, bias = evaluate._fit_logistic(x, y, 4, 1e-2, 200)
    w, b = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True), torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def loss(w, b):
        return F.cross_entropy(x.double() @ w + b, y) + 0.005 * w.square().sum()
    for _ in range(3000):
        grads = torch.autograd.grad(loss(w, b), (w, b))
        with torch.no_grad():
            w -= 0.5 * grads[0]
            b -= 0.5 * grads[1]
    assert float(loss(weight.double(), bias.double()) - loss(w, b).detach()) < 1e-5


def test_linear_probe_is_deterministic_and_scale_free():
    train, test = clusters(300, spread=1.5), clusters(300, seed=1, spread=1.5)
    first = evaluate.linear_probe(*train, *test)
    assert first == evaluate.linear_probe(*train, *test)
    scaled = evaluate.linear_probe(train[0] * 1000 + 5, train[1], test[0] * 1000 + 5, test[1])
    assert abs(first - scaled) < 1.0


def test_linear_probe_chooses_its_penalty_without_the_test_set(monkeypatch):
    seen = []
    original = evaluate._fit_logistic
    monkeypatch.setattr(evaluate, "_fit_logistic", lambda x, y, c, penalty, i: seen.append((len(x), penalty)) or
                        original(x, y, c, penalty, i))
    train = clusters(300, spread=3.0)
    for test_labels in (torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.int64)):
        evaluate.linear_probe(*train, clusters(100, seed=1)[0], test_labels)
    assert seen[:4] == seen[4:] and [length for length, _ in seen[:4]] == [270, 270, 270, 300]


def test_knn_agrees_with_the_plain_definition():
    train, test = clusters(60, spread=2.0), clusters(30, seed=1, spread=2.0)
    hits = 0
    for x, y in zip(*test):
        similarity = torch.stack([F.cosine_similarity(x, other, dim=0) for other in train[0]])
        best = similarity.argsort(descending=True)[:7]
        votes = torch.zeros(4)
        for index in best:
            votes[train[1][index]] += (similarity[index] / 0.1).exp()
        hits += int(votes.argmax() == y)
    assert evaluate.knn_accuracy(*train, *test, k=7, temperature=0.1, batch_size=8) == pytest.approx(100 * hits / 30)


def test_knn_of_one_on_itself_is_perfect():
    x, y = clusters(100, spread=5.0)
    assert evaluate.knn_accuracy(x, y, x, y, k=1) == 100.0


def test_mean_average_precision():
    """One class: hits at ranks 1 and 3 -> (1 + 2/3) / 2; difficult ones (-1) are not counted."""
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.95]])
    targets = torch.tensor([[1], [0], [1], [0], [-1]])
    assert evaluate.mean_average_precision(scores, targets) == pytest.approx(100 * (1 + 2 / 3) / 2)
    perfect = torch.eye(4)
    assert evaluate.mean_average_precision(perfect, perfect.long()) == pytest.approx(100.0)


def test_features_come_in_eval_mode_in_order_and_leave_the_network_as_it_was():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = evaluate.fingerprint(encoder)
    images = torch.randn(23, 3, 8, 8)
    features = evaluate.extract_features(encoder, images, batch_size=5)
    assert encoder.training and evaluate.fingerprint(encoder) == before and features.shape == (23, 144)
    torch.testing.assert_close(features, encoder.eval()(images).flatten(1).detach())
    split = Resident(images, torch.zeros(23))
    torch.testing.assert_close(evaluate.extract_features(encoder, split, batch_size=4), features)


def test_cells_are_averages():
    maps = torch.arange(64.0).view(1, 1, 8, 8)
    assert evaluate.average_cells(maps, 2).tolist() == [[13.5, 17.5, 45.5, 49.5]]
    assert evaluate.average_cells(maps, 16).shape == (1, 64)


def test_low_shot_uses_k_of_each_class_and_grows():
    train, test = clusters(400, spread=2.5), clusters(400, seed=1, spread=2.5)
    result = evaluate.low_shot(*train, *test, shots=(1, 80))
    assert set(result) == {1, 80} and result[80] > result[1]
    assert result == evaluate.low_shot(*train, *test, shots=(1, 80))
    with pytest.raises(ValueError, match="fewer than 200"):
        evaluate.low_shot(*train, *test, shots=(200,))


def test_accuracies_count_hits():
    split = Resident(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10) % 2)
    result = evaluate.accuracies(lambda x: {"parity": F.one_hot(x.flatten().long() % 2, 2).float(),
                                            "always 0": torch.tensor([[1.0, 0.0]]).expand(len(x), 2)}, split, batch_size=3)
    assert result == {"parity": 100.0, "always 0": 50.0}


def test_tsne_keeps_two_clusters_apart():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 10, generator=generator)
    features[60:] += 8
    places = evaluate.tsne(features, generator, perplexity=15, iterations=250)
    near = torch.cdist(places, places).fill_diagonal_(math.inf).argmin(1)
    assert places.shape == (120, 2) and ((near < 60) == (torch.arange(120) < 60)).float().mean() > 0.95
    with pytest.raises(ValueError, match="2001 points"):
        evaluate.tsne(torch.zeros(2001, 2), generator)


def test_fringes_magnify_green_alone():
    images = torch.rand(2, 3, 41, 41)
    fringed = evaluate.add_fringes(images, 0.1)
    assert torch.equal(fringed[:, [0, 2]], images[:, [0, 2]])
    torch.testing.assert_close(evaluate.add_fringes(images, 0.0), images)
    ramp = torch.arange(41.0).expand(1, 3, 41, 41)
    green = evaluate.add_fringes(ramp, 0.1)[0, 1, 20]
    assert float(green[20]) == pytest.approx(20, abs=1e-4) and float(green[33]) == pytest.approx(20 + 13 / 1.1, abs=0.05)
    for frequency in (0.9, 2.5):  # waves of seven and of two and a half pixels are moved, not blurred
        waves = torch.sin(torch.arange(96) * frequency).expand(1, 3, 96, 96)
        moved = evaluate.add_fringes(waves, 0.02)[0, 1, 48]
        assert all(float(part.square().mean()) == pytest.approx(0.5, abs=0.06) for part in moved[8:-8].split(16))


def test_recalibrated_batch_norm_has_the_statistics_of_train():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, affine=False))
    images = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 7 + 3
    out = []
    assert evaluate.recalibrate(model, model, Resident(images, torch.zeros(300))) is model and not model.training
    with torch.no_grad():
        out = model(images)
    assert float(out.mean((0, 2, 3)).abs().max()) < 1e-4
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(5), atol=1e-3, rtol=0)
    assert [layer.momentum for layer in model if isinstance(layer, nn.BatchNorm2d)] == [0.1, 0.1]


def test_mirror_and_shift_moves_whole_images_by_at_most_an_eighth():
    ramp = torch.arange(32).expand(500, 1, 32, 32).to(torch.uint8)
    moved = evaluate.mirror_and_shift(ramp, torch.Generator().manual_seed(0))
    middle = moved[:, 0, 16].int()
    mirrored = middle[:, 20] < middle[:, 12]
    assert moved.shape == ramp.shape and 200 < int(mirrored.sum()) < 300
    shift = torch.where(mirrored, 31 - middle[:, 16], middle[:, 16]) - 16
    assert set(shift.tolist()) == set(range(-4, 5)) and moved.unique().tolist() == list(range(32))
    assert torch.equal(moved[:, :, :1].expand_as(moved), moved)  # rows alike stay alike


def test_rows_name_their_labels():
    rows = {"supervised": None, "x/conv4/labels20": 20, "x/labels5": 5, "x/conv4/linear": None, "labels20/x": None}
    assert {row: evaluate.labels_of(row) for row in rows} == rows


def test_a_plan_needs_no_labels(tmp_path):
    """While planning the train part is cut short, too short for many labels a class; the other probes are timed all the same."""
    config = trainer.resolve_config(rotation.Config, trainer.ROOT / "papers" / "gidaris_rotation.yaml", "smoke")
    run = trainer.Run(rotation.__file__, config, "smoke", "cpu", suite="smoke", results=tmp_path, runs=tmp_path, plan=True)
    images, labels = torch.rand(4000, 1, 2, 2), torch.arange(4000) % 4
    split = Resident(images, labels)
    rows = {"x/block1/linear": (1, "linear"), "x/block1/labels700": (1, "labels700")}
    evaluate.record_probes(run, rows, lambda: (lambda images: [images], 0.0), ImageSet("x", split, split, 4))
    assert not run.records and not list(tmp_path.iterdir())


def test_rows_name_their_blocks():
    rows = ["a/conv4/linear", "a/conv1/labels5", "a/finetuned/labels5", "a/loss", "ab/conv2/knn", "audit/a/block3/linear", "a"]
    assert evaluate.probe_rows(rows, "a") == {"a/conv4/linear": (4, "linear"), "a/conv1/labels5": (1, "labels5")}
    assert evaluate.probe_rows(rows, "audit/a") == {"audit/a/block3/linear": (3, "linear")}
