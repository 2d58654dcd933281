"""The invariants of the domain-adversarial paper, cheap ones first; the last tests run the script
on tiny sets."""
import copy
import json
import math
import re
import socket

import pytest
import torch
from conftest import write_folder
from PIL import Image
from torch import nn
from torch.nn import functional as F

from papers import dann
from replicate import data as image_data
from replicate import records as run_records
from replicate import scatter, trainer
from replicate.classes import CLASSES
from replicate.data import ImageSet, InputError, Resident

DECLARED = run_records.read_declared(dann.__file__)
PAIR = "mnist-mnistm"


def some_run(folder, only=("*",), **settings):
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config, _ = trainer.read_settings(dann.Config, DECLARED, "smoke", 0, overrides)
    return trainer.Run(dann.__file__, config, "smoke", DECLARED["rows"], results=folder,
                       runs=folder, only=only)


def some_network(mean=0.0, layers=dann.digit_layers, classes=10, side=28):
    torch.manual_seed(0)
    return dann.DomainAdversarialNetwork(layers, classes, torch.full((3, side, side), mean))


def untrained_of(run):
    """The network of the pairs with MNIST as source before its first step."""
    mean = some_domains().mean
    return run.build(dann.DomainAdversarialNetwork, dann.digit_layers, 10, mean,
                     purpose="mnist/digit_layers/28/init")


def some_images(count=20, channels=3, size=28, seed=0):
    return torch.randint(0, 256, (count, channels, size, size),
                         generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def some_domains(count=60):
    """Two domains of noise, the target darker, ten classes."""
    def image_set(seed, divisor):
        return ImageSet("x", *(Resident(some_images(count, seed=seed + part) // divisor,
                                        torch.arange(count) % 10) for part in (0, 10)), 10)
    return dann.Domains(image_set(1, 1), image_set(2, 3), torch.full((3, 28, 28), 0.3))


# The reversal
def test_reversal_passes_features_and_turns_gradients_exactly():
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    head = nn.Linear(7, 1)

    def gradients(strength):
        x = features.clone().requires_grad_()
        reversed_ = dann.reverse_gradient(x, strength) if strength is not None else x
        assert torch.equal(reversed_, x)
        head.zero_grad()
        head(reversed_).square().sum().backward()
        return x.grad, [parameter.grad.clone() for parameter in head.parameters()]

    plain, head_plain = gradients(None)
    for strength in (1.0, 0.5, 0.3, 0.0, -1.0):
        turned, head_turned = gradients(strength)
        assert torch.equal(turned, -strength * plain)
        # The domain head learns at full strength.
        assert all(torch.equal(a, b) for a, b in zip(head_plain, head_turned))
    x = features.clone().requires_grad_()
    dann.reverse_gradient(dann.reverse_gradient(x, 1.0), 1.0).square().sum().backward()
    assert torch.equal(x.grad, 2 * features)  # two reversals cancel


def test_one_step_is_the_two_player_update():
    """Features go down the label loss and up the domain loss, the domain head goes down the domain
    loss."""
    model = some_network()
    source, target = (some_images(8, seed=seed) for seed in (1, 2))
    labels, strength = torch.arange(8), 0.7
    dann.adaptation_losses(model, source, target, labels, "dann", strength)["loss"].backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    label = F.cross_entropy(plain(source), labels)
    domain = dann.domain_loss(
        *plain.domain_head(plain.encode(torch.cat([source, target]))).split([8, 8]))
    named = dict(plain.named_parameters())
    of_label = dict(zip(named, torch.autograd.grad(label, named.values(), allow_unused=True,
                                                   retain_graph=True)))
    of_domain = dict(zip(named, torch.autograd.grad(domain, named.values(), allow_unused=True)))
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        wanted = {"features": lambda: of_label[name] - strength * of_domain[name],
                  "label_head": lambda: of_label[name], "classifier": lambda: of_label[name],
                  "domain_head": lambda: of_domain[name]}[part]()
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_schedules():
    assert dann.reversal_strength(0) == 0 and dann.learning_rate(0) == 0.01
    assert dann.reversal_strength(0.5) == pytest.approx(0.9866, abs=5e-5)
    assert dann.reversal_strength(1) == pytest.approx(0.9999092, abs=5e-8)
    assert dann.learning_rate(1) == pytest.approx(0.0016556, abs=5e-8)
    for progress, strength, rate in ((0.1, 0.4621, 0.00595), (0.25, 0.8483, 0.00391),
                                     (0.75, 0.9989, 0.00201)):
        assert dann.reversal_strength(progress) == pytest.approx(strength, abs=5e-5)
        assert dann.learning_rate(progress) == pytest.approx(rate, abs=5e-6)
    steps = [step / 100 for step in range(101)]
    strengths, rates = ([dann.reversal_strength(p) for p in steps],
                        [dann.learning_rate(p) for p in steps])
    assert strengths == sorted(set(strengths)) and rates == sorted(set(rates), reverse=True)


# Network and losses
def test_features_and_parameters_of_the_papers_network():
    model = some_network()
    assert model.features(torch.zeros(2, 3, 28, 28)).shape == (2, 768)
    assert sum(p.numel() for p in model.features.parameters()) == 40_880
    assert (model(some_images(2)).shape == (2, 10)
            and model.domain_head(torch.zeros(2, 768)).shape == (2,))
    assert not [module for module in model.modules()
                if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for layers, classes, side in ((dann.digit_layers, 5, 64), (dann.svhn_layers, 10, 32),
                                  (dann.sign_layers, 43, 40)):
        assert some_network(0.0, layers, classes, side)(
            some_images(2, size=side)).shape == (2, classes)


@pytest.mark.parametrize("layers,side", [(dann.digit_layers, 28), (dann.svhn_layers, 32),
                                         (dann.sign_layers, 40)])
def test_pooling_before_relu_is_exact(layers, side):
    """The paper's order, ReLU first, gives the same features and gradients to the last bit."""
    model, images, found = (some_network(0.5, layers, side=side),
                            some_images(4, size=side) / 255 - 0.5, [])
    papers = list(model.features)
    for index, layer in enumerate(papers[:-1]):
        if isinstance(layer, nn.MaxPool2d):
            papers[index:index + 2] = reversed(papers[index:index + 2])
    for features in (model.features, nn.Sequential(*papers)):
        model.zero_grad()
        values = features(images)
        values.square().sum().backward()
        found.append([values, *(parameter.grad for parameter in model.features.parameters())])
    assert [type(layer) for layer in papers] != [type(layer) for layer in model.features]
    assert all(torch.equal(ours, other) for ours, other in zip(*found))


def test_losses_of_an_untrained_network_are_those_of_a_guess():
    model, images = some_network(0.5), [some_images(64, seed=seed) for seed in (1, 2)]
    losses = dann.adaptation_losses(model, *images, torch.arange(64) % 10, "dann", 1.0)
    losses = {name: value.detach() for name, value in losses.items()}
    assert float(losses["label"]) == pytest.approx(math.log(10), abs=0.05)
    assert float(losses["domain"]) == pytest.approx(2 * math.log(2), abs=0.05)
    assert float(losses["loss"]) == pytest.approx(
        float(losses["label"] + losses["domain"]), abs=1e-6)


def test_domain_loss_is_the_logistic_loss_of_both_domains():
    source, target = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.5, -1.0])
    slow = (-(1 - source.sigmoid()).log()).mean() - target.sigmoid().log().mean()
    assert float(dann.domain_loss(source, target)) == pytest.approx(float(slow), abs=1e-6)


