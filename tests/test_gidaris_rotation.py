"""The invariants of the rotation paper, cheap ones first; the last tests train tiny networks."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as transforms

from papers import gidaris_rotation as rotation
from replicate import trainer
from replicate.data import ImageSet, InputError, Resident


def some_config(*overrides, scale="smoke"):
    return trainer.read_settings(rotation.Config, rotation.__file__, scale, 0, overrides)[0]


def normalize(images):
    return rotation.normalize(images, some_config())


@pytest.fixture
def make_run(tmp_path):
    """make_run(*overrides, rows=...): a Run with those rows and with folders of its own."""
    def make(*overrides, rows=("rotnet4/conv",)):
        return trainer.Run(rotation.__file__, some_config(*overrides), "smoke",
                           dict.fromkeys(rows, {}), results=tmp_path / "results",
                           runs=tmp_path / "runs")
    return make


def some_data(count=64, classes=10):
    split = Resident(some_images(count), torch.arange(count) % classes)
    return ImageSet("x", split, split, classes)


def weights_of(folder):
    """{training: state dict} of the finished trainings in a runs folder."""
    return {path.stem: torch.load(path, weights_only=True)["model"]
            for path in sorted(folder.rglob("*.pt"))}


def some_images(count=6, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


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


def test_the_turn_comes_last(make_run, monkeypatch):
    """hflip(rot90(x)) is rot270(hflip(x)): a flip after the turn would exchange 90 and 270 degrees
    and cap accuracy at 75 %.

    What reaches the network in real pre-training steps must be exact turns of one another, with
    both mirror images there.
    """
    images = some_images()
    flipped_last = torch.rot90(images, 1, (2, 3)).flip(3)
    assert torch.equal(flipped_last, torch.rot90(images.flip(3), 3, (2, 3)))
    seen = []
    original = rotation.normalize
    monkeypatch.setattr(rotation, "normalize",
                        lambda x, *rest: seen.append(x.clone()) or original(x, *rest))
    run = make_run("batch_size=16", "width=0.05", "pretext_epochs=1")
    bright_left = torch.zeros(48, 3, 32, 32, dtype=torch.uint8)
    bright_left[..., :8] = 255
    split = Resident(bright_left, torch.zeros(48, dtype=torch.int64))
    rotation.pretrain(run, ImageSet("x", split, split, 10), run.config, "rotnet4")
    assert len(seen) == 3
    for batch in seen:
        copies = batch.unflatten(0, (4, 16))
        for turns in range(1, 4):
            assert torch.equal(copies[turns], torch.rot90(copies[0], turns, (2, 3)))
    first = torch.cat([batch[:16] for batch in seen]).float()
    brighter_left = first[..., :16].sum((1, 2, 3)) > first[..., 16:].sum((1, 2, 3))
    assert 10 < int(brighter_left.sum()) < 38  # some mirrored, some not


@pytest.mark.parametrize("degrees", [
    (0, 90, 180, 270), (0, 180), (90, 270), tuple(range(0, 360, 45))])
def test_classes_are_balanced_so_a_constant_answer_is_chance(degrees):
    turned, labels = rotation.rotate(some_images(8), degrees)
    ways = len(degrees)
    assert len(turned) == len(labels) == 8 * ways
    assert labels.bincount().tolist() == [8] * ways
    result = rotation.pretext_loss(torch.zeros(8 * ways, ways), labels)
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
    """Deviation 2: on white images no copy has a dark corner; on noise all copies are equally
    sharp within 10 %."""
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
    # the turn itself: copies two eighths apart are exact quarter turns of each other, and 45
    # degrees are counter-clockwise
    assert torch.equal(turned[labels == 3], torch.rot90(turned[labels == 1], 1, (2, 3)))
    wedge = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    wedge[:, :, :14, 14:18] = 255  # a bar from the centre to the top
    corner = rotation.rotate_eight_ways(wedge)[0][1].float()
    assert corner[:, :11, :11].sum() > 5 * corner[:, :11, 11:].sum()  # now points to the top left


@pytest.mark.parametrize("name", ["rotations8", "rotations4-centre"])
def test_the_blur_has_the_same_direction_in_all_turns(name):
    """White noise looks alike in all turns.  A blur by unequal weights has a direction, which shows
    in fourth moments of neighbours; turned along with the image it would give the turn away."""
    turned, labels = rotation.rotated_copies(some_images(512, seed=4), name)
    x = (turned.float() - turned.float().mean()) / turned.float().std()
    found = []
    for label in range(len(labels.unique())):
        copies = x[labels == label]
        pairs = (copies[..., :-1], copies[..., 1:]), (copies[:, :, :-1], copies[:, :, 1:])
        found.append(torch.stack([(a ** 3 * b - a * b ** 3).mean() for a, b in pairs]))
    found = torch.stack(found)  # (turns, axes)
    if name == "rotations8":  # by 45 degrees more, another blur
        assert found[1::2].abs().max() < 0.01
        found = found[::2]
    assert found.std(0).max() < 0.01 < found.abs().min()


@pytest.mark.parametrize("blocks,parameters", [(3, 1_004_484), (4, 1_411_140), (5, 1_817_796)])
def test_parameters_of_the_network_in_network(blocks, parameters):
    assert sum(p.numel() for p in rotation.NetworkInNetwork(blocks).parameters()) == parameters


def test_supervised_network_is_two_blocks_and_the_conv_head():
    trunk = rotation.NetworkInNetwork(2)
    head = rotation.conv_head((1, 192, 8, 8), 10, 1.0)
    count = sum(p.numel() for p in [*trunk.blocks.parameters(), *head.parameters()])
    assert count == 1_005_642
    assert count == sum(p.numel() for p in rotation.NetworkInNetwork(3, 10).parameters())


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
    count = sum(p.numel() for p in head.parameters())
    assert count == 12288 * 200 + 200 * 200 + 4 * 200 + 200 * 10 + 10


def test_alexnet_has_the_papers_maps():
    model = rotation.AlexNet(4, width=0.125).eval()
    with torch.no_grad():
        maps = model.maps(torch.zeros(1, 3, 224, 224))
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 4)
    assert [m.shape[-1] for m in maps] == [55, 27, 13, 13, 13]
    full = rotation.AlexNet(4)
    convolutions = [layer for layer in full.blocks.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 192, 384, 256, 256]


def test_loss_of_an_untrained_network():
    torch.manual_seed(0)
    model = rotation.NetworkInNetwork(4, width=0.25)
    turned, labels = rotation.rotate_four_ways(some_images(32))
    loss = float(rotation.pretext_loss(model(normalize(turned)), labels)["loss"].detach())
    assert 1.30 < loss < 1.6
    nn.init.zeros_(model.classifier[1].weight)
    loss = float(rotation.pretext_loss(model(normalize(turned)), labels)["loss"].detach())
    assert loss == pytest.approx(math.log(4), abs=1e-6)


def test_pad_crop_and_flip_moves_pixels_and_nothing_else():
    images = some_images(200)
    generator = torch.Generator().manual_seed(1)
    cropped = rotation.pad_crop_and_flip(images, generator)
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    padded = F.pad(images, (4,) * 4)
    seen, flipped = set(), 0
    for image, source in zip(cropped, padded):
        found = [(top, left, flip)
                 for flip in (False, True) for top in range(9) for left in range(9)
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
    optimizer = rotation.make_optimizer(some_config(), model)
    optimizer.param_groups[0]["lr"] = 0.1
    for step in range(steps):
        generator = trainer.stream(seed, "test", step)
        batch_images = images[torch.randint(len(images), (batch,), generator=generator)]
        batch_images = rotation.pad_crop_and_flip(batch_images, generator)
        turned, labels = rotate(batch_images)
        result = rotation.pretext_loss(model(normalize(turned)), labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    return model.eval(), float(result["loss"].detach())


def rotation_hits(model, images, rotate=rotation.rotate_four_ways):
    turned, labels = rotate(images)
    with torch.no_grad():
        return 100 * float((model(normalize(turned)).argmax(1) == labels).float().mean())


def test_noise_teaches_nothing():
    """Leak test: noise has no up, so whatever lifts held-out accuracy above chance would be a trace
    of the turning."""
    model, _ = train_rotation(some_images(2000, seed=1), 40)
    generator = torch.Generator().manual_seed(0)
    held_out = rotation.pad_crop_and_flip(some_images(1000, seed=2), generator)
    deviation = 100 * math.sqrt(0.25 * 0.75 / 1000)  # at worst four copies share one mistake
    assert abs(rotation_hits(model, held_out) - 25) < 4 * deviation


def test_smooth_noise_does_not_give_eighth_turns_away():
    """Leak test for deviation 2: noise as smooth as photographs looks the same in all directions,
    so neither corners nor the blur of the turn by 45 degrees may lift accuracy above chance."""
    def smooth(count, seed):
        noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        blurred = transforms.gaussian_blur(noise, [13, 13], [2.0, 2.0])
        return (blurred / blurred.std() * 50 + 128).clamp(0, 255).round().byte()

    model, _ = train_rotation(smooth(2000, 1), 60, rotate=rotation.rotate_eight_ways, ways=8)
    deviation = 100 * math.sqrt(0.125 * 0.875 / 1000)
    accuracy = rotation_hits(model, smooth(1000, 2), rotation.rotate_eight_ways)
    assert abs(accuracy - 12.5) < 4 * deviation


def test_a_bright_top_half_is_learnt_in_a_few_steps():
    """Positive control for the leak test: the same training finds an orientation that is there."""
    images = some_images(600, seed=1)
    images[:, :, :16] = images[:, :, :16] // 2 + 128
    model, loss = train_rotation(images, 40)
    assert loss < 1.0 and rotation_hits(model, images[:200]) > 95


def test_a_network_that_cannot_tell_turns_apart_is_at_chance(make_run):
    """Averaged over the four copies a network is rotation-invariant: exactly 25 % for any scores,
    through the real count."""
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = rotation.NetworkInNetwork(2, width=0.125)

        def forward(self, images):
            network, images = self.inner.double(), images.double()
            scores = sum(network(torch.rot90(images, turns, (2, 3))) for turns in range(4))
            return scores.round(decimals=6)

    torch.manual_seed(0)
    test = Resident(some_images(50), torch.zeros(50, dtype=torch.int64))
    run = make_run("precision=float32")
    assert rotation.rotation_accuracy(run, Averaged(), "rotnet4", test) == 25.0


# Trunks, heads and rows
def test_the_controls_differ_as_deviation_10_says(make_run):
    """random: statistics of its images, whatever it is asked for first; random-official: 0 and 1,
    torch's own weights; scratch: as RotNet before training."""
    run, data = make_run("precision=float32", "width=0.1"), some_data(200)
    random, official, scratch = (rotation.network(run, data, name).model
                                 for name in ("random", "random-official", "scratch"))
    again = rotation.network(run, data, "random").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in random.state_dict().items())
    for ours, theirs, plain in zip(random.modules(), official.modules(), scratch.modules()):
        if isinstance(ours, nn.BatchNorm2d):
            assert ours.running_mean.abs().max() > 0.01
            for layer in (theirs, plain):
                assert (layer.running_mean == 0).all() and (layer.running_var == 1).all()
        if isinstance(ours, nn.Conv2d):
            assert torch.equal(ours.weight, plain.weight)
            assert not torch.equal(ours.weight, theirs.weight)
            inputs = ours.in_channels * ours.kernel_size[0] ** 2
            # torch draws evenly within 1 / sqrt(inputs)
            assert theirs.weight.abs().max() <= inputs ** -0.5 < ours.weight.abs().max()


