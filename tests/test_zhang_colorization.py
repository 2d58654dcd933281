"""The invariants of the colorization paper, cheap ones first; the last tests train tiny networks
and colour pictures."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from papers import zhang_colorization as zhang
from replicate import records, trainer
from replicate.data import ImageSet, InputError, Resident

SETTINGS = records.ROOT / "papers" / "zhang_colorization.yaml"
BINS = zhang.gamut_bins()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=6, size=32, seed=0):
    """Smooth noise in vivid colours."""
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator(seed)).float()
    return F.interpolate(coarse, (size, size), mode="bilinear").byte()


def some_ab(count=4, size=16, seed=0):
    return zhang.rgb_to_lab(torch.rand(count, 3, size, size, generator=generator(seed)))[:, 1:]


def some_config(**settings):
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return trainer.read_settings(zhang.Config, SETTINGS, "smoke", 0, overrides)[0]


def some_run(folder, **settings):
    return trainer.Run(zhang.__file__, some_config(**settings), "smoke",
                       records.read_declared(zhang.__file__)["rows"], results=folder, runs=folder)


def some_network(loss="classification"):
    torch.manual_seed(0)
    return zhang.ColorizationNetwork("small", 0.1, BINS, loss, image_size=32)


# Colours
def test_the_313_colors_are_the_papers_row_by_row():
    ranges = {-90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100),
              -40: (-40, 100), -30: (-50, 100), -20: (-50, 100), -10: (-60, 100), 0: (-70, 100),
              10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90), 50: (-100, 80),
              60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0)}
    expected = [[a, b] for a, (low, high) in ranges.items() for b in range(low, high + 1, 10)]
    assert len(expected) == 313 and BINS.tolist() == expected
    assert [len(zhang.gamut_bins(step)) for step in (5, 15, 20)] == [1083, 159, 101]


def test_every_color_lies_in_a_cell_of_the_set():
    ab = some_ab(20, 64).permute(0, 2, 3, 1).flatten(0, 2)
    known = set(map(tuple, BINS.int().tolist()))
    low = (ab / 10).floor().int() * 10
    assert all((a + i, b + j) in known for a, b in set(map(tuple, low.tolist()))
               for i in (0, 10) for j in (0, 10))


def test_other_rules_give_other_counts():
    """Colours that are nearest to some screen colour: 261; inside the hull of all: 233 (the sheet
    of wrong turns)."""
    level = torch.arange(256, dtype=torch.float64) / 255
    u, v = torch.meshgrid(level, level, indexing="ij")
    faces = [torch.stack(face) for end in (0 * u, 0 * u + 1)
             for face in ((end, u, v), (u, end, v), (u, v, end))]
    ab = zhang.rgb_to_lab(torch.stack(faces))[:, 1:].permute(0, 2, 3, 1).flatten(0, 2)
    candidates = zhang.candidate_bins(BINS, 1)
    nearest = torch.cat([
        zhang.nearest_bins(part.view(-1, 2, 1, 1), BINS, 1, candidates)[1].flatten()
        for part in ab.float().split(50000)])
    assert len(nearest.unique()) == 261
    angle = torch.linspace(0, 2 * math.pi, 1801, dtype=torch.float64)[:-1]
    normals = torch.stack([angle.cos(), angle.sin()])
    extent = torch.cat([(ab @ part).amax(0) for part in normals.split(50, 1)])
    assert int((BINS.double() @ normals <= extent).all(1).sum()) == 233


def test_lab_and_back():
    rgb = torch.rand(8, 3, 64, 64, generator=generator())
    assert float((zhang.lab_to_rgb(zhang.rgb_to_lab(rgb)) - rgb).abs().max()) < 1e-6
    assert float((zhang.lab_to_rgb(zhang.rgb_to_lab(rgb.double()))
                  - rgb.double()).abs().max()) < 1e-13
    bytes_ = torch.randint(0, 256, (16, 3, 64, 64), generator=generator(1), dtype=torch.uint8)
    assert torch.equal((zhang.lab_to_rgb(zhang.rgb_to_lab(bytes_.float() / 255))
                        * 255).round().byte(), bytes_)


def test_the_fast_way_to_lab_is_the_exact_one():
    every = torch.randint(0, 256, (4, 3, 100, 100), generator=generator(), dtype=torch.uint8)
    # Greys, and black, on both sides of the bends.
    every[0] = torch.arange(10000).view(100, 100).remainder(256).byte()
    exact = zhang.rgb_to_lab(every.double() / 255)
    assert float((zhang.rgb_to_lab(every) - exact).abs().max()) < 1e-3
    with torch.autocast("cpu", torch.bfloat16):  # as probes and the semantic test call it
        assert float((zhang.rgb_to_lab(every) - exact).abs().max()) < 1e-3


def test_white_black_grey_and_red():
    def lab_of(*rgb):
        return zhang.rgb_to_lab(torch.tensor(rgb).view(1, 3, 1, 1)).flatten().tolist()
    assert (lab_of(1.0, 1.0, 1.0) == pytest.approx([100, 0, 0], abs=0.01)
            and lab_of(0.0, 0.0, 0.0) == [0, 0, 0])
    assert max(map(abs, lab_of(0.5, 0.5, 0.5)[1:])) < 0.02
    assert lab_of(1.0, 0.0, 0.0) == pytest.approx([53.24, 80.09, 67.20], abs=0.02)  # sRGB's red
    assert zhang.lab_to_rgb(torch.tensor([50.0, 120.0, 0.0]).view(
        1, 3, 1, 1)).flatten().tolist()[1] == 0  # outside: cut off


# Encoding and decoding
def dense(nearest, shares):
    """(N,H,W,k) both, as training has them -> the distribution over all colours (N,313,H,W)."""
    return torch.zeros(*shares.shape[:3], 313).scatter_(3, nearest, shares).permute(0, 3, 1, 2)


def encode_fast(ab, neighbors, candidates):
    """As training encodes."""
    return dense(*zhang.neighbor_shares(ab, BINS, neighbors, candidates=candidates))


@pytest.mark.parametrize("neighbors,top,entropy,mean", [(5, 0.6488, 1.135, 1.26),
                                                        (10, 0.6192, 1.333, 1.44)])
def test_soft_encoding_is_the_plain_definition(neighbors, top, entropy, mean):
    ab = some_ab()
    encoded = zhang.soft_encode(ab, BINS, neighbors)
    assert (encoded.shape == (4, 313, 16, 16)
            and (encoded > 0).sum(1).unique().tolist() == [neighbors])
    torch.testing.assert_close(encoded.sum(1), torch.ones(4, 16, 16))
    point = ab[2, :, 5, 7]
    distances = [math.dist(point.tolist(), bin_) for bin_ in BINS.tolist()]
    near = sorted(range(313), key=distances.__getitem__)[:neighbors]
    raw = {number: math.exp(-distances[number] ** 2 / 50) for number in near}
    for number in range(313):
        assert float(encoded[2, number, 5, 7]) == pytest.approx(
            raw.get(number, 0) / sum(raw.values()), abs=1e-5)
    on_a_color = zhang.soft_encode(torch.tensor([0.0, 0.0]).view(1, 2, 1, 1), BINS,
                                   neighbors).flatten()
    assert float(on_a_color.max()) == pytest.approx(top, abs=1e-4)
    assert float(torch.special.entr(on_a_color).sum()) == pytest.approx(entropy, abs=1e-3)
    assert float(torch.special.entr(encoded).sum(1).mean()) == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize("neighbors", [5, 10])
def test_encoding_as_trained_with_is_the_definition_in_float64(neighbors):
    ab = some_ab(4, 32, seed=7)
    points = ab.permute(0, 2, 3, 1).flatten(0, 2).double()
    squares, near = (points[:, None] - BINS.double()).square().sum(2).sort(1)
    raw = torch.exp(-squares[:, :neighbors] / 50)
    plain = torch.zeros(len(points), 313, dtype=torch.float64).scatter_(
        1, near[:, :neighbors], raw / raw.sum(1, keepdim=True))
    made = encode_fast(ab, neighbors, zhang.candidate_bins(BINS, neighbors))
    assert float((made.permute(0, 2, 3, 1).flatten(0, 2) - plain).abs().max()) < 1e-6


@pytest.mark.parametrize("neighbors", [1, 5, 10])
def test_the_table_of_candidates_changes_nothing(neighbors):
    ab = some_ab(8, 64, seed=3)
    table = zhang.candidate_bins(BINS, neighbors)
    assert table.shape[2] < 40
    plain, fast = (encode_fast(ab, neighbors, candidates) for candidates in (None, table))
    assert float((plain - fast).abs().max()) < 1e-6


def test_decoding_gives_the_color_back():
    ab = some_ab(8, 32)
    scores = zhang.soft_encode(ab, BINS).clamp_min(1e-30).log()
    error = (zhang.annealed_mean(scores, BINS, 1.0) - ab).norm(dim=1)
    assert float(error.mean()) == pytest.approx(0.22, abs=0.02) and float(error.max()) < 0.71
    hard = BINS[zhang.soft_encode(ab, BINS).argmax(1)].permute(0, 3, 1, 2)
    assert float((hard - ab).norm(dim=1).mean()) == pytest.approx(3.8, abs=0.1)


def test_annealed_mean_between_its_limits():
    logits = 3 * torch.randn(2, 313, 4, 4, generator=generator())
    probabilities = logits.softmax(1)
    torch.testing.assert_close(zhang.annealed_mean(logits, BINS, 1.0),
                               torch.einsum("nqhw,qc->nchw", probabilities, BINS))
    likeliest = BINS[logits.argmax(1)].permute(0, 3, 1, 2)
    torch.testing.assert_close(zhang.annealed_mean(logits, BINS, 0.001), likeliest, atol=1e-2,
                               rtol=0)
    ahead = logits + F.one_hot(logits.argmax(1), 313).permute(0, 3, 1, 2)
    torch.testing.assert_close(zhang.annealed_mean(ahead, BINS, 0.01), likeliest, atol=1e-2, rtol=0)
    centre = zhang.annealed_mean(logits, BINS, 1e6)[0, :, 0, 0]
    assert centre.tolist() == pytest.approx([15.69, 6.68], abs=0.01)
    directions = torch.randn(50, 2, generator=generator(2))
    assert ((zhang.annealed_mean(logits, BINS).permute(0, 2, 3, 1).flatten(0, 2)
             @ directions.T).amax(0)
            <= (BINS @ directions.T).amax(0)).all()  # inside the hull of the 313
    sharp = 60 * torch.eye(313).view(313, 313, 1, 1)  # at its corners
    for temperature in (0.01, 0.38, 1.0, 10.0):
        made = zhang.annealed_mean(sharp, BINS, temperature).flatten(1)
        assert ((made @ directions.T).amax(0) <= (BINS @ directions.T).amax(0) + 1e-3).all()
    powered = probabilities ** (1 / 0.38)
    torch.testing.assert_close(
        zhang.annealed_mean(logits, BINS, 0.38),
        torch.einsum("nqhw,qc->nchw", powered / powered.sum(1, keepdim=True), BINS),
        atol=1e-3, rtol=1e-4)


def test_rebalancing_weights():
    prior = torch.rand(313, generator=generator()) ** 4
    prior[:20] = 0
    prior = prior / prior.sum()
    for mix in (0.25, 0.5, 0.9):
        weights = zhang.rebalancing_weights(prior, mix)
        assert float((prior * weights).sum()) == pytest.approx(1, abs=1e-5)
        order = prior.argsort()
        assert (weights[order].diff() <= 1e-5 * weights.max()).all() and weights.isfinite().all()
    torch.testing.assert_close(zhang.rebalancing_weights(prior, 1.0), torch.ones(313))
    sharp = F.one_hot(torch.tensor(5), 313).float()
    weights = zhang.rebalancing_weights(sharp, 0.5)
    assert float(weights.max() / weights.min()) == pytest.approx(314, rel=1e-3)


# Measures
def test_auc_has_its_known_values():
    ab = some_ab(4, 32)
    chroma = ab.square().sum(1).sqrt()
    assert zhang.color_auc(ab, ab) == 1
    assert zhang.color_auc(torch.zeros_like(ab), ab) == pytest.approx(
        1 - float(chroma.clamp_max(150).mean()) / 150, abs=1e-6)
    thresholds = torch.arange(0, 150.001, 0.25)
    counted = torch.stack([(chroma <= t).float().mean() for t in thresholds])
    assert zhang.color_auc(torch.zeros_like(ab), ab) == pytest.approx(
        float(torch.trapezoid(counted, thresholds)) / 150, abs=1e-3)
    torch.testing.assert_close(zhang.color_auc(0.5 * ab, ab, torch.full(chroma.shape, 3.0)),
                               zhang.color_auc(0.5 * ab, ab))
    assert zhang.color_auc(0.5 * ab, ab) > zhang.color_auc(0.2 * ab, ab)
    # Vivid pixels count more.
    assert zhang.color_auc(0 * ab, ab, chroma) < zhang.color_auc(0 * ab, ab)
    assert zhang.color_auc(ab + 1e4, ab) == 0


def test_auc_falls_with_the_error():
    ab, weights = some_ab(2, 8), torch.rand(2, 8, 8, generator=generator(4))
    for each in (None, weights):
        values = [zhang.color_auc(ab + torch.tensor([miss, 0.0]).view(1, 2, 1, 1), ab, each)
                  for miss in range(0, 160, 10)]
        assert values == pytest.approx([1 - miss / 150 for miss in range(0, 150, 10)] + [0],
                                       abs=1e-5)


def test_recoloring_keeps_the_lightness():
    # Colours of a screen.
    ab = (5 * torch.randn(1, 2, 16, 16, generator=generator(), dtype=torch.float64)).clamp(-12, 12)
    lab = torch.cat([torch.linspace(30, 80, 256, dtype=torch.float64).view(1, 1, 16, 16), ab], 1)
    torch.testing.assert_close(zhang.rgb_to_lab(zhang.lab_to_rgb(lab)), lab, atol=1e-9, rtol=0)
    images = some_images()
    grey = zhang.recolor(images, lambda lab: 0 * lab[:, 1:])
    assert float((zhang.rgb_to_lab(grey)[:, 0] - zhang.rgb_to_lab(images)[:, 0]).abs().max()) < 0.3


def test_true_colors_give_the_picture_back():
    images = torch.randint(0, 256, (2, 3, 24, 24), generator=generator(), dtype=torch.uint8)
    assert torch.equal(zhang.recolor(images, lambda lab: lab[:, 1:]), images)


def test_mirrored_images_have_mirrored_targets():
    images, config = some_images(8), some_config()  # crops as large as the images
    plain, turned = (zhang.make_examples(each, generator(3), config, some_palette(),
                                         torch.arange(313.0)) for each in (images, images.flip(3)))
    assert torch.equal(turned[0], plain[0].flip(3))
    ab = zhang.rgb_to_lab(
        zhang.crop_and_flip(images, generator(3), 32))[:, 1:].flip(3)[..., ::4, ::4]
    assert torch.equal(turned[1], ab)
    torch.testing.assert_close(dense(*turned[2:4]), zhang.soft_encode(ab, BINS))


@pytest.mark.parametrize("loss", ["classification", "l2"])
def test_a_grey_image_gives_no_gradient(loss):
    images = some_images(3)
    images[1] = images[1, :1]
    _, ab, *targets, weights = zhang.make_examples(images, generator(), some_config(),
                                                   some_palette(), torch.ones(313))
    scores = torch.randn(3, 2 if loss == "l2" else 313, *ab.shape[2:], generator=generator(2),
                         requires_grad=True)
    made = (zhang.regression_loss(scores, ab, (weights > 0).float()) if loss == "l2" else
            zhang.classification_loss(scores, *targets, weights))
    (gradient,) = torch.autograd.grad(made["loss"], scores)
    assert [bool(each.any()) for each in gradient] == [True, False, True]


def test_grey_images_neither_teach_nor_count(tmp_path):
    images = some_images()
    images[2] = images[2, :1]
    ab = zhang.rgb_to_lab(images.float() / 255)[:, 1:]
    assert zhang.is_colored(ab).tolist() == [True, True, False, True, True, True]
    config, palette = some_config(), some_palette()
    *_, weights = zhang.make_examples(images, generator(), config, palette, torch.ones(313))
    assert weights.flatten(1).sum(1).ne(0).tolist() == [True, True, False, True, True, True]
    only, both = (zhang.color_measures("x", lambda lab: 0.5 * lab[:, 1:], palette,
                                       Resident(part, torch.zeros(len(part))))
                  for part in (images[[0, 1, 3]], images[:4]))
    assert only == both and only["x/chroma-ratio"] == pytest.approx(0.5)
    # All colours are equally frequent.
    assert only["x/auc-rebalanced"] == pytest.approx(only["x/auc-raw"])
    run, (colored, grey) = some_run(tmp_path), (Resident(part, torch.zeros(1))
                                                for part in (images[:1], images[2:3]))
    run.load = lambda *named: ImageSet("x", colored, grey, 1)
    with pytest.raises(InputError, match="all test images are grey"):
        zhang.reproduce(run)


def test_rebalanced_auc_weighs_each_pixel_by_its_true_colors_rarity():
    """Half of the pixels blue and found, half orange and missed by 30: raw counts them alike,
    rebalanced by what train holds."""
    colors = torch.tensor([[20.0, -60.0], [30.0, 60.0]])  # (2, 2), both among the 313
    prior = torch.full((313,), 1e-6)
    places = [(BINS == color).all(1).nonzero().item() for color in colors]
    prior[places] = torch.tensor([0.9, 0.1 - 311e-6])
    ab = colors.T.view(1, 2, 1, 2).repeat(1, 1, 16, 8)
    rgb = (zhang.lab_to_rgb(torch.cat([torch.full((1, 1, 16, 16), 60.0), ab], 1))
           * 255).round().byte()
    true = zhang.rgb_to_lab(rgb)[:, 1:]
    palette = zhang.Palette(BINS, zhang.candidate_bins(BINS, 5), prior)
    miss = torch.tensor([0.0, 30.0]).view(1, 1, 1, 2).repeat(1, 1, 16, 8)
    measures = zhang.color_measures("x", lambda lab: true + torch.cat([miss, 0 * miss], 1), palette,
                                    Resident(rgb, torch.zeros(1)))
    assert measures["x/auc-raw"] == pytest.approx(100 * (1 - 0.5 * 30 / 150), abs=0.01)
    # Bounded: the weights that train the full network.
    for kind, mix in (("rebalanced", 0), ("bounded", 0.5)):
        rare, common = (1 / ((1 - mix) * share + mix / 313) for share in (0.1, 0.9))
        assert measures[f"x/auc-{kind}"] == pytest.approx(
            100 * (1 - rare / (rare + common) * 30 / 150), abs=0.1)


def some_palette():
    return zhang.Palette(BINS, zhang.candidate_bins(BINS, 5), torch.ones(313) / 313)


def test_frequencies_are_of_train_images_and_smooth(tmp_path):
    blue = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    blue[:, 2] = 200
    palette = zhang.make_palette(some_run(tmp_path), Resident(blue, torch.zeros(3)))
    ab = zhang.rgb_to_lab(blue[:1].float() / 255)[0, 1:, 0, 0]
    assert float(palette.prior.sum()) == pytest.approx(1) and (palette.prior > 0).all()
    assert (palette.prior.argmax() == (BINS - ab).norm(dim=1).argmin()
            and 0.1 < float(palette.prior.max()) < 0.9)
    with pytest.raises(InputError, match="all images of 'embedded' are grey"):
        zhang.make_palette(some_run(tmp_path), Resident(blue[:, 2:].expand(-1, 3, -1, -1),
                                                        torch.zeros(3)))


def test_the_runs_palette_and_controls_are_of_train(tmp_path):
    blue, red = torch.zeros(2, 12, 3, 32, 32, dtype=torch.uint8)
    blue[:, 2] = red[:, 0] = 200
    train, test = (Resident(each, torch.arange(12) % 2) for each in (blue, red))
    run = some_run(tmp_path)
    run.only, run.scale_rows, run.load = ["random-colors/auc-raw"], ["*"], (
        lambda *named: ImageSet("x", train, test, 2))
    zhang.reproduce(run)
    a, b = (zhang.rgb_to_lab(each[:1])[:, 1:] for each in (blue, red))
    assert run.value("random-colors/auc-raw")["value"] == pytest.approx(
        100 * zhang.color_auc(a, b), abs=0.01)
    colorizer = zhang.make_colorizer(run, run.load(), zhang.make_palette(run, train),
                                     "random-colors", None)
    colors = colorizer(zhang.rgb_to_lab(red))
    torch.testing.assert_close(colors, a.expand_as(colors))


# Targets and loss
def test_only_the_full_method_weighs_colors(tmp_path):
    split = Resident(some_images(32), torch.zeros(32, dtype=torch.int64))
    run = some_run(tmp_path, precision="float32", batch_size=8, pretext_epochs=1)
    palette = zhang.make_palette(run, split)
    for variant, same in (("class", True), ("full", False)):
        trained = zhang.network(run, ImageSet("x", split, split, 2), palette, variant)
        loss, plain = (torch.tensor(trained.curves[name])[:, 1]
                       for name in ("loss", "cross_entropy"))
        assert torch.allclose(loss, plain, rtol=1e-4) == same


def test_targets_are_every_fourth_pixel_of_a_mirrored_crop():
    images, config = some_images(40, 48), some_config(crop_size=32, image_size=48)
    lightness, ab, *targets, weights = zhang.make_examples(images, generator(5), config,
                                                           some_palette(), torch.arange(313.0))
    crops = zhang.crop_and_flip(images, generator(5), 32)
    lab = zhang.rgb_to_lab(crops)
    encoded = dense(*targets)
    assert lightness.shape == (40, 1, 32, 32) and encoded.shape == (40, 313, 8, 8)
    torch.testing.assert_close(ab, lab[:, 1:, ::4, ::4])
    torch.testing.assert_close(lightness, lab[:, :1] - 50)
    torch.testing.assert_close(encoded, zhang.soft_encode(ab, BINS), atol=1e-6, rtol=0)
    assert torch.equal(weights, encoded.argmax(1).float())
    mirrored = 0
    for image, crop in zip(images, crops):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        straight, turned = ((windows == each).flatten(1).all(1).any()
                            for each in (crop, crop.flip(2)))
        assert straight or turned
        mirrored += bool(turned and not straight)
    assert 8 < mirrored < 32


def test_the_sparse_loss_is_the_dense_one_and_has_its_gradient():
    ab, weights = some_ab(3, 16), torch.rand(3, 16, 16, generator=generator(1)) * 5
    weights[1] = 0  # an image without colours
    scores = 3 * torch.randn(3, 313, 16, 16, generator=generator(2))
    one, other = scores.clone().requires_grad_(), scores.double().requires_grad_()
    made = zhang.classification_loss(
        one, *zhang.neighbor_shares(ab, BINS, 5, 5.0, zhang.candidate_bins(BINS, 5)), weights)
    entropies = -(other.log_softmax(1) * zhang.soft_encode(ab, BINS)).sum(1)
    plain = (weights * entropies).mean()
    assert float(made["loss"].detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert float(made["cross_entropy"].detach()) == pytest.approx(
        float(entropies[[0, 2]].mean().detach()), rel=1e-5)
    (gradient,), (expected,) = (torch.autograd.grad(made["loss"], one),
                                torch.autograd.grad(plain, other))
    torch.testing.assert_close(gradient.double(), expected, atol=1e-8, rtol=1e-3)


def test_loss_starts_at_a_guess_and_stays_above_the_targets_entropy():
    model, ab = some_network(), some_ab(4, 8)
    encoded, targets = zhang.soft_encode(ab, BINS), zhang.neighbor_shares(ab, BINS)
    scores = model(torch.randn(4, 1, 32, 32, generator=generator()))
    assert scores.shape == (4, 313, 8, 8)
    losses = zhang.classification_loss(scores, *targets, torch.ones(4, 8, 8))
    assert float(losses["loss"].detach()) == pytest.approx(math.log(313), abs=1e-5)
    best = zhang.classification_loss(encoded.clamp_min(1e-30).log(), *targets,
                                     torch.ones(4, 8, 8))["loss"]
    assert float(best) == pytest.approx(float(torch.special.entr(encoded).sum(1).mean()), abs=1e-4)
    for scale in (0.1, 1, 10):
        guess = encoded.clamp_min(1e-30).log() + scale * torch.randn(encoded.shape,
                                                                     generator=generator(1))
        assert zhang.classification_loss(guess, *targets, torch.ones(4, 8, 8))["loss"] > best + 1e-4


def test_a_pixels_gradient_is_multiplied_by_its_weight():
    scores = torch.randn(2, 313, 3, 3, generator=generator(), requires_grad=True)
    targets, weights = (zhang.neighbor_shares(some_ab(2, 3), BINS),
                        torch.rand(2, 3, 3, generator=generator(1)))
    weights[1, 2, 2] = 0
    plain, weighted = (torch.autograd.grad(
        zhang.classification_loss(scores, *targets, each)["loss"], scores)[0]
        for each in (torch.ones(2, 3, 3), weights))
    torch.testing.assert_close(weighted, weights[:, None] * plain)
    assert not weighted[1, :, 2, 2].any()


def test_regression_begins_from_the_full_network(tmp_path):
    """At a rate of next to nothing it ends where full did; only its last layer is its own."""
    split = Resident(some_images(32), torch.zeros(32, dtype=torch.int64))
    data = ImageSet("x", split, split, 2)
    for rate in (1e-3, 1e-12):
        run = some_run(tmp_path / str(rate), batch_size=8, pretext_epochs=1, pretext_rate=rate,
                       finetuning_epochs=0.5)
        palette = zhang.make_palette(run, split)
        full, l2 = (zhang.network(run, data, palette, name) for name in ("full", "l2-finetuned"))
        assert l2.steps == 2 and l2.model(torch.zeros(1, 1, 32, 32)).shape == (1, 2, 8, 8)
        moved = [float((one - other).detach().abs().max()) for one, other in zip(
            l2.model.blocks.parameters(), full.model.blocks.parameters())]
        assert (max(moved) > 1e-5) == (rate == 1e-3) and l2.model.architecture[2] == 1


# Networks
def test_shapes_and_sizes_of_the_papers_networks():
    model = zhang.ColorizationNetwork("paper").eval()
    with torch.no_grad():
        maps = model.maps(torch.zeros(1, 1, 64, 64))
        assert [tuple(each.shape[1:]) for each in maps] == [
            (64, 32, 32), (128, 16, 16), *[(256, 8, 8)], *[(512, 8, 8)] * 4]
        assert model.head(maps[-1]).shape == (1, 313, 16, 16)
    assert sum(p.numel() for p in model.parameters()) == 32_230_393
    alexnet = zhang.ColorizationNetwork("alexnet", 0.1)
    with torch.no_grad():
        assert alexnet(torch.zeros(2, 1, 176, 176)).shape == (2, 313, 44, 44)


def test_predictions_are_enlarged_onto_their_own_pixels():
    ab = torch.randn(2, 2, 8, 8, generator=generator())
    large = zhang.enlarge(ab, (32, 32), (32, 32))
    torch.testing.assert_close(large[..., ::4, ::4], ab)
    torch.testing.assert_close(large[..., 2, ::4], (ab[..., 0, :] + ab[..., 1, :]) / 2)
    double = zhang.enlarge(ab, (32, 32), (64, 64))
    assert double.shape == (2, 2, 64, 64)
    ramp = torch.arange(8.0).expand(1, 2, 8, 8)
    same, double = (zhang.enlarge(ramp, (32, 32), (side, side)) for side in (32, 64))
    # Pixels lie where they lay.
    torch.testing.assert_close(F.avg_pool2d(double, 2)[..., 1:-4], same[..., 1:-4])


def test_rescaling_makes_every_convolution_put_out_unit_deviation():
    torch.manual_seed(0)
    model = zhang.ColorizationNetwork("paper", 0.05, BINS).eval()
    lightness = 30 * torch.randn(8, 1, 32, 32, generator=generator())
    zhang.rescale(model, lightness)
    deviations = []
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            layer.register_forward_hook(
                lambda layer, inputs, output: deviations.append(output.std((0, 2, 3))))
    scores = model(lightness)
    assert len(deviations) == 23 and all(
        bool((each - 1).abs().max() < 0.01) for each in deviations[:-1]) and not scores.any()


# Config
@pytest.mark.parametrize("override,message", [
    ("crop_size=40", "multiple of 16"), ("crop_size=48", "do not fit"), ("mix=2", "at most 1"),
    ("loss=l1", "classification, l2"), ("network=vgg", "paper, small, alexnet"),
    ("step=50", "coarser ones too few"), ("neighbors=30", "at most 20"),
    ("temperature=0", "above 0"), ("second_momentum=1", "below 1"),
])
def test_wrong_settings_are_named(override, message):
    with pytest.raises(InputError, match=message):
        trainer.read_settings(zhang.Config, SETTINGS, "smoke", 0, [override])


def test_paper_scale_is_the_papers_schedule():
    config = trainer.read_settings(zhang.Config, SETTINGS, "paper")[0]
    assert (config.batch_size, config.crop_size, config.network, config.width) == (
        40, 176, "paper", 1.0)
    assert int(config.pretext_epochs * 1_281_167 / 40) == pytest.approx(450_000, rel=0.001)
    rate = trainer.stepped(config.pretext_rate, config.pretext_drops, 10 ** -0.5)
    assert [rate(step / 450_000) for step in (0, 201_000, 376_000)] == pytest.approx(
        [3.16e-5, 1e-5, 3.16e-6], rel=0.01)


# Short training
@pytest.mark.parametrize("variant", ["full", "l2", "alexnet"])
def test_two_worlds_of_one_color_each_are_told_apart(tmp_path, graphs, variant):
    """Dark images are blue, light ones orange: after a few steps the right colour is predicted from
    lightness alone."""
    levels = torch.tensor([[30, 40, 120], [240, 170, 90]], dtype=torch.uint8).repeat(40, 1)
    noise = torch.randint(-12, 13, (80, 1, 32, 32), generator=generator())
    images = (levels[:, :, None, None].int() + noise).clamp(0, 255).byte()
    split = Resident(images, torch.zeros(80, dtype=torch.int64))
    run = some_run(tmp_path, precision="float32", pretext_rate=0.01,
                   pretext_epochs=60 * 16.5 / 80, batch_size=16)
    palette = zhang.make_palette(run, split)
    data = ImageSet("x", split, split, 2)
    colorizer = zhang.make_colorizer(run, data, palette, variant,
                                     zhang.network(run, data, palette, variant).model)
    means = colorizer(zhang.rgb_to_lab(images[:2])).mean((2, 3))
    assert means[0, 1] < -15 and means[1, 1] > 15 and len(graphs) == 61 and not graphs.offenders()


def test_every_kind_of_row_runs_and_keeps_to_deterministic_operations(tmp_path, folders, graphs,
                                                                      monkeypatch):
    """A folder of two classes with one grey picture in it: each measure, each control, each
    network, and the figures."""
    root = write_folder(tmp_path / "set", counts=(24, 8), size=(48, 40))
    Image.new("L", (40, 40), 90).save(root / "train" / "cat" / "grey.png")
    wants = trainer.Run.wants

    def wants_of_all_rows(run, *globs):
        run.scale_rows = ["*"]
        return wants(run, *globs)

    monkeypatch.setattr(trainer.Run, "wants", wants_of_all_rows)
    rows = ["grey/auc-raw", "random-colors/auc-rebalanced", "centre/auc-raw", "l2/chroma-ratio",
            "l2/auc-rebalanced", "l2-finetuned/auc-bounded", "class/auc-rebalanced",
            "full/auc-rebalanced", "full/auc-raw", "truth/semantic", "full/semantic",
            "full/block7/linear", "random/block1/linear", "supervised-l/block4/linear",
            "full/block4/labels20", "supervised-l/labels20", "full/finetuned/labels20",
            "full/finetuned/labels100", "alexnet/block5/linear", "alexnet-random/block1/linear"]
    assert zhang.main(["--scale", "smoke", "--rows", ",".join(rows),
                       "--set", f"dataset=folder:{root}", "--set", "batch_size=8",
                       *(word for name in ("pretext", "finetuning", "supervised")
                         for word in ("--set", f"{name}_epochs=0.5")),
                       "--device", "cpu", *folders]) == 0
    assert len(graphs) > 15 and not graphs.offenders()
    (path,) = (tmp_path / "results").rglob("zhang_colorization.jsonl")
    records = {record["row"]: record for record in map(json.loads, path.read_text().splitlines())}
    assert set(rows) - records.keys() == {"full/finetuned/labels100"}  # classes have 24 images
    assert (records["full/auc-raw"]["history"]["cross_entropy"]
            and records["grey/auc-raw"]["steps"] == 0)
    names = {path.name for path in path.parent.iterdir()}
    assert {f"zhang_colorization_{name}.png"
            for name in ("pictures", "temperature", "bins")} <= names


def test_two_ranks_equal_one(tmp_path, one_and_two_ranks, write_packed):
    write_packed(tmp_path, train=192, test=20)
    ((one, two),) = one_and_two_ranks(
        zhang, "--scale", "smoke", "--data", str(tmp_path), "--rows", "full/auc-raw",
        "--set", "dataset=cifar10", "--set", "precision=float32", "--set", "pretext_epochs=1",
        "--set", "shards=2", "--set", "rescaled=true").values()
    for name in ("blocks.0.0.weight", "blocks.6.0.weight", "head.0.weight"):
        # Adam's steps are 1e-3 whatever the gradient.
        torch.testing.assert_close(two[name], one[name], atol=2e-3, rtol=1e-2)
    last = "head.4.weight"  # zero before
    assert (float(one[last].abs().max()) > 1e-3
            and float((two[last] - one[last]).norm()) < 0.05 * float(one[last].norm()))


# Use
@pytest.fixture
def checkpoint(tmp_path):
    model = some_network()  # whose last layer is zero: the mean of all colours everywhere
    path = tmp_path / "full.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


RAMP = (torch.arange(120).repeat(90, 1).byte() * 2).numpy()


def color(checkpoint, *words):
    return zhang.main(["--colorize", *map(str, words), "--checkpoint", str(checkpoint),
                       "--device", "cpu"])


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path):
    """Pictures of every kind, and files that are none."""
    source = tmp_path / "grey ones"
    (source / "more").mkdir(parents=True)
    grey = Image.fromarray(RAMP)
    for name in ("a.png", "b.webp", "d.jpg", "d.JPEG", "f.tif", "g.bmp", "h.gif", "h.gif.png",
                 "i.pgm", "more/a.png"):
        grey.save(source / name, lossless=True)
    Image.fromarray(RAMP.astype("uint16") * 257).save(source / "e.png")
    (source / "c.jpg").write_text("no picture")
    for name in (".DS_Store", ".hidden.png", "Thumbs.db", "notes.txt"):
        (source / name).write_bytes(b"x")
    return source


def test_of_several_networks_the_one_that_was_trained_longest_is_taken(tmp_path, capsys):
    Image.fromarray(RAMP).save(tmp_path / "in.png")
    state = some_network().state_dict()
    for number, (steps, more) in enumerate([(9, {"optimizer": {}}), (5, {}), (7, {}), (6, {})]):
        path = tmp_path / f"runs/zhang_colorization/{number}/full.pt"
        path.parent.mkdir(parents=True)
        torch.save({"model": state, "step": steps, **more}, path)
        os.utime(path, (number, number))

    def network(made):
        assert zhang.main(["--colorize", str(tmp_path / "in.png"), str(tmp_path / made), "--runs",
                           str(tmp_path / "runs")]) == 0
        return capsys.readouterr().out.splitlines()[0].partition("zhang_colorization/")[2]
    assert network("a.png") == "2/full.pt, 7 steps"
    for number in (1, 2, 3):
        (tmp_path / f"runs/zhang_colorization/{number}/full.pt").unlink()
    assert network("b.png") == "0/full.pt, 9 steps, not finished"


def test_the_transparent_level_of_a_deep_picture_stays_transparent(tmp_path, checkpoint):
    levels = np.full((20, 20), 30000, np.uint16)
    levels[:5] = 7
    Image.fromarray(levels).save(tmp_path / "in.png", transparency=7)
    assert color(checkpoint, tmp_path / "in.png", tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as picture:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    assert (alpha[:5] == 0).all() and (alpha[5:] == 255).all()


def test_what_lies_in_the_folder_to_write_to_is_said_to_be_left_out(tmp_path, checkpoint, capsys):
    for name in ("in/a.png", "in/made/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(RAMP).save(tmp_path / name)
    assert color(checkpoint, tmp_path / "in", tmp_path / "in/made") == 0
    assert "1 pictures; left out: 1 in the folder to write to" in capsys.readouterr().out


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, checkpoint, capsys,
                                                          monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.fromarray(RAMP).save(tmp_path / f"in/{name}.png")
    own = zhang.colorize

    def colorize(*arguments):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/b.png").write_text("precious")
        return own(*arguments)
    monkeypatch.setattr(zhang, "colorize", colorize)
    assert color(checkpoint, tmp_path / "in", tmp_path / "out") == 2
    assert (tmp_path / "out/b.png").read_text() == "precious" and (tmp_path / "out/a.png").exists()
    assert "out/b.png is there already" in capsys.readouterr().err


def test_a_name_that_is_too_long_leaves_out_one_picture(tmp_path, checkpoint, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "m" * 245 + ".png", "n" * 249 + ".gif", "z.png"):
        Image.fromarray(RAMP).save(tmp_path / "in" / name)
    assert color(checkpoint, tmp_path / "in", tmp_path / "out") == 2
    assert {path.name[0] for path in (tmp_path / "out").iterdir()} == {"a", "m", "z"}
    error = capsys.readouterr().err
    assert "is too long for a file's name" in error and len(error.splitlines()) == 1


def test_the_first_frame_of_an_animation_is_said_to_be_one(tmp_path, checkpoint, capsys):
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert color(checkpoint, tmp_path / "two.gif", tmp_path / "out.png") == 0
    assert "; the first of 2 frames" in capsys.readouterr().out


def test_a_folder_is_colored_and_what_is_no_picture_is_named(tmp_path, source, checkpoint, capsys):
    target, before = source / "colored", listing(source)
    assert color(checkpoint, source, target) == 2
    out, error = capsys.readouterr()
    names = {"a.png", "b.webp", "d.jpg", "d.JPEG", "f.tif", "g.bmp", "h.gif.png", "h.gif.png.png",
             "i.pgm.png", "more/a.png", "e.png"}
    assert listing(target).keys() == names and before.items() <= listing(source).items()
    assert len(error.splitlines()) == 1 and "c.jpg cannot be read" in error
    assert "12 pictures; left out: 1 .txt (not read here), 3 hidden" in out and "12/12" in out
    truth = zhang.rgb_to_lab(torch.from_numpy(RAMP).expand(1, 3, -1, -1))
    # Where this colour is in the gamut, lightness is the picture's own but for rounding.
    middle = slice(30, 90)
    for name in ("a.png", "e.png", "f.tif", "g.bmp"):
        with Image.open(target / name) as picture:
            assert picture.size == (120, 90) and picture.mode == "RGB"
            made = zhang.rgb_to_lab(pil_to_tensor(picture)[None])[..., middle]
        assert float((made[:, 0] - truth[:, 0, :, middle]).abs().max()) < 0.5
        torch.testing.assert_close(made[:, 1:].mean((2, 3)), torch.tensor([[15.69, 6.68]]),
                                   atol=0.3, rtol=0)
    whole = listing(source)
    # What was made is no input.
    assert color(checkpoint, source, target) == 2 and listing(source) == whole
    assert "11 of 12 would overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("words,message", [
    ("{s}/a.png {s}", "would overwrite"), ("{s}/a.png {s}/more/../a.png", "would overwrite"),
    ("{s} {s}", "would overwrite"), ("{s}/a.png {t}/link.png", "would overwrite"),
    ("{s}/a.png {t}/hard.png", "would overwrite"), ("{t}/link.png {s}/a.png", "would overwrite"),
    ("{s}/a.png {s}/d.jpg", "would overwrite"), ("{s} {t}/folder", "would overwrite"),
    ("{s} {s}/a.png", "is a folder"), ("{s} {t}/colored.png", "is a folder"),
    ("{s} {t}/colored.webp", "is a folder"), ("{s}/a.png {t}/b.xyz", "kinds: .png"),
    ("{s}/a.png {t}/b.gif", "kinds: .png"), ("{s}/a.png {s}/d.jpg/b.png", "cannot write"),
    ("{t}/empty {t}/out", "0 pictures; left out: 1 hidden")])
def test_no_file_is_overwritten_and_a_folder_needs_a_folder(tmp_path, source, checkpoint, capsys,
                                                            words, message):
    (source / "c.jpg").unlink()
    (tmp_path / "link.png").symlink_to(source / "a.png")
    (tmp_path / "hard.png").hardlink_to(source / "a.png")
    (tmp_path / "folder").symlink_to(source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    before, itself = listing(tmp_path), words in ("{s} {s}", "{s} {t}/folder")
    assert color(checkpoint, *(word.format(s=source, t=tmp_path) for word in words.split())) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error
    after = listing(tmp_path)
    assert before.items() <= after.items() and (itself or after == before)  # it adds i.pgm.png


@pytest.mark.parametrize("kind,kept", [("png", True), ("webp", True), ("tif", True), ("jpg", False),
                                       ("bmp", False), ("JPEG", False)])
def test_transparency_is_kept_or_said_to_be_lost(tmp_path, checkpoint, capsys, kind, kept):
    alpha = Image.linear_gradient("L").resize((60, 40))
    picture, exif = Image.new("RGBA", (60, 40), "gray"), Image.Exif()
    picture.putalpha(alpha)
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "in.png", exif=exif)
    assert color(checkpoint, tmp_path / "in.png", tmp_path / f"out.{kind}") == 0
    assert ("transparency is lost" in capsys.readouterr().out) != kept
    with Image.open(tmp_path / f"out.{kind}") as made:
        assert made.size == (40, 60) and made.mode == ("RGBA" if kept else "RGB")
        if kept:
            assert made.getchannel("A").tobytes() == alpha.transpose(Image.ROTATE_270).tobytes()
        else:
            assert min(made.getpixel((38, 30))) > 225  # white where it was clear


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_no_picture_gets_one_line(tmp_path, source, checkpoint, capsys,
                                                    monkeypatch, fault):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync" if fault == "full" else "pathlib.Path.mkdir", fail)
    assert color(checkpoint, source / "a.png", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "cannot write" in error and "No space left" in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_gigantic_picture_is_named_and_the_rest_goes_on(tmp_path, checkpoint, capsys):
    for name, size in (("a.png", (20000, 10000)), ("b.png", (1, 300)), ("c.png", (20, 20))):
        Image.new("1", size).save(tmp_path / name)
    assert color(checkpoint, tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (len(error.splitlines()) == 1 and "a.png cannot be read" in error
            and listing(tmp_path / "out").keys() == {"b.png", "c.png"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, checkpoint, capsys, value):
    state = torch.load(checkpoint)
    state["model"]["blocks.3.0.weight"][0, 0, 0, 0] = value
    torch.save(state, checkpoint)
    Image.new("L", (20, 20), 100).save(tmp_path / "in.png")
    assert color(checkpoint, tmp_path / "in.png", tmp_path / "out.png") == 2
    error = capsys.readouterr().err
    assert (len(error.splitlines()) == 1 and "blocks.3.0.weight holds NaN or infinity" in error
            and not (tmp_path / "out.png").exists())


@pytest.mark.parametrize("arguments,message", [
    (["--colorize", "nowhere", "out"], "no picture or folder"),
    (["--colorize", "in.png"], "expected 2 arguments"),
    (["--colorize", "in.png", "in.png"], "would overwrite"),
    (["--colorize", "in.png", "out.png", "--runs", "."], "no trained network in ."),
    (["--colorize", "in.png", "out.png", "--checkpoint", "in.png"], "is no checkpoint"),
    (["--colorize", "in.png", "out.png", "--checkpoint", "/dev/zero"], "no file /dev/zero"),
])
def test_bad_use_gets_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (20, 20), 100).save("in.png")
    assert zhang.main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error and not (tmp_path / "out.png").exists()


def test_sets_without_colors_or_of_another_size_get_one_line_whose_advice_works(
        tmp_path, write_packed, folders, capsys):
    write_packed(tmp_path, "mnist", shape=(28, 28, 1))
    write_packed(tmp_path, "cifar10", train=60)
    arguments = ["--scale", "small", "--seeds", "0", "--rows", "grey/auc-raw",
                 "--data", str(tmp_path), "--device", "cpu", *folders]
    for name in ("mnist", "cifar10"):
        assert zhang.main([*arguments, "--set", f"dataset={name}"]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and ("1 colour channel" in error) == (name == "mnist")
        advice = error.partition(": --set ")[2].split()
        assert zhang.main([*arguments, "--set", f"dataset={name}", "--set", *advice,
                           "--force"]) == 0


def test_networks_trained_with_runs_are_found(tmp_path, folders, capsys):
    Image.fromarray(RAMP).save(tmp_path / "in.png")
    assert zhang.main(["--scale", "smoke", "--rows", "full/auc-raw", "--device", "cpu",
                       *folders]) == 0
    words = [sys.executable, "papers/zhang_colorization.py", "--colorize", tmp_path / "in.png",
             tmp_path / "out.png", *folders]
    done = subprocess.run(words, capture_output=True, text=True, cwd=records.ROOT)
    assert (done.returncode == 0
            and f"network {tmp_path}/runs/zhang_colorization/" in done.stdout), done.stderr


def test_a_large_picture_takes_less_than_two_gigabytes(tmp_path):
    checkpoint = tmp_path / "full.pt"
    torch.save({"model": zhang.ColorizationNetwork("paper", 1.0, BINS,
                                                   image_size=256).state_dict()}, checkpoint)
    Image.linear_gradient("L").resize((4000, 3000)).save(tmp_path / "large.jpg")
    # getrusage counts the parent's memory, too.
    code = ("import re, sys; from papers import zhang_colorization as z; "
            "status = z.main(sys.argv[1:]); "
            "print(status, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
    done = subprocess.run(
        [sys.executable, "-c", code, "--colorize", tmp_path / "large.jpg", tmp_path / "out.png",
         "--checkpoint", checkpoint, "--device", "cpu"],
        capture_output=True, text=True, cwd=records.ROOT)
    status, kilobytes = done.stdout.split()[-2:]
    assert status == "0" and int(kilobytes) < 2e6, done.stderr
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (4000, 3000)
