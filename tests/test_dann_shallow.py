"""DANN's shallow network: Algorithm 1, mSDA, SVM and moons, against slow and plain versions."""
import math

import pytest
import torch

from papers import dann_shallow
from replicate import records, trainer


def plain_algorithm(points, first, V, source, targets, labels, strength, rate):
    """Algorithm 1 as the paper prints it, on the weights of one network."""
    W, b, u = first.T.clone(), *torch.zeros(2, first.shape[1]).double()
    V, c, d = V.T.clone(), torch.zeros(V.shape[1]).double(), torch.zeros(()).double()
    for i, j in zip(source, targets):
        h = torch.sigmoid(b + W @ points[i])
        dc = torch.softmax(c + V @ h, 0) - torch.nn.functional.one_hot(labels[i], len(c))
        dV, db = torch.outer(dc, h), (V.T @ dc) * h * (1 - h)
        dW = torch.outer(db, points[i])
        gd = torch.sigmoid(d + u @ h)
        dd, du = strength * (1 - gd), strength * (1 - gd) * h
        extra = strength * (1 - gd) * u * h * (1 - h)
        db, dW = db + extra, dW + torch.outer(extra, points[i])
        h = torch.sigmoid(b + W @ points[j])
        gd = torch.sigmoid(d + u @ h)
        dd, du = dd - strength * gd, du - strength * gd * h
        extra = -strength * gd * u * h * (1 - h)
        db, dW = db + extra, dW + torch.outer(extra, points[j])
        W, V, b, c = W - rate * dW, V - rate * dV, b - rate * db, c - rate * dc
        u, d = u + rate * du, d + rate * dd
    return W, b, V.T, c, u, d


def test_networks_side_by_side_follow_algorithm_1():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 20, 3, generator=generator).double()
    first, strengths = torch.randn(3, 4, generator=generator).double(), torch.tensor([0.0, 0.7])
    nets = dann_shallow.first_networks(points @ first, 2, 3, generator)
    V, kernel = nets["V"][0, 0].clone(), points @ points.transpose(1, 2)
    source, targets = torch.arange(8), torch.randint(10, 20, (2, 8), generator=generator)
    targets[0, :3] = 12  # an example that is drawn again sees what it has learnt
    labels = torch.randint(3, (2, 20, 2), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    for part, others in zip(source.split(5), targets.split(5, 1)):
        dann_shallow.train_on_block(nets, kernel, part, others, one_hot[:, part], strengths, 0.3)
    for pair in range(2):
        for network in range(2):
            W, *rest = plain_algorithm(points[pair], first, V, source, targets[pair],
                                       labels[pair, :, network], float(strengths[network]), 0.3)
            assert torch.allclose(nets["inputs"][pair, :, network], points[pair] @ W.T)
            inputs = points[pair] @ first + kernel[pair] @ nets["a"][pair, :, network]
            assert torch.allclose(inputs, points[pair] @ W.T)
            for name, value in zip("bVcud", rest):
                assert torch.allclose(nets[name][pair, network], value), name
    assert not nets["u"][:, 0].any()  # lambda 0: the domain unit learns nothing


def test_training_keeps_the_best_epoch_of_each_network_and_stops():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(1, 40, 2, generator=generator)
    labels = (points[..., 0] > 0).long()[..., None].repeat(1, 1, 2)
    epochs = []

    def train(held_out, count=60):
        nets = dann_shallow.first_networks(points @ torch.ones(2, 3), 2, 2,
                                           generator.manual_seed(2))
        draw = lambda epoch, pair: epochs.append(epoch) or torch.Generator().manual_seed(epoch)
        return dann_shallow.train(nets, points @ points.transpose(1, 2), torch.arange(20),
                                  torch.arange(20, 40), held_out, labels, torch.tensor([0.0, 1.0]),
                                  0.5, count, 3, draw)
    trained = train(torch.arange(20))
    answers = dann_shallow.class_scores(trained, torch.arange(20)).argmax(3)
    assert (answers == labels[:, :20]).float().mean() > 0.9
    assert train(None, 2)["b"].any() and epochs[-1] == 1
    labels[:, :20] = 1 - labels[:, :20]  # held-out labels that training makes worse
    held_out, source = torch.arange(20, 40), labels.clone()
    epochs.clear()
    train(held_out)
    assert max(epochs) < 59  # it stopped before the budget was used up


def test_labels_of_the_target_reach_nothing():
    """The target's entries among the labels of training examples are placeholders."""
    generator = torch.Generator().manual_seed(3)
    domains = {letter: dann_shallow.draw_reviews(torch.Generator().manual_seed(number), number)
               for number, letter in enumerate("BD")}
    assert all(0.45 < reviews.labels.float().mean() < 0.55 for reviews in domains.values())
    config = dann_shallow.Config(0, "embedded", hidden=4, layers=1)
    run = trainer.Run(dann_shallow.__file__, config, "smoke", {})
    before = dann_shallow.all_products(run, "raw", domains)
    changed = {**domains, "D": domains["D"]._replace(labels=1 - domains["D"].labels)}
    after = dann_shallow.all_products(run, "raw", changed)
    for name in ("kernel", "across", "projected", "tested", "labels", "test_labels"):
        assert torch.equal(getattr(before["B-D"], name), getattr(after["B-D"], name)), name
    assert not before["B-D"].labels[200:].any() and before["D-B"].labels[:200].any()
    assert generator.initial_seed() == 3


def test_products_of_a_pair_and_of_its_opposite():
    domains = {letter: dann_shallow.draw_reviews(torch.Generator().manual_seed(number), number)
               for number, letter in enumerate("BD")}
    config = dann_shallow.Config(0, "embedded", hidden=4, layers=2)
    run = trainer.Run(dann_shallow.__file__, config, "smoke", {})
    pairs = dann_shallow.all_products(run, "msda", domains)
    features = list(dann_shallow.stacked_layers(
        torch.cat([domains["D"].train, domains["B"].train]), domains["B"].test, 2, 0.5))
    x, test = (torch.cat(each, 1) for each in zip(*features))
    assert x.shape == (400, 360)
    back = pairs["D-B"]
    assert torch.allclose(back.kernel, x @ x.T, rtol=1e-3, atol=1e-2)
    assert torch.allclose(back.across, test @ x.T, rtol=1e-3, atol=1e-2)
    assert torch.equal(back.test_labels, domains["B"].test_labels)


def test_a_denoising_layer_is_what_many_corrupted_copies_would_give():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 3, generator=generator).double() + 1
    weights = dann_shallow.denoising_layer(x, 0.5)
    kept = torch.rand(20000, *x.shape, generator=generator) < 0.5
    blanked = torch.cat([x * kept, torch.ones(20000, 40, 1)], 2).flatten(0, 1)
    clean = x.expand(20000, -1, -1).flatten(0, 1)
    fitted = torch.linalg.lstsq(blanked, clean).solution.T
    assert torch.allclose(weights, fitted, atol=0.02)
    exact = dann_shallow.denoising_layer(x, 0.0)  # nothing is blanked: the input itself
    assert torch.allclose(exact[:, :3], torch.eye(3).double(), atol=1e-3)


