"""Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles
Mehdi Noroozi, Paolo Favaro.  ECCV 2016, arXiv 1603.09246.
Official code: https://github.com/MehdiNoroozi/JigsawPuzzleSolver/tree/8c7ec09
(N18: line 18 of its train_val_cfn_jps.prototxt; S11: line 11 of its solver_cfn_jps.prototxt)

Claim: to order the shuffled tiles of a photograph, a network has to learn how objects are built.
Method: nine tiles are cut from the cells of a 3 x 3 grid and shuffled by one of P permutations that
differ much; the network predicts which (chance: ln P).  It is context-free: one encoder turns each
tile alone into a vector, and only the vectors meet.  Against short cuts (lines that go on, colour
fringes of a lens, brightness) tiles have gaps, are normalised, and a puzzle is grey or its colour
channels are shifted against each other; an audit undoes these measures.

Deviations from the paper
 1. An image's tiles are encoded once a step and serve several puzzles; paper: a single one.
 2. Each permutation maximises the least distance to those before, then the mean; paper: the mean.
 3. Images of 96 or 128 pixels, tiles of 24 or 32, a network to match, with batch-norm; Nesterov
    momentum, warm-up, cosine.  Not so scale paper, which keeps the paper's 1 to 3 on squares of 256
    pixels; small has a narrower network, less training: claims are comparable, values are not.
 4. Channels shift inside their own cell: tiles keep `margin` pixels from its border, as in the
    authors' later network.  Grey puzzles are not shifted, or they would not be grey.
 5. Tiles are normalized by channel; the official code subtracts a mean (N13) and does not divide.
 6. Paper: fine-tuning for VOC, and on ImageNet with layers locked.  Ours: plain probes, few labels,
    fine-tuning, with batch-norm statistics of 500 images.  Images are prepared as the network's
    own tiles were (so in the audit, too), but are never grey and their channels never shifted.
 7. Multiplications in bfloat16 (--set precision=float32 for the original's), the rest in float32.
 8. audit/no-gap: tiles do not move, either; no-color-handling: no grey, either (paper: no shifts).
 9. Left out: VOC, locked layers, transfer to puzzles (Table 3), nine sets of Table 4.
python -m papers.noroozi_jigsaw --scale small   # Imagenette, two CPU cores: 60 minutes a seed
Result, small: jigsaw/conv4/linear 70.7 +- 0.3 against random/conv4/linear 61.4 (n = 3);
        paper's weights on ImageNet, from a survey: 33.9
"""
import itertools
import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from replicate import evaluate, trainer
from replicate.launch import launch
from replicate.outputs import make_grid, save_image


