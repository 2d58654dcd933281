"""The invariants of the jigsaw paper, cheap ones first; the last tests train tiny networks on real
steps."""
import dataclasses
import json
import math
import time

import pytest
import torch
from torch.nn.functional import cross_entropy

from papers import noroozi_jigsaw as jigsaw
from replicate import records, trainer
from replicate.data import ImageSet, InputError, Resident

DECLARED = records.read_declared(jigsaw.__file__)


def some_images(count=6, size=64, seed=0):
    return torch.randint(0, 256, (count, 3, size, size),
                         generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_config(scale="smoke", **settings):
    return trainer.read_settings(jigsaw.Config, DECLARED, scale, 0,
                                 [f"{key}={value}" for key, value in settings.items()])[0]


def some_run(folder, **settings):
    return trainer.Run(jigsaw.__file__, some_config(**settings), "smoke", DECLARED["rows"],
                       results=folder, runs=folder)


def some_network(**settings):
    torch.manual_seed(0)
    return jigsaw.ContextFreeNetwork(some_config(**settings))


def coordinates(count, side):
    """Images that hold each pixel's row in the first channel, its column in the second and the
    image's number in the third."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    images = torch.stack([rows, columns, torch.zeros_like(rows)]).repeat(count, 1, 1, 1).short()
    images[:, 2] = torch.arange(count)[:, None, None]
    return images


# Permutations
def hamming_distances(permutations):
    """Of all pairs, in one row."""
    distances = (permutations[:, None] != permutations[None]).sum(2)
    return distances[tuple(torch.triu_indices(len(permutations), len(permutations), 1))]


@pytest.mark.parametrize("rule,count,least,mean", [
    ("max-min", 9, 9, 9.0), ("max-min", 10, 8, 8.8), ("max-min", 24, 7, 8.315),
    ("max-min", 64, 7, 8.123),
    ("max-min", 100, 6, 8.080), ("max-mean", 9, 9, 9.0), ("max-mean", 64, 4, 8.125),
    ("max-mean", 100, 2, 8.080)])
def test_permutations_are_distinct_and_as_far_apart_as_published(rule, count, least, mean):
    permutations = jigsaw.hamming_permutations(count, rule=rule)
    assert permutations.shape == (count, 9) and permutations.dtype == torch.int64
    assert torch.equal(permutations.sort(1).values, torch.arange(9).expand(count, 9))
    assert len(permutations.unique(dim=0)) == count
    distances = hamming_distances(permutations)
    assert int(distances.min()) == least
    assert float(distances.float().mean()) == pytest.approx(mean, abs=0.03)
    assert float(distances.double().mean()) <= 8 * count / (count - 1) + 1e-9  # the exact bound
    if count == 9:  # a Latin square: every tile once in every place
        assert torch.equal(permutations.sort(0).values, torch.arange(9)[:, None].expand(9, 9))


def test_near_permutations_are_near():
    distances = hamming_distances(jigsaw.hamming_permutations(64, rule="min-mean")).float()
    assert distances.min() == 2 and distances.mean() < 5


def test_permutations_follow_the_seed():
    first = jigsaw.hamming_permutations(10, seed=3)
    jigsaw.hamming_permutations.cache_clear()
    assert torch.equal(first, jigsaw.hamming_permutations(10, seed=3))
    assert not torch.equal(first, jigsaw.hamming_permutations(10, seed=4))
    # chosen one after the other
    assert torch.equal(first[:5], jigsaw.hamming_permutations(5, seed=3))


def test_a_thousand_permutations_take_seconds():
    jigsaw.hamming_permutations.cache_clear()
    start = time.process_time()
    permutations = jigsaw.hamming_permutations(1000)
    assert time.process_time() - start < 20
    assert len(permutations.unique(dim=0)) == 1000
    assert int(hamming_distances(permutations).min()) >= 3


def test_small_layouts_and_wrong_calls():
    every = jigsaw.hamming_permutations(24, tiles=4)
    assert len(every.unique(dim=0)) == 24
    assert (every[:1] != every).sum(1).bincount(minlength=5).tolist() == [1, 0, 6, 8, 9]
    assert int(hamming_distances(every[:4]).min()) == 4
    with pytest.raises(ValueError, match="10 permutations of 3 tiles"):
        jigsaw.hamming_permutations(10, tiles=3)
    with pytest.raises(ValueError, match="0 permutations"):
        jigsaw.hamming_permutations(0)
    with pytest.raises(KeyError, match="farthest"):
        jigsaw.hamming_permutations(10, rule="farthest")


def test_the_inverse_permutation_restores_the_tiles():
    tiles = torch.randint(0, 256, (5, 9, 3, 4, 4))
    orders = jigsaw.hamming_permutations(24)[torch.randint(24, (5, 8))]
    shuffled = jigsaw.arrange(tiles, orders)
    assert shuffled.shape == (5, 8, 9, 3, 4, 4)
    assert torch.equal(shuffled[2, 3, 7], tiles[2, orders[2, 3, 7]])  # place t gets tile orders[t]
    for puzzle in range(8):
        inverse = orders[:, puzzle:puzzle + 1].argsort(2)
        assert torch.equal(jigsaw.arrange(shuffled[:, puzzle], inverse)[:, 0], tiles)


# Geometry
@pytest.mark.parametrize("side,cell,tile", [(255, 85, 64), (96, 32, 24), (60, 20, 20)])
def test_every_tile_lies_in_its_own_cell(side, cell, tile):
    count = 20 if side == 255 else 100
    tiles = jigsaw.cut_tiles(coordinates(count, side), cell, tile, generator())
    assert tiles.shape == (count, 9, 3, tile, tile) and tiles.dtype == torch.int16
    # of its own image
    assert torch.equal(tiles[:, :, 2, 0, 0].long(), torch.arange(count)[:, None].expand(-1, 9))
    corners = tiles[:, :, :2, 0, 0].long()
    assert torch.equal(tiles[:, :, :2, -1, -1].long(), corners + tile - 1)  # whole windows
    grid = torch.tensor([[place // 3, place % 3] for place in range(9)])
    offsets = corners - cell * grid
    assert int(offsets.min()) == 0 and int(offsets.max()) == cell - tile  # both ends are reached
    gaps = corners[:, 1:3, 1] - corners[:, 0:2, 1] - tile
    assert int(gaps.min()) >= 0 and int(gaps.max()) <= 2 * (cell - tile)
    assert float(gaps.float().mean()) == pytest.approx(cell - tile, abs=0.15 * (cell - tile) + 1e-9)


@pytest.mark.parametrize("side,cell,tile,margin", [(96, 32, 24, 2), (128, 42, 32, 2),
                                                   (96, 24, 24, 2), (76, 24, 24, 2),
                                                   (64, 21, 16, 2)])
def test_margins_stay_in_the_image_and_where_they_can_in_the_cell(side, cell, tile, margin):
    images = coordinates(50, side)
    tiles = jigsaw.cut_tiles(images, cell, tile, generator(), margin)
    assert tiles.shape[-1] == tile + 2 * margin
    corners = tiles[:, :, :2, 0, 0].long()
    assert corners.min() >= 0 and corners.max() + tile + 2 * margin <= side
    if cell - tile >= 2 * margin:  # neighbours share no pixel
        assert int((corners[:, 1:3, 1] - corners[:, 0:2, 1]).min()) >= tile + 2 * margin
    fixed = jigsaw.cut_tiles(images, cell, tile, generator(), margin, jitter=False)[:, :, :2, 0, 0]
    assert (fixed[:, 1:3, 1] - fixed[:, 0:2, 1] == cell).all()


@pytest.mark.parametrize("cell,tile,margin", [(85, 64, 2), (42, 32, 2), (32, 24, 1)])
def test_tiles_with_margins_keep_to_their_cells(cell, tile, margin):
    grid = cell * torch.tensor([[place // 3, place % 3] for place in range(9)])
    images = coordinates(60, 3 * cell)  # the grid has no room to move
    offsets, fixed = (jigsaw.cut_tiles(images, cell, tile, generator(), margin,
                                       jitter)[:, :, :2, 0, 0].long() + margin - grid
                      for jitter in (True, False))
    assert (int(offsets.min()), int(offsets.max())) == (margin, cell - tile - margin)
    assert (fixed == (cell - tile) // 2).all()
    down = offsets[:, 3:, 0] - offsets[:, :6, 0] + cell - tile  # gaps between rows
    assert int(down.min()) >= 2 * margin
    assert float(down.float().mean()) == pytest.approx(cell - tile, abs=0.15 * (cell - tile))


def test_hidden_rims_part_tiles_that_touch():
    """The same middles of the same tiles in both arms; blank rims in one of them."""
    config = some_config(image_size=96, tile=24, gap=8, shift=0, margin=1, grey=0,
                         normalization="false")
    touching, parted = (jigsaw.make_puzzles(
        some_images(size=96), generator(), jigsaw.audit_config(config, f"audit/no-gap{rims}"))[0]
        for rims in ("", "-hidden-rims"))
    assert touching.shape == parted.shape == (6, 9, 3, 24, 24)
    assert int((parted != 0).flatten(0, 2).any(0).sum()) == 20 ** 2
    ramp = torch.arange(96).expand(40, 3, 96, 96).byte() * 2
    tiles, _ = jigsaw.make_puzzles(ramp, generator(), jigsaw.audit_config(config, "audit/no-gap"))
    columns = ((tiles[:, :, 0].mean(2) / 4 + 0.5) * 255 / 2).unflatten(1, (3, 3))
    between = columns[:, :, 1:, 0] - columns[:, :, :-1, -1]  # from a last column to the next first
    torch.testing.assert_close(between, torch.ones_like(between), atol=0.01, rtol=0)


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 3, 90, 90\).* need 96"):
        jigsaw.cut_tiles(some_images(size=90), 32, 24, generator())
    with pytest.raises(ValueError, match="need 76"):
        jigsaw.cut_tiles(some_images(size=74), 24, 24, generator(), margin=2)
    with pytest.raises(ValueError, match="tiles of 16 in cells of 15"):
        jigsaw.cut_tiles(some_images(), 15, 16, generator())


def test_no_border_shows():
    """Zero padding would: on a white image all tiles of all puzzles are alike."""
    config = some_config(normalization="false", grey=0.5)
    tiles, _ = jigsaw.make_puzzles(torch.full((20, 3, 64, 64), 255, dtype=torch.uint8), generator(),
                                   config)
    torch.testing.assert_close(tiles, torch.full_like(tiles, 2.0))


# Colours and contrast
def test_grey_puzzles_are_grey_and_channels_move_at_most_two_pixels():
    windows = coordinates(200, 63).float()
    windows[:, 2] = windows[:, 0]
    windows = jigsaw.cut_tiles(windows, 21, 16, generator(), margin=2)
    tiles = jigsaw.handle_colors(windows, 16, 0.3, 2, generator(1))
    assert tiles.shape == (200, 9, 3, 16, 16)
    grey = (tiles == tiles[:, :, :1]).flatten(1).all(1)
    assert 35 < int(grey.sum()) < 85
    # a constant in each channel of each tile
    moved = tiles[~grey] - windows[~grey, :, :, 2:18, 2:18]
    assert torch.equal(moved, moved[..., :1, :1].expand_as(moved))
    assert moved.unique().tolist() == [-2, -1, 0, 1, 2]
    assert (moved[:, :, 0] != moved[:, :, 2]).any() and (moved[:, 0] != moved[:, 1]).any()
    assert torch.equal(jigsaw.handle_colors(windows, 16, 0.0, 0, generator()),
                       windows[..., 2:18, 2:18])
    luma = jigsaw.handle_colors(torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1,
                                                               1).expand(1, 9, 3, 20, 20), 16, 1.0,
                                                               2, generator())
    torch.testing.assert_close(luma, torch.full_like(luma, 0.299))


def test_tiles_are_normalised_one_by_one():
    tiles = torch.rand(4, 9, 3, 16, 16, generator=generator()) * 0.3 + 0.2
    normal = jigsaw.normalize_tiles(tiles)
    assert float(normal.mean((-2, -1)).abs().max()) < 1e-5
    torch.testing.assert_close(normal.std((-2, -1), correction=0), torch.ones(4, 9, 3), atol=1e-4,
                               rtol=1e-4)
    torch.testing.assert_close(jigsaw.normalize_tiles(tiles * 1.7 + 0.1), normal, atol=1e-4,
                               rtol=1e-3)
    # and finite
    assert float(jigsaw.normalize_tiles(torch.full((1, 9, 3, 16, 16), 0.7)).abs().max()) < 1e-4


# Networks
def test_shapes_and_sizes_of_the_papers_network():
    encoder = jigsaw.TileEncoder("alexnet", 1.0, 64).eval()
    with torch.no_grad():
        tile = torch.zeros(1, 3, 64, 64)
        maps = encoder.maps(tile)
        sides = [encoder.blocks[0][0](tile).shape[-1], maps[0].shape[-1],
                 encoder.blocks[1][0](maps[0]).shape[-1],
                 *(each.shape[-1] for each in maps[1:])]
    assert sides == [27, 13, 13, 6, 6, 6, 3]
    assert [each.shape[1] for each in maps] == [96, 256, 384, 384, 256]
    assert encoder.fc6[1][0].in_features == 2304 and encoder.dimension == 1024
    assert sum(p.numel() for p in encoder.blocks.parameters()) == 2_334_080
    model = jigsaw.ContextFreeNetwork(some_config("paper", permutations=100))
    assert model.head[0][0].in_features == 9216
    assert sum(p.numel() for p in model.parameters()) == 42_856_932
    assert [float(block[0].bias.detach().mean()) for block in encoder.blocks] == [0, 1, 0, 1, 1]
    assert encoder.blocks[0][0].stride == (2, 2)
    assert jigsaw.for_images(encoder).blocks[0][0].stride == (4, 4)


def test_tiles_do_not_see_one_another():
    """Context-free: a tile changes its own embedding only, and shuffling embeddings is shuffling
    tiles."""
    model = some_network().double().eval()
    tiles = torch.randn(3, 9, 3, 16, 16, dtype=torch.float64, generator=generator())
    labels = torch.randint(24, (3, 8), generator=generator())
    with torch.no_grad():
        embeddings = model.embed(tiles)
        changed = tiles.clone()
        changed[:, 3] += 1
        others = [place for place in range(9) if place != 3]
        assert torch.equal(model.embed(changed)[:, others], embeddings[:, others])
        assert not torch.equal(model.embed(changed)[:, 3], embeddings[:, 3])
        scores = model(tiles, labels).unflatten(0, (3, 8))
        for puzzle in range(8):  # the slow way: shuffle the tiles, then run everything
            shuffled = jigsaw.arrange(tiles, model.permutations[labels[:, puzzle:puzzle + 1]])[:, 0]
            torch.testing.assert_close(scores[:, puzzle],
                                       model.head(model.embed(shuffled).flatten(1)), rtol=1e-9,
                                       atol=1e-9)


@pytest.mark.parametrize("one_tile,ways", [("false", 24), ("false", 100), ("false", 701),
                                           ("false", 1000), ("true", 9)])
def test_a_zeroed_classifier_is_at_chance(one_tile, ways):
    config = some_config(one_tile=one_tile, permutations=ways)
    model = some_network(one_tile=one_tile, permutations=ways)
    torch.nn.init.zeros_(model.head[1].weight)  # its biases are alike
    tiles, labels = jigsaw.make_puzzles(some_images(), generator(), config)
    loss = cross_entropy(model(tiles, labels), labels.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(ways), abs=1e-5)


def test_single_tiles_are_scored_by_cell():
    tiles, labels = jigsaw.make_puzzles(some_images(), generator(), some_config(one_tile="true"))
    assert torch.equal(labels, torch.arange(9).expand(6, 9))
    model = some_network(one_tile="true").eval()
    with torch.no_grad():
        scores = model(tiles, labels)
        tiles[:, 1:] = 0
        assert scores.shape == (54, 9) and torch.equal(model(tiles, labels).view(6, 9, 9)[:, 0],
                                                       scores.view(6, 9, 9)[:, 0])


def test_labels_are_uniform():
    _, labels = jigsaw.make_puzzles(some_images(600), generator(), some_config())
    assert labels.shape == (600, 8) and 140 < int(labels.flatten().bincount(minlength=24).min())


def test_biases_learn_twice_as_fast_and_do_not_decay():
    optimizer = jigsaw.make_optimizer(some_config(), some_network())
    weights, biases = optimizer.param_groups
    assert weights["weight_decay"] == 5e-4 and (biases["weight_decay"],
                                                biases["scale"]) == (0.0, 2.0)
    assert all(p.dim() == 1 for p in biases["params"])


# Config
@pytest.mark.parametrize("override,message", [
    ("image_size=60", r"\(embedded\): 63 are needed; tile=15 would fit"), ("tile=8", "at least 16"),
    ("rule=far", "max-min, max-mean, min-mean"), ("grey=2", "at most 1"),
    ("batch_size=0", "above 0"),
    ("network=vgg", "small, alexnet"), ("gap=-1", "not be negative"),
    ("permutations=362881", "2 to 362880"),
    ("audit_permutations=1", "2 to 362880"), ("shift=3", "at most margin=2"),
    ("puzzles=0", "above 0"), ("width=0", "above 0"),
    ("pretext_drops=[0.5, 0.2]", "rising fractions"),
])
def test_wrong_settings_are_named(override, message):
    with pytest.raises(InputError, match=message):
        some_config(**dict([override.split("=")]))


def test_images_too_small_for_the_tiles_get_one_line(tmp_path, write_packed, monkeypatch, folders,
                                                     capsys):
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    write_packed(tmp_path)
    assert jigsaw.main(["--scale", "smoke", "--set", "dataset=cifar10", "--device", "cpu",
                        *folders]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "image_size 32 (cifar10)" in error and "tile=5 would fit" in error


def test_paper_scale_is_the_papers_geometry_and_solver():
    config = some_config("paper")
    assert (config.tile + config.gap, config.tile, config.puzzles,
            config.permutations) == (85, 64, 1, 1000)
    steps = int(config.pretext_epochs * 1_281_167 / config.batch_size)
    assert steps == pytest.approx(350_000, rel=0.002)


def test_variants_with_the_same_settings_share_a_training(monkeypatch):
    run, names = type("Run", (), {"config": some_config("paper")}), []
    monkeypatch.setattr(jigsaw, "pretrain", lambda run, data, config,
                        name: names.append((config.permutations, name)))
    for name in ("audit/as-is", "audit/permutations100", "audit/no-gap"):
        jigsaw.network(run, None, name)
    count = run.config.audit_permutations
    assert names == [(count, "audit/as-is"), (count, "audit/as-is"), (count, "audit/no-gap")]


# Short training
# how far chance may be off: 8 puzzles of an image are alike
CHANCE = 4 * 100 * math.sqrt(1 / 24 * 23 / 24 / 1200)


def train(folder, images, steps, variant="as-is", **settings):
    """Accuracy on 300 held-out images, in percent, after a few real steps of pre-training."""
    run = some_run(folder, **{"precision": "float32", **settings})
    split = Resident(images[:-300], torch.zeros(len(images) - 300, dtype=torch.int64))
    held_out = Resident(images[-300:], torch.zeros(300, dtype=torch.int64))
    config = jigsaw.audit_config(run.config, f"audit/{variant}")
    config = dataclasses.replace(config, pretext_epochs=steps * 32.5 / len(split))
    trained = jigsaw.pretrain(run, ImageSet("x", split, held_out, 2), config, variant)
    return jigsaw.puzzle_accuracy(run, trained.model, config, held_out)


@pytest.mark.parametrize("variant,settings", [("as-is", {}), ("as-is", {"grey": 1.0}),
                                              ("no-color-handling", {}),
                                              ("no-normalization", {}),
                                              ("no-gap", {"image_size": 64, "tile": 16, "gap": 5})])
def test_noise_teaches_nothing(tmp_path, variant, settings):
    """Leak test: tiles of white noise do not tell where they lie."""
    accuracy = train(tmp_path, some_images(900, seed=1), 40, variant, **settings)
    assert abs(accuracy - 100 / 24) < CHANCE


def test_the_gap_stops_textures_that_run_on(tmp_path, smooth_noise):
    """Leak detector: smooth noise is solved where tiles touch, not where they are farther apart
    than it reaches."""
    images, settings = smooth_noise(24), {"image_size": 124, "normalization": "false", "grey": 1.0}
    assert train(tmp_path, images, 200, gap=0, **settings) > 100 / 24 + 2 * CHANCE
    assert abs(train(tmp_path, images, 200, gap=25, jitter="false", **settings) - 100 / 24) < CHANCE


def test_shifted_channels_hide_fringes(tmp_path, smooth_noise):
    """Leak detector: grey noise with fringes of less than a pixel is solved, unless channels are
    shifted by as much."""
    images = smooth_noise(4)[..., :64, :64]
    assert train(tmp_path, images, 80, fringe=0.02, grey=0.0, shift=0) > 100 / 24 + 3 * CHANCE
    assert abs(train(tmp_path, images, 80, fringe=0.02, grey=0.0, shift=2) - 100 / 24) < CHANCE


def test_cells_of_different_colours_are_solved(tmp_path):
    """Positive control: every cell has its colour, contrast and colours left alone."""
    colors = torch.randint(0, 256, (3, 3, 3), generator=generator(5), dtype=torch.uint8)
    image = colors.repeat_interleave(21, 1).repeat_interleave(21, 2)
    images = image.expand(900, -1, -1, -1).clone()
    assert train(tmp_path, images, 60, image_size=63, normalization="false", grey=0.0) > 90


def test_fixed_puzzles_are_learnt_by_heart():
    """No plateau at ln P: 64 puzzles are told apart within a few hundred steps."""
    config = some_config(grey=0.0, width=0.2)
    model = some_network(width=0.2)
    tiles, labels = jigsaw.make_puzzles(some_images(64, seed=3), generator(), config)
    optimizer = jigsaw.make_optimizer(config, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    for _ in range(200):
        scores = model(tiles, labels[:, :1])
        optimizer.zero_grad()
        cross_entropy(scores, labels[:, 0]).backward()
        optimizer.step()
    assert float((scores.argmax(1) == labels[:, 0]).float().mean()) > 0.95


def test_every_kind_of_row_runs_and_keeps_to_deterministic_operations(tmp_path, folders, graphs,
                                                                      monkeypatch, write_packed):
    """On a set with an unlabelled part; the graph of every training step is walked."""
    write_packed(tmp_path, "stl10", 320, 60, (96, 96, 3))
    declared = records.read_declared(jigsaw.__file__)
    declared["scales"]["smoke"]["rows"] = [
        "jigsaw/puzzle-accuracy", "jigsaw/conv4/linear", "jigsaw/conv4/labels20",
        "random/conv4/knn", "supervised/conv4/knn",
        "jigsaw/finetuned/labels20", "supervised/labels20", "audit/aberration/puzzle-accuracy",
        "audit/aberration/conv4/linear",
        "audit/one-tile/cell-accuracy", "audit/no-gap/puzzle-accuracy"]
    monkeypatch.setattr(records, "read_declared", lambda path: declared)
    arguments = ["--scale", "smoke", "--data", str(tmp_path), *folders]
    for setting in ("dataset=stl10", "image_size=96", "pretext_epochs=1", "audit_epochs=0.5",
                    "supervised_epochs=0.5",
                    "label_steps=5"):
        arguments += ["--set", setting]
    assert jigsaw.main(arguments) == 0
    assert len(graphs) > 10 and not graphs.offenders()
    (path,) = (tmp_path / "results").rglob("noroozi_jigsaw.jsonl")
    assert len(path.read_text().splitlines()) == 11
    assert all(json.loads(line)["status"] == "ok" for line in path.read_text().splitlines())
    names = {file.name for file in path.parent.iterdir()}
    assert {"noroozi_jigsaw_puzzles.png", "noroozi_jigsaw_pretext.svg"} <= names
    graphs.clear()
    model = jigsaw.ContextFreeNetwork(some_config("paper", permutations=24, width=0.05))
    labels = torch.randint(24, (2, 1))
    cross_entropy(model(torch.rand(2, 9, 3, 64, 64), labels), labels[:, 0]).backward()
    assert len(graphs) == 1 and not graphs.offenders()


def test_two_ranks_equal_one(tmp_path, one_and_two_ranks, write_packed):
    """Patches and answers are drawn by shards, batch-norm spans the ranks: four steps end at the
    same weights."""
    write_packed(tmp_path, "stl10", 108, 20, (96, 96, 3))
    ((one, two),) = one_and_two_ranks(jigsaw, "--scale", "smoke", "--data", str(tmp_path), "--rows",
                                      "jigsaw/puzzle-accuracy",
                                      "--set", "dataset=stl10", "--set", "image_size=96", "--set",
                                      "precision=float32",
                                      "--set", "pretext_epochs=2", "--set", "shards=8").values()
    start = some_run(tmp_path).build(jigsaw.ContextFreeNetwork, some_config()).state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-3, rtol=1e-2,
                                   msg=lambda m: f"{name}: {m}")
    assert max(float((one[name] - tensor).abs().max()) for name, tensor in start.items()
               if name.endswith("weight")) > 0.004
