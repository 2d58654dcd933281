"""The invariants of the SwAV paper, cheap ones first; the last tests train tiny networks, stop and
resume them, on one rank and on two."""
import argparse
import copy
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy
import pytest
import torch
import torchvision
from conftest import write_folder
from torch.nn import functional as F

from papers import swav
from replicate import records, trainer
from replicate.data import ImageSet, InputError, Resident
from replicate.records import ROOT


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=6, size=40, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(seed),
                         dtype=torch.uint8)


def some_config(scale="smoke", **settings):
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return trainer.read_settings(swav.Config, swav.__file__, scale, 0, overrides)[0]


def some_run(folder, **settings):
    config = some_config(**{"precision": "float32", "shards": 2, **settings})
    return trainer.Run(swav.__file__, config, "smoke", {}, results=folder, runs=folder)


def some_network(run, name="swav", images=0):
    return run.build(swav.ClusteringNetwork, swav.variants(run.config)[name], images)


@pytest.fixture
def all_rows(monkeypatch):
    """The scale runs all rows."""
    init = trainer.Run.__init__
    monkeypatch.setattr(trainer.Run, "__init__", lambda run, *given, **named: init(
        run, *given, **{**named, "scale_rows": ["*"]}))


def some_data(count=64):
    split = Resident(some_images(count), torch.arange(count) % 10)
    return ImageSet("x", split, split, 10)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def random_scores(samples, prototypes, seed=0):
    return unit(samples, 128, seed=seed) @ unit(prototypes, 128, seed=seed + 100).T


# Sinkhorn
def slow_sinkhorn(scores, epsilon, iterations):
    """The paper's loop on float64: K x B, all to 1; rows to 1/K, columns to 1/B, times B."""
    q = torch.exp((scores.double() - scores.double().max()) / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("samples,prototypes,mass,entropy", [
    (256, 300, 0.01, 0.76), (512, 30, 0.02, 0.67), (4096, 3000, 0.01, 0.81)])
def test_codes_are_the_slow_reference_and_spread_evenly(samples, prototypes, mass, entropy):
    scores = random_scores(samples, prototypes)
    codes = swav.sinkhorn(scores)
    assert codes.dtype == torch.float32 and float(codes.min()) >= 0
    torch.testing.assert_close(codes.double(), slow_sinkhorn(scores, 0.05, 3), rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(codes.sum(1), torch.ones(samples), rtol=0, atol=1e-6)
    shares = codes.sum(0) * prototypes / samples
    assert float((shares - 1).abs().max()) < mass
    assert float((swav.sinkhorn(scores, iterations=10).sum(0) * prototypes / samples
                  - 1).abs().max()) < 1e-3
    assert float(-torch.special.xlogy(codes, codes).sum(1).mean()) / math.log(
        prototypes) == pytest.approx(entropy, abs=0.02)


def test_codes_do_not_change_with_shifts_and_follow_permutations():
    scores = random_scores(60, 12)
    codes = swav.sinkhorn(scores)
    torch.testing.assert_close(swav.sinkhorn(scores + 7), codes, rtol=1e-4, atol=1e-6)
    shifted = scores + torch.rand(60, 1, generator=generator())
    assert float((swav.sinkhorn(shifted) - codes).abs().max()) > 1e-4  # not yet converged
    torch.testing.assert_close(swav.sinkhorn(shifted, iterations=300),
                               swav.sinkhorn(scores, iterations=300), rtol=1e-3, atol=1e-5)
    rows, columns = (torch.randperm(60, generator=generator()),
                     torch.randperm(12, generator=generator()))
    torch.testing.assert_close(swav.sinkhorn(scores[rows][:, columns]), codes[rows][:, columns],
                               rtol=1e-5, atol=1e-7)


def test_identical_samples_get_exactly_uniform_codes_and_the_loss_of_a_guess():
    for prototypes in (3, 30, 300):
        codes = swav.sinkhorn(random_scores(1, prototypes).expand(64, -1))
        assert (codes.unique().numel() == 1
                and float(codes[0, 0]) == pytest.approx(1 / prototypes, rel=1e-6))
        rows = random_scores(1, prototypes).expand(64, -1)
        loss = float(swav.swapped_prediction_loss([rows] * 3, [codes, codes]))
        assert loss == pytest.approx(float(-(rows[0] / 0.1).log_softmax(0).mean()),
                                     rel=1e-5) and loss > math.log(prototypes)
        scores = [torch.full((64, prototypes), 0.3)] * 3
        assert float(swav.swapped_prediction_loss(scores, [codes, codes])) == pytest.approx(
            math.log(prototypes), abs=1e-5)


def test_extreme_softness():
    scores = random_scores(64, 8)
    torch.testing.assert_close(swav.sinkhorn(scores, 1e4), torch.full((64, 8), 1 / 8),
                               rtol=1e-3, atol=0)
    hard = swav.sinkhorn(scores, 1e-3, 1000)
    # exp(1 / 0.001) overflows even float64.
    assert hard.isfinite().all() and float(hard.max(1).values.mean()) > 0.97
    assert hard.sum(0).tolist() == pytest.approx([8] * 8, abs=0.01)
    assert swav.sinkhorn(torch.tensor([[1.0, -1], [1, -1]]), 1e-3).isfinite().all()
    torch.testing.assert_close(swav.sinkhorn(scores, iterations=0), (scores / 0.05).softmax(1))
    assert torch.equal(swav.sinkhorn(scores.bfloat16()), swav.sinkhorn(scores.bfloat16().float()))


# The loss
def test_the_loss_is_the_slow_reference_and_no_smaller_than_the_entropy_of_the_codes():
    scores = [random_scores(16, 10, seed) for seed in range(4)]
    codes = [swav.sinkhorn(each) for each in scores[:2]]
    losses = []
    for i in range(2):
        for v in range(4):
            if v != i:
                p = torch.exp(scores[v] / 0.1) / torch.exp(scores[v] / 0.1).sum(1, keepdim=True)
                losses.append(float(-(codes[i] * p.log()).sum() / 16))
    loss = float(swav.swapped_prediction_loss(scores, codes))
    assert loss == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert loss >= float(-torch.cat(codes).xlogy(torch.cat(codes)).sum(1).mean())
    two = swav.swapped_prediction_loss(scores[:2], codes)
    assert float(swav.swapped_prediction_loss(scores[1::-1], codes[::-1])) == pytest.approx(
        float(two), rel=1e-6)


def test_an_untrained_network_guesses_and_scores_are_float32(tmp_path):
    run = some_run(tmp_path, precision="bfloat16", prototypes=300)
    model = some_network(run)
    images = some_images(64)
    with run.autocast():
        embeddings = model(swav.make_views(images, generator(), run.config))
        with torch.autocast("cpu", enabled=False):
            loss, scores = swav.swav_loss(model, embeddings, run.config, True, False)
    assert {tensor.dtype for tensor in (loss, *embeddings, *scores)} == {torch.float32}
    assert all(float(each.detach().abs().max()) <= 1 + 1e-6 for each in scores)
    # Crops of noise have nothing in common, and random scores have variance 1 / 128: they cost half
    # of that over temperature^2.
    assert float(loss.detach()) == pytest.approx(math.log(300) + 0.5 / 128 / 0.1 ** 2, abs=0.15)


def test_views_that_agree_cost_less_than_a_guess_and_more_than_the_entropy_of_their_codes():
    scores = random_scores(256, 300)
    codes = swav.sinkhorn(scores)
    loss = float(swav.swapped_prediction_loss([scores, scores], [codes, codes]))
    assert float(-torch.special.xlogy(codes, codes).sum(1).mean()) < loss < math.log(300) - 0.5


def test_prototypes_and_queue_start_at_their_step(tmp_path, monkeypatch):
    run = some_run(tmp_path, pretext_epochs=3, freeze=2, queue=32, queue_start=1,
                   patience=99)  # two steps an epoch
    start, seen, real = some_network(run).prototypes.weight.detach().clone(), [], swav.swav_loss

    def spy(model, embeddings, config, learned, queued):
        weight = model.prototypes.weight
        state = learned, queued, torch.equal(weight, start), weight.grad is None
        made = real(model, embeddings, config, learned, queued)
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(30))
        seen.append((*state, model.queue.count))
        return made

    monkeypatch.setattr(swav, "swav_loss", spy)
    swav.pretrain(run, some_data(), run.config, "swav")
    assert seen == [(False, False, True, True, 0)] * 2 + [(False, True, True, True, 32)] * 2 + [
        (True, True, True, True, 32), (True, True, False, False, 32)]


def test_all_arms_start_from_the_same_weights(tmp_path):
    run = some_run(tmp_path)
    first = some_network(run).state_dict()
    for variant in swav.variants(run.config):
        other = some_network(run, variant, 64).state_dict()
        assert all(torch.equal(first[k], other[k]) for k in first
                   if k.startswith(("encoder.", "projection.")))


def test_no_gradient_flows_through_the_codes():
    z = [unit(16, 128, seed=seed).requires_grad_() for seed in range(2)]
    model = swav.ClusteringNetwork(some_config())
    loss, scores = swav.swav_loss(model, z, some_config(), True, False)
    loss.backward()
    codes = [swav.sinkhorn(each) for each in scores]
    fixed = [each.detach().clone().requires_grad_() for each in z]
    weight = model.prototypes.weight.detach()
    swav.swapped_prediction_loss([each @ weight.T for each in fixed], codes).backward()
    for each, constant in zip(z, fixed):  # as if the codes were given numbers
        torch.testing.assert_close(each.grad, constant.grad, rtol=1e-4, atol=1e-8)
    free = weight.clone().requires_grad_()
    swav.swapped_prediction_loss([each.detach() @ free.T for each in z], codes).backward()
    torch.testing.assert_close(model.prototypes.weight.grad, free.grad, rtol=1e-4, atol=1e-8)
    codes = [each.clone().requires_grad_() for each in codes]
    swav.swapped_prediction_loss([each.detach().requires_grad_() for each in scores],
                                 codes).backward()
    assert codes[0].grad is None and codes[1].grad is None
    p = (scores[1] / 0.1).softmax(1)  # by hand: view 1 is moved by the code of view 0 alone
    by_hand = ((p - codes[0]) / 0.1 / 16 / 2) @ weight
    torch.testing.assert_close(z[1].grad, by_hand.detach(), rtol=1e-3, atol=1e-7)


def test_two_crop_contrast_is_simclrs_loss():
    z = [unit(8, 128, seed=seed) for seed in range(2)]
    both = torch.cat(z)
    similarity = (both @ both.T / 0.1).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(similarity, torch.arange(16).roll(8))
    assert float(swav.simclr_loss(z, 0.1)) == pytest.approx(float(expected), rel=1e-5)
    assert swav.chance_loss(some_config(method="simclr", batch_size=8)) == pytest.approx(
        math.log(15))
    three = float(swav.simclr_loss([*z, unit(8, 128, seed=2)], 0.1))
    views, terms = [*z, unit(8, 128, seed=2)], []
    for v, i in ((v, i) for v in range(3) for i in range(2) if i != v):
        for n in range(8):
            own = views[v][n] @ views[i][n] / 0.1
            others = [views[v][n] @ views[j][m] / 0.1 for j in range(2) for m in range(8)
                      if m != n]
            terms.append(float(torch.stack([own, *others]).logsumexp(0) - own))
    assert three == pytest.approx(sum(terms) / len(terms), rel=1e-5)


# Prototypes and queue
def test_frozen_prototypes_stay_bit_identical_and_trained_ones_of_unit_length(tmp_path):
    settings = dict(weight_decay=0.1, pretext_epochs=3, patience=99)
    for freeze, same in ((3, True), (2, False)):  # two steps an epoch
        run = some_run(tmp_path, freeze=freeze, **settings)
        start = some_network(run).state_dict()
        model = swav.pretrain(run, some_data(), run.config, "swav").model
        assert torch.equal(model.prototypes.weight, start["prototypes.weight"]) == same
        assert not torch.equal(model.projection[0].weight, start["projection.0.weight"])
    # Every step starts with this.
    swav.swav_loss(model, [unit(4, 128)] * 2, run.config, True, False)
    torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(30))
    _, scores = swav.swav_loss(model, [unit(4, 128)] * 2, run.config, True, False)
    assert float(scores[0].detach().abs().max()) <= 1