def test_proxy_a_distance_of_equal_and_of_separable_samples():
    generator = torch.Generator().manual_seed(0)
    same = torch.randn(2, 1000, 5, generator=generator)
    assert 0 <= dann.proxy_a_distance(*same, seed=0) < 0.25
    assert dann.proxy_a_distance(same[0], same[0], seed=0) < 0.25
    assert dann.proxy_a_distance(same[0], same[1] + 20, seed=0) == 2.0
    between = dann.proxy_a_distance(same[0], same[1] + 0.7, seed=0)
    assert 0.4 < between < 1.9


def test_aligned_subspaces_of_one_domain_are_its_principal_components():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [5, 3, 2, 1, 0.1, 0.1])
    x = x - x.mean(0)
    source, target = dann.align_subspaces(x, x, 3)
    torch.testing.assert_close(source, target, atol=1e-4, rtol=1e-4)  # nothing to turn
    torch.testing.assert_close(target.T @ target, torch.eye(3), atol=1e-4, rtol=1e-4)
    assert float((x @ target).var(0).sum()) > 0.95 * float(x.var(0).sum())
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    angle = math.radians(20)
    turn = torch.eye(6)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)],
                                 [math.sin(angle), math.cos(angle)]])
    # The same cloud, turned within the plane of its first two axes.
    x, other = x @ basis, x @ turn @ basis
    source, target = dann.align_subspaces(x, other, 3)
    plain = torch.linalg.norm(x @ target - other @ target)
    assert (torch.linalg.norm(x @ source - other @ target) <= plain * 1.001
            and source.shape == target.shape == (6, 3))
    # The same, whatever the signs of the axes.
    torch.testing.assert_close(source @ source.T, (lambda p: p @ p.T @ target @ target.T @ p @ p.T)(
        torch.linalg.svd(x, full_matrices=False).Vh[:3].T), atol=1e-3, rtol=1e-3)


def test_gap_closed():
    assert dann.gap_closed(50.0, 50.0, 90.0) == 0 and dann.gap_closed(50.0, 90.0, 90.0) == 100
    # The paper's column.
    assert dann.gap_closed(54.90, 73.85, 99.42) == pytest.approx(42.6, abs=0.05)
    assert dann.gap_closed(79.00, 88.65, 99.80) == pytest.approx(46.4, abs=0.05)


# MNIST-M
def test_blending_takes_the_difference_without_wrapping_around():
    patches = some_images(6)
    digits = torch.zeros(6, 1, 28, 28, dtype=torch.uint8)
    digits[:, :, 5:20, 5:20] = 255
    digits[:, :, 20:25] = 100
    blended = dann.blend_digits(digits, patches)
    assert blended.dtype == torch.uint8 and blended.shape == patches.shape
    where = digits.expand_as(patches)
    assert torch.equal(blended[where == 0], patches[where == 0])
    assert torch.equal(blended[where == 255], 255 - patches[where == 255])
    assert torch.equal(blended[where == 100].int(), (patches[where == 100].int() - 100).abs())
    wrapped = patches - digits  # what uint8 would make of it
    assert not torch.equal(blended, wrapped)