def test_few_label_rows_train_on_the_first_of_each_class_and_as_long_as_with_all(
        make_run, monkeypatch, capsys):
    seen = {}

    def shuffled(run, split, batch_size, purpose):
        seen[purpose] = split.images, split.labels.bincount().tolist()

    def fit(run, purpose, model, loss, batches, *, steps, **more):
        seen[purpose] += (steps,)
        return trainer.Trained(model)

    monkeypatch.setattr(trainer.Run, "shuffled", shuffled)
    monkeypatch.setattr(trainer.Run, "fit", fit)
    names = ["supervised", "supervised/labels20", "supervised/labels100", "supervised/labels400"]
    run = make_run("width=0.05", "head_batch_size=10", "supervised_epochs=0.3", rows=names)
    data = some_data(500, 4)
    monkeypatch.setattr(trainer.Run, "load", lambda *arguments, **options: data)
    rotation.reproduce(run)
    assert {name: (counts, steps) for name, (_, counts, steps) in seen.items()} == {
        "supervised": ([125] * 4, 15), "supervised/labels20": ([20] * 4, 15),
        "supervised/labels100": ([100] * 4, 15)}
    assert torch.equal(seen["supervised/labels20"][0], data.train.images[:80])
    assert "supervised/labels400: left out" in capsys.readouterr().out  # 400 a class are not there