def test_the_queue_is_first_in_first_out_and_of_no_use_before_it_is_full():
    queue = swav.FeatureQueue(2, 6, 1)
    for number in range(1, 6):
        assert len(queue.read(0)) == (6 if number > 3 else 0)  # three batches of two fill it
        queue.push(torch.tensor([[[number + 0.1], [number + 0.2]],
                                 [[-number - 0.1], [-number - 0.2]]]))
    assert queue.read(0).flatten().tolist() == pytest.approx([5.1, 5.2, 4.1, 4.2, 3.1, 3.2])
    assert queue.read(1).flatten().tolist() == pytest.approx([-5.1, -5.2, -4.1, -4.2, -3.1, -3.2])
    other = swav.FeatureQueue(2, 6, 1)
    other.load_state_dict(queue.state_dict())
    assert (torch.equal(other.read(0), queue.read(0))
            and len(swav.FeatureQueue(2, 6, 1).read(0)) == 0)


def test_the_queue_takes_part_in_the_codes_only_when_full():
    config = some_config(queue=40, batch_size=16)  # rounded down to 32
    model, plain = swav.ClusteringNetwork(config), swav.ClusteringNetwork(some_config())
    plain.prototypes.load_state_dict(model.prototypes.state_dict())
    assert model.queue.features.shape == (2, 32, 128) and plain.queue is None
    batches = [[unit(16, 128, seed=3 * number + view) for view in range(3)] for number in range(3)]
    losses = [[float(swav.swav_loss(each, z, config, False, True)[0]) for z in batches]
              for each in (model, plain)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]
    weight = model.prototypes.weight.detach()
    past = [torch.cat([batches[1][view], batches[0][view]]) for view in range(2)]
    codes = [swav.sinkhorn(torch.cat([past[view], batches[2][view]]) @ weight.T)[-16:]
             for view in range(2)]
    assert losses[0][2] == pytest.approx(float(
        swav.swapped_prediction_loss([z @ weight.T for z in batches[2]], codes)), rel=1e-5)
    before = model.queue.features.clone()
    swav.swav_loss(model, batches[0], config, False, False)  # not started yet
    assert torch.equal(model.queue.features, before)