def test_patches_come_from_where_they_say():
    """On pictures that name themselves and their coordinates: every place is used, no patch leaves
    its picture."""
    pictures = []
    for number, (height, width) in enumerate(((40, 60), (60, 40), (28, 28))):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        pictures.append(torch.stack([rows, columns, torch.full_like(rows, number)]).byte())
    patches = dann.cut_backgrounds(pictures, 600, 28, torch.Generator().manual_seed(0))
    again = dann.cut_backgrounds(pictures, 600, 28, torch.Generator().manual_seed(0))
    assert torch.equal(patches, again) and patches.shape == (600, 3, 28, 28)
    numbers = patches[:, 2, 0, 0]
    assert numbers.bincount().min() > 150 and (patches[:, 2] == numbers[:, None, None]).all()
    tops, lefts = patches[:, 0, 0, 0].int(), patches[:, 1, 0, 0].int()
    assert torch.equal(patches[:, 0, :, 5].int(), tops[:, None] + torch.arange(28))
    assert torch.equal(patches[:, 1, 7].int(), lefts[:, None] + torch.arange(28))
    assert (set(tops[numbers == 0].tolist()) == set(range(13))
            and set(lefts[numbers == 0].tolist()) == set(range(33)))
    assert not tops[numbers == 2].any() and not lefts[numbers == 2].any()


def write_backgrounds(root):
    """Train backgrounds are red, test backgrounds green."""
    for part, color in (("train", (200, 30, 40)), ("val", (30, 200, 40))):
        folder = root / "BSDS500" / "data" / "images" / part
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (60, 50), color).save(folder / f"{number}.jpg", quality=95)


def test_mnist_m_is_made_from_both_sets_with_separate_backgrounds(tmp_path, write_packed,
                                                                  monkeypatch):
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    write_packed(tmp_path, "mnist", train=50, test=30, shape=(28, 28, 1))
    write_backgrounds(tmp_path)
    run = some_run(tmp_path)
    mnist = run.load("mnist")
    mnist.train.images[:, :, :2], mnist.test.images[:, :, :2] = 0, 0
    made = dann.make_mnist_m(run, mnist)
    assert (made.train.images.shape == (50, 3, 28, 28)
            and torch.equal(made.train.labels, mnist.train.labels))
    # Train is red, test green.
    assert (made.train.images[:, 0, :2] > 150).all() and (made.train.images[:, 1, :2] < 80).all()
    assert (made.test.images[:, 1, :2] > 150).all() and (made.test.images[:, 0, :2] < 80).all()
    means = made.train.images.float().mean((0, 2, 3))
    assert means.max() - means.min() > 5  # not grey
    other = some_run(tmp_path / "other")
    assert torch.equal(dann.make_mnist_m(other, mnist).train.images, made.train.images)
    assert run.sha256.keys() == {"mnist", "mnist-m on BSDS500"}
    assert run.sha256["mnist-m on BSDS500"] == other.sha256["mnist-m on BSDS500"]


def test_without_bsds500_backgrounds_come_from_cifar10_and_the_record_says_so(
        tmp_path, write_packed, monkeypatch):
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    write_packed(tmp_path, "mnist", shape=(28, 28, 1))
    write_packed(tmp_path, "cifar10")
    run = some_run(tmp_path)
    dann.make_mnist_m(run, run.load("mnist"))
    assert run.sha256.keys() == {"mnist", "cifar10", "mnist-m on CIFAR-10"}


def small_mnist(root, write_packed, monkeypatch):
    """30 train and 20 test pictures packed as MNIST, with backgrounds; the data root is set."""
    monkeypatch.setenv("REPLICATE_DATA", str(root))
    write_packed(root, "mnist", train=30, test=20, shape=(28, 28, 1))
    write_backgrounds(root)


def test_digits_are_binarised_and_backgrounds_shared_where_asked(tmp_path, write_packed,
                                                                 monkeypatch):
    small_mnist(tmp_path, write_packed, monkeypatch)
    run = some_run(tmp_path, dataset="mnist")
    plain, binarised, shared = (dann.load_set(run, f"mnist-m{variant}", 28)
                                for variant in ("", " binarised", " sharedbackgrounds"))
    digits, patches = run.load("mnist").train.images, torch.tensor([200, 30, 40]).view(3, 1, 1)
    blended = torch.where(digits > 0, 255 - patches, patches)  # of red backgrounds
    assert (binarised.train.images.int() - blended).abs().max() < 8  # as JPEG keeps them
    assert torch.equal(shared.train.images, plain.train.images)
    below = run.load("mnist").test.images < 20
    for made, red in ((plain, False), (shared, True)):
        where = below.expand(-1, 3, -1, -1)[:, 0]
        assert ((made.test.images[:, 0][where] > 150) == red).all()
    source = dann.load_set(run, dann.PAIRS["mnist-released-binarised"][0], 28)
    assert torch.equal(source.train.images, 255 * (digits > 0).byte().expand(-1, 3, -1, -1))
    assert len(set(run.sha256) - {"mnist"}) == len(set(run.sha256.values())) - 1 == 3


def test_usps_stands_in_the_frame_of_mnist(tmp_path, write_packed, monkeypatch):
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    write_packed(tmp_path, "usps", shape=(16, 16, 1))
    made = dann.load_set(some_run(tmp_path, dataset="mnist"), "usps", 28).train.images
    assert made.shape == (40, 3, 28, 28) and made[:, :, 4:24, 4:24].float().mean() > 100
    assert not made[:, :, :4].any() and not made[:, :, 24:].any() and not made[..., :4].any()