@dataclass
class Config:
    """Settings of a run.  Lengths are in pixels of an image of image_size."""
    seed: int
    dataset: str = "imagenette"
    image_size: int = 128               # ours; paper: 256
    streamed: bool = False              # ours: decode files on the fly, do not keep them in memory
    network: Literal["small", "alexnet"] = "small"      # "small": ours; "alexnet": the paper's
    width: float = 1.0                  # ours: channels, as a fraction of the network's
    tile: int = 32                      # ours; official code, N18: 64
    gap: int = 10                       # ours; official code, N19: 21, in cells of 85
    jitter: bool = True                 # paper: tiles lie anywhere in their cells
    normalization: bool = True          # paper: mean and deviation of each tile
    grey: float = 0.3                   # paper: share of puzzles without colours
    shift: int = 2                      # paper: of each channel of each tile, to either side
    margin: int = 2                     # ours: kept around a tile for the shift
    fringe: float = 0.0                 # audit: the green channel is magnified by 1 + fringe
    hidden_rims: bool = False           # audit: a tenth of a tile is blank along each side
    one_tile: bool = False              # audit: predict the cell of a tile from that tile alone
    permutations: int = 64              # ours; paper: 1000 in the end, 100 in Table 5
    rule: Literal["max-min", "max-mean", "min-mean"] = "max-min"    # ours; paper: "max-mean"
    puzzles: int = 8                    # ours: permutations of an image in a step; paper: 1
    audit_permutations: int = 64        # ours; paper, Table 5: 100
    batch_size: int = 256               # official code, N25: images
    pretext_epochs: float = 200.0       # ours
    audit_epochs: float = 40.0          # ours
    permutation_epochs: float = 40.0    # ours: for each set of permutations
    pretext_rate: float = 0.05          # ours; official code, S5: 0.01
    pretext_drops: tuple[float, ...] = ()   # S8: when the rate falls to a tenth; none: cosine
    supervised_epochs: float = 60.0     # ours: with all labels, from scratch and fine-tuned
    label_steps: int = 1500             # ours: updates on few labels, however few
    supervised_rate: float = 0.1        # ours
    finetune_rate: float = 0.1          # ours
    warmup: float = 0.05                # ours: share of the steps
    momentum: float = 0.9               # official code, S11
    nesterov: bool = True               # ours; official code: without
    weight_decay: float = 5e-4          # official code, S12
    probe_cells: int = 4                # ours: probes see maps of at most 4 x 4
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # ours: of multiplications
    deterministic: bool = True          # ours
    shards: int = 1                     # ours: parts of a batch, divided among GPUs

    def __post_init__(self):
        outside = 2 * max(0, self.margin - self.gap // 2)
        needed, least = 3 * (self.tile + self.gap) + outside, 16 if self.network == "small" else 32
        assert self.image_size >= needed, (
            f"image_size {self.image_size} ({self.dataset}): {needed} are needed; "
            f"tile={max(0, (self.image_size - outside) // 3 - self.gap)} would fit this gap")
        assert self.tile >= least, f"tile {self.tile}: the network needs at least {least} pixels"
        assert self.shift <= self.margin, f"shift {self.shift}: at most margin={self.margin} pixels"
        for count in (self.permutations, self.audit_permutations):
            assert 2 <= count <= 362880, f"{count} permutations: nine tiles have 2 to 362880"
        assert self.width * self.puzzles * self.probe_cells, "width, puzzles, probe_cells: above 0"
        assert self.grey <= 1 and self.warmup <= 1, "grey, warmup: shares, at most 1"


# ---- The idea: put the tiles back in order ----

@cache
def hamming_permutations(count, tiles=9, seed=0, rule="max-min"):
    """(count, tiles) int64, chosen one after the other, the first at random (Algorithm 1).

    The next one has the largest minimum ("max-min", ties by the mean), largest mean ("max-mean") or
    smallest mean ("min-mean") Hamming distance, the number of places that differ, to those before.
    The result is cached: do not write into it.
    """
    if not 1 <= tiles <= 9 or not 1 <= count <= math.factorial(tiles):
        raise ValueError(f"{count} permutations of {tiles} tiles: 1 to tiles! of up to 9 tiles")
    candidates = torch.tensor(list(itertools.permutations(range(tiles))), dtype=torch.uint8)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    candidates = candidates[order].T.contiguous()  # (tiles, tiles!)
    total = torch.zeros(len(order), dtype=torch.int32)  # of the distances to all chosen
    nearest = torch.full_like(total, tiles)  # the least of them
    free, chosen = torch.ones(len(order), dtype=torch.bool), [0]
    while len(chosen) < count:
        free[chosen[-1]] = False
        distance = (candidates != candidates[:, chosen[-1:]]).sum(0, dtype=torch.int32)  # (tiles!,)
        total += distance
        nearest = torch.minimum(nearest, distance)
        score = {"max-min": nearest * (tiles * count + 1) + total,  # the total only breaks ties
                 "max-mean": total, "min-mean": -total}[rule]
        chosen.append(int(torch.where(free, score, -2 ** 30).max(0).indices))  # the first of equals
    return candidates[:, chosen].T.long().contiguous()


def cut_tiles(images, cell, tile, generator, margin=0, jitter=True):
    """(N,C,H,W) -> (N,9,C,t,t): a tile from a random place of each cell of a 3 x 3 grid.

    The grid lies at a random place of the image.  margin: tiles are cut with so many pixels more on
    each side, t = tile + 2 margin, inside the cell if it has room, else beyond it.  jitter=False:
    from the middle of the cells.  ValueError where the grid does not fit.
    """
    count, device = len(images), images.device
    inside = min(margin, (cell - tile) // 2)  # the part of the margin for which the cell has room
    span = 3 * cell + 2 * (margin - inside)
    if tile > cell or min(images.shape[-2:]) < span:
        raise ValueError(f"{tuple(images.shape)}: tiles of {tile} in cells of {cell} need {span}")
    down, right = torch.rand(2, count, 1, generator=generator, device=device)
    rows, columns = (side - span + 1 for side in images.shape[-2:])  # places for the grid
    origin = torch.stack([down * rows, right * columns], 2).long()  # (N, 1, 2)
    choices = cell - tile - 2 * inside + 1
    moved = (choices - 1) // 2
    if jitter:
        moved = torch.randint(choices, (count, 9, 2), generator=generator, device=device)
    place = torch.arange(9, device=device)
    corners = origin + cell * torch.stack([place // 3, place % 3], 1) + moved  # (N, 9, 2)
    return cut_squares(images, corners, tile + 2 * margin)


def cut_squares(images, corners, side):
    """(N,C,H,W), row and column (N,K,2) of the first pixels -> squares (N,K,C,side,side)."""
    samples = torch.arange(len(images), device=images.device)[:, None]
    rows, columns = corners.unbind(2)
    windows = images.unfold(2, side, 1).unfold(3, side, 1)  # a view: every square of the image
    return windows[samples, :, rows, columns]


def handle_colors(windows, tile, grey, shift, generator):
    """Tiles with their margins (N,9,3,w,w) -> (N,9,3,t,t): a share `grey` of the puzzles is grey;
    in the others each channel of each tile is cut up to `shift` pixels off the middle."""
    count, device = len(windows), windows.device
    in_grey = torch.rand(count, 1, 1, 1, generator=generator, device=device) < grey
    moved = torch.randint(-shift, shift + 1, (count, 9, 3, 2), generator=generator, device=device)
    red, green, blue = windows.split(1, 2)  # (N, 9, 1, w, w)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = torch.where(in_grey[..., None], luma, windows).flatten(0, 2)[:, None]  # (27N,1,w,w)
    corners = torch.where(in_grey, 0, moved) + (windows.shape[-1] - tile) // 2
    corners = corners.flatten(0, 2)[:, None]  # (27N, 1, 2): each channel is cut as its own image
    return cut_squares(channels, corners, tile).reshape(count, 9, 3, tile, tile)


def normalize_tiles(tiles):
    """(...,C,t,t) in 0..1 -> the same, each channel of each tile with mean 0 and deviation 1."""
    centred = tiles - tiles.mean((-2, -1), keepdim=True)
    return centred / centred.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(0.01)


def make_puzzles(images, generator, config):
    """(N,3,S,S) uint8 -> tiles (N,9,3,t,t) in order, short cuts closed, and labels (N,K), numbers
    of the permutations by which the network shuffles them (one_tile: each tile's cell, (N,9))."""
    rim = config.tile // 10 if config.hidden_rims else 0
    tile, cell = config.tile - 2 * rim, config.tile + config.gap
    if config.fringe:
        images = evaluate.add_fringes(images.float(), config.fringe)
    windows = cut_tiles(images, cell, tile, generator, config.margin, config.jitter).float() / 255
    tiles = handle_colors(windows, tile, config.grey, config.shift, generator)
    tiles = normalize_tiles(tiles) if config.normalization else (tiles - 0.5) / 0.25
    tiles = F.pad(tiles, 4 * [rim])
    if config.one_tile:
        return tiles, torch.arange(9, device=tiles.device).repeat(len(tiles), 1)
    return tiles, torch.randint(config.permutations, (len(tiles), config.puzzles),
                                generator=generator, device=tiles.device)


def arrange(tiles, orders):
    """(N,9,...), orders (N,K,9) -> (N,K,9,...): place t of puzzle k gets tile orders[n, k, t]."""
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None, None], orders]


# ---- Network ----

def grouped_convolution(inputs, outputs, kernel, stride=1, padding=1, groups=1, norm=0, pool=0):
    """The layers of a convolution in groups and, as asked, batch-norm and pooling, then ReLU."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=not norm)]
    layers += [nn.BatchNorm2d(outputs)] if norm else []
    layers += [nn.MaxPool2d(3, 2, ceil_mode=True)] if pool else []
    return [*layers, nn.ReLU()]  # after pooling it gives the same and has less to do


def fully_connected(inputs, outputs, norm):
    """Linear layer and ReLU, with batch-norm between them or dropout after them."""
    rest = [nn.BatchNorm1d(outputs), nn.ReLU()] if norm else [nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(nn.Linear(inputs, outputs, bias=not norm), *rest)


class TileEncoder(nn.Module):
    """conv1 to conv5 and fc6: tiles (N,3,t,t) -> (N,D); or `maps` of images of any size."""

    def __init__(self, network="small", width=1.0, tile=64):
        super().__init__()
        self.small = small = network == "small"
        channels = (64, 192, 384, 256, 256) if small else (96, 256, 384, 384, 256)
        c1, c2, c3, c4, c5 = (2 * max(4, round(count * width / 2)) for count in channels)  # even
        convolution = partial(grouped_convolution, norm=small)
        if small:
            blocks = [convolution(3, c1, 5, 2, 2, pool=True), convolution(c1, c2, 3, pool=True),
                      convolution(c2, c3, 3), convolution(c3, c4, 3), convolution(c4, c5, 3)]
        else:  # official code, N151
            blocks = [[*convolution(3, c1, 11, 2, padding=0, pool=True), LocalResponseNorm()],
                      [*convolution(c1, c2, 5, 1, 2, groups=2, pool=True), LocalResponseNorm()],
                      convolution(c2, c3, 3), convolution(c3, c4, 3, groups=2),
                      convolution(c4, c5, 3, groups=2, pool=True)]
        self.blocks = nn.ModuleList(nn.Sequential(*layers) for layers in blocks)
        self.channels, self.dimension = c5, max(8, round((512 if small else 1024) * width))
        flat = self.eval().maps(torch.zeros(1, 3, tile, tile))[-1].numel()  # inputs of fc6
        self.fc6 = nn.Sequential(nn.Flatten(), fully_connected(flat, self.dimension, norm=small))
        self.apply(initialize).train()

    def maps(self, images):
        """[feature map of conv1, ..., of conv5], pooled where the network pools."""
        maps = [images]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    def forward(self, tiles):
        return self.fc6(self.maps(tiles)[-1])


class ContextFreeNetwork(nn.Module):
    """Tiles (N,9,3,t,t), labels (N,K) -> scores (NK,P) of P permutations (Fig. 3).  Labels only
    shuffle the vectors, as if tiles were; no layer sees them.  one_tile: scores (9N,9) of cells."""

    def __init__(self, config):
        super().__init__()
        self.encoder = TileEncoder(config.network, config.width, config.tile)
        permutations = hamming_permutations(config.permutations, 9, config.seed, config.rule)
        self.register_buffer("permutations", permutations.clone())
        self.one_tile, small = config.one_tile, config.network == "small"
        tiles, classes = (1, 9) if self.one_tile else (9, config.permutations)
        units = max(8, round((1024 if small else 4096) * config.width))
        fc7 = fully_connected(tiles * self.encoder.dimension, units, norm=small)
        self.head = nn.Sequential(fc7, nn.Linear(units, classes)).apply(initialize)

    def embed(self, tiles):
        """(N,9,3,t,t) -> (N,9,D): each tile by itself, all at once."""
        flat = tiles.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.encoder(flat).to(tiles.dtype).unflatten(0, tiles.shape[:2])

    def forward(self, tiles, labels):
        embeddings = self.embed(tiles)
        if not self.one_tile:
            embeddings = arrange(embeddings, self.permutations[labels]).flatten(2)  # (N, K, 9D)
        return self.head(embeddings.flatten(0, 1))


def initialize(layer):
    """Gaussians and biases of the official code (N171); He initialisation before batch-norm."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is None:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    elif isinstance(layer, (nn.Conv2d, nn.Linear)):
        linear = isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=0.005 if linear else 0.01)
        nn.init.constant_(layer.bias, float(linear or layer.groups > 1))


# ---- Objective ----

def pretext_loss(scores, labels):
    """Scores (B,classes), labels (B,) -> mean cross-entropy and the share of correct answers."""
    return {"loss": F.cross_entropy(scores.float(), labels),
            "accuracy": (scores.argmax(1) == labels).float().mean()}


def make_optimizer(config, model):
    """SGD; biases have twice the rate (run.fit reads "scale") and no weight decay (N162)."""
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights}, {"params": biases, "scale": 2.0, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay,
                           nesterov=config.nesterov and config.momentum > 0, fused=True)