# DeepCluster-v2
def test_kmeans_finds_clusters_and_keeps_centroids_without_samples():
    centres = unit(5, 128)
    features = F.normalize(
        centres.repeat(20, 1) + 0.02 * torch.randn(100, 128, generator=generator(1)), dim=1)
    found = [swav.spherical_kmeans(features, 5, 10, generator(seed)) @ centres.T
             for seed in range(9)]
    assert max(float(cosines.max(0).values.min()) for cosines in found) > 0.99
    alike = swav.spherical_kmeans(centres[:1].expand(10, -1).contiguous(), 3, 5, generator())
    assert alike.isfinite().all() and torch.allclose(alike.norm(dim=1), torch.ones(3))


def test_clusters_are_those_of_the_memory_which_then_takes_the_new_embeddings():
    config = some_config(method="deepcluster", prototypes=4)
    model = swav.ClusteringNetwork(config, images=10)
    model.memory.copy_(unit(2, 10, 128))
    model.centroids.copy_(unit(swav.HEADS, 4, 128, seed=1))
    numbers, z = torch.tensor([7, 2, 5]), [unit(3, 128, seed=seed) for seed in (2, 3, 4)]
    memory = model.memory.clone()
    expected = sum(float(F.cross_entropy(
        each @ model.centroids[head].T / 0.1,
        torch.stack([(memory[head % 2, n] @ model.centroids[head].T).argmax() for n in numbers])))
        for head in range(3) for each in z) / 9
    assert float(swav.deepcluster_loss(model, z, numbers, 0.1)[0]) == pytest.approx(
        expected, rel=1e-5)
    assert (torch.equal(model.memory[1, numbers], z[1])
            and torch.equal(model.memory[0, 3], memory[0, 3]))


# Crops and colours
def coordinates(count, side):
    """Images that hold each pixel's x in the first channel and its y in the second, as fractions,
    and the image's number in the third."""
    places = (torch.arange(side) + 0.5) / side
    return torch.stack([torch.stack([
        places.expand(side, -1), places[:, None].expand(-1, side),
        torch.full((side, side), float(n))]) for n in range(count)])


def test_crops_lie_inside_the_image_and_each_has_its_own_place():
    images = coordinates(300, 32)
    crops = swav.multi_crop(images, (24, 12), (2, 3), [(0.14, 1.0), (0.05, 0.14)], generator())
    assert [tuple(crop.shape) for crop in crops] == [(300, 3, 24, 24)] * 2 + [(300, 3, 12, 12)] * 3
    for crop, size, (low, high) in zip(crops, (24, 24, 12, 12, 12),
                                       [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 3):
        torch.testing.assert_close(
            crop[:, 2], torch.arange(300.0)[:, None, None].expand(-1, size, size))  # its own image
        assert (float(crop[:, :2].min()) >= 0.5 / 32 - 1e-6
                and float(crop[:, :2].max()) <= 1 - 0.5 / 32 + 1e-6)
        assert len(crop[:, 0, 0, 0].unique()) > 250  # places differ
        mirrored = crop[:, 0, 0, -1] < crop[:, 0, 0, 0]
        assert 110 < int(mirrored.sum()) < 190 and (crop[:, 1, -1, 0] > crop[:, 1, 0, 0]).all()
    (crop,) = swav.multi_crop(coordinates(5000, 16), (8,), (1,), [(0.2, 0.5)], generator())
    sides = ((crop[:, 0, 4, 4] - crop[:, 0, 4, 3]).abs() * 8,
             (crop[:, 1, 4, 4] - crop[:, 1, 3, 4]) * 8)  # of the image
    area, shape = sides[0] * sides[1], sides[0] / sides[1]
    assert (area.min() >= 0.2 - 1e-5 and area.max() <= 0.5 + 1e-5
            and float(area.mean()) == pytest.approx(0.35, abs=0.01))
    assert shape.min() >= 0.75 - 1e-4 and shape.max() <= 4 / 3 + 1e-4
    # No box is longer than the image.
    (whole,) = swav.multi_crop(images, (32,), (1,), [(1, 1)], generator())
    assert float((whole[:, 1, -1] - whole[:, 1, 0]).max()) == pytest.approx(31 / 32, abs=1e-5)
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(crops[2], crops[3])
    again = swav.multi_crop(images, (24, 12), (2, 3), [(0.14, 1.0), (0.05, 0.14)], generator())
    assert all(torch.equal(first, second) for first, second in zip(crops, again))


def test_a_crop_is_what_slicing_and_resizing_give(monkeypatch):
    image = torch.rand(1, 3, 16, 16, generator=generator())
    # An area of 3/16; with the least ratio, 3/4, a box 3/8 wide and 1/2 high, its middle at
    # (7/16, 1/2).
    drawn = [torch.tensor([[0.5], [0.0], [0.4], [0.5]]), torch.tensor([0.9])] + [
        torch.tensor([[0.5], [0.0], [0.4], [0.5]]), torch.tensor([0.1])]
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: drawn.pop(0))
    crop = swav.multi_crop(image, (8,), (2,), [(0, 3 / 8)], generator())
    window = F.interpolate(image[:, :, 4:12, 4:10], (8, 8), mode="bilinear")
    inner = slice(2, -2)  # at the window's edge a crop sees the pixels beyond
    for each in (crop[0], crop[1].flip(3)):  # the second one is mirrored
        torch.testing.assert_close(each[..., inner, inner], window[..., inner, inner],
                                   rtol=0, atol=1e-5)


def test_a_size_that_shrinks_its_boxes_is_cut_from_an_antialiased_image():
    """Of stripes one pixel wide a crop of 3/4 of the image's length or less shows grey; a box of
    the crop's size shows the stripes."""
    stripes = (torch.arange(32) % 2).float().expand(20, 3, 32, 32)
    contrast = {size: float(swav.multi_crop(stripes, (size,), (1,), [(1, 1)], generator())[0].std())
                for size in (8, 16, 20, 25, 26, 32)}
    assert (max(contrast[8], contrast[16], contrast[20]) < 0.05 and contrast[25] < 0.15
            and min(contrast[26], contrast[32]) > 0.25), contrast
    small = swav.multi_crop(stripes, (32, 8), (1, 1), [(0.5, 1), (0.04, 0.08)], generator())[1]
    assert float(small.std()) > 0.25  # boxes of 8 pixels
    places = swav.multi_crop(coordinates(200, 32), (8,), (1,), [(0.3, 1.0)], generator())[0][:, :2]
    assert 0 < float(places.min()) < 0.07 and 0.93 < float(places.max()) < 1  # of the whole image