def framed(digits):
    """(N,C,28,28) -> (N,32,32,3), as in the released MNIST-M: with a rim of 2 pixels."""
    return F.pad(digits, (2, 2, 2, 2)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def test_the_released_set_blends_digits_in_black_and_white_with_a_rim_of_two_pixels():
    """On white backgrounds every pixel of a digit is black, where MNIST's digit is not black, and
    nowhere else; next to a digit's edge the two sides are each other's inverse in all pictures."""
    root = image_data.data_root()
    if not all((root / "packed" / f"{name}.npz").exists()
               for name in ("mnist-m-released", "mnist")):
        pytest.skip("no released MNIST-M on this machine")
    released, mnist = (image_data.load(name, root, "cpu") for name in ("mnist-m", "mnist"))
    images = released.train.images
    digits = F.pad(dann.binarise(mnist.train.images[:len(images), 0]), (2, 2, 2, 2))
    assert torch.equal(released.train.labels, mnist.train.labels[:len(images)])
    white = ((images == 255) | (digits > 0)[:, None]).flatten(2).all(2)  # the backgrounds' channels
    assert white.sum() > 30
    pictures, channels = white.nonzero().T
    assert torch.equal(images[pictures, channels], 255 - digits[pictures])
    edge = digits[:3000, :, 1:] != digits[:3000, :, :-1]
    left, right = (part.float().mean(1)[edge]
                   for part in (images[:3000, ..., :-1], images[:3000, ..., 1:]))
    assert (left + right - 255).abs().median() < 6 and (left - right).abs().median() > 60


def write_released(root, images, digits):
    """Pictures (N,32,32,3) and their digits laid out as released: the same train and test."""
    for part in ("train", "test"):
        (root / "mnist_m" / f"mnist_m_{part}").mkdir(parents=True)
        for number, image in enumerate(images.numpy()):
            Image.fromarray(image).save(root / "mnist_m" / f"mnist_m_{part}" / f"{number:08}.png")
        lines = "".join(f"{number:08}.png {digit}\n" for number, digit in enumerate(digits))
        (root / "mnist_m" / f"mnist_m_{part}_labels.txt").write_text(lines)


def test_the_released_set_is_found_decoded_once_and_brought_to_28_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    monkeypatch.setitem(image_data.COUNTS, "mnist-m", (10, 10))
    digits = some_images(10, 1)
    digits[digits < 100] = 0
    write_released(tmp_path, framed(digits), range(10))
    assert image_data.on_disk(tmp_path) == ["mnist-m"]
    run = some_run(tmp_path, dataset="mnist")
    resized, middle = (dann.load_set(run, dann.PAIRS[f"mnist-released-{way}"][1], 28)
                       for way in ("resized", "middle"))
    assert (middle.train.labels.tolist() == list(range(10))
            and [*run.sha256] == ["mnist-m as released"])
    assert torch.equal(middle.train.images, digits.expand(-1, 3, -1, -1))
    assert resized.test.images.shape == (10, 3, 28, 28)
    # The digits are smaller.
    assert not resized.test.images[..., 0].any() and resized.test.images[..., 3].any()
    monkeypatch.setattr(image_data, "decode", None)
    again = run.load("mnist-m")
    assert again.sha256 == run.sha256["mnist-m as released"]


@pytest.mark.parametrize("damage,message", [
    ("fewer", "its train part is not 10 pictures"), ("missing", "cannot be read"),
    ("labels", "No such file"), ("rubbish", "its train part is not 10 pictures"),
    ("size", "sizes?")])
def test_a_released_set_that_is_not_whole_gets_one_line(tmp_path, monkeypatch, damage, message):
    monkeypatch.setitem(image_data.COUNTS, "mnist-m", (10, 10))
    write_released(tmp_path, framed(some_images(10, 1)), range(10))
    labels = tmp_path / "mnist_m" / "mnist_m_train_labels.txt"
    if damage == "fewer":
        labels.write_text("".join(labels.read_text().splitlines(True)[1:]))
    elif damage == "missing":
        (tmp_path / "mnist_m" / "mnist_m_test" / "00000003.png").unlink()
    elif damage == "labels":
        (tmp_path / "mnist_m" / "mnist_m_test_labels.txt").unlink()
    elif damage == "size":
        Image.new("RGB", (28, 28)).save(tmp_path / "mnist_m" / "mnist_m_train" / "00000003.png")
    else:
        labels.write_text(labels.read_text().replace("png 3", "png three"))
    with pytest.raises(InputError, match=message) as caught:
        image_data.load("mnist-m", tmp_path, "cpu")
    assert len(str(caught.value).splitlines()) == 1 and not list(tmp_path.glob("packed/*.npz"))


def test_without_the_released_set_its_rows_are_left_out_and_with_it_they_run(
        tmp_path, write_packed, monkeypatch, folders, capsys):
    small_mnist(tmp_path, write_packed, monkeypatch)
    arguments = ["--scale", "full", "--seeds", "0", "--device", "cpu", "--set", "steps=2",
                 "--set", "batch_size=8", *folders, "--rows", "mnist-released-*,"
                 "mnist-binarised/dann,mnist-mnistm/dann/shared-backgrounds"]

    def rows():
        lines = [json.loads(line) for path in (tmp_path / "results").rglob("dann.jsonl")
                 for line in path.read_text().splitlines()]
        return {line["row"] for line in lines if line["status"] == "ok"}

    assert dann.main(arguments) == 0
    assert rows() == {"mnist-binarised/dann", "mnist-mnistm/dann/shared-backgrounds"}
    out, error = capsys.readouterr()
    assert not error and [line for line in out.splitlines() if "left out" in line] == [
        f"mnist-released-*: left out, {tmp_path / 'mnist_m'} does not hold the released set"]
    monkeypatch.setitem(image_data.COUNTS, "mnist-m", (10, 10))
    write_released(tmp_path, framed(some_images(10, 1)), range(10))
    assert dann.main(arguments) == 0 and len(rows()) == 8


def test_rows_with_shared_backgrounds_measure_the_networks_of_the_pair_itself(
        tmp_path, write_packed, monkeypatch, folders):
    """Nothing else is trained; these rows see test digits on red pictures, the others on green."""
    small_mnist(tmp_path, write_packed, monkeypatch)
    seen, measure, fit, fitted = {}, dann.accuracy, trainer.Run.fit, []
    rows = [f"{PAIR}/{method}{more}" for method in ("source-only", "dann")
            for more in ("", "/shared-backgrounds")]

    def accuracy(run, model, test):
        seen[run.asked[0]] = model, test
        return measure(run, model, test)

    monkeypatch.setattr(dann, "accuracy", accuracy)
    monkeypatch.setattr(trainer.Run, "fit", lambda run, name, *rest, **options: fitted.append(
        name) or fit(run, name, *rest, **options))
    monkeypatch.setattr(dann, "figures", lambda *arguments: None)
    assert dann.main(["--scale", "small", "--seeds", "0", "--device", "cpu", "--set", "steps=3",
                      "--set", "batch_size=8", "--rows", ",".join(rows), *folders]) == 0
    assert seen.keys() == {*rows} and {*fitted} == {f"{PAIR}/source-only", f"{PAIR}/dann"}
    below = image_data.load("mnist", tmp_path, "cpu").test.images[:, 0] < 20
    for plain, shared in (rows[:2], rows[2:]):
        (model, own), (again, other) = seen[plain], seen[shared]
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                     again.state_dict().values()))
        assert torch.equal(own.labels, other.labels)
        assert (own.images[:, 1][below] > 150).all() and (other.images[:, 0][below] > 150).all()