# ---- Pre-training ----

def pretrain(run, data, config, name):
    """-> Trained ContextFreeNetwork.  run: trainer.Run; config: its own or an audit variant's."""
    model = run.build(ContextFreeNetwork, config)
    rate = (trainer.stepped(config.pretext_rate, config.pretext_drops, 0.1)
            if config.pretext_drops else trainer.cosine(config.pretext_rate, config.warmup))

    def loss(batch, step):
        images, _ = batch  # the class labels stay unused
        tiles, labels = run.augment(make_puzzles, images, "augment", step, config=config)
        return pretext_loss(model(tiles, labels), labels.flatten())

    return run.fit(name, model, loss, run.shuffled(data.unlabeled, config.batch_size, "pretext"),
                   steps=trainer.steps_in(config, config.pretext_epochs, data.unlabeled),
                   optimizer=make_optimizer(config, model), rate=rate,
                   chance=math.log(9 if config.one_tile else config.permutations))


# ---- Evaluation ----

NETWORKS = ("jigsaw", "random", "supervised")
FRINGE = 0.005  # an aberration of half a percent of the distance to the middle of the image
VARIANTS = {  # of the audit: name -> settings that differ from the run's
    "audit/as-is": {}, "audit/no-jitter": {"jitter": False},
    "audit/no-jitter-hidden-rims": {"jitter": False, "hidden_rims": True},
    "audit/no-gap": {"gap": 0, "jitter": False},
    "audit/no-gap-hidden-rims": {"gap": 0, "jitter": False, "hidden_rims": True},
    "audit/no-normalization": {"normalization": False},
    "audit/no-color-handling": {"grey": 0.0, "shift": 0},
    "audit/aberration": {"grey": 0.0, "shift": 0, "fringe": FRINGE},
    "audit/aberration-handled": {"fringe": FRINGE}, "audit/one-tile": {"one_tile": True},
    "audit/permutations9": {"permutations": 9}, "audit/permutations64": {"permutations": 64},
    "audit/permutations64-near": {"permutations": 64, "rule": "min-mean"},
    "audit/permutations100": {"permutations": 100},
    "audit/permutations1000": {"permutations": 1000}}