def test_colours():
    images = torch.rand(400, 3, 6, 6, generator=generator())
    torch.testing.assert_close(swav.distort_colors(images, 0.0, 0.0, generator()), images,
                               rtol=1e-5, atol=1e-6)
    grey = swav.distort_colors(images, 0.0, 1.0, generator())
    torch.testing.assert_close(grey[:, 0], torch.einsum(
        "c,nchw->nhw", torch.tensor(swav.LUMA), images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grey[:, 1], grey[:, 0])
    made = swav.distort_colors(images, 1.0, 0.2, generator())
    assert made.min() >= 0 and made.max() <= 1
    colourless = (made - made[:, :1]).abs().amax((1, 2, 3)) < 1e-5
    assert 50 < int(colourless.sum()) < 115
    untouched = (made - images).abs().amax((1, 2, 3)) < 1e-4
    assert 40 < int(untouched.sum()) < 90  # one in five is not jittered, of these one in five grey
    flat = torch.full((400, 3, 4, 4), 0.4)
    levels = swav.distort_colors(flat, 1.0, 0.2, generator())
    assert float((levels - levels[:, :1]).abs().max()) < 1e-5  # greys stay grey
    assert len(levels[:, 0, 0, 0].unique()) > 250 and levels.min() < 0.1 and levels.max() > 0.7
    pure = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(400, -1, 2, 2) * 0.5
    turned = swav.distort_colors(pure, 1.0, 0.0, generator())[:, :, 0, 0]
    assert ((turned[:, 1] > turned[:, 2] + 0.05).any()  # to yellow
            and (turned[:, 2] > turned[:, 1] + 0.05).any())  # and to purple


def test_blur_is_a_gaussian_for_a_share_of_the_crops():
    flat = torch.full((4, 3, 32, 32), 0.3)
    torch.testing.assert_close(swav.blur(flat, 1.0, generator()), flat)
    dots = torch.zeros(200, 3, 112, 112)
    dots[:, :, 56, 56] = 1
    made = swav.blur(dots, 0.5, generator())
    torch.testing.assert_close(made.sum((2, 3)), torch.ones(200, 3))
    kept = made[:, 0, 56, 56] > 0.999
    assert 75 < int(kept.sum()) < 150 and torch.allclose(
        made, made.flip(2, 3).roll((1, 1), (2, 3)), atol=1e-6)
    assert torch.equal(swav.blur(dots[:2], 0.0, generator()), dots[:2])
    places = torch.arange(48.0) - 24
    for side in (48, 112):  # whatever the crop's size, up to 2 pixels
        dots = torch.zeros(300, 3, side, side)
        dots[:, :, 24, 24] = 1
        sigma = (swav.blur(dots, 1.0, generator())[:, 0, :48, :48].sum(2)
                 * places.square()).sum(1).sqrt()
        assert (1.8 < float(sigma.max()) < 2.01
                and float(sigma.median()) == pytest.approx(1.05, abs=0.2))


# Rates and optimisers
def test_rates_of_the_released_recipe():
    config = some_config("paper")
    rate = swav.warmed_cosine(config.pretext_rate, config.warmup)
    assert (rate(0) == pytest.approx(0.3) and rate(config.warmup) == pytest.approx(4.8)
            and rate(1) == pytest.approx(0.0048))
    assert (rate(config.warmup / 2) == pytest.approx(2.55)
            and swav.warmed_cosine(0.6, 0)(0) == pytest.approx(0.6))
    images = 1_281_167
    assert (images // config.batch_size == 312
            and round(config.freeze * images / config.batch_size) == 313)
    assert round(images / 256) == 5005 and config.warmup * config.pretext_epochs == 10
    assert (config.crop_sizes, config.crop_counts, config.prototypes, config.hidden) == (
        (224, 96), (2, 6), 3000, 2048)


def test_lars_is_the_slow_reference():
    """One tensor after the other, among them one of zeros, one without a gradient and one whose
    gradient is zero."""
    weights = [torch.randn(4, 3, generator=generator()), torch.randn(3, generator=generator(1)),
               torch.zeros(2), torch.ones(2), torch.ones(2, 2)]
    parameters = [weight.clone().requires_grad_() for weight in weights]
    optimizer = swav.LARS(parameters, momentum=0.9, decay=0.1, trust=0.01)
    optimizer.param_groups[0]["lr"] = 0.5
    buffers = [torch.zeros_like(weight) for weight in weights]
    for step in range(3):
        for number, p in enumerate(parameters):
            p.grad = None if number == 3 else torch.randn(
                p.shape, generator=generator(10 * step + number))
            p.grad = torch.zeros_like(p) if number == 4 else p.grad
        gradients = [p.grad for p in parameters]
        optimizer.step()
        for number, (weight, gradient, buffer) in enumerate(zip(weights, gradients, buffers)):
            if gradient is None:
                continue
            if weight.norm() > 0 and gradient.norm() > 0:
                gradient = (gradient + 0.1 * weight) * 0.01 * weight.norm() / (
                    gradient.norm() + 0.1 * weight.norm())
            buffers[number] = 0.9 * buffer + gradient
            weights[number] = weight - 0.5 * buffers[number]
    for p, weight in zip(parameters, weights):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-5, atol=1e-7)
    assert (torch.equal(parameters[3], torch.ones(2))
            and torch.equal(parameters[4], torch.ones(2, 2)))