# Training
def test_pairs_with_the_same_source_begin_with_the_same_weights_and_source_batches(tmp_path,
                                                                                   monkeypatch):
    """At 28 pixels and with the same network; the target's batches are the pair's."""
    begun = {}

    def fit(run, name, model, loss, batches, **options):
        first = [part for _, batch in zip(range(2), batches(0)) for part in batch]
        begun[name] = [value.clone() for value in model.state_dict().values()], first

    monkeypatch.setattr(trainer.Run, "fit", fit)
    run, domains = some_run(tmp_path), some_domains()
    pairs = [name for name, (source, *_, side) in dann.PAIRS.items()
             if source.startswith("mnist") and side == 28]
    assert len(pairs) == 6
    for pair in pairs:
        mean = torch.rand(3, 28, 28)  # the pair's own
        for method in ("source-only", "dann"):
            dann.pretrain(run, domains._replace(mean=mean), run.config, f"{pair}/{method}")
    weights, (source, target, later, _) = begun.pop(f"{PAIR}/source-only")
    for name, (others, (first, second, third, _)) in begun.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, others))
        for ours, theirs in ((source, first), (later, third)):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert torch.equal(target[0], second[0]) == name.startswith(PAIR)
    dann.pretrain(run, domains, run.config, "usps-mnist/dann")
    assert not torch.equal(begun["usps-mnist/dann"][1][0][0], source[0])


def trained(folder, method, domains=None, **settings):
    run = some_run(folder, **{"steps": 6, "batch_size": 16, **settings})
    return dann.pretrain(run, domains or some_domains(), run.config, f"{PAIR}/{method}").model, run


def test_strength_zero_is_source_only_bit_for_bit(tmp_path):
    source_only, _ = trained(tmp_path / "a", "source-only")
    strength0, run = trained(tmp_path / "b", "dann", strength=0)
    dann_model, _ = trained(tmp_path / "c", "dann", strength=5)
    untrained = untrained_of(run)
    for part in ("features", "label_head", "classifier"):
        pairs = list(zip(*(getattr(model, part).parameters()
                           for model in (source_only, strength0, dann_model, untrained))))
        assert all(torch.equal(a, b) for a, b, _, _ in pairs)
        assert not all(torch.equal(a, d) for a, _, _, d in pairs)  # it has learnt
        # And DANN has learnt something else.
        assert part != "features" or not any(torch.equal(a, c) for a, _, c, _ in pairs)
    assert not torch.equal(next(strength0.domain_head.parameters()),
                           next(untrained.domain_head.parameters()))


@pytest.mark.parametrize("method", set(dann.METHODS) - {"train-on-target"})
def test_target_labels_reach_nothing(tmp_path, method):
    """With the target's labels permuted, train and test, all weights are the same, bit for bit."""
    poisoned = some_domains()
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    for split in (poisoned.target.train, poisoned.target.test):
        split.labels = split.labels[shuffled]
    clean, _ = trained(tmp_path / "a", method)
    other, _ = trained(tmp_path / "b", method, poisoned)
    assert all(torch.equal(a, b)
               for a, b in zip(clean.state_dict().values(), other.state_dict().values()))


