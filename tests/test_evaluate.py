"""Protocols against slow references and cases with known answers."""
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from replicate import evaluate
from replicate.data import Resident


def clusters(count, dimension=20, classes=4, spread=0.5, seed=0):
    centres = torch.randn(classes, dimension, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, dimension, generator=generator), labels


def test_linear_probe_separates_what_is_separable_and_guesses_what_is_not():
    assert evaluate.linear_probe(*clusters(400), *clusters(400, seed=1)) > 95
    x, y = clusters(400)
    noise = torch.randn(2400, 20, generator=torch.Generator().manual_seed(5))
    found = evaluate.linear_probe(noise[:400], y, noise[400:], torch.arange(2000) % 4)
    assert abs(found - 25) < 6


def test_linear_probe_reaches_the_optimum_of_its_objective():
    """Against 3,000 steps of plain gradient descent in float64."""
    x, y = clusters(200, dimension=5, spread=2.0)
    x = (x - x.mean(0)) / x.std(0)
    weight, bias = evaluate._fit_logistic(x, y, 4, 1e-2, 200)
    w, b = torch.zeros(5, 4, dtype=torch.float64,
                       requires_grad=True), torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def loss(w, b):
        return F.cross_entropy(x.double() @ w + b, y) + 0.005 * w.square().sum()
    for _ in range(3000):
        grads = torch.autograd.grad(loss(w, b), (w, b))
        with torch.no_grad():
            w -= 0.5 * grads[0]
            b -= 0.5 * grads[1]
    assert float(loss(weight.T.double(), bias.double()) - loss(w, b).detach()) < 1e-5


def test_linear_probe_is_deterministic_and_scale_free():
    train, test = clusters(300, spread=1.5), clusters(300, seed=1, spread=1.5)
    first = evaluate.linear_probe(*train, *test)
    assert first == evaluate.linear_probe(*train, *test)
    scaled = evaluate.linear_probe(train[0] * 1000 + 5, train[1], test[0] * 1000 + 5, test[1])
    assert abs(first - scaled) < 1.0


def test_linear_probe_chooses_its_penalty_without_the_test_set(monkeypatch):
    seen = []
    original = evaluate._fit_logistic
    monkeypatch.setattr(evaluate, "_fit_logistic", lambda x, y, c, penalty, *rest:
                        seen.append((len(x), penalty)) or original(x, y, c, penalty, *rest))
    train = clusters(500, spread=3.0)
    for test_labels in (torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.int64)):
        evaluate.linear_probe(*train, clusters(100, seed=1)[0], test_labels)
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and half >= 3
    assert [length for length, _ in seen[:half]] == [450] * (half - 1) + [500]
    assert [penalty for _, penalty in seen[:half - 1]] == list(evaluate.PENALTIES[:half - 1])
    assert seen[half - 1][1] in evaluate.PENALTIES[:half - 1]
    seen.clear()  # 39 of 390 held out are fewer than ten a class
    evaluate.linear_probe(*clusters(390, spread=3.0), *clusters(100, seed=1))
    assert seen == [(390, evaluate.PENALTIES[len(evaluate.PENALTIES) // 2])] and seen[0][1] == 0.01


def test_linear_probe_warns_when_the_best_penalty_is_the_last_one_tried():
    train, test = clusters(500, spread=3.0), clusters(100, seed=1, spread=3.0)
    with pytest.warns(UserWarning, match="best penalty") as noticed:
        evaluate.linear_probe(*train, *test, penalties=(1e-3, 1e-4))
    assert len(noticed) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.linear_probe(*train, *test, penalties=(1e-2,))  # nothing to choose


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
    assert evaluate.knn_accuracy(*train, *test, k=7, temperature=0.1,
                                 batch_size=8) == pytest.approx(100 * hits / 30)


def test_knn_of_one_on_itself_is_perfect():
    x, y = clusters(100, spread=5.0)
    assert evaluate.knn_accuracy(x, y, x, y, k=1) == 100.0


def test_features_come_in_eval_mode_in_order_and_leave_the_network_as_it_was():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    images = torch.randn(23, 3, 8, 8)
    features = evaluate.extract_features(encoder, images, batch_size=5)
    assert encoder.training and not encoder[1].num_batches_tracked and features.shape == (23, 144)
    torch.testing.assert_close(features, encoder.eval()(images).flatten(1).detach())
    split = Resident(images, torch.zeros(23))
    torch.testing.assert_close(evaluate.extract_features(encoder, split, batch_size=4), features)


def test_rows_name_the_block_and_the_kind_of_their_probe():
    rows = ["x/conv4/linear", "x/after5/block2/knn", "x/block1/labels20"]
    assert evaluate.blocks_and_kinds(rows) == {rows[0]: (4, "linear"), rows[1]: (2, "knn"),
                                               rows[2]: (1, 20)}


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
                                            "always 0": torch.tensor([[1.0,
                                                                       0.0]]).expand(len(x), 2)},
                                                                       split, batch_size=3)
    assert result == {"parity": 100.0, "always 0": 50.0}


def test_fringes_magnify_green_alone():
    images = torch.rand(2, 3, 41, 41)
    fringed = evaluate.add_fringes(images, 0.1)
    assert torch.equal(fringed[:, [0, 2]], images[:, [0, 2]])
    torch.testing.assert_close(evaluate.add_fringes(images, 0.0), images)
    ramp = torch.arange(41.0).expand(1, 3, 41, 41)
    green = evaluate.add_fringes(ramp, 0.1)[0, 1, 20]
    assert float(green[20]) == pytest.approx(20, abs=1e-4)
    assert float(green[33]) == pytest.approx(20 + 13 / 1.1, abs=0.05)
    # waves of seven and of two and a half pixels are moved, not blurred
    for frequency in (0.9, 2.5):
        waves = torch.sin(torch.arange(96) * frequency).expand(1, 3, 96, 96)
        moved = evaluate.add_fringes(waves, 0.02)[0, 1, 48]
        assert all(float(part.square().mean()) == pytest.approx(0.5, abs=0.06)
                   for part in moved[8:-8].split(16))


def test_recalibrated_batch_norm_has_the_statistics_of_train():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3),
                          nn.BatchNorm2d(5, affine=False))
    images = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 7 + 3
    out = []
    assert evaluate.recalibrate(model, model, Resident(images,
                                                       torch.zeros(300))) is model
    assert not model.training
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
    rows = {"supervised": None, "x/conv4/labels20": 20, "x/labels5": 5, "x/conv4/linear": None,
            "labels20/x": None}
    assert {row: evaluate.labels_of(row) for row in rows} == rows