# Networks and files
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_at_width_one_the_encoder_is_torchvisions(name):
    theirs = getattr(torchvision.models, name)().eval()
    encoder = swav.Encoder(name).eval()
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()
              if not key.startswith("fc.")}
    assert {key: tensor.shape for key, tensor in encoder.state_dict().items()} == shapes
    encoder.load_state_dict({key: tensor for key, tensor in theirs.state_dict().items()
                             if not key.startswith("fc.")})
    theirs.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), theirs(images), rtol=1e-4, atol=1e-5)
        assert [tuple(each.shape[1:]) for each in encoder.maps(images)] == [
            (encoder.channels // 2 ** (3 - block), 16 // 2 ** block, 16 // 2 ** block)
            for block in range(4)]
    with torch.device("meta"):
        assert swav.Encoder(name, stem="cifar").conv1.weight.shape == (64, 3, 3, 3)
        wide = sum(p.numel() for p in swav.Encoder("resnet50", width=2).parameters())
    assert wide == pytest.approx(94e6, rel=0.01)  # the paper's RN50-w2


FIRST = "module.conv1.weight"


def published(encoder, prefix="module."):
    """The weights as SwAV's are published: prefixed, with heads."""
    state = {prefix + key: tensor for key, tensor in encoder.state_dict().items()}
    heads = {"projection_head.0.weight": torch.zeros(8, encoder.channels),
             "prototypes.weight": torch.ones(3, 8)}
    return {**state, **{prefix + key: tensor for key, tensor in heads.items()}}


@pytest.mark.parametrize("wrap", [lambda state: state,
                                  lambda state: {"state_dict": state, "epoch": 3},
                                  lambda state: [state, 3]])
@pytest.mark.parametrize("network,width,stem,prefix", [
    ("resnet18", 0.125, "imagenet", "module."), ("resnet10", 0.25, "cifar", ""),
    ("resnet50", 0.125, "no-pool", "module.encoder.")])
def test_weights_load_whatever_their_prefix_and_heads(tmp_path, wrap, network, width, stem, prefix,
                                                      capsys):
    encoder = swav.Encoder(network, width, stem)
    state = published(encoder, prefix)
    if stem == "no-pool":  # published networks pool
        state = {key: tensor for key, tensor in state.items() if "projection_head" not in key}
    torch.save(wrap(state), tmp_path / "file")
    loaded = swav.load_encoder(some_run(tmp_path), tmp_path / "file",
                               "no-pool" if stem == "no-pool" else "imagenet")
    for (name, first), (_, second) in zip(encoder.state_dict().items(),
                                          loaded.state_dict().items()):
        assert torch.equal(first, second), name
    assert (type(loaded.maxpool) is type(encoder.maxpool)
            and f"{network}, width {width:g}, stem {stem}" in (said := capsys.readouterr().out))
    assert ("--set stem" in said) == (stem == "no-pool")  # where it would be heeded


@pytest.mark.parametrize("other", ["--evaluate=none.pt", "--plan"])
def test_what_goes_not_together_is_said(tmp_path, capsys, folders, other):
    assert swav.main(["--scale", "smoke", "--export", str(tmp_path / "a.pt"), other, *folders]) == 2
    error = capsys.readouterr().err
    assert error == "error: --export goes neither with --evaluate nor with --plan\n"


def numbered(encoder):
    """The weights as those of nn.Sequential(*children), which names them by number."""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    parts = {name: name.partition(".") for name in encoder.state_dict()}
    return {f"backbone.{numbers[parts[name][0]]}.{parts[name][2]}": w
            for name, w in encoder.state_dict().items()}


@pytest.mark.parametrize("wrap", [
    lambda e: {"teacher": {f"backbone.{k}": w for k, w in e.state_dict().items()},
               "student": {f"module.backbone.{k}": w + 1 for k, w in e.state_dict().items()},
               "args": argparse.Namespace(lr=0.1), "epoch": 9},
    lambda e: {"classy_state_dict": {"base_model": {"model": {
        "trunk": {f"_feature_blocks.{k}": w for k, w in e.state_dict().items()}}}},
        "loss": numpy.float64(1.5)},
    lambda e: {"state_dict": {**numbered(e), "projection_head.layers.0.weight": torch.ones(4, 4)}}])
def test_checkpoints_of_other_projects_are_read(tmp_path, wrap):
    encoder = swav.Encoder("resnet18", 0.125)
    torch.save(wrap(encoder), tmp_path / "file")
    loaded = swav.load_encoder(some_run(tmp_path), tmp_path / "file", "imagenet")
    assert all(torch.equal(first, second) for first, second in zip(encoder.state_dict().values(),
                                                                   loaded.state_dict().values()))


def test_which_of_two_networks_in_a_file_is_taken_is_said(tmp_path, capsys):
    encoder = swav.Encoder("resnet18", 0.125)
    weights = {f"model.{name}": weight for name, weight in encoder.state_dict().items()}
    torch.save({**weights, "average": encoder.state_dict()}, tmp_path / "file")
    swav.load_encoder(some_run(tmp_path), tmp_path / "file", "imagenet")
    assert "model. is taken, average. not" in capsys.readouterr().err


def test_a_network_in_a_file_is_known_by_its_content(tmp_path, capsys, folders):
    """A setting with the path alone would take records of an older file for those of a new one."""
    assert swav.main(["--scale", "smoke", "--set", "checkpoint=file.pt", *folders]) == 2
    assert "checkpoint: give it as --evaluate" in capsys.readouterr().err


def test_a_module_saved_whole_is_refused_with_the_way_out(tmp_path):
    torch.save(swav.Encoder("resnet18", 0.125), tmp_path / "file")
    with pytest.raises(trainer.InputError, match="save its state dict alone"):
        swav.load_encoder(some_run(tmp_path), tmp_path / "file", "imagenet")


@pytest.mark.parametrize("damage,message", [
    (lambda state: state["module.layer1.0.conv1.weight"].fill_(math.nan),
     "layer1.0.conv1.weight holds NaN"),
    (lambda state: state.pop("module.layer3.0.conv1.weight"),
     "not fit resnet18, .*resnet50: .*Missing key.*layer3.0.conv1.weight"),
    (lambda state: state.update({"module.layer2.7.conv1.weight": torch.zeros(1)}),
     "Unexpected key.*layer2.7.conv1.weight"),
    (lambda state: state.update({"module.layer4.0.conv2.weight": torch.zeros(2, 2)}),
     "size mismatch for layer4.0.conv2.weight"),
    (lambda state: [state.pop(key) for key in list(state) if "conv1" in key],
     "holds no conv1.weight"),
    (lambda state: state.update({FIRST: torch.ones(8, 1, 7, 7)}), "for images of 3 channels"),
    (lambda state: state.update({FIRST: state[FIRST].char()}), "conv1.weight is .*int8"),
    *((lambda state, change=change: state.update({FIRST: change(state[FIRST])}),
       f"conv1.weight is .*{kind}.*plain tensors")
      for change, kind in ((torch.Tensor.to_sparse, "sparse"), (lambda w: w.to("meta"), "meta"),
                           (lambda w: w.to(torch.complex64), "complex64"),
                           (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "qint8"))),
])
def test_files_that_do_not_fit_get_one_line(tmp_path, capsys, folders, write_packed, damage,
                                            message):
    write_packed(tmp_path)
    state = published(swav.Encoder("resnet18", 0.125))
    damage(state)
    torch.save(state, tmp_path / "file")
    assert swav.main(["--scale", "smoke", "--data", str(tmp_path), "--set", "dataset=cifar10",
                      "--evaluate", str(tmp_path / "file"), *folders]) == 2
    error = capsys.readouterr().err.strip()
    assert (len(error.splitlines()) == 1 and re.search(message, error)
            and str(tmp_path / "file") in error)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_files_that_are_none_get_one_line(tmp_path, capsys, folders, write_packed):
    write_packed(tmp_path)
    (tmp_path / "rubbish").write_bytes(b"x" * 300)
    torch.save(published(swav.Encoder("resnet18", 0.125)), tmp_path / "half")
    (tmp_path / "half").write_bytes((tmp_path / "half").read_bytes()[:5000])
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("rubbish", "copy or download it again"), ("half", "is cut short"),
                          ("missing", "no file"), ("pipe", "no file")):
        assert swav.main(["--scale", "smoke", "--data", str(tmp_path), "--set", "dataset=cifar10",
                          "--evaluate", str(tmp_path / name), *folders]) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and message in error
    assert (swav.main(["--scale", "smoke", "--evaluate"]) == 2
            and "--evaluate" in capsys.readouterr().err)
    assert swav.main(["--scale", "smoke", "--export", str(tmp_path / "x"), *folders]) == 2
    assert "torchvision has no resnet10 of width 0.125" in capsys.readouterr().err


def records_of(folder):
    return [json.loads(line) for path in sorted(folder.rglob("*.jsonl"))
            for line in path.read_text().splitlines()]