def test_the_svm_minimises_its_objective():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(60, 4, generator=generator).double()
    signs = dann_shallow.signs_of(x[:, 0] + 0.5 * torch.randn(60, generator=generator).double())
    coefficients = dann_shallow.fit_svm(x @ x.T, signs, 0.5)
    w = (x.T @ coefficients).requires_grad_()
    objective = w.square().sum() / 2 + 0.5 * (1 - signs * (x @ w)).clamp_min(0).square().sum()
    objective.backward()
    assert w.grad.abs().max() < 1e-9


def test_a_distance_of_equal_and_of_separate_domains():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(800, 5, generator=generator).double()
    near = dann_shallow.svm_a_distance(x @ x.T + 1, (0.01, 1.0), generator)
    x[:400, 0] += 20
    assert near < 0.3 and dann_shallow.svm_a_distance(x @ x.T + 1, (0.01, 1.0), generator) > 1.9


@pytest.mark.parametrize("text, message", [("2 1:1\n", "line 1"), ("1 1:1\n-1 9999:1\n", "line 2"),
                                           ("1 a:b\n", "line 1"), ("\n", "line 1")])
def test_files_of_another_form_get_one_line(tmp_path, text, message):
    path = tmp_path / "books_train.svmlight"
    path.write_text(text)
    with pytest.raises(trainer.InputError, match=message):
        dann_shallow.read_svmlight(path)
    with pytest.raises(trainer.InputError, match="no file"):
        dann_shallow.read_svmlight(tmp_path / "missing.svmlight")


def test_a_file_is_read(tmp_path):
    path = tmp_path / "books_train.svmlight"
    path.write_text("1 0:2 4999:1\n-1 3:5\n1\n")  # the last review has none of the words
    counts, labels = dann_shallow.read_svmlight(path)
    assert counts.shape == (3, 5000) and labels.tolist() == [1, 0, 1]
    assert (counts[0, 0] == 2 and counts[0, 4999] == 1 and counts[1].sum() == 5
            and not counts[2].any())


def test_moons_are_two_turned_classes():
    points, labels = dann_shallow.two_moons(400, 0, torch.Generator().manual_seed(0))
    turned, same = dann_shallow.two_moons(400, 35, torch.Generator().manual_seed(0))
    assert torch.equal(labels, same) and labels.bincount().tolist() == [200, 200]
    angle = math.radians(35)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    assert torch.allclose(turned, points @ matrix.T, atol=1e-5)
    assert points.norm(dim=1).max() < 4 and points[labels == 0].mean(0)[1] > 0.3


def test_moons_are_adapted_and_every_row_is_recorded(tmp_path):
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    assert dann_shallow.main(["--scale", "smoke", "--set", "moons_epochs=60", *folders]) == 0
    found, _ = records.read(tmp_path / "results/smoke-custom/dann_shallow.jsonl")
    values = {record["row"]: record["value"] for record in found}
    assert values.keys() == records.read_declared(dann_shallow.__file__)["rows"].keys()
    assert values["moons/dann"] > values["moons/source-only"] + 0.5
    mean = sum(values[row] for row in values
               if row.startswith("raw/") and row.endswith("-D/nn")) / 3
    assert 0 < mean < 100