def test_a_probe_leaves_the_trunk_bit_identical_and_fine_tuning_does_not(make_run, monkeypatch):
    run, data = make_run("head_batch_size=16", "width=0.1", rows=("frozen", "tuned")), some_data()
    trunk = rotation.NetworkInNetwork(4, 4, 0.1).train()
    monkeypatch.setattr(rotation, "pretrain", lambda *arguments: trainer.Trained(trunk))
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    rotation.fit_heads(run, data, "frozen", "rotnet4", rotation.conv_head, (1.0, (0.5,), 0.1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    saved = weights_of(run.folder)["frozen"]
    assert not any(name.startswith("blocks") for name in saved)  # not in the optimiser's reach
    trunk.requires_grad_(True)
    rotation.fit_heads(run, data, "tuned", "rotnet4", rotation.conv_head, (1.0, (0.5,), 0.1),
                       finetune=True)
    tuned = weights_of(run.folder)["tuned"]
    for name in ("blocks.0.0.0.weight", "blocks.0.0.1.running_mean"):
        assert not torch.equal(tuned[name], before[name])


def test_heads_on_views_encode_an_image_once_a_view(make_run, monkeypatch):
    run = make_run("views=3", "head_batch_size=16", "width=0.1", rows=("a", "b"))
    data = some_data(40)
    trunk = rotation.NetworkInNetwork(4, 4, 0.1)
    encoded, steps, maps = [], [], trunk.maps
    monkeypatch.setattr(trunk, "maps", lambda images: encoded.append(len(images)) or maps(images))
    monkeypatch.setattr(rotation, "network", lambda *arguments: trainer.Trained(trunk))
    monkeypatch.setattr(rotation, "head_accuracies", lambda *arguments: {"a": 1.0, "b": 2.0})
    fit = trainer.Run.fit

    def counted(self, *arguments, **options):
        steps.append(options["steps"])
        return fit(self, *arguments, **options)

    monkeypatch.setattr(trainer.Run, "fit", counted)
    rotation.fit_heads(run, data, "a", "rotnet4", rotation.nonlinear_head, (12.0, (0.5,), 0.1),
                       {"a": 1, "b": 2})
    assert sum(encoded) == 2 + 3 * 40 and steps == [30]  # 2: the shapes of the maps
    # A view is what the trunk makes of an augmented image, each image as often as another.
    see = lambda images, generator: {1: images[:, :1].float(), 2: images[:, 1:].float()}
    views = rotation.encode_views(run, data.train, 120, see, "a")
    assert torch.equal(views.labels.bincount(), 3 * data.train.labels.bincount())
    pixels = views.images.unflatten(1, (3, 32, 32)).to(torch.uint8)
    assert all((pixels == image).flatten(1).all(1).sum() == 3 for image in data.train.images)


def test_rows_after_a_part_of_the_training_measure_the_weights_of_that_step(make_run, monkeypatch):
    run = make_run("width=0.1", "pretext_epochs=1", "batch_size=2", rows=(
        "rotnet4/after5/rotation-accuracy", "rotnet4/after50/rotation-accuracy",
        "rotnet4/after5/block2/linear"))
    data, seen = some_data(40), []

    def keep(run, model, *arguments):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 50.0

    monkeypatch.setattr(rotation, "rotation_accuracy", keep)
    monkeypatch.setattr(trainer.Run, "load", lambda *arguments, **options: data)
    rotation.reproduce(run)
    saved = torch.load(next(run.folder.glob("rotnet4.pt")), weights_only=True)
    assert [*saved["kept"]] == [1, 4, 10] and saved["step"] == 20
    for step, state in zip((1, 10), seen, strict=True):
        assert all(torch.equal(saved["kept"][step][name], state[name]) for name in state)
    assert not torch.equal(saved["model"]["blocks.0.0.0.weight"], seen[1]["blocks.0.0.0.weight"])


def test_the_guard_notices_a_trunk_that_moves(make_run, monkeypatch):
    class Restless(rotation.NetworkInNetwork):
        def train(self, mode=True):  # batch-norm statistics go on moving
            return super().train(True)

    restless = trainer.Trained(Restless(2, 4, 0.05))
    monkeypatch.setattr(rotation, "pretrain", lambda *arguments: restless)
    with pytest.raises(AssertionError, match="has moved"):
        rotation.fit_heads(make_run("head_batch_size=8"), some_data(16), "rotnet4/conv", "rotnet4",
                           rotation.conv_head, (1.0, (0.5,), 0.1))


def test_images_smaller_than_the_crop_are_refused(make_run, monkeypatch):
    monkeypatch.setattr(trainer.Run, "load", lambda *arguments, **options: some_data())
    message = "have 32 pixels, fewer than crop_size=40: lower it with --set crop_size=32"
    with pytest.raises(InputError, match=message):
        rotation.reproduce(make_run("crop_size=40"))


@pytest.mark.parametrize("override,message", [
    ("crop_size=15", "needs 16 pixels"), ("width=0", "width and probe_cells must be above 0"),
    ("mean=[1, 2]", "one value a channel"),
    ("precision=half", "bfloat16, float32")])
def test_settings_that_no_run_can_have_are_named(override, message):
    with pytest.raises(InputError, match=message):
        some_config(override)


# Whole runs
@pytest.fixture
def tiny(tmp_path, write_packed):
    """Options for a run of seconds on 640 images of noise packed as CIFAR-10."""
    write_packed(tmp_path / "data", train=640, test=100)
    options = ["--scale", "smoke", "--device", "cpu", "--data", str(tmp_path / "data")]
    for override in ("dataset=cifar10", "width=0.05", "batch_size=32", "head_batch_size=32",
                     "pretext_epochs=1", "conv_epochs=1", "supervised_epochs=1"):
        options += ["--set", override]
    return options


def test_training_steps_keep_to_operations_that_are_deterministic_on_a_gpu(
        make_run, monkeypatch, graphs):
    rows = ["rotnet4/conv", "supervised", "rotnet4/conv-finetuned", "rotnet4/nonlinear-finetuned",
            *(f"rotnet4/block{block}/nonlinear" for block in (1, 2, 3, 4)),
            "rotations8/block2/nonlinear", "random/block1/linear"]
    run = make_run("width=0.05", "batch_size=32", "pretext_epochs=1", rows=rows)
    monkeypatch.setattr(trainer.Run, "load", lambda *arguments, **options: some_data(640))
    rotation.reproduce(run)
    assert all(run.value(row) for row in rows)
    assert len(graphs) > 60 and not graphs.offenders()
    graphs.clear()
    maps = torch.zeros(4, 8, 13, 13)
    rotation.AlexNet(4, width=0.05)(torch.zeros(4, 3, 224, 224)).sum().backward()
    rotation.alexnet_linear_head(maps.shape, 10, 0.05, 4)(maps).sum().backward()
    head = rotation.alexnet_nonlinear_head(maps.shape, 10, 0.05, 4)
    head(torch.zeros(4, 13, 13, 13)).sum().backward()
    assert len(graphs) == 3 and not graphs.offenders()
    F.adaptive_avg_pool2d(torch.zeros(1, 1, 8, 8, requires_grad=True), 3).sum().backward()
    assert graphs.offenders()  # the guard can see one


def test_test_labels_do_not_reach_training_or_choice(tmp_path, monkeypatch, tiny, records_of):
    """With the test labels shifted by one class all weights stay the same; only scores change."""
    def go(name):
        rows = "rotnet4/conv,supervised/labels20,rotnet4/block2/nonlinear"
        results, runs = tmp_path / name, tmp_path / f"runs-{name}"
        assert rotation.main([*tiny, "--rows", rows, "--results", str(results),
                              "--runs", str(runs)]) == 0
        return weights_of(runs), [record["value"] for record in records_of(results)]

    clean_weights, clean = go("clean")
    load = trainer.Run.load

    def poisoned(run, *arguments, **options):
        data = load(run, *arguments, **options)
        data.test.labels = (data.test.labels + 1) % 10
        return data

    monkeypatch.setattr(trainer.Run, "load", poisoned)
    weights, other = go("poisoned")
    assert clean_weights.keys() == weights.keys() and len(weights) == 4 and clean != other
    for training, state in clean_weights.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, weights[training][name]), f"{training} {name}"


def test_figures_are_drawn_and_the_same_twice_and_a_plan_draws_none(tmp_path, folders, tiny):
    tiny = [*tiny, "--rows", "rotnet4/rotation-accuracy", *folders]
    assert rotation.main([*tiny, "--plan"]) == 0 and not list(tmp_path.rglob("*.png"))
    assert rotation.main(tiny) == 0
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "results").rglob("*.png")}
    assert set(pictures) == {"gidaris_rotation_filters.png", "gidaris_rotation_attention.png"}
    assert rotation.main([*tiny, "--plan"]) == 0 and rotation.main([*tiny, "--force"]) == 0
    again = {path.name: path.read_bytes() for path in (tmp_path / "results").rglob("*.png")}
    assert again == pictures
    (page,) = (tmp_path / "results").rglob("gidaris_rotation.md")
    assert all(name in page.read_text() for name in pictures)