def settings(**values):
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def test_an_exported_network_loads_into_torchvision_and_probes_the_same(tmp_path, capsys, folders,
                                                                        write_packed):
    write_packed(tmp_path, train=32, test=20)
    options = ["--scale", "smoke", "--data", str(tmp_path), *folders, *settings(
        dataset="cifar10", network="resnet18", width=1, pretext_epochs=1, batch_size=16,
        precision="float32", shards=2)]
    assert swav.main([*options, "--rows", "swav/knn20,swav/linear"]) == 0
    assert swav.main([*options, "--export", str(tmp_path / "out.pt")]) == 0  # does not train again
    assert "min left" not in capsys.readouterr().out.split("swav/linear")[-1]
    exported = torch.load(tmp_path / "out.pt", weights_only=True)
    model = torchvision.models.resnet18()
    model.load_state_dict(exported, strict=True)
    (trained,) = (torch.load(path, weights_only=True)["model"]
                  for path in tmp_path.rglob("swav.pt"))
    assert torch.equal(model.layer4[1].conv2.weight, trained["encoder.layer4.1.conv2.weight"])
    for path in (tmp_path / "out.pt", next(tmp_path.rglob("swav.pt"))):
        assert swav.main([*options, "--evaluate", str(path),
                          "--rows", "checkpoint/knn20,checkpoint/linear"]) == 0
    values = [record["value"] for record in records_of(tmp_path / "results")]
    assert len(values) == 6 and values[:2] == values[2:4] == values[4:]


def test_small_floats_are_read_and_features_that_overflow_are_no_guess(tmp_path, capsys, folders,
                                                                       write_packed):
    write_packed(tmp_path)
    for change, status in ((lambda w: w.to(torch.float8_e4m3fn), 0), (lambda w: w * 1e38, 3),
                           (lambda w: w * 1e25, 3)):
        state = published(swav.Encoder("resnet18", 0.125))
        state[FIRST] = change(state[FIRST])
        torch.save(state, tmp_path / "file")
        assert swav.main(["--scale", "smoke", "--data", str(tmp_path), "--set", "dataset=cifar10",
                          "--evaluate", str(tmp_path / "file"), "--rows", "checkpoint/knn20",
                          *folders]) == status
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and all("statistics hold NaN or infinity" in error for error in errors)
    assert [r["status"] for r in records_of(tmp_path / "results")] == ["ok", "failed", "failed"]


def test_an_export_overwrites_nothing(tmp_path, capsys, folders):
    (tmp_path / "mine.pth").write_bytes(b"mine")
    for place, message in (("mine.pth", "mine.pth is there already"), ("", "is there already"),
                           ("mine.pth/x", "another place with --export FILE"),
                           ("new", "give one seed")):
        seeds = "0,1" if place == "new" else "0"
        assert swav.main(["--scale", "smoke", "--export", str(tmp_path / place),
                          "--seeds", seeds, *folders]) == 2
        printed = capsys.readouterr()
        assert (message in printed.err and len(printed.err.splitlines()) == 1
                and "min left" not in printed.out)
    assert (tmp_path / "mine.pth").read_bytes() == b"mine"


# Labels, config
def test_a_share_of_the_labels_is_a_share_of_every_class():
    labels = torch.arange(1000) % 10
    labels[-3:] = 10
    chosen = swav.share_of_labels(labels, 0.1, 0)
    assert labels[chosen].bincount().tolist() == [10] * 10 + [1] and len(chosen.unique()) == 101
    assert torch.equal(chosen, swav.share_of_labels(labels, 0.1, 0))
    assert not torch.equal(chosen, swav.share_of_labels(labels, 0.1, 1))


@pytest.mark.parametrize("row,rate,factor,images,passes", [
    ("supervised", 0.1, 1, 64, 3), ("supervised/percent1", 0.04, 1, 10, 60),
    ("supervised/percent10", 0.05, 1, 10, 8), ("swav/percent1", 0.02, 250, 10, 60),
    ("swav/percent10", 0.01, 20, 10, 8)])
def test_what_a_classifier_starts_from_and_is_trained_by(tmp_path, monkeypatch, row, rate, factor,
                                                         images, passes):
    run, seen = some_run(tmp_path, label_rates=[0.02, 0.01], head_factors=[250, 20],
                         label_passes=[60, 8], supervised_rate=0.1, scratch_rates=[0.04, 0.05],
                         supervised_epochs=3), []
    monkeypatch.setattr(run, "fit", lambda *given, **options: seen.append((*given[:2], options)))
    encoder = some_network(run).encoder
    swav.classify(run, some_data(), row, encoder)
    ((name, model, options),) = seen
    assert (name == row and not model.linear.weight.any()
            and options["steps"] == passes * images // run.config.label_batch)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.state_dict().values(),
                                                 encoder.state_dict().values()))
    assert [group.get("scale", 1) for group in options["optimizer"].param_groups] == [1, factor]
    assert options["rate"](run.config.warmup) == pytest.approx(rate)


@pytest.mark.parametrize("override,message", [
    ("network=vgg", "resnet10, resnet18, resnet50"), ("stem=large", "imagenet, no-pool, cifar"),
    ("crop_sizes=[32]", "as many crop_counts"), ("crop_sizes=[32, 16]", "at least 17 pixels"),
    ("crop_counts=[3, 2]", "two of the first"),
    ("crop_scales=[0.5, 0.2, 0.1, 0.2]", "least and largest share"),
    ("epsilon=0", "above 0"), ("prototypes=1", "at least 2"),
    ("queue=8", "at least the batch size"), ("label_passes=[3]", "label_passes .* two numbers"),
    ("blur=2", "at most 1"), ("patience=-1", "not be negative"), ("batch_size=1", "at least 2"),
])
def test_wrong_settings_are_named(override, message):
    with pytest.raises(InputError, match=message):
        trainer.read_settings(swav.Config, swav.__file__, "smoke", 0, [override])


def test_images_without_colours_are_grey(tmp_path, folders, write_packed):
    write_packed(tmp_path, "mnist", train=64, test=20, shape=(28, 28, 1))
    assert swav.main(["--scale", "smoke", "--data", str(tmp_path), "--rows", "swav/loss", *folders,
                      *settings(dataset="mnist", pretext_epochs=1)]) == 0
    assert records_of(tmp_path)[0]["status"] == "ok"


@pytest.mark.parametrize("scale", ["smoke", "demo", "small", "full", "paper"])
def test_variants_fit_every_scale_and_two_crops_see_as_many_pixels(scale):
    config = some_config(scale)
    variants = swav.variants(config)
    assert variants["swav"] == config and config.method == "swav"
    seen = [each.pretext_epochs * sum(view[0, 0].numel() for view in swav.make_views(
        some_images(2, 96), generator(), each))
            for each in (config, variants["two-crops"])]
    assert seen[0] == pytest.approx(seen[1]) and sum(variants["two-crops"].crop_counts) == 2
    epochs = {name: each.pretext_epochs for name, each in variants.items()}
    assert {epochs[name] for name in epochs
            if name.startswith("ablation/")} == {config.audit_epochs}
    assert {epochs[name] for name in ("swav", "simclr", "deepcluster")} == {config.pretext_epochs}