def audit_config(config, name):
    """The settings of a network: the run's, or a variant's, with a budget of its own."""
    if name not in VARIANTS:
        return config
    sets = name.startswith("audit/permutations")
    epochs = config.permutation_epochs if sets else config.audit_epochs
    audit = {"pretext_epochs": epochs, "permutations": config.audit_permutations}
    return replace(config, **{**audit, **VARIANTS[name]})


@torch.no_grad()
def puzzle_accuracy(run, model, config, test):
    """Percent of the puzzles of test images whose permutation, or cell, is predicted correctly."""
    model.eval()
    correct = count = 0
    for number, (images, _) in enumerate(evaluate.in_order(test, 250)):
        tiles, labels = make_puzzles(images, run.stream("test puzzles", number, run.device), config)
        with run.autocast():
            correct += int((model(tiles, labels).argmax(1) == labels.flatten()).sum())
        count += labels.numel()
    return 100.0 * correct / count


def normalize(images, config, crop=False):
    """Whole images (N,3,H,W) uint8 -> what encoders see of them, as of tiles in pre-training.
    crop: the middle 3/4, a random crop of images that have been shifted by up to an eighth."""
    images = F.pad(images, 4 * [-(images.shape[-1] // 8)]) if crop else images
    images = images.float() / 255
    images = normalize_tiles(images) if config.normalization else (images - 0.5) / 0.25
    return images.contiguous(memory_format=torch.channels_last)


def for_images(encoder):
    """The same encoder, set for whole images: AlexNet's conv1 has a stride of 2 for tiles only."""
    if not encoder.small:
        encoder.blocks[0][0].stride = (4, 4)
    return encoder


def feature_maps(run, encoder, config, images):
    """[feature map of conv1, ..., of conv5] of whole images."""
    with run.autocast():
        return encoder.maps(normalize(images, config))


def plain_probes(run, encoder, config, rows, train, test):
    """{row: accuracy} of rows <network>/conv<block>/<linear, knn or labels<number a class>>."""
    maps = partial(feature_maps, run, encoder, config)
    evaluate.recalibrate(encoder, maps, train)  # batch-norm statistics of whole images
    with evaluate.frozen(encoder):
        return evaluate.probe(maps, evaluate.blocks_and_kinds(rows), train, test,
                              config.probe_cells, run.seed)


def train_classifier(run, data, row, encoder, rate):
    """-> Trained: the encoder's convolutions and a linear layer, on the labels a row may use."""
    config, labels, size = run.config, evaluate.labels_of(row), min(run.config.batch_size, 64)
    model = evaluate.Classifier(encoder, data.classes).to(run.device)
    steps = config.label_steps if labels else trainer.steps_in(
        config, config.supervised_epochs, data.train, size)
    return evaluate.train_on_labels(
        run, data, row, model, partial(normalize, config=config, crop=True), labels,
        batch_size=size, steps=steps, optimizer=make_optimizer(config, model),
        rate=trainer.cosine(rate, config.warmup), chance=math.log(data.classes))


def network(run, data, name):
    """-> Trained, whose model has an encoder: one of NETWORKS or of the audit's VARIANTS."""
    config = audit_config(run.config, name)
    if name in VARIANTS:  # those with the same settings share one training, under the first's name
        name = next(first for first in VARIANTS if audit_config(run.config, first) == config)
    if name not in ("random", "supervised"):
        return pretrain(run, data, config, name)
    model = run.build(ContextFreeNetwork, config)
    if name == "random":
        return trainer.Trained(model)
    encoder = for_images(model.encoder)
    return train_classifier(run, data, name, encoder, config.supervised_rate)


def reproduce(run):
    """Every row of one seed; what several rows share is trained once, then read from its file."""
    config = run.config
    data = run.load(config.dataset, config.image_size, config.streamed or None, channels=3)
    if hasattr(data.train, "images"):  # some sets have a size of their own: Config checks it again
        replace(config, image_size=data.train.images.shape[-1])
    for name in (*NETWORKS, *VARIANTS):
        settings = audit_config(config, name)
        if rows := run.wants(f"{name}/puzzle-accuracy", f"{name}/cell-accuracy"):
            trained = network(run, data, name)
            measure = partial(puzzle_accuracy, run, trained.model, settings)
            if "jigsaw/puzzle-accuracy" in rows and run.seed == run.rank == 0 and not run.plan:
                figures(run, data, trained.model)
            run.record(rows, measure, data.test, after=[trained])
        if rows := run.wants(f"{name}/conv*"):
            trained = network(run, data, name)
            encoder = for_images(trained.model.encoder)
            measure = partial(plain_probes, run, encoder, settings, rows)
            run.record(rows, measure, data.train, data.test, after=[trained])
    for row in run.wants("supervised", "supervised/labels*", "jigsaw/finetuned*"):
        if not evaluate.enough_labels(data.train.labels, row):
            run.record(row, None)  # leaves the row out
            continue
        finetuned = row.startswith("jigsaw")
        start = network(run, data, "jigsaw" if finetuned else "random")
        rate = config.finetune_rate if finetuned else config.supervised_rate
        final = train_classifier(run, data, row, for_images(start.model.encoder), rate)
        see = partial(normalize, config=config)
        measure = partial(evaluate.class_accuracy, run, final.model, see)
        run.record(row, measure, data.test, after=[start, final])


# ---- Figures ----

@torch.no_grad()
def figures(run, data, model):
    """Six test images as puzzles, as the network solves them, and in order."""
    spread = torch.linspace(0, len(data.test) - 1, min(6, len(data.test))).long()
    images, _ = next(data.test.batches([spread]))
    tiles, labels = make_puzzles(images, run.stream("figures", 0, run.device), run.config)
    with run.autocast():
        answers = model.eval()(tiles, labels[:, :1]).argmax(1, keepdim=True)  # (N, 1)
    plain = replace(run.config, grey=0.0, shift=0, normalization=False)
    ordered, _ = make_puzzles(images, run.stream("figures", 0, run.device), plain)  # the same tiles
    ordered = ordered * 0.25 + 0.5  # in 0..1 again
    shuffled = arrange(ordered, model.permutations[labels[:, :1]])[:, 0]
    solved = arrange(shuffled, model.permutations[answers].argsort(2))[:, 0]  # the inverse
    panels = [make_grid(tiles, nrow=3, padding=2, pad_value=1.0)
              for puzzle in zip(shuffled.cpu(), solved.cpu(), ordered.cpu()) for tiles in puzzle]
    grid = make_grid(panels, nrow=6, padding=4, pad_value=1.0)[None]
    save_image(F.interpolate(grid, scale_factor=2), run.suite / f"{run.paper}_puzzles.png")


# ---- Parts that the method calls ----

class LocalResponseNorm(nn.Module):
    """AlexNet's, over five channels; torch's own has no deterministic backward pass on a GPU."""

    def forward(self, x):
        squares = F.pad(x.float().square(), (0, 0, 0, 0, 2, 2))
        near = sum(squares[:, shift:shift + x.shape[1]] for shift in range(5))
        return x / (1 + 1e-4 / 5 * near).pow(0.75).to(x.dtype)


def main(arguments=None):
    return launch(__file__, Config, reproduce, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