def test_target_labels_only_count_hits_in_subspace_alignment(tmp_path, monkeypatch):
    """The classifier is fitted on source labels, and the script hands over no label of the
    target's training images."""
    run, domains, fitted, handed = (
        some_run(tmp_path, steps=2, only=[f"{PAIR}/subspace-alignment"]), some_domains(200), [], [])
    probe, align = dann.evaluate.linear_probe, dann.subspace_alignment
    monkeypatch.setattr(
        dann.evaluate, "linear_probe",
        lambda x, y, *test, **options: fitted.append(y) or probe(x, y, *test, **options))
    monkeypatch.setattr(dann, "subspace_alignment",
                        lambda *arguments: handed.append(arguments[3]) or align(*arguments))
    dann.reproduce_pair(run, domains, PAIR)
    assert len(run.records) == 1 and len(fitted) == 1 and fitted[0] is domains.source.train.labels
    assert handed[0].images is domains.target.train.images and (handed[0].labels == -1).all()


def test_a_row_whose_training_fails_does_not_stop_the_others(tmp_path, folders, capsys,
                                                             monkeypatch):
    monkeypatch.setattr(dann, "domain_loss", lambda source, target: source.sum() * math.nan)
    rows = f"{PAIR}/source-only,{PAIR}/dann,{PAIR}/train-on-target"
    assert dann.main(["--scale", "smoke", "--rows", rows, "--set", "steps=3", *folders]) == 3
    error = capsys.readouterr().err.strip()
    assert (error.startswith(f"error: {PAIR}/dann: the loss is not finite")
            and len(error.splitlines()) == 1)
    (path,) = (tmp_path / "results").rglob("dann.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    status = {record["row"]: record["status"] for record in records}
    assert len(records) == 3 and status == {f"{PAIR}/source-only": "ok", f"{PAIR}/dann": "failed",
                                            f"{PAIR}/train-on-target": "ok"}


def test_two_ranks_equal_one(tmp_path, one_and_two_ranks):
    phases = one_and_two_ranks(dann, "--scale", "smoke",
                               "--rows", f"{PAIR}/dann,{PAIR}/source-only", "--set", "steps=4",
                               "--set", "precision=float32", "--set", "rate=0.05",
                               "--set", "shards=2")
    untrained = untrained_of(some_run(tmp_path)).state_dict()
    assert len(phases) == 2
    for phase, (one, two) in phases.items():
        moved = max(float((one[name] - start).abs().max()) for name, start in untrained.items())
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=moved / 1000, rtol=0,
                                       msg=lambda m: f"{phase} {name}: {m}")
        assert moved > 1e-3


def test_rows_that_may_use_target_labels_do(tmp_path):
    for method in ("train-on-target", "finetuned10"):
        models = []
        for name, domains in (("a", some_domains(120)), ("b", some_domains(120))):
            if name == "b":
                domains.target.train.labels = (domains.target.train.labels + 1) % 10
            run, row = (some_run(tmp_path / name, steps=3, finetune_steps=3, batch_size=16),
                        f"{PAIR}/{method}")
            models.append(dann.pretrain(run, domains, run.config, row).model
                          if method == "train-on-target" else
                          dann.finetune(run, domains, run.config, row, untrained_of(run)).model)
        assert not torch.equal(models[0].classifier.bias, models[1].classifier.bias)


def test_without_enough_target_labels_finetuning_is_left_out(tmp_path, capsys):
    run = some_run(tmp_path, only=[f"{PAIR}/finetuned10"])
    dann.reproduce_pair(run, some_domains(99), PAIR)
    assert not run.records and "finetuned10: left out" in capsys.readouterr().out


def test_the_domains_are_shuffled_independently(tmp_path, monkeypatch):
    """MNIST-M holds the digits of MNIST in the same order: one order for both would pair each digit
    with itself."""
    orders = []

    class Spy(Resident):
        def batches(self, order):
            seen = []
            orders.append(seen)
            for indices in order:
                seen.append(indices.tolist())
                yield self.images[indices], self.labels[indices]

    domains = some_domains(600)
    for image_set in (domains.source, domains.target):
        image_set.train = Spy(image_set.train.images, image_set.train.labels)
    monkeypatch.setattr(dann, "hide_labels", lambda split: split)
    trained(tmp_path, "dann", domains, steps=20)
    source, target = orders
    assert len(source) == len(target) == 20 and source[0] != target[0]
    same = sum(a == b for x, y in zip(source, target) for a, b in zip(x, y))
    assert same < 8  # of 320, about one in 600 by chance


def test_features_and_loss_see_both_domains_through_one_transform():
    model, images = some_network(0.3), some_images(4)
    torch.testing.assert_close(model.encode(images), model.features(images / 255 - 0.3))
    assert "mean" not in model.state_dict()  # it follows from the data
    hidden = dann.hide_labels(Resident(images, torch.arange(4)))
    assert hidden.labels.tolist() == [-1] * 4 and hidden.images is images


def test_tsne_keeps_two_clusters_apart():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 10, generator=generator)
    features[60:] += 8
    places = scatter.tsne(features, features[:, :2], generator, perplexity=15, iterations=250)
    near = torch.cdist(places, places).fill_diagonal_(math.inf).argmin(1)
    assert (places.shape == (120, 2)
            and ((near < 60) == (torch.arange(120) < 60)).float().mean() > 0.95)