def test_two_ranks_equal_one(one_and_two_ranks, make_run, tiny):
    """Crops are drawn by shards, batch-norm spans the ranks: a few steps end at the same weights,
    of trunk and head."""
    weights = one_and_two_ranks(
        rotation, *tiny, "--rows", "rotnet4/conv", "--set", "precision=float32",
        "--set", "shards=2",
        "--set", "pretext_epochs=0.15", "--set", "conv_epochs=0.15")
    assert set(weights) == {"rotnet4", "rotnet4_conv"}
    for training, (one, two) in weights.items():
        # float32 moments differ by 1e-4; the head starts from a trunk that differs already
        tolerance = 5e-4 if training == "rotnet4" else 5e-3
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=tolerance, rtol=1e-2,
                                       msg=lambda m: f"{training} {name}: {m}")
    start = make_run().build(rotation.NetworkInNetwork, 4, 4, 0.05).blocks[0][0][0].weight
    moved = (weights["rotnet4"][0]["blocks.0.0.0.weight"] - start).abs().max()
    assert moved > 5e-3  # three steps were taken


def test_grey_sets_work_as_the_refusal_advises(tmp_path, folders, write_packed, capsys):
    write_packed(tmp_path, "mnist", 400, 100, (28, 28, 1))
    options = ["--scale", "smoke", "--data", str(tmp_path), "--device", "cpu", *folders,
               "--set", "dataset=mnist", "--set", "pretext_epochs=1",
               "--rows", "rotnet4/rotation-accuracy"]
    assert rotation.main(options) == 2
    advice = capsys.readouterr().err.strip().split()[-1]
    assert advice == "crop_size=28" and rotation.main([*options, "--set", advice]) == 0
