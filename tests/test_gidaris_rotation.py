"""The invariants of the rotation paper, cheap ones first; the last tests train tiny networks on real steps."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as image_functional

from papers import gidaris_rotation as rotation
from replicate import evaluate, trainer
from replicate.data import ImageSet, Resident

SETTINGS = trainer.ROOT / "papers" / "gidaris_rotation.yaml"


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


def test_the_turn_comes_last(tmp_path, monkeypatch):
    """hflip(rot90(x)) is rot270(hflip(x)): a flip after the turn would exchange 90 and 270 and cap accuracy at 75 %.

    What reaches the network in real pre-training steps must be exact turns of one another, with both mirror images there.
    """
    images = some_images()
    assert torch.equal(torch.rot90(images, 1, (2, 3)).flip(3), torch.rot90(images.flip(3), 3, (2, 3)))
    seen = []
    original = rotation.normalize
    monkeypatch.setattr(rotation, "normalize", lambda x, *rest: seen.append(x.clone()) or original(x, *rest))
    config = trainer.resolve_config(rotation.Config, SETTINGS, "smoke", 0, ["batch_size=16", "width=0.05", "pretext_epochs=1"])
    run = trainer.Run(rotation.__file__, config, "smoke", "cpu", suite="smoke", results=tmp_path, runs=tmp_path)
    bright_left = torch.zeros(48, 3, 32, 32, dtype=torch.uint8)
    bright_left[..., :8] = 255
    split = Resident(bright_left, torch.zeros(48, dtype=torch.int64))
    rotation.pretrain(run, ImageSet("x", split, split, 10), "rotnet4")
    assert len(seen) == 3
    for batch in seen:
        copies = batch.unflatten(0, (4, 16))
        for turns in range(1, 4):
            assert torch.equal(copies[turns], torch.rot90(copies[0], turns, (2, 3)))
    first = torch.cat([batch[:16] for batch in seen]).float()
    brighter_left = first[..., :16].sum((1, 2, 3)) > first[..., 16:].sum((1, 2, 3))
    assert 10 < int(brighter_left.sum()) < 38  # some mirrored, some not


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
    four, turns = rotation.rotate_four_ways(images)
    trained, labels = rotation.rotate(images, rotation.QUARTER_TURNS)  # what pre-training uses
    assert torch.equal(trained, four) and torch.equal(labels, turns)
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
    loss = float(rotation.rotation_loss(model(normalize(turned)), labels)["loss"].detach())
    assert 1.30 < loss < 1.6
    nn.init.zeros_(model.classifier[1].weight)
    loss = float(rotation.rotation_loss(model(normalize(turned)), labels)["loss"].detach())
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


# Short training, straight on the pure functions
def train_rotation(images, steps, batch=48, seed=0, rotate=rotation.rotate_four_ways, ways=4):
    torch.manual_seed(seed)
    model = rotation.NetworkInNetwork(2, ways, width=0.125).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for step in range(steps):
        generator = trainer.stream(seed, "test", step)
        batch_images = images[torch.randint(len(images), (batch,), generator=generator)]
        batch_images = rotation.crop_and_flip(batch_images, generator)
        turned, labels = rotate(batch_images)
        result = rotation.rotation_loss(model(normalize(turned)), labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    return model.eval(), float(result["loss"].detach())


def rotation_hits(model, images, rotate=rotation.rotate_four_ways):
    turned, labels = rotate(images)
    with torch.no_grad():
        return 100 * float((model(normalize(turned)).argmax(1) == labels).float().mean())


def test_noise_teaches_nothing():
    """Leak test: noise has no up, so whatever lifts held-out accuracy above chance would be a trace of the turning."""
    model, _ = train_rotation(some_images(2000, seed=1), 40)
    held_out = rotation.crop_and_flip(some_images(1000, seed=2), torch.Generator().manual_seed(0))
    deviation = 100 * math.sqrt(0.25 * 0.75 / 1000)  # the four copies of an image share one mistake at worst
    assert abs(rotation_hits(model, held_out) - 25) < 4 * deviation


def test_smooth_noise_does_not_give_eighth_turns_away():
    """Leak test for deviation 2: noise as smooth as photographs looks the same in all directions, so neither corners nor the
    blur of the turn by 45 degrees may lift accuracy above chance."""
    def smooth(count, seed):
        noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        blurred = image_functional.gaussian_blur(noise, [13, 13], [2.0, 2.0])
        return (blurred / blurred.std() * 50 + 128).clamp(0, 255).round().byte()

    model, _ = train_rotation(smooth(2000, 1), 60, rotate=rotation.rotate_eight_ways, ways=8)
    deviation = 100 * math.sqrt(0.125 * 0.875 / 1000)
    assert abs(rotation_hits(model, smooth(1000, 2), rotation.rotate_eight_ways) - 12.5) < 4 * deviation


def test_a_bright_top_half_is_learnt_in_a_few_steps():
    """Positive control for the leak test: the same training finds an orientation that is there."""
    images = some_images(600, seed=1)
    images[:, :, :16] = images[:, :, :16] // 2 + 128
    model, loss = train_rotation(images, 40)
    assert loss < 1.0 and rotation_hits(model, images[:200]) > 95


def test_a_network_that_cannot_tell_turns_apart_is_at_chance(tmp_path):
    """Averaged over the four copies a network is rotation-invariant: exactly 25 % for any scores, through the real count."""
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = rotation.NetworkInNetwork(2, width=0.125)

        def forward(self, images):
            images = images.double()
            return sum(self.inner.double()(torch.rot90(images, turns, (2, 3))) for turns in range(4)).round(decimals=6)

    config = trainer.resolve_config(rotation.Config, SETTINGS, "smoke", 0, ["precision=float32"])
    run = trainer.Run(rotation.__file__, config, "smoke", "cpu", suite="smoke", results=tmp_path, runs=tmp_path)
    torch.manual_seed(0)
    test = Resident(some_images(50), torch.zeros(50, dtype=torch.int64))
    assert rotation.rotation_accuracy(run, Averaged(), rotation.QUARTER_TURNS, test) == 25.0


def test_few_label_rows_train_on_exactly_so_many_a_class_and_as_long_as_with_all(tmp_path, monkeypatch):
    seen = {}

    def classify(run, purpose, encoder, heads, data, train, *, epochs, **budget):
        seen[purpose] = train.labels.bincount().tolist(), epochs, len(data.train)
        return dict.fromkeys(heads, 50.0), 1, 0.0

    monkeypatch.setattr(rotation, "classify", classify)
    config = trainer.resolve_config(rotation.Config, SETTINGS, "smoke", 0, ["width=0.05"])
    run = trainer.Run(rotation.__file__, config, "small", "cpu", suite="smoke", results=tmp_path, runs=tmp_path,
                      rows="supervised*")
    split = Resident(some_images(500), torch.arange(500) % 4)
    rotation.evaluate(run, ImageSet("x", split, split, 4))
    assert seen == {"supervised": ([125] * 4, config.supervised_epochs, 500),
                    "supervised/labels20": ([20] * 4, config.supervised_epochs, 500),
                    "supervised/labels100": ([100] * 4, config.supervised_epochs, 500)}  # 400 a class are not there


def test_the_guard_notices_a_trunk_that_moves(tmp_path):
    class Restless(rotation.NetworkInNetwork):
        def train(self, mode=True):  # batch-norm statistics go on moving
            return super().train(True)

    config = trainer.resolve_config(rotation.Config, SETTINGS, "smoke", 0, ["batch_size=8"])
    run = trainer.Run(rotation.__file__, config, "smoke", "cpu", suite="smoke", results=tmp_path, runs=tmp_path)
    split = Resident(some_images(16), torch.arange(16) % 10)
    encoder = Restless(2, 4, 0.05)
    heads = {"conv": (2, rotation.conv_head((1, 8, 8, 8), 10, 0.05))}
    with pytest.raises(AssertionError, match="has moved"):
        rotation.classify(run, "x", encoder, heads, ImageSet("x", split, split, 10), split, epochs=1, drops=(0.5,), rate=0.1)


def test_few_labels_are_the_first_of_each_class():
    labels = torch.tensor([1, 0, 0, 1, 2, 0, 2, 1, 2])
    assert evaluate.first_per_class(labels, 2).tolist() == [0, 1, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="class 0 has 3"):
        evaluate.first_per_class(labels, 4)