# The script as a user meets it
def test_smoke_runs_every_row_and_keeps_to_deterministic_operations(tmp_path, folders, graphs):
    """Every row on drawn digits, with its figures; the graph of each training step is walked."""
    assert dann.main(["--scale", "smoke", "--set", "steps=5", "--set", "finetune_steps=2",
                      *folders]) == 0
    assert len(graphs) > 25 and not graphs.offenders()
    (path,) = (tmp_path / "results").rglob("dann.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {record["row"] for record in records}
    missing = {row for row in DECLARED["rows"] if row.startswith(PAIR)} - rows
    shared = {f"{PAIR}/{method}/shared-backgrounds" for method in ("source-only", "dann")}
    # There is a texture for each drawn digit.
    assert shared <= missing <= {*shared, f"{PAIR}/dann/gap-closed"}
    history = next(record["history"] for record in records if record["row"] == f"{PAIR}/dann")
    assert set(history) == {"loss", "label", "domain"} and history["domain"][-1][0] == 5
    names = {file.name for file in path.parent.iterdir()}
    assert {"dann.md", "dann_digits.png", "dann_tsne.png", "dann_learning.svg"} <= names


def own(source, target):
    return ["--scale", "smoke", "--rows", "own/*", "--set", f"source=folder:{source}",
            "--set", f"target=folder:{target}", "--set", "image_size=36", "--set", "steps=5",
            "--set", "batch_size=8"]


def test_a_run_over_several_pairs_resumes_in_the_middle(tmp_path, write_packed, monkeypatch,
                                                        folders):
    """Stopped in the second pair, it goes on there: what was done before neither changes identities
    nor is done again."""
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    write_packed(tmp_path, "mnist", shape=(28, 28, 1))
    write_packed(tmp_path, "usps", shape=(16, 16, 1))
    arguments = ["--scale", "small", "--seeds", "0", "--rows", "*usps*/source-only",
                 "--device", "cpu"]
    for key, value in dict(usps_steps=6, batch_size=8, precision="float32").items():
        arguments += ["--set", f"{key}={value}"]
    agreed, calls = trainer.Run.stop_agreed, []

    def stop(run, step, last):
        calls.append(step)
        return len(calls) == 10  # the fourth step of the second pair

    def records(folder):
        lines = [json.loads(line) for path in folder.rglob("*.jsonl")
                 for line in path.read_text().splitlines()]
        return [(line["row"], line["value"], line["data"], line["history"]) for line in lines]

    monkeypatch.setattr(trainer.Run, "stop_agreed", stop)
    assert dann.main([*arguments, *folders]) == 130
    monkeypatch.setattr(trainer.Run, "stop_agreed",
                        lambda run, step, last: calls.append(step) or False)
    assert dann.main([*arguments, *folders]) == 0
    assert calls == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]  # no step twice
    monkeypatch.setattr(trainer.Run, "stop_agreed", agreed)
    whole = ["--results", str(tmp_path / "whole"), "--runs", str(tmp_path / "runs2")]
    assert dann.main([*arguments, *whole]) == 0
    assert (records(tmp_path / "whole") == records(tmp_path / "results")
            and len(records(tmp_path / "whole")) == 2)


def refuse(*arguments, **options):
    raise OSError("no network")


