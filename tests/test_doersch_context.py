"""The invariants of the context-prediction paper, cheap first; the last ones train networks."""
import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from papers import doersch_context as context
from replicate import records, trainer
from replicate.data import ImageSet, InputError, Resident

UNTREATED = {"normalization": "false", "colors": "all", "pixelation": 0}
DECLARED = records.read_declared(context.__file__)


def some_images(count=6, size=64, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(seed)).byte()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_config(scale="smoke", **settings):
    given = [f"{key}={value}" for key, value in settings.items()]
    return trainer.read_settings(context.Config, DECLARED, scale, 0, given)[0]


def some_run(folder, **settings):
    return trainer.Run(context.__file__, some_config(**settings), "smoke", DECLARED["rows"],
                       results=folder, runs=folder)


def some_network(patch=22):
    torch.manual_seed(0)
    return context.RelativePositionNet("small", 0.1, patch)


# Places
def test_positions_are_the_eight_neighbours_row_by_row():
    places = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
    assert [context.neighbor_position(*place) for place in places] == list(range(8))
    for row, column in places:  # seen from the neighbour, the centre lies opposite
        opposite = context.neighbor_position(2 - row, 2 - column)
        assert context.neighbor_position(row, column) + opposite == 7
    for outside in ((1, 1), (3, 0), (0, -1)):
        with pytest.raises(ValueError, match="is no neighbour"):
            context.neighbor_position(*outside)


@pytest.mark.parametrize("side,patch,gap,jitter", [
    (96, 22, 11, 2), (128, 30, 15, 2), (448, 96, 48, 7), (64, 16, 0, 0)])