# Collapse
def test_a_collapse_ends_the_run_with_one_line_and_is_recorded_where_it_is_meant(
        tmp_path, capsys, folders, write_packed):
    write_packed(tmp_path, train=64, test=20)
    options = ["--scale", "smoke", "--data", str(tmp_path), *folders, *settings(
        dataset="cifar10", pretext_epochs=100, audit_epochs=100, batch_size=16, patience=3,
        freeze=1, pretext_rate=1, shards=2)]
    assert swav.main([*options, "--rows", "swav/knn20", *settings(epsilon=1)]) == 3
    error = capsys.readouterr().err.strip()
    assert (len(error.splitlines()) == 1 and "swav collapsed: over 200 steps" in error
            and "chance 3.401" in error)
    assert "--set epsilon=0.05 (now 1)" in error
    (record,) = records_of(tmp_path / "results")
    assert record["status"] == "failed" and record["error"] in error
    assert swav.main([*options, "--rows", "ablation/epsilon0.5/loss"]) == 0
    assert records_of(tmp_path / "results")[-1]["value"] > 99


def test_the_watch_sees_chance_and_one_prototype_that_takes_over():
    model, chance = swav.ClusteringNetwork(some_config()), math.log(30)

    def watched(loss, scores, **changed):
        model.watched.zero_()
        for step in range(20):
            scalars = swav.log_of_step(torch.tensor(loss), scores)
            swav.stop_at_collapse(model, some_config(**changed), "x", scalars, step + 1, 10)

    alike, apart = torch.eye(30)[:1].expand(40, -1), torch.eye(30)
    watched(0.99 * chance, [apart, apart])
    watched(1.01 * chance, [apart, apart])  # nothing is learnt yet
    with pytest.raises(trainer.TrainingFailed, match=(
            "over 10 steps .* one prototype took 100 % .* pretext_rate=0.15")):
        watched(1.0, [alike, alike])
    with pytest.raises(trainer.TrainingFailed, match="iterations=3 .now 0."):
        watched(chance, [apart, apart], iterations=0)
    with pytest.raises(trainer.TrainingFailed, match="pretext_rate=0.15, or --set patience=0"):
        watched(math.log(31), [], method="simclr", batch_size=16, epsilon=1)


@pytest.mark.parametrize("epochs", [3, 100])
def test_a_folder_of_a_few_pictures_is_no_collapse(tmp_path, capsys, folders, epochs):
    """Neither in the first steps nor once the watch has seen enough of them."""
    write_folder(tmp_path / "pictures", counts=(22, 4))
    options = ["--scale", "smoke", *folders, "--rows", "swav/loss", *settings(
        dataset=f"folder:{tmp_path / 'pictures'}", batch_size=16, shards=2, pretext_epochs=epochs,
        freeze=0.3, pretext_rate=1)]
    assert swav.main(options) == 0, capsys.readouterr().err
    (record,) = records_of(tmp_path / "results")
    assert record["steps"] == epochs * 44 // 16 and (epochs == 3 or record["value"] < 97)


@pytest.mark.parametrize("fault", ["epsilon=1", "iterations=0"])
def test_what_a_collapse_advises_helps(tmp_path, capsys, folders, fault):
    write_folder(tmp_path / "pictures", counts=(22, 4))
    options = ["--scale", "smoke", *folders, "--rows", "swav/loss", *settings(
        dataset=f"folder:{tmp_path / 'pictures'}", batch_size=16, shards=2, pretext_epochs=80,
        freeze=0.3, pretext_rate=1)]
    assert swav.main([*options, "--set", fault]) == 3
    error = capsys.readouterr().err
    assert "swav collapsed: over 200 steps" in error
    advised = [words.split()[0].strip(",") for words in error.split("--set ")[1:]]
    assert len(advised) == 2 and advised[1] == "patience=0"
    for advice in advised:
        assert swav.main([*options, "--set", fault, "--set", advice]) == 0


def test_use_of_prototypes():
    entropy, largest = swav.use_of_prototypes(torch.eye(8).repeat(3, 1))
    assert float(entropy) == pytest.approx(math.log(8)) and float(largest) == pytest.approx(1 / 8)
    entropy, largest = swav.use_of_prototypes(torch.eye(8)[:1].expand(5, -1))
    assert float(entropy) == 0 and float(largest) == 1


# Short training
def test_pictures_are_told_apart(tmp_path):
    """The loss leaves ln K, with the watch on, and most crops of an image end at the same
    prototype, while all are in use."""
    images = F.interpolate(torch.rand(64, 3, 3, 3, generator=generator()), 40,
                           mode="bilinear").mul(255).byte()
    split = Resident(images, torch.zeros(64, dtype=torch.int64))
    run = some_run(tmp_path, pretext_epochs=30, batch_size=32, jitter=0, grey=0,
                   crop_scales=[0.5, 1, 0.3, 0.5], freeze=2, width=0.25, prototypes=10,
                   pretext_rate=2, patience=5)
    trained = swav.pretrain(run, ImageSet("x", split, split, 2), run.config, "x")
    model, losses = trained.model, [mean for _, mean in trained.curves["loss"]]
    assert losses[-1] < 0.9 * math.log(10) < losses[0]
    assert trained.curves["ln K"][0][1] == pytest.approx(math.log(10), abs=1e-4)
    model.eval()
    with torch.no_grad():
        scores = [model.score(model.embed(swav.normalize(view)))
                  for view in swav.multi_crop(images.float() / 255, (32,), (2,), [(0.5, 1)],
                                              generator(5))]
    assert float((scores[0].argmax(1) == scores[1].argmax(1)).float().mean()) > 0.5
    assert float(swav.use_of_prototypes(scores[0])[0]) > 0.7 * math.log(10)


TRAINED = ["--rows", "swav/loss,deepcluster/loss,simclr/knn20"]
NOISE = ["--scale", "smoke", "--device", "cpu", *settings(
    dataset="cifar10", precision="float32", pretext_epochs=4, queue=64, freeze=0.2, queue_start=0,
    patience=99, pretext_rate=0.2, shards=2)]
ALL_ROWS = """
import os, signal, sys
from papers import swav
from replicate import records, trainer
init = trainer.Run.__init__
trainer.Run.__init__ = lambda run, *given, **named: init(\
run, *given, **{**named, "scale_rows": ["*"]})
write, left = trainer.write_atomically, int(sys.argv[1])

def dying(path, content):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

trainer.write_atomically = dying
sys.exit(swav.main(sys.argv[2:]))
"""


def into(folder):
    return ["--results", str(folder / "results"), "--runs", str(folder / "runs")]


def states_of(folder):
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.pt"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(data folder, folder of a run that was never stopped): twenty steps of each method on 160
    images of noise."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("whole")
    noise = some_images(200, 32).permute(0, 2, 3, 1).numpy()
    (data / "packed").mkdir()
    numpy.savez(data / "packed" / "cifar10.npz", x_train=noise[:160],
                y_train=numpy.arange(160) % 10, x_test=noise[160:], y_test=numpy.arange(40) % 10)
    init = trainer.Run.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Run, "__init__", lambda run, *given, **named: init(
            run, *given, **{**named, "scale_rows": ["*"]}))
        assert swav.main([*NOISE, *TRAINED, "--data", str(data), *into(folder)]) == 0
    return data, folder