def test_a_pair_whose_data_is_missing_does_not_stop_the_others(tmp_path, write_packed, monkeypatch,
                                                               folders, capsys):
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_packed(tmp_path, "mnist", shape=(28, 28, 1))
    write_packed(tmp_path, "cifar10")
    missing = ("svhn-mnist", "synnumbers-svhn", "synsigns-gtsrb")
    arguments = ["--scale", "paper", "--seeds", "0,1", "--device", "cpu", *folders,
                 *(word for each in ("steps=2", "batch_size=8") for word in ("--set", each))]
    assert dann.main([*arguments, "--rows", "*/source-only"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in errors] == [f"{pair}/* left out" for pair in missing]
    assert all("--data" in line for line in errors)
    (path,) = (tmp_path / "results").rglob("dann.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(each["row"], each["seed"]) for each in records] == [
        ("mnist-mnistm/source-only", seed) for seed in (0, 1)]
    assert path.with_suffix(".md").exists()
    assert dann.main([*arguments, "--rows", "svhn-mnist/*"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_for_svhn_to_mnist_alone_the_rate_stays_and_steps_are_more(tmp_path, monkeypatch):
    fitted = {}

    def fit(run, purpose, *arguments, steps, rate, **options):
        fitted[purpose.split("/")[0]] = steps, rate(0), rate(1)

    monkeypatch.setattr(trainer.Run, "fit", fit)
    monkeypatch.setattr(trainer.Run, "build", lambda run, *arguments, **options: nn.Linear(1, 1))
    config, _ = trainer.read_settings(dann.Config, DECLARED, "paper")
    run = trainer.Run(dann.__file__, config, "paper", DECLARED["rows"], results=tmp_path,
                      runs=tmp_path)
    for pair in dann.PAIRS:
        dann.pretrain(run, some_domains(), config, f"{pair}/dann")
    steps, first, last = fitted.pop("svhn-mnist")
    assert steps >= 230_000 and first == last == 0.01
    assert all(first == 0.01 and last == dann.learning_rate(1)
               for _, first, last in fitted.values())
    assert fitted["synnumbers-svhn"][0] == fitted["mnist-mnistm"][0] == 40_000


def test_plan_times_every_row_and_writes_nothing(tmp_path, folders, capsys):
    assert dann.main(["--scale", "smoke", "--plan", *folders]) == 0
    out = capsys.readouterr().out
    assert re.search(r"dann.*: 11 rows to do.* min a seed\n", out) and not list(tmp_path.iterdir())


def test_two_folders_of_ones_own_adapt(tmp_path, folders):
    source, target = (write_folder(tmp_path / name, counts=(24, 6), level=level)
                      for name, level in (("my photographs", 0), ("my sketches", 50)))
    assert dann.main([*own(source, target), *folders]) == 0
    (path,) = (tmp_path / "results").rglob("dann.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {record["row"] for record in records if record["status"] == "ok"}
    assert {"own/source-only", "own/dann", "own/train-on-target", "own/finetuned10"} <= rows
    assert len(records[0]["data"]) == 2  # both folders' hashes


WORDS = "zero one two three four five six seven eight nine".split()


@pytest.mark.parametrize("source,target", [
    ("mnist", WORDS), (WORDS, "mnist"), ("usps", "0123456789"), (WORDS, "0123456789"),
    ("mnist", "svhn"), ("cifar10", "stl10 without its monkeys")])
def test_equal_classes_get_equal_labels(tmp_path, write_packed, monkeypatch, source, target):
    """Whatever their alphabet, size and number of channels: a folder is as bright as its digit."""
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    names, shapes = [], {"mnist": (28, 28, 1), "usps": (16, 16, 1), "stl10": (96, 96, 3)}
    if source == "cifar10":
        target = [*CLASSES["stl10"]]
        target[target.index("monkey")] = "frog"
    for name, classes in (("a", source), ("b", target)):
        if isinstance(classes, str) and classes != "0123456789":
            write_packed(tmp_path, classes, shape=shapes.get(classes, (32, 32, 3)))
            names.append(classes)
            continue
        for part in ("train", "test"):
            for number, each in enumerate(classes):
                (tmp_path / name / part / each).mkdir(parents=True)
                Image.new("L", (30, 40), 20 * number).save(tmp_path / name / part / each / "0.png")
        names.append(f"folder:{tmp_path / name}")
    run = some_run(tmp_path, source=names[0], target=names[1])
    domains, labels = dann.load_domains(run, "own"), {}
    for side in (domains.source, domains.target):
        assert side.train.images.shape[1:] == side.test.images.shape[1:] == (3, 28, 28)
        for split in (side.train, side.test):
            if side.class_names:  # what the brightness says
                labels |= {int(image.max()) // 20: int(label)
                           for image, label in zip(split.images, split.labels)}
    if source == "cifar10":
        assert labels == {k: CLASSES["cifar10"].index(each) for k, each in enumerate(target)}
    elif source == WORDS:
        if target == "mnist":
            assert domains.target.train.labels.tolist()[:10] == [
                sorted(WORDS).index(word) for word in WORDS]
        assert labels == {k: sorted(WORDS).index(word) for k, word in enumerate(WORDS)}
    elif domains.target.class_names:
        assert labels == {k: k for k in range(10)}
    assert sorted({*domains.target.train.labels.tolist()}) == list(range(10))


@pytest.mark.parametrize("source,target,message", [
    ("mnist", "folder", "only in the source 0, 1, 2, 3, 4; only in the target a, b, c, d, e"),
    ("mnist", "cifar10", "only in the target airplane, automobile"),
    ("cifar10", "stl10", "only in the source frog; only in the target monkey"),
    ("mnist", "embedded", "only in the target embedded's class 0")])
def test_sets_of_other_classes_get_one_line(tmp_path, write_packed, monkeypatch, folders, capsys,
                                            source, target, message):
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    for name, shape in (("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3)), ("stl10", (96, 96, 3))):
        write_packed(tmp_path, name, shape=shape)
    if target == "folder":
        target = f"folder:{write_folder(tmp_path / 'a', classes='abcdefghij')}"
    assert dann.main(["--scale", "smoke", "--seeds", "0,1", "--set", f"source={source}",
                      "--set", f"target={target}", *folders]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not list((tmp_path / "results").rglob("*.jsonl"))


@pytest.mark.parametrize("case,message", [
    ("other classes", "only in the source dog; only in the target fox"), ("empty", "no images in"),
    ("one missing", "source and target go together"),
    ("missing", "no folder with train/<class>/ images"),
])
def test_bad_folders_get_one_line(tmp_path, folders, capsys, case, message):
    source, target = write_folder(tmp_path / "a", counts=(24, 6)), tmp_path / "b"
    if case == "other classes":
        write_folder(target, classes=("cat", "fox"))
    elif case == "empty":
        for part in ("train/cat", "train/dog", "test/cat", "test/dog"):
            (target / part).mkdir(parents=True)
    arguments = own(source, target)
    if case == "one missing":
        arguments = [word for word in arguments if not word.startswith("target=")]
        arguments.pop(arguments.index("--set", 6))
    assert dann.main([*arguments, *folders]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1, error
    assert not list((tmp_path / "results").rglob("*.jsonl"))


def test_a_set_that_needs_another_package_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    (tmp_path / "train_32x32.mat").write_bytes(b"x")

    def missing(*arguments, **options):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
    monkeypatch.setattr("torchvision.datasets.SVHN.__init__", missing)
    for there in (True, False):  # before and after a download
        if not there:
            (tmp_path / "train_32x32.mat").unlink()
        with pytest.raises(InputError,
                           match="'svhn': torchvision needs the package scipy") as caught:
            dann.load_set(some_run(tmp_path, dataset="mnist"), "svhn", 32)
        assert len(str(caught.value).splitlines()) == 1
