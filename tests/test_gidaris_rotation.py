"""The invariants of the rotation paper, cheap ones first; the last tests train tiny networks on real steps."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from papers import gidaris_rotation as rotation
from replicate import evaluate, trainer


def normalize(images):
    return rotation.normalize(images, rotation.Config.mean, rotation.Config.deviation)


def some_images(count=6, size=32, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_order_and_labels_of_the_four_turns():
    images = some_images()
    turned, turns = rotation.rotate_four_ways(images)
    assert turned.shape == (24, 3, 32, 32) and turned.dtype == torch.uint8
    assert turns.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert torch.equal(turned[:6], images)
    assert torch.equal(turned[12:18], images.flip(2, 3))  # half a turn is a double flip
    assert torch.equal(turned[6:12], images.transpose(2, 3).flip(2))  # counter-clockwise


def test_counter_clockwise_is_as_seen_on_the_screen():
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 0, 3] = 1  # top right goes to top left
    assert rotation.rotate_four_ways(image)[0][1, 0, 0, 0] == 1


def test_four_quarter_turns_are_the_identity_and_keep_every_pixel():
    images = some_images()
    once = images
    for _ in range(4):
        once = rotation.rotate_four_ways(once)[0][6:12]
        assert torch.equal(once.flatten(2).sort().values, images.flatten(2).sort().values)
    assert torch.equal(once, images)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="32 x 30"):
        rotation.rotate_four_ways(torch.zeros(2, 3, 32, 30))


def test_flip_and_turn_do_not_commute():
    images = some_images()

    def quarter(x):
        return torch.rot90(x, 1, (2, 3))

    assert torch.equal(quarter(images).flip(3), torch.rot90(images.flip(3), 3, (2, 3)))
    assert not torch.equal(quarter(images.flip(3)), quarter(images).flip(3))


@pytest.mark.parametrize("degrees", [(0, 90, 180, 270), (0, 180), (90, 270), tuple(range(0, 360, 45))])
def test_classes_are_balanced_so_a_constant_answer_is_chance(degrees):
    turned, labels = rotation.rotate(some_images(8), degrees)
    ways = len(degrees)
    assert len(turned) == len(labels) == 8 * ways
    assert labels.bincount().tolist() == [8] * ways
    result = rotation.rotation_loss(torch.zeros(8 * ways, ways), labels)
    assert float(result["loss"]) == pytest.approx(math.log(ways), abs=1e-6)
    assert float(result["accuracy"]) == pytest.approx(1 / ways)


def test_subsets_hold_the_turns_they_name():
    images = some_images()
    four, _ = rotation.rotate_four_ways(images)
    assert torch.equal(rotation.rotate(images, (0, 180))[0], torch.cat([four[:6], four[12:18]]))
    assert torch.equal(rotation.rotate(images, (90, 270))[0], torch.cat([four[6:12], four[18:]]))


def test_eight_turns_show_no_corner_and_no_difference_in_sharpness():
    """Deviation 2: on white images no copy has a dark corner; on noise all copies are equally sharp within 10 %."""
    white = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    turned, _ = rotation.rotate_eight_ways(white)
    assert turned.shape == (16, 3, 22, 22)
    assert int(turned.min()) == 255
    noise = some_images(64, seed=3)
    turned, labels = rotation.rotate_eight_ways(noise)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        assert torch.equal(turned, rotation.rotate_eight_ways(noise)[0])
    sharpness = torch.stack([turned[labels == k].float().std() for k in range(8)])
    assert sharpness.max() / sharpness.min() < 1.10, sharpness
    # the turn itself: copies two eighths apart are exact quarter turns of each other, 45 degrees is counter-clockwise
    assert torch.equal(turned[labels == 2], torch.rot90(turned[labels == 0], 1, (2, 3)))
    wedge = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    wedge[:, :, :14, 14:18] = 255  # a bar from the centre to the top
    corner = rotation.rotate_eight_ways(wedge)[0][1].float()
    assert corner[:, :11, :11].sum() > 5 * corner[:, :11, 11:].sum()  # now points to the top left


@pytest.mark.parametrize("blocks,parameters", [(3, 1_004_484), (4, 1_411_140), (5, 1_817_796)])
def test_parameters_of_the_network_in_network(blocks, parameters):
    assert sum(p.numel() for p in rotation.NetworkInNetwork(blocks).parameters()) == parameters


def test_supervised_network_is_two_blocks_and_the_conv_head():
    trunk = rotation.NetworkInNetwork(2)
    head = rotation.conv_head((1, 192, 8, 8), 10, 1.0)
    count = sum(p.numel() for p in [*trunk.blocks.parameters(), *head.parameters()])
    assert count == 1_005_642 == sum(p.numel() for p in rotation.NetworkInNetwork(3, 10).parameters())


def test_shapes_of_the_blocks():
    model = rotation.NetworkInNetwork(4).eval()
    images = torch.zeros(2, 3, 32, 32)
    shapes = [tuple(model.features(images, block).shape[1:]) for block in (1, 2, 3, 4)]
    assert shapes == [(96, 16, 16), (192, 8, 8), (192, 8, 8), (192, 8, 8)]
    assert model(images).shape == (2, 4)
    for block in (0, 5):
        with pytest.raises(ValueError, match=f"block {block}"):
            model.features(images, block)


def test_nonlinear_head_has_the_papers_size():
    """2.50 million parameters on block 2: more than RotNet itself."""
    head = rotation.nonlinear_head((1, 192, 8, 8), 10)
    assert sum(p.numel() for p in head.parameters()) == 12288 * 200 + 200 * 200 + 4 * 200 + 200 * 10 + 10


def test_alexnet_has_the_papers_maps():
    model = rotation.AlexNet(4, width=0.125).eval()
    with torch.no_grad():
        maps = model.maps(torch.zeros(1, 3, 224, 224), 5)
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 4)
    assert [m.shape[-1] for m in maps] == [55, 27, 13, 13, 13]
    full = rotation.AlexNet(4)
    assert [block[-1][0].out_channels if isinstance(block[0], nn.MaxPool2d) else block[0].out_channels
            for block in full.blocks] == [64, 192, 384, 256, 256]


def test_loss_of_an_untrained_network():
    torch.manual_seed(0)
    model = rotation.NetworkInNetwork(4, width=0.25)
    turned, labels = rotation.rotate_four_ways(some_images(32))
    loss = float(rotation.rotation_loss(model(normalize(turned)), labels)["loss"])
    assert 1.30 < loss < 1.6
    nn.init.zeros_(model.classifier[1].weight)
    loss = float(rotation.rotation_loss(model(normalize(turned)), labels)["loss"])
    assert loss == pytest.approx(math.log(4), abs=1e-6)


def test_crop_and_flip_moves_pixels_and_nothing_else():
    images = some_images(200)
    generator = torch.Generator().manual_seed(1)
    cropped = rotation.crop_and_flip(images, generator)
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    padded = F.pad(images, (4,) * 4)
    seen, flipped = set(), 0
    for image, source in zip(cropped, padded):
        found = [(top, left, flip) for flip in (False, True) for top in range(9) for left in range(9)
                 if torch.equal(source[:, top:top + 32, left:left + 32].flip(2) if flip
                                else source[:, top:top + 32, left:left + 32], image)]
        assert len(found) == 1
        seen.add(found[0][:2])
        flipped += found[0][2]
    assert len(seen) > 60 and 70 < flipped < 130
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(9))


def test_random_sized_crops_stay_inside_and_keep_the_level():
    images = torch.full((50, 3, 64, 64), 200, dtype=torch.uint8)
    crops = rotation.resized_crop_and_flip(images, torch.Generator().manual_seed(0), 32)
    assert crops.shape == (50, 3, 32, 32)
    torch.testing.assert_close(crops, torch.full_like(crops, 200.0))
    ramp = torch.arange(64.0).expand(50, 3, 64, 64)
    widths = (lambda c: (c[:, 0, 16, -1] - c[:, 0, 16, 0]).abs())(
        rotation.resized_crop_and_flip(ramp, torch.Generator().manual_seed(0), 32))
    assert widths.min() < 30 and widths.max() > 50 and float(widths.max()) <= 63


def test_normalize_centres_each_channel():
    images = torch.tensor([125.3, 123.0, 113.9]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert float(normalize(images).abs().max()) < 1e-6
    step = normalize(images + torch.tensor([63.0, 62.1, 66.7]).view(1, 3, 1, 1))
    torch.testing.assert_close(step, torch.ones_like(step))


def test_learning_rate_steps():
    rate = rotation.stepped(0.1, (0.3, 0.6, 0.8), 0.2)
    assert [round(rate(p), 6) for p in (0, 0.299, 0.3, 0.6, 0.8, 0.99)] == [0.1, 0.1, 0.02, 0.004, 0.0008, 0.0008]


def test_every_scale_resolves_to_a_config_and_known_rows():
    import fnmatch

    import yaml
    settings = trainer.ROOT / "papers" / "gidaris_rotation.yaml"
    blocks = yaml.safe_load(settings.read_text())
    assert set(blocks) == {*trainer.SCALES, "small-embedded"}
    for scale in trainer.SCALES:
        assert trainer.resolve_config(rotation.Config, settings, scale).seed == 0
        for glob in blocks[scale]["rows"]:
            assert fnmatch.filter(rotation.PAPER, glob), glob


def test_claims_and_curves_name_known_rows():
    for _, first, sign, second, *_ in rotation.CLAIMS:
        assert first in rotation.PAPER and second in rotation.PAPER and sign in "<>"
    for *_, series in rotation.CURVES:
        assert all(row in rotation.PAPER for points in series.values() for _, row in points)


# Short training, straight on the pure functions
def train_rotation(images, steps, batch=64, seed=0, augment=True):
    torch.manual_seed(seed)
    model = rotation.NetworkInNetwork(2, width=0.125).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for step in range(steps):
        generator = trainer.stream(seed, "test", step)
        batch_images = images[torch.randint(len(images), (batch,), generator=generator)]
        if augment:
            batch_images = rotation.crop_and_flip(batch_images, generator)
        turned, labels = rotation.rotate_four_ways(batch_images)
        result = rotation.rotation_loss(model(normalize(turned)), labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    return model.eval(), float(result["loss"].detach())


def rotation_hits(model, images):
    turned, labels = rotation.rotate_four_ways(images)
    with torch.no_grad():
        return 100 * float((model(normalize(turned)).argmax(1) == labels).float().mean())


def test_noise_teaches_nothing():
    """Leak test: noise has no up, so whatever lifts held-out accuracy above chance would be a trace of the turning."""
    model, _ = train_rotation(some_images(2000, seed=1), 40)
    held_out = rotation.crop_and_flip(some_images(1000, seed=2), torch.Generator().manual_seed(0))
    deviation = 100 * math.sqrt(0.25 * 0.75 / 1000)  # the four copies of an image share one mistake at worst
    assert abs(rotation_hits(model, held_out) - 25) < 4 * deviation


def test_a_bright_top_half_is_learnt_in_a_few_steps():
    """Positive control for the leak test: the same training finds an orientation that is there."""
    images = some_images(600, seed=1)
    images[:, :, :16] = images[:, :, :16] // 2 + 128
    model, loss = train_rotation(images, 40)
    assert loss < 1.0 and rotation_hits(model, images[:200]) > 95


def test_averaging_over_the_four_copies_destroys_the_task():
    """A rotation-invariant network must be at chance: its scores are the same for all four copies."""
    torch.manual_seed(0)
    model = rotation.NetworkInNetwork(2, width=0.125).eval()
    turned, labels = rotation.rotate_four_ways(some_images(50))
    with torch.no_grad():
        averaged = sum(model(normalize(torch.rot90(turned, k, (2, 3)))) for k in range(4))
    same = averaged.unflatten(0, (4, 50))
    torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-4, rtol=1e-4)


def test_few_labels_are_the_first_of_each_class():
    labels = torch.tensor([1, 0, 0, 1, 2, 0, 2, 1, 2])
    assert evaluate.first_per_class(labels, 2).tolist() == [0, 1, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="class 0 has 3"):
        evaluate.first_per_class(labels, 4)