def test_patches_lie_where_their_corners_say(side, patch, gap, jitter):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    count = 40 if side < 400 else 4
    images = torch.stack([rows, columns, rows + columns]).expand(count, -1, -1, -1).short()
    patches, corners = context.cut_patches(images, patch, gap, jitter, generator())
    assert patches.shape == (count, 9, 3, patch, patch) and patches.dtype == torch.int16
    assert corners.shape == (count, 9, 2)
    assert corners.min() >= 0 and corners.max() + patch <= side
    assert torch.equal(patches[..., :2, 0, 0].long(), corners)
    assert torch.equal(patches[:, :, 0, -1, 0].long(), corners[..., 0] + patch - 1)
    offsets = corners - corners[:, 4:5]
    for place in range(9):
        for axis, steps in ((0, place // 3 - 1), (1, place % 3 - 1)):
            assert (offsets[:, place, axis] - steps * (patch + gap)).abs().max() <= 2 * jitter
    around = [place for place in range(9) if place != 4]
    assert [context.neighbor_position(place // 3, place % 3) for place in around] == list(range(8))
    if gap:
        nearest = (offsets[:, around].abs().amax(2) - patch).min()
        assert nearest >= gap - 2 * jitter > 0  # no pixel in common, not even neighbours
    if count == 40:
        steps = torch.tensor([[place // 3 - 1, place % 3 - 1] for place in around])
        moved = offsets[:, around] - (patch + gap) * steps
        assert moved.unique().tolist() == list(range(-2 * jitter, 2 * jitter + 1))  # and no more
    if count == 40 and side > 3 * patch + 2 * gap + 2 * jitter:
        assert corners[:, 4].unique(dim=0).shape[0] > 5  # places differ


def test_paper_geometry_leaves_at_least_34_pixels():
    config = some_config("paper")
    assert (config.patch, config.gap, config.jitter) == (96, 48, 7)
    assert config.gap - 2 * config.jitter == 34
    with pytest.raises(ValueError, match="needs 92"):
        context.cut_patches(some_images(size=90), 22, 11, 2, generator())


def test_the_answer_is_where_the_second_patch_lies():
    _, corners = context.cut_patches(some_images(50, 96), 22, 11, 2, generator())
    first, second, positions = context.pair_neighbors(corners)
    steps = ((second - first) / 33).round().long().tolist()  # jitter: at most 4 of 33 pixels
    found = [context.neighbor_position(1 + down, 1 + right) for down, right in steps]
    assert found == positions.tolist()


def test_hidden_rims_part_patches_that_touch():
    """The same middles of the same patches in both arms; blank rims in one of them."""
    config, images = some_config(image_size=96, patch=20, gap=10, **UNTREATED), some_images(size=96)
    touching, parted = (context.sample_patches(
        images, generator(), context.variant_config(config, f"audit/no-gap{rims}"))
        for rims in ("", "-hidden-rims"))
    assert touching.shape == parted.shape == (6, 9, 3, 20, 20)
    inside = (..., slice(2, -2), slice(2, -2))
    assert torch.equal(touching[inside], parted[inside])
    assert int((parted != 0).flatten(0, 2).any(0).sum()) == 16 ** 2  # nothing else is left
    row = touching[:, :3].transpose(1, 2).transpose(2, 3).flatten(3)  # (6, 3, 20, 60)
    seen = images.unfold(2, 20, 1).unfold(3, 60, 1).flatten(2, 3)  # every such strip of each image
    strip = ((row * 0.25 + 0.5) * 255).round().byte()
    assert (seen == strip[:, :, None]).all(-1).all(-1).all(1).any(1).all()  # no pixel between them


def test_patches_stay_inside_at_any_size_that_has_room():
    for number in range(60):
        patch, gap, jitter, spare = torch.randint(1, 20, (4,), generator=generator(number)).tolist()
        side = 3 * patch + 2 * gap + 2 * jitter + spare - 1
        images = torch.arange(side * side).view(1, 1, side, side).expand(5, -1, -1, -1)
        patches, corners = context.cut_patches(images, patch, gap, jitter, generator(number))
        assert corners.min() >= 0 and corners.max() + patch <= side
        last = corners + patch - 1
        assert torch.equal(patches[..., 0, -1, -1], last[..., 0] * side + last[..., 1])
        signs = (corners - corners[:, 4:5]).sign() if gap + patch > 2 * jitter else None
        for place in (0, 2, 6, 8) if signs is not None else ():  # the label is right, jitter or not
            assert (signs[:, place] == torch.tensor([place // 3 - 1, place % 3 - 1])).all()


def test_all_adjacent_patches_are_paired_in_both_orders():
    embeddings = torch.arange(2 * 9, dtype=torch.float32).view(2, 9, 1)
    first, second, positions = context.pair_neighbors(embeddings)
    pairs = torch.stack([first[:, 0], second[:, 0], positions], 1).long().tolist()
    for a, b, position in pairs:
        assert a // 9 == b // 9  # of one image
        (row, column), (down, right) = divmod(a % 9, 3), divmod(b % 9, 3)
        assert max(abs(down - row), abs(right - column)) == 1
        assert context.neighbor_position(1 + down - row, 1 + right - column) == position
        assert [b, a, 7 - position] in pairs
    assert len(set(map(tuple, pairs))) == len(pairs) == 2 * 40
    alone = context.pair_neighbors(embeddings, one_patch=True)
    assert (alone[0] == 0).all() and all(torch.equal(*each) for each in zip(
        alone[1:], (second, positions)))


def test_a_zeroed_head_is_at_chance_and_frequencies_tell_a_little():
    model = some_network(16)
    nn.init.zeros_(model.head[-1].weight)
    *pair, positions = context.pair_neighbors(model.embed(torch.randn(4, 9, 3, 16, 16)))
    loss = float(F.cross_entropy(model(*pair), positions).detach())
    assert loss == pytest.approx(math.log(8), abs=1e-6)
    shares = positions.bincount(minlength=8) / len(positions)
    assert float(shares.max()) == pytest.approx(0.15)  # a constant answer
    assert float(-(shares * shares.log()).sum()) == pytest.approx(context.CHANCE, abs=1e-6)
    assert context.CHANCE == pytest.approx(2.059, abs=1e-3)


# Colours, contrast, resolution
def test_projection_keeps_grey_and_kills_green_magenta():
    matrix = context.project_green_magenta(torch.eye(3).view(3, 3, 1, 1)).view(3, 3).T
    expected = torch.tensor([[5, 2, -1], [2, 2, 2], [-1, 2, 5]]) / 6
    assert_close(matrix, expected)
    assert_close(matrix @ matrix, matrix)
    assert torch.linalg.matrix_rank(matrix) == 2
    axis = torch.tensor([-1.0, 2, -1]).view(1, 3, 1, 1)
    assert float(context.project_green_magenta(axis).abs().max()) < 1e-6
    grey = torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1)
    assert_close(context.project_green_magenta(grey), grey)


def test_dropping_keeps_one_channel_and_leaves_noise_in_the_others():
    patches = torch.rand(30, 9, 3, 22, 22, generator=generator())
    dropped = context.drop_colors(patches, generator(1))
    centred = patches - patches.mean((-2, -1), keepdim=True)
    same = (dropped - centred).abs().amax((-2, -1)) < 1e-5  # (30, 9, 3)
    assert (same.sum(2) == 1).all()
    assert same.flatten(0, 1).sum(0).min() > 60  # each channel is kept at times
    noise, kept = dropped[~same].std((-2, -1)), centred[same].std((-2, -1))
    assert float((noise.view(-1, 2) / kept[:, None]).max()) < 1 / 50
    original = centred[~same]
    correlation = (dropped[~same] * original).mean((-2, -1)) / (noise * original.std((-2, -1)))
    assert float(correlation.abs().mean()) < 0.06  # about 0.036 for 484 independent pixels
    noises = dropped[~same].view(-1, 2, 22, 22)  # nor does it go with the channel that is kept
    shared = (noises * centred[same][:, None]).mean((-2, -1))
    assert float((shared / (noises.std((-2, -1)) * kept[:, None])).abs().mean()) < 0.06
    assert float((noise.view(-1, 2) / kept[:, None]).min()) > 1 / 200


def test_contrast_is_removed_and_flat_patches_stay_finite():
    patches = torch.rand(4, 9, 3, 8, 8) * 0.3 + 0.2
    normal = context.normalize_contrast(patches)
    assert float(normal.mean((-3, -2, -1)).abs().max()) < 1e-5
    assert_close(normal.square().mean((-3, -2, -1)), torch.ones(4, 9), atol=1e-4, rtol=0)
    brighter = context.normalize_contrast(patches * 1.7 + 0.1)
    assert_close(brighter, normal, atol=1e-4, rtol=1e-3)
    assert float(context.normalize_contrast(torch.full((1, 1, 3, 8, 8), 0.7)).abs().max()) < 1e-3


def test_pixelation_lowers_the_resolution_of_a_share():
    matrices = context.pixelation_matrices(22)
    assert matrices.shape == (23, 22, 22)
    assert_close(matrices[22], torch.eye(22))
    assert_close(matrices.sum(2), torch.ones(23, 22))  # a flat patch stays flat
    assert [int(torch.linalg.matrix_rank(matrices[side])) for side in (2, 5, 11)] == [2, 5, 11]
    patches = torch.rand(200, 9, 3, 22, 22, generator=generator())
    made = context.pixelate(patches, 1 / 3, generator(1))
    changed = (made - patches).abs().amax((-3, -2, -1)) > 1e-5
    assert 0.28 < float(changed.float().mean()) < 0.38
    assert made[changed].std((-2, -1)).mean() < 0.8 * patches[changed].std((-2, -1)).mean()


# Networks
def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_shapes_and_sizes_of_the_papers_network():
    encoder = context.PatchEncoder("alexnet", 1.0, 96).eval()
    with torch.no_grad():
        maps = encoder.maps(torch.zeros(1, 3, 96, 96))
    assert [tuple(each.shape[1:]) for each in maps] == [
        (96, 12, 12), (256, 6, 6), (384, 6, 6), (384, 6, 6), (256, 3, 3)]
    assert encoder.fc6[1].in_features == 2304 and encoder.dimension == 4096
    convolutions = sum(p.numel() for p in encoder.blocks.parameters())
    assert convolutions == pytest.approx(3.75e6, rel=0.01)
    assert encoder.fc6[1].weight.numel() == pytest.approx(9.44e6, rel=0.01)
    with torch.no_grad():  # before pooling
        assert encoder.blocks[0][0](torch.zeros(1, 3, 96, 96)).shape[-1] == 24
        assert encoder.blocks[1][0](maps[0]).shape[-1] == 12
    model = context.RelativePositionNet("alexnet")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(63.6e6, rel=0.005)


def test_alexnet_has_plain_batch_norm_from_the_third_convolution_on():
    model = context.RelativePositionNet("alexnet", 0.05)
    norms = batch_norms(model)
    assert len(norms) == 5 and all(norm.weight is None and norm.bias is None for norm in norms)
    assert [len(batch_norms(block)) for block in model.encoder.blocks] == [0, 0, 1, 1, 1]
    before = [norm.running_mean.clone() for norm in norms]
    for training in (False, True):
        model.train(training)
        *pair, _ = context.pair_neighbors(model.embed(torch.randn(2, 9, 3, 96, 96)))
        model(*pair)
        same = [torch.equal(old, norm.running_mean) for old, norm in zip(before, norms)]
        assert same == [not training] * 5


def test_batch_norm_has_no_scale_and_shift_and_moves_only_in_training():
    model = some_network()
    norms = batch_norms(model)
    assert norms and all(norm.weight is None and norm.bias is None for norm in norms)
    patches = torch.randn(8, 3, 22, 22)
    before = norms[0].running_mean.clone()
    model.eval().encoder(patches)
    assert torch.equal(before, norms[0].running_mean)
    model.train().encoder(patches)
    assert not torch.equal(before, norms[0].running_mean)


def test_patches_meet_late_and_their_order_counts():
    model, patches = some_network().eval(), torch.randn(3, 9, 3, 22, 22)
    with torch.no_grad():
        embeddings = model.embed(patches)
        changed = patches.clone()
        changed[:, 3] += 1
        others = [place for place in range(9) if place != 3]
        assert torch.equal(model.embed(changed)[:, others], embeddings[:, others])
        a, b = embeddings[:, 4], embeddings[:, 0]
        assert not torch.allclose(model(a, b), model(b, a))
        changed = embeddings.clone()
        changed[:, :4] *= 5
        (*alone, _), (*same, _) = (context.pair_neighbors(each, one_patch=True)
                                   for each in (embeddings, changed))
        second = context.adjacent_places()[1].repeat(3)
        untouched = second >= 4  # the second patch of the pair: the first one is hidden
        assert torch.equal(model(*alone)[untouched], model(*same)[untouched])


def test_swapped_patches_have_swapped_embeddings():
    model = some_network().double().eval()
    patches = torch.randn(3, 9, 3, 22, 22, dtype=torch.float64, generator=generator())
    order = [4, 1, 2, 3, 0, 5, 6, 7, 8]
    with torch.no_grad():
        swapped = model.embed(patches[:, order])
        assert_close(swapped, model.embed(patches)[:, order], rtol=1e-12, atol=1e-12)


def test_retrieval_counts_neighbours_of_the_same_class(tmp_path, monkeypatch):
    labels = torch.arange(40) % 2
    monkeypatch.setattr(context, "unit_features", lambda *_: torch.eye(2)[labels])
    run, images = some_run(tmp_path), some_images(40)
    assert context.retrieval(run, None, None, Resident(images, labels)) == 100
    alone = Resident(images, torch.arange(40))  # each its own class: only itself would match
    assert context.retrieval(run, None, None, alone) == 0


def test_features_of_patches_are_of_unit_length_and_all_networks_are_normalised_alike(tmp_path):
    run, images = some_run(tmp_path), some_images(60)
    encoder = context.PatchEncoder("small", 0.1, 16)
    patches, labels = context.query_patches(run, Resident(images, torch.arange(60)))
    assert patches.shape == (60, 3, 16, 16) and torch.equal(labels, torch.arange(60))
    train_split = Resident(images, labels)
    features = context.unit_features(run, encoder, patches, train_split)
    assert_close(features.norm(dim=1), torch.ones(60))
    for layer in encoder.modules():  # whatever statistics a network comes with
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(3), layer.running_var.fill_(9)
    assert torch.equal(features, context.unit_features(run, encoder, patches, train_split))


# Config
@pytest.mark.parametrize("override,message", [
    ("image_size=50", r"\(embedded\): 62 are needed; patch=12 would fit"),
    ("patch=8", "at least 16"), ("gap=1", "patches would overlap"), ("gap=-1", "not be negative"),
    ("pixelation=2", "at most 1"), ("width=0", "above 0"), ("probe_cells=0", "above 0"),
    ("network=vgg", "small, alexnet"), ("colors=grey", "dropping, projection, all"),
])
def test_wrong_settings_are_named(override, message):
    with pytest.raises(InputError, match=message):
        some_config(**dict([override.split("=")]))


def test_images_too_small_for_the_patches_get_one_line(tmp_path, write_packed, folders, capsys):
    write_packed(tmp_path)
    options = ["--scale", "smoke", "--set", "dataset=cifar10", "--data", str(tmp_path), *folders]
    assert context.main(options) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "image_size 32 (cifar10)" in error and "patch=6 would fit" in error


# Short training
# A constant answer is right in 15 %; how far off: an image has 40 pairs, two and two alike
CHANCE = 4 * 100 * math.sqrt(0.15 * 0.85 / 300 / 20)


def train(folder, images, steps, variant="audit/as-is", **settings):
    """Accuracy on 300 held-out images, in percent, after a few real steps of pre-training."""
    run = some_run(folder, **{"batch_size": 32, "precision": "float32", "width": 0.1, **settings})
    split = Resident(images[:-300], torch.zeros(len(images) - 300, dtype=torch.int64))
    held_out = Resident(images[-300:], torch.zeros(300, dtype=torch.int64))
    config = context.variant_config(run.config, variant)
    config = dataclasses.replace(config, pretext_epochs=steps * 32.5 / len(split))
    trained = context.pretrain(run, ImageSet("x", split, held_out, 2), config, variant)
    return context.position_accuracy(run, trained.model, config, held_out)


@pytest.mark.parametrize("variant", ["as-is", "dropping", "no-color-handling", "no-gap"])
def test_noise_teaches_nothing(tmp_path, variant):
    """Leak test: patches of white noise do not tell where they lie."""
    accuracy = train(tmp_path, some_images(900, seed=1), 40, f"audit/{variant}")
    assert abs(accuracy - 15) < CHANCE


def test_the_gap_stops_textures_that_run_on(tmp_path, smooth_noise):
    """Leak detector: smooth noise tells the place where patches touch, not where they lie farther
    apart than it reaches."""
    images, settings = smooth_noise(24), {"image_size": 124, "jitter": 0, **UNTREATED}
    assert train(tmp_path, images, 150, gap=0, **settings) > 15 + 2 * CHANCE
    assert abs(train(tmp_path, images, 150, gap=25, **settings) - 15) < CHANCE


def test_dropping_colors_hides_fringes(tmp_path, smooth_noise):
    """Leak detector: grey noise with strong fringes tells the place, unless colours are dropped."""
    images = smooth_noise(4)[..., :64, :64]
    settings = {"fringe": 0.06, "pixelation": 0}
    assert train(tmp_path, images, 80, colors="all", **settings) > 15 + 3 * CHANCE
    assert abs(train(tmp_path, images, 80, colors="dropping", **settings) - 15) < CHANCE


def test_pictures_of_their_own_coordinates_are_solved(tmp_path):
    """Positive control: brightness that tells row and column, contrast left alone."""
    rows, columns = torch.meshgrid(*2 * [torch.linspace(0, 255, 64)], indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 128)]).byte()
    images = image.expand(900, -1, -1, -1).clone()
    assert train(tmp_path, images, 60, **UNTREATED) > 90


def test_fixed_patches_are_learnt_by_heart():
    """Gradients flow: 32 images in fixed places are told apart within a few hundred steps."""
    torch.manual_seed(0)
    config = some_config(width=0.2)
    model = context.RelativePositionNet("small", 0.2, 16)
    patches = context.sample_patches(some_images(32, seed=3), generator(), config)
    optimizer = context.make_optimizer(config, model)
    optimizer.param_groups[0]["lr"] = 0.05
    for _ in range(150):
        *pair, positions = context.pair_neighbors(model.embed(patches))
        scores = model(*pair)
        optimizer.zero_grad()
        F.cross_entropy(scores, positions).backward()
        optimizer.step()
    assert float((scores.argmax(1) == positions).float().mean()) > 0.9


def test_every_kind_of_row_runs_and_keeps_to_deterministic_operations(
        tmp_path, folders, graphs, monkeypatch, write_packed):
    """On a set with an unlabelled part; the graph of every training step is walked."""
    write_packed(tmp_path, "stl10", 320, 60, (96, 96, 3))
    declared = records.read_declared(context.__file__)
    declared["scales"]["smoke"]["rows"] = [
        "context/position-accuracy", "context/conv4/linear", "context/conv4/labels20",
        "*/retrieval", "random/conv4/knn", "context/finetuned/labels20", "audit/aberration/*",
        "one-patch/position-accuracy"]
    monkeypatch.setattr(records, "read_declared", lambda path: declared)
    arguments = ["--scale", "smoke", "--data", str(tmp_path), *folders]
    for setting in ("dataset=stl10", "image_size=96", "pretext_epochs=1", "audit_epochs=0.5",
                    "supervised_epochs=0.5", "label_steps=5"):
        arguments += ["--set", setting]
    assert context.main(arguments) == 0
    assert len(graphs) > 10 and not graphs.offenders()
    (path,) = (tmp_path / "results").rglob("doersch_context.jsonl")
    assert len(path.read_text().splitlines()) == 11
    assert all(json.loads(line)["status"] == "ok" for line in path.read_text().splitlines())
    names = {file.name.removeprefix("doersch_context_") for file in path.parent.iterdir()}
    assert {"neighbours.png", "pretext.svg"} <= names
    graphs.clear()
    encoder = context.PatchEncoder("alexnet", 0.05, 96)
    encoder(torch.rand(4, 3, 96, 96)).sum().backward()
    assert len(graphs) == 1 and not graphs.offenders()


def test_two_ranks_equal_one(tmp_path, one_and_two_ranks, write_packed):
    """Patches are drawn by shards and batch-norm spans the ranks: the weights are the same."""
    write_packed(tmp_path, "stl10", 108, 20, (96, 96, 3))
    ((one, two),) = one_and_two_ranks(
        context, "--scale", "smoke", "--data", str(tmp_path), "--rows", "context/position-accuracy",
        "--set", "dataset=stl10", "--set", "image_size=96", "--set", "precision=float32",
        "--set", "pretext_epochs=2", "--set", "pretext_rate=0.02", "--set", "shards=8").values()
    start = some_run(tmp_path).build(context.RelativePositionNet, "small", 0.1, 16).state_dict()
    for name, tensor in one.items():
        assert_close(two[name], tensor, atol=1e-3, rtol=1e-2, msg=lambda m: f"{name}: {m}")
    moved = [(one[name] - start[name]).abs().max() for name in start if name.endswith("weight")]
    assert max(moved) > 0.003