def test_frozen_sees_what_moves():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with evaluate.frozen(model) as still:
        assert still is model and not model.training and not any(p.requires_grad
                                                                 for p in model.parameters())
    for change in (lambda: model[0].weight.data.add_(1e-3),
                   lambda: model.train()(torch.randn(4, 2))):
        with pytest.raises(AssertionError, match="has moved"):
            with evaluate.frozen(model):
                change()


class Streamlike(Resident):
    """A split without .images, as one whose files are decoded on the fly."""
    images = property(lambda self: (_ for _ in ()).throw(AttributeError("images")), lambda self,
                      value: setattr(self, "kept", value))

    def batches(self, order):
        yield from Resident(self.kept, self.labels).batches(order)


@pytest.mark.parametrize("kind", [Resident, Streamlike])
def test_probes_on_maps_agree_with_the_plain_protocols_and_leave_out_rows_without_labels(kind):
    images = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(400) % 4
    images += labels[:, None, None, None]
    train, test = kind(images[:300], labels[:300]), kind(images[300:], labels[300:])
    calls = []

    def maps(images):
        calls.append(len(images))
        return [images, images[:, :1, ::2, ::2]]

    rows = {"a": (1, "linear"), "b": (2, "knn"), "c": (1, 5), "d": (1, 100)}
    values = evaluate.probe(maps, rows, train, test, cells=2, seed=3)
    x, z = (F.adaptive_avg_pool2d(part, 2).flatten(1) for part in (images[:300], images[300:]))
    held = z, labels[300:]
    assert values["a"] == evaluate.linear_probe(x, labels[:300], *held,
                                                seed=3) and values["d"] is None
    assert values["c"] == evaluate.low_shot(x, labels[:300], *held, shots=[5], seed=3)[5]
    x, z = (F.adaptive_avg_pool2d(part[:, :1, ::2, ::2], 2).flatten(1)
            for part in (images[:300], images[300:]))
    assert values["b"] == evaluate.knn_accuracy(x, labels[:300], z, labels[300:])
    # block by block where the features of all might not fit
    assert len(calls) == (3 if kind is Resident else 6)
    assert not evaluate.enough_labels(labels, "x/labels101")
    assert evaluate.enough_labels(labels, "x/labels100")
    assert evaluate.enough_labels(labels, "x/linear")