def test_stopped_and_resumed_ends_in_the_same_bytes(tmp_path, whole, all_rows, monkeypatch):
    """Queue, prototypes, memory and centroids included; each phase is stopped at its 11th step."""
    data, folder = whole
    options = [*NOISE, *TRAINED, "--data", str(data), *into(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "stop_agreed", lambda run, step, last: step == 11)
        assert [swav.main(options) for _ in range(3)] == [130] * 3
    assert swav.main(options) == 0
    first, second = states_of(folder), states_of(tmp_path)
    assert set(first) == set(second) == {"swav.pt", "deepcluster.pt", "simclr.pt"}
    assert {"memory", "centroids"} < set(first["deepcluster.pt"]["model"])
    queue = first["swav.pt"]["model"]
    assert (queue["queue._extra_state"] == queue["queue.features"].shape[1] == 64
            and queue["queue.features"].norm() > 1)
    for name, state in first.items():
        assert all(torch.equal(values, second[name]["trace"][key])
                   for key, values in state["trace"].items()), name
        for key, tensor in state["model"].items():
            assert torch.equal(tensor, second[name]["model"][key]), f"{name} {key}"
    first, second = ([(record["row"], record["value"]) for record in records_of(each)]
                     for each in (folder, tmp_path))
    assert first == second


def test_two_ranks_equal_one_and_go_on_after_one_that_was_killed(tmp_path, whole):
    """torchrun with two processes: the same rows of data, the same loss to 1e-4 over 20 steps.
    They resume what one rank had begun when it was killed."""
    data, folder = whole
    script = tmp_path / "all_rows.py"
    script.write_text(ALL_ROWS)
    options = [*NOISE, *TRAINED, "--data", str(data), *into(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, str(script), "9", *options, "--rows", "simclr/knn20"], timeout=100,
        capture_output=True, text=True, env={**environment, "REPLICATE_CHECKPOINT_SECONDS": "0"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [(name, state["step"]) for name, state in states_of(tmp_path).items()] == [
        ("simclr.pt", 8)]
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", str(script), "-1", *options], capture_output=True,
                         text=True, timeout=200, env=environment)
    assert two.returncode == 0, two.stderr
    assert "simclr: resumed at step 8/20" in two.stdout
    first, second = states_of(folder), states_of(tmp_path)
    assert set(first) == set(second) == {"swav.pt", "deepcluster.pt", "simclr.pt"}
    for name, state in first.items():
        assert (len(state["trace"]["loss"]) == 20
                and state["trace"].keys() == second[name]["trace"].keys())
        # A sample between two clusters may go to the other.
        tolerance = 2e-2 if name == "deepcluster.pt" else 1e-4
        torch.testing.assert_close(second[name]["trace"]["loss"], state["trace"]["loss"], rtol=0,
                                   atol=tolerance, msg=lambda m: f"{name}: {m}")
        assert float(state["trace"]["loss"].std()) > 4 * tolerance, name
    torch.testing.assert_close(second["swav.pt"]["model"]["queue.features"],
                               first["swav.pt"]["model"]["queue.features"], rtol=0, atol=1e-3)
    records = records_of(tmp_path)
    assert {record["ranks"] for record in records} == {2} and len(records) == 3  # one writer


LOSES_ONE = """
import os, signal, sys
from papers import swav
from replicate import records, trainer
init = trainer.Run.__init__
trainer.Run.__init__ = lambda run, *given, **named: init(\
run, *given, **{**named, "scale_rows": ["*"]})
augment = trainer.Run.augment

def dying(run, function, images, purpose, step, **settings):
    if run.rank == 1 and step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return augment(run, function, images, purpose, step, **settings)

trainer.Run.augment = dying
sys.exit(swav.main(sys.argv[1:]))
"""


def test_a_rank_that_dies_ends_the_job_with_one_line_and_a_state_to_go_on_from(
        tmp_path, whole, all_rows, capsys):
    data, _ = whole
    script = tmp_path / "loses_one.py"
    script.write_text(LOSES_ONE)
    options = [*NOISE, "--rows", "simclr/knn20", "--data", str(data), *into(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "REPLICATE_CHECKPOINT_SECONDS": "0"}
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", str(script), *options],
                         capture_output=True, text=True, timeout=200, env=environment)
    assert two.returncode != 0
    lines = [line for line in two.stderr.splitlines()
             if line.startswith(("error:", "interrupted:"))]
    gone = "error: another rank is gone: the same command goes on from the state saved last"
    # torchrun ends the rank that is left.
    ended = "interrupted: the same command goes on from the state saved last"
    assert gone in lines and set(lines) <= {gone, ended}, two.stderr
    # There is no traceback of ours; torchrun adds its own report.
    assert 'File "' + str(ROOT) not in two.stderr
    assert swav.main(options) == 0
    assert "simclr: resumed at step 12/20" in capsys.readouterr().out


def test_every_kind_of_row_runs_and_keeps_to_deterministic_operations(
        tmp_path, folders, graphs, all_rows, write_packed):
    """The graph of every training step is walked."""
    write_packed(tmp_path, train=160, test=40)
    options = ["--scale", "smoke", "--data", str(tmp_path), *folders, *settings(
        dataset="cifar10", pretext_epochs=0.4, audit_epochs=0.4, supervised_epochs=0.4,
        label_passes=[40, 4], blur=0.5, queue=64, shards=2)]
    assert swav.main(options) == 0
    assert len(graphs) > 20 and not graphs.offenders()
    path = next((tmp_path / "results").rglob("swav.jsonl"))
    found = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in records.read_declared(swav.__file__)["rows"]
            if not row.startswith("checkpoint/")]
    assert ([record["status"] for record in found] == ["ok"] * len(rows)
            and {record["row"] for record in found} == set(rows))
    assert all(0 <= record["value"] <= 100 for record in found if record["metric"] == "accuracy")
    names = {file.name for file in path.parent.iterdir()}
    assert {"swav_nearest.png", "swav_pretext.svg", "swav_use.svg"} <= names


def test_probes_leave_the_network_as_it_is(tmp_path):
    run, data = some_run(tmp_path, label_passes=[40, 20]), some_data()
    model = some_network(run)
    before = copy.deepcopy(model.state_dict())
    swav.measures(run, trainer.Trained(model), run.config,
                  ["swav/knn20", "swav/linear", "swav/use"], data.train, data.test)
    swav.classify(run, data, "x/percent10", model.encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
               if torch.is_tensor(tensor))


def test_readmes_example_evaluates_networks_of_any_width(tmp_path, capsys, folders, write_packed):
    """Whatever network the scale itself would train."""
    write_packed(tmp_path, train=32, test=20)
    for number, encoder in enumerate((torchvision.models.resnet18(),
                                      swav.Encoder("resnet50", 0.25))):
        torch.save(encoder.state_dict(), tmp_path / f"{number}.pt")
        assert swav.main(["--scale", "smoke", "--data", str(tmp_path), "--set", "dataset=cifar10",
                          f"--evaluate={tmp_path / f'{number}.pt'}", *folders]) == 0
        assert capsys.readouterr().out.count(" %") == 3  # k-NN twice, and the linear probe
