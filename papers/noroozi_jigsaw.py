"""Noroozi, Favaro (ECCV 2016): Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles.

Claim: to put the shuffled tiles of a photograph back in order, a network has to learn how objects are made of parts.

Method.  A 3 x 3 grid of cells is laid on an image and a tile is cut from each cell at a random place, so that a gap lies between
neighbours.  The tiles are shuffled by one of P permutations, fixed beforehand and far apart in Hamming distance; the network says
by which; a guess costs ln P.  It is context-free: each tile goes through the same convolutions alone, and they meet only after
fc6.  Against short cuts (lines that run on, brightness, the lens's colour fringes) there are the gap, tiles normalised one by one,
grey puzzles and colour channels shifted against each other; the audit rows take these away again, the last two together.

Deviations
 1. Tiles are embedded once and several permutations of the embeddings are scored per image, which costs little because the
    network is context-free; the paper shuffles tiles and takes one permutation.  Scale paper takes one, too.
 2. Permutations maximise the smallest Hamming distance to those chosen before, ties by the mean; the paper maximises the mean,
    which says little from 100 permutations on.  Scale paper maximises the mean.
 3. Images of 96 or 128 pixels, tiles of 24 or 32, batch-norm and a network of that size, at scales small and full.  Scale paper
    has the paper's tiles and the released AlexNet, without batch-norm, on ImageNet decoded to squares of 256 pixels.
 4. Channels are shifted inside their own cell: tiles keep `margin` pixels from its border, as the authors' later network does;
    otherwise windows could leave the image.  Grey puzzles are not shifted, or they would not be grey.
 5. Tiles are normalised by channel; the released code subtracts the mean by channel and does not divide.
 6. SGD with Nesterov momentum, warm-up and cosine at scales small and full; at scale paper the paper's solver.  Biases have
    twice the rate and no weight decay, as in the released code.
 7. Evaluation: the paper fine-tunes for PASCAL VOC and on ImageNet with layers locked.  Ours: plain probes on the feature maps
    (at most 4 x 4, scale paper 2 x 2) of whole images (conv1 of AlexNet back at stride 4, as in the paper's transfer), batch-norm
    statistics of all networks, the random one too, taken anew from 500 training images; few labels and fine-tuning.  Networks of
    the audit see images prepared as their tiles were, in colour.
 8. Convolutions and matrix products run in bfloat16 and hand it on (--set precision=float32 for the original's); parameters, losses
    and the fitting of plain probes are float32.
 9. For audit/no-gap the picture is made smaller until touching tiles reach as far across it as tiles with gaps do, so each also
    shows 1.7 times as much of it; how the paper did it is not known.  Without colour handling the puzzles are not grey, either.
10. Left out: PASCAL VOC (Table 1, transfer in Tables 4, 5), locked layers (Table 2), transfer to the puzzles (Table 3), nine of
    Table 4's sets of permutations.
11. Scale small: less training and a narrower network (see the YAML); values are not comparable, claims are.

    python -m papers.noroozi_jigsaw --scale small        # Imagenette; two CPU cores: half an hour for two seeds side by side
    python -m papers.noroozi_jigsaw --scale full         # Imagenette, one data-centre GPU
    torchrun --nproc_per_node=8 -m papers.noroozi_jigsaw --scale paper        # ImageNet, AlexNet
"""
import copy
import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from replicate import evaluate as frozen
from replicate import trainer

# row -> (the paper's value, where, False if only remembered).  A row is named network/layer/probe or audit/variant/measure.
PAPER = {
    "jigsaw/puzzle-accuracy": (71.0, "Table 4, 1000 permutations", False),
    "jigsaw/conv1/linear": (18.2, "ImageNet, from a survey", True),
    "jigsaw/conv2/linear": (28.8, "ImageNet, from a survey", True),
    "jigsaw/conv3/linear": (34.0, "ImageNet, from a survey", True),
    "jigsaw/conv4/linear": (33.9, "ImageNet, from a survey", True),
    "jigsaw/conv5/linear": (27.1, "ImageNet, from a survey", True),
    "random/conv1/linear": (11.6, "ImageNet, from a survey", True),
    "random/conv2/linear": (17.1, "ImageNet, from a survey", True),
    "random/conv3/linear": (16.9, "ImageNet, from a survey", True),
    "random/conv4/linear": (16.3, "ImageNet, from a survey", True),
    "random/conv5/linear": (14.1, "ImageNet, from a survey", True),
    "supervised/conv1/linear": (19.3, "ImageNet, from a survey", True),
    "supervised/conv2/linear": (36.3, "ImageNet, from a survey", True),
    "supervised/conv3/linear": (44.2, "ImageNet, from a survey", True),
    "supervised/conv4/linear": (48.3, "ImageNet, from a survey", True),
    "supervised/conv5/linear": (50.5, "ImageNet, from a survey", True),
    "jigsaw/conv4/knn": (None, "not in the paper", True),
    "random/conv4/knn": (None, "control", True),
    "supervised/conv4/knn": (None, "control", True),
    "jigsaw/finetuned": (None, "not in the paper", True),
    "supervised": (None, "control", True),
    "jigsaw/finetuned/labels1": (None, "not in the paper", True),
    "jigsaw/finetuned/labels5": (None, "not in the paper", True),
    "jigsaw/finetuned/labels20": (None, "not in the paper", True),
    "jigsaw/finetuned/labels100": (None, "not in the paper", True),
    "supervised/labels1": (None, "control", True),
    "supervised/labels5": (None, "control", True),
    "supervised/labels20": (None, "control", True),
    "supervised/labels100": (None, "control", True),
    "jigsaw/conv4/labels1": (None, "not in the paper", True),
    "jigsaw/conv4/labels5": (None, "not in the paper", True),
    "jigsaw/conv4/labels20": (None, "not in the paper", True),
    "jigsaw/conv4/labels100": (None, "not in the paper", True),
    "random/conv4/labels1": (None, "control", True),
    "random/conv4/labels5": (None, "control", True),
    "random/conv4/labels20": (None, "control", True),
    "random/conv4/labels100": (None, "control", True),
    "audit/as-is/puzzle-accuracy": (88.0, "Table 5, 100 permutations", True),
    "audit/no-gap/puzzle-accuracy": (98.0, "Table 5; here tiles also show more", False),
    "audit/no-jitter/puzzle-accuracy": (None, "tiles in the middle; channels still shift", True),
    "audit/no-normalization/puzzle-accuracy": (90.0, "Table 5", False),
    "audit/no-color-handling/puzzle-accuracy": (89.0, "Table 5, colour jitter alone; here grey puzzles too", False),
    "audit/aberration/puzzle-accuracy": (None, "fringes, no colour handling", True),
    "audit/aberration-handled/puzzle-accuracy": (None, "fringes, grey puzzles and shifts", True),
    "audit/one-tile/cell-accuracy": (None, "where one tile alone lies, chance 11.1", True),
    "audit/permutations9/puzzle-accuracy": (None, "chance 11.1", True),
    "audit/permutations64/puzzle-accuracy": (None, "chance 1.6", True),
    "audit/permutations64-near/puzzle-accuracy": (None, "smallest mean distance, as in Table 4", True),
    "audit/permutations100/puzzle-accuracy": (88.0, "Table 4", True),
    "audit/permutations1000/puzzle-accuracy": (71.0, "Table 4", False),
    "audit/as-is/conv4/linear": (None, "same budget as the rows below", True),
    "audit/no-gap/conv4/linear": (None, "short-cut open", True),
    "audit/no-jitter/conv4/linear": (None, "short-cut half open", True),
    "audit/no-normalization/conv4/linear": (None, "short-cut open", True),
    "audit/no-color-handling/conv4/linear": (None, "short-cut open", True),
    "audit/aberration/conv4/linear": (None, "short-cut open", True),
    "audit/aberration-handled/conv4/linear": (None, "short-cut closed", True),
    "audit/one-tile/conv4/linear": (None, "trained to place one tile", True),
    "audit/permutations9/conv4/linear": (None, "", True),
    "audit/permutations64/conv4/linear": (None, "", True),
    "audit/permutations64-near/conv4/linear": (None, "", True),
    "audit/permutations100/conv4/linear": (None, "", True),
    "audit/permutations1000/conv4/linear": (None, "", True),
}

# (id, row, sign, other row, margin in points, statement, where)
CLAIMS = [
    ("beats-random", "jigsaw/conv4/linear", ">", "random/conv4/linear", 4.0,
     "Jigsaw features beat random ones by 4 points, linear probe", "survey's table"),
    ("last-falls", "jigsaw/conv4/linear", ">", "jigsaw/conv5/linear", 0.0,
     "The best layer is not the last: conv4 beats conv5 (untrained, too)", "survey's table"),
    ("few-labels", "jigsaw/finetuned/labels20", ">", "supervised/labels20", 0.0,
     "With 20 labels a class pre-training beats training from scratch", "ours"),
    ("gap-matters", "audit/no-gap/puzzle-accuracy", ">", "audit/no-jitter/puzzle-accuracy", 2.0,
     "Without the gap the pretext task gets easier by 2 points (the grid is as large a part of the image)", "Table 5"),
    ("easier-is-worse", "audit/no-gap/conv4/linear", "<", "audit/no-jitter/conv4/linear", 0.0,
     "Without the gap the features get worse", "Table 5"),
    ("normalization-matters", "audit/no-normalization/puzzle-accuracy", ">", "audit/as-is/puzzle-accuracy", 0.0,
     "Without normalisation the pretext task gets easier", "Table 5"),
    ("fringes-show", "audit/aberration/puzzle-accuracy", ">", "audit/no-color-handling/puzzle-accuracy", 2.0,
     "Colour fringes give the place away where colours are left alone: 2 points", "the method"),
    ("handling-hides-fringes", "audit/aberration-handled/puzzle-accuracy", "<", "audit/as-is/puzzle-accuracy", -2.0,
     "With grey puzzles and shifted channels, fringes add less than 2 points", "the method"),
    ("more-is-harder", "audit/permutations100/puzzle-accuracy", "<", "audit/permutations9/puzzle-accuracy", 10.2,
     "More permutations lower pretext accuracy, by more than chance falls", "Table 4"),
    ("near-is-harder", "audit/permutations64-near/puzzle-accuracy", "<", "audit/permutations64/puzzle-accuracy", 0.0,
     "Permutations close to one another lower pretext accuracy", "Table 4"),
]

# (file suffix, title, x axis, y axis, {line: [(x, row)] or (row, scalar)})
CURVES = [
    ("low_label", "Test accuracy with few labels", "labels a class", "accuracy, %", {
        "jigsaw, fine-tuned": [(1, "jigsaw/finetuned/labels1"), (5, "jigsaw/finetuned/labels5"),
                               (20, "jigsaw/finetuned/labels20"), (100, "jigsaw/finetuned/labels100")],
        "from scratch": [(1, "supervised/labels1"), (5, "supervised/labels5"), (20, "supervised/labels20"),
                         (100, "supervised/labels100")],
        "jigsaw, conv4 frozen": [(1, "jigsaw/conv4/labels1"), (5, "jigsaw/conv4/labels5"), (20, "jigsaw/conv4/labels20"),
                                 (100, "jigsaw/conv4/labels100")],
        "random, conv4 frozen": [(1, "random/conv4/labels1"), (5, "random/conv4/labels5"), (20, "random/conv4/labels20"),
                                 (100, "random/conv4/labels100")]}),
    ("pretext", "Loss of the pretext task", "step", "loss", {"jigsaw": ("jigsaw/puzzle-accuracy", "loss")}),
]

COMPARABLE = ("paper",)

VARIANTS = {  # audit: name -> settings that differ
    "as-is": {}, "no-gap": {"touching": True}, "no-jitter": {"jitter": False}, "no-normalization": {"normalization": False},
    "no-color-handling": {"grey": 0.0, "shift": 0}, "aberration": {"grey": 0.0, "shift": 0, "fringe": 0.02},
    "aberration-handled": {"fringe": 0.02}, "one-tile": {"one_tile": True}, "permutations9": {"permutations": 9},
    "permutations64": {"permutations": 64}, "permutations64-near": {"permutations": 64, "rule": "min-mean"},
    "permutations100": {"permutations": 100}, "permutations1000": {"permutations": 1000},
}
LABELS = (1, 5, 20, 100)  # a class
RULES = ("max-min", "max-mean", "min-mean")


@dataclass
class Config:
    """Settings of a run.  Lengths in pixels of an image of image_size; a cell of the grid is tile + gap wide."""
    seed: int
    dataset: str = "imagenette"
    image_size: int = 128               # ours: paper 256
    streamed: bool = False              # decode files on the fly rather than keep them on the device
    network: str = "small"              # "small" (ours) or "alexnet" (paper)
    width: float = 1.0                  # channels, as a fraction of the network's
    tile: int = 32                      # ours: paper 64
    gap: int = 10                       # ours: paper 21, on average; cells of 85
    jitter: bool = True                 # paper: tiles at random places of their cells
    normalization: bool = True          # paper: mean and deviation of each tile
    grey: float = 0.3                   # paper: share of puzzles without colours
    shift: int = 2                      # paper: of each channel of each tile, to either side
    margin: int = 2                     # ours: kept around a tile for the shift, in every variant alike
    fringe: float = 0.0                 # audit: what the green channel is magnified by
    touching: bool = False              # audit: no gaps; pictures are made smaller, so that the grid reaches as far across them
    one_tile: bool = False              # audit: say where a tile lies, from that tile alone
    permutations: int = 64              # ours: paper 1000 in the end, 100 in Table 5
    rule: str = "max-min"               # ours: paper "max-mean"
    puzzles: int = 8                    # ours: permutations scored per image and step; paper 1
    audit_permutations: int = 64        # ours: paper 100, Table 5
    batch_size: int = 256               # paper: images
    pretext_epochs: float = 200.0       # ours
    audit_epochs: float = 40.0          # ours
    pretext_rate: float = 0.05          # ours
    pretext_drops: tuple[float, ...] = ()   # paper: fractions of the run at which the rate falls to a tenth; none: cosine
    supervised_epochs: float = 60.0     # ours: with all labels, from scratch and fine-tuned
    label_epochs: float = 20.0          # ours: with few labels; in epochs of the whole set
    supervised_rate: float = 0.1        # ours
    finetune_rate: float = 0.1          # ours
    warmup: float = 0.05                # ours: share of the steps
    momentum: float = 0.9               # official code
    nesterov: bool = True               # ours: official code without
    weight_decay: float = 5e-4          # official code
    probe_cells: int = 4                # ours: linear and k-NN probes see maps of at most 4 x 4
    precision: str = "bfloat16"         # ours: multiplications only; parameters and losses stay float32
    deterministic: bool = True          # ours
    shards: int = 8                     # ours: parts of a batch with random streams of their own; ranks divide it

    def __post_init__(self):
        trainer.check_settings(self, positive=("image_size", "width", "tile", "puzzles", "probe_cells"), shares=("grey", "warmup"),
                               rule=RULES, network=tuple(NETWORKS))
        require_room(self, self.image_size, "image_size")
        smallest = 16 if self.network == "small" else 32
        trainer.require(self.tile >= smallest, f"tile {self.tile}: the network needs at least {smallest} pixels")
        trainer.require(self.shift <= self.margin, f"shift {self.shift}: at most the margin of {self.margin} pixels")
        for name in ("permutations", "audit_permutations"):
            count = getattr(self, name)
            trainer.require(2 <= count <= math.factorial(9), f"{name} must be 2 to {math.factorial(9)} of nine tiles, not {count}")
        trainer.require(self.momentum > 0 or not self.nesterov, "nesterov needs a momentum above 0")


def require_room(config, side, what):
    """Raise InputError, naming the tile that would fit, unless images of `side` pixels hold the grid and its margin."""
    extra = 2 * (config.margin - min(config.margin, config.gap // 2))
    needed = 3 * (config.tile + config.gap) + extra
    trainer.require(side >= needed, f"{what} {side}: nine tiles of {config.tile} with gaps of {config.gap} need {needed} pixels; "
                    f"tile={max(0, (side - extra) // 3 - config.gap)} would fit this gap")


# Data: the test split is only ever counted on
def load_data(run):
    """The ImageSet of the config; images too small for the tiles are refused."""
    config = run.config
    data = run.load(config.dataset, config.image_size, config.streamed or None)
    side = data.train.images.shape[-1] if hasattr(data.train, "images") else config.image_size
    require_room(config, side, f"images of '{config.dataset}' of side")
    return data


# The idea: put the tiles back in order
@functools.lru_cache(maxsize=None)
def every_permutation(tiles):
    """(tiles!, tiles) uint8, in lexicographic order."""
    return torch.tensor(list(itertools.permutations(range(tiles))), dtype=torch.uint8)


@functools.lru_cache(maxsize=None)
def hamming_permutations(count, tiles=9, seed=0, rule="max-min"):
    """(count, tiles) int64: permutations chosen one after the other from all, the first at random (Algorithm 1).

    Each next one has the largest minimum ("max-min", ties by the mean) or mean ("max-mean", the paper's "maximal") Hamming
    distance to those chosen, or the smallest mean ("min-mean", its "minimal"); further ties fall by the seed.  Kept for the
    process, so do not write into it.  Raises ValueError for another rule and for more permutations than there are.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule '{rule}'; known: {', '.join(RULES)}")
    if not 1 <= tiles <= 9 or not 1 <= count <= math.factorial(tiles):
        raise ValueError(f"{count} permutations of {tiles} tiles; of 1 to 9 tiles there are 1 to tiles! permutations")
    candidates = every_permutation(tiles)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    candidates = candidates[order].T.contiguous()  # (tiles, tiles!)
    total = torch.zeros(len(order), dtype=torch.int32)
    nearest = torch.full_like(total, tiles)
    free, chosen = torch.ones(len(order), dtype=torch.bool), [0]
    while len(chosen) < count:
        free[chosen[-1]] = False
        distance = (candidates != candidates[:, chosen[-1:]]).sum(0, dtype=torch.int32)  # (tiles!,)
        total += distance
        nearest = torch.minimum(nearest, distance)
        score = -total if rule == "min-mean" else total + nearest * (tiles * count + 1) * (rule == "max-min")
        chosen.append(int(torch.where(free, score, -2 ** 30).max(0).indices))  # the first of equals
    return candidates[:, chosen].T.long().contiguous()


def cut_tiles(images, cell, tile, generator, margin=0, jitter=True):
    """(N,C,H,W), any dtype -> (N,9,C,t,t): a tile at a random place of each cell of a 3 x 3 grid, row by row.

    The grid lies at a random place of the image.  Gaps between neighbours are 0 to 2 (cell - tile) wide, on average cell - tile
    (official code).  margin: cut so many pixels more on each side, t = tile + 2 margin, from the cell where it has them, else from
    the image around it.  jitter=False: tiles in the middle of their cells.  Raises ValueError where the grid does not fit.
    """
    count, device, slack = len(images), images.device, cell - tile
    inside = min(margin, slack // 2)  # what the cell holds of the margin
    span = 3 * cell + 2 * (margin - inside)
    if slack < 0 or min(images.shape[-2:]) < span:
        raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels; nine tiles of {tile} in cells of {cell} with "
                         f"margin {margin} need {span}, and cells no smaller than tiles")
    room = torch.tensor(images.shape[-2:], device=device) - span + 1
    origin = (torch.rand(count, 1, 2, generator=generator, device=device) * room).long()
    moved = (torch.randint(slack - 2 * inside + 1, (count, 9, 2), generator=generator, device=device) if jitter
             else slack // 2 - inside)
    place = torch.arange(9, device=device)
    grid = torch.stack([place // 3, place % 3], 1)  # (9, 2)
    corners = origin + cell * grid + moved  # (N, 9, 2)
    window = torch.arange(tile + 2 * margin, device=device)
    rows, columns = (corners[..., axis, None] + window for axis in (0, 1))  # (N, 9, t)
    samples = torch.arange(count, device=device)[:, None, None, None]
    tiles = images[samples, :, rows[..., :, None], columns[..., None, :]]  # (N, 9, t, t, C)
    return tiles.permute(0, 1, 4, 2, 3)


def handle_colors(windows, tile, grey, shift, generator):
    """(N,9,3,w,w) float -> (N,9,3,t,t): a share `grey` of the puzzles loses its colours; in the others each channel of each tile is
    cut up to `shift` pixels off on both axes.  Reads at most `shift` pixels around the middle t x t."""
    count, device = len(windows), windows.device
    chosen = torch.rand(count, 1, 1, 1, generator=generator, device=device) < grey
    moved = torch.randint(-shift, shift + 1, (count, 9, 3, 2), generator=generator, device=device)
    moved = torch.where(chosen, 0, moved)
    luma = torch.einsum("c,nkchw->nkhw", torch.tensor([0.299, 0.587, 0.114], device=device), windows)
    windows = torch.where(chosen[..., None], luma[:, :, None], windows)
    middle = (windows.shape[-1] - tile) // 2 + torch.arange(tile, device=device)
    rows, columns = (moved[..., axis, None] + middle for axis in (0, 1))  # (N, 9, 3, t)
    samples, places, channels = (torch.arange(size, device=device).view(-1, *[1] * after)
                                 for size, after in ((count, 4), (9, 3), (3, 2)))
    return windows[samples, places, channels, rows[..., :, None], columns[..., None, :]]


def normalize_tiles(tiles):
    """(...,C,t,t) float in 0..1 -> mean 0 and standard deviation 1 in each channel of each tile; one without contrast becomes 0."""
    centred = tiles - tiles.mean((-2, -1), keepdim=True)
    return centred / centred.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(0.01)


def scaled(images, config):
    """(...,3,h,w) in 0..1 -> what the network sees: normalised one by one, or all alike."""
    return normalize_tiles(images) if config.normalization else (images - 0.5) / 0.25


def whole(images, config):
    """What the network sees of whole images (N,3,S,S) uint8 in the probes."""
    return scaled(images.float() / 255, config).contiguous(memory_format=torch.channels_last)


def windows_of(images, config, generator):
    """(N,3,S,S) uint8 -> tiles with their margins (N,9,3,w,w) in 0..1."""
    images, cell = images.float() / 255, config.tile + config.gap
    images = frozen.add_fringes(images, config.fringe) if config.fringe else images
    if config.touching:
        side = round(images.shape[-1] * config.tile / cell) + 2 * config.margin
        images, cell = F.interpolate(images, (side, side), mode="bilinear", antialias=True), config.tile
    return cut_tiles(images, cell, config.tile, generator, config.margin, config.jitter)


def puzzles_of(windows, config, generator):
    """(N,9,3,w,w) in 0..1 -> (tiles (N,9,3,t,t), labels (N,K)): tiles in order, ready for the network, and by which of the
    permutations to shuffle them; or, for single tiles, the cell of each."""
    tiles = scaled(handle_colors(windows, config.tile, config.grey, config.shift, generator), config)
    if config.one_tile:
        return tiles, torch.arange(9, device=tiles.device).repeat(len(tiles), 1)
    return tiles, torch.randint(config.permutations, (len(tiles), config.puzzles), generator=generator, device=tiles.device)


def arrange(tiles, orders):
    """(N,9,...), (N,K,9) -> (N,K,9,...): place t of puzzle k gets tile orders[n, k, t]."""
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None, None], orders]


# Networks
# (channels, kernel, stride, padding, groups, pooling, local response norm) of conv1 to conv5; units of fc6 and fc7; batch-norm
NETWORKS = {
    "small": (((64, 5, 2, 2, 1, True, False), (192, 3, 1, 1, 1, True, False), (384, 3, 1, 1, 1, False, False),
               (256, 3, 1, 1, 1, False, False), (256, 3, 1, 1, 1, False, False)), 512, 1024, True),
    "alexnet": (((96, 11, 2, 0, 1, True, True), (256, 5, 1, 2, 2, True, True), (384, 3, 1, 1, 1, False, False),
                 (384, 3, 1, 1, 2, False, False), (256, 3, 1, 1, 2, True, False)), 1024, 4096, False),
}


def fully_connected(inputs, outputs, norm):
    """Linear layer and ReLU, with batch-norm between them or dropout after them."""
    if norm:
        return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5))


class TileEncoder(nn.Module):
    """conv1 to conv5 and fc6, for one tile alone: (N,3,t,t) -> (N,D).  `maps` gives what every convolution puts out, also for
    whole images."""

    def __init__(self, network="small", width=1.0, tile=64):
        super().__init__()
        layers, units, _, norm = NETWORKS[network]
        blocks, inputs = [], 3
        for channels, kernel, stride, padding, groups, pooling, local in layers:
            outputs = 2 * max(4, round(channels * width / 2))  # even, for the groups
            block = [nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=not norm)]
            block += [nn.BatchNorm2d(outputs)] if norm else []
            block += [nn.ReLU()] + [nn.MaxPool2d(3, 2, ceil_mode=True)] * pooling + [trainer.LocalResponseNorm()] * local
            blocks.append(nn.Sequential(*block))
            inputs = outputs
        self.network, self.blocks, self.channels = network, nn.ModuleList(blocks), inputs
        with torch.no_grad():
            flat = self.eval().maps(torch.zeros(1, 3, tile, tile))[-1].numel()
        self.dimension = max(8, round(units * width))
        self.fc6 = nn.Sequential(nn.Flatten(), fully_connected(flat, self.dimension, norm))
        self.apply(initialize).train()

    def maps(self, images):
        """[feature map of conv1, ..., of conv5], pooled where the network pools."""
        maps = []
        for block in self.blocks:
            maps.append(block(maps[-1] if maps else images))
        return maps

    def forward(self, tiles):
        return self.fc6(self.maps(tiles)[-1])

    def for_images(self):
        """A copy for whole images: AlexNet's first convolution gets its stride of 4 back."""
        encoder = copy.deepcopy(self)
        if self.network == "alexnet":
            encoder.blocks[0][0].stride = (4, 4)
        return encoder


class ContextFreeNetwork(nn.Module):
    """Tiles (N,9,3,t,t) and labels (N,K) -> scores (NK,P): by which of the permutations (P,9) were the tiles shuffled?

    Tiles are embedded alone, once, and the embeddings are shuffled; they meet in fc7.  one_tile: the head sees one tile
    at a time and scores the nine cells, (9N,9), for the audit.
    """

    def __init__(self, encoder, permutations, units=4096, one_tile=False):
        super().__init__()
        self.encoder, self.one_tile = encoder, one_tile
        self.register_buffer("permutations", permutations.clone())
        inputs, classes = (1, 9) if one_tile else (9, len(permutations))
        self.head = nn.Sequential(fully_connected(inputs * encoder.dimension, units, NETWORKS[encoder.network][3]),
                                  nn.Linear(units, classes))
        self.head.apply(initialize)

    def embed(self, tiles):
        """(N,9,3,t,t) -> (N,9,D)."""
        flat = tiles.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.encoder(flat).to(tiles.dtype).unflatten(0, tiles.shape[:2])  # sums over puzzles, on the way back, in float32

    def forward(self, tiles, labels):
        embeddings = self.embed(tiles)
        if self.one_tile:
            return self.head(embeddings.flatten(0, 1))
        shuffled = arrange(embeddings, self.permutations[labels])  # (N, K, 9, D)
        return self.head(shuffled.flatten(2).flatten(0, 1))


def initialize(layer):
    """Gaussians and biases of the official code; He initialisation where batch-norm follows, so that there is no bias."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        if layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            linear = isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.005 if linear else 0.01)
            nn.init.constant_(layer.bias, float(linear or layer.groups > 1))  # 1 in conv2, conv4, conv5 and above


# Objective
def puzzle_loss(scores, labels):
    """Mean cross-entropy over all puzzles and the share told right.  scores (NK,P), labels (N,K)."""
    labels = labels.flatten()
    return {"loss": F.cross_entropy(scores.float(), labels), "accuracy": (scores.argmax(1) == labels).float().mean()}


def optimizer_of(config, model, rate):
    """SGD; biases at twice the rate and without weight decay (official code)."""
    named = list(model.named_parameters())
    groups = [{"params": [p for name, p in named if not name.endswith("bias")]},
              {"params": [p for name, p in named if name.endswith("bias")], "scale": 2.0, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov)


# Pre-training.  Of `run` (replicate/trainer.py): fit loops over "set the rate, take objective(batch, step), step the
# optimiser"; shuffled gives endless shuffled batches; augment calls a function with generators fixed by seed, purpose and step;
# wanted says which rows are still to do; record writes a result; measure times an evaluation.
def settings_of(config, variant):
    """The config with what an audit's variant changes."""
    return dataclasses.replace(config, **{"permutations": config.audit_permutations, **VARIANTS[variant]})


def first_alike(config, variant):
    """The first variant with the same settings: one training serves both."""
    return next(other for other in VARIANTS if settings_of(config, other) == settings_of(config, variant))


def build(run, config):
    """The untrained network: the same weights for every user of the seed."""
    permutations = hamming_permutations(config.permutations, 9, config.seed, config.rule)
    run.seed_global("init")
    encoder = TileEncoder(config.network, config.width, config.tile)
    units = max(8, round(NETWORKS[config.network][2] * config.width))
    return ContextFreeNetwork(encoder, permutations, units, config.one_tile).to(run.device, memory_format=torch.channels_last)


def pretrain(run, data, config, epochs, purpose):
    """-> (network, seconds): trained to solve puzzles; config is the run's or that of one of the audit's VARIANTS."""
    model = build(run, config)

    def objective(batch, step):
        images, _ = batch  # the class labels stay unused
        tiles, labels = run.augment(lambda part, generator: puzzles_of(windows_of(part, config, generator), config, generator),
                                    images, "augment", step)
        return puzzle_loss(model(tiles, labels), labels)

    rate = config.pretext_rate
    seconds = run.fit(
        purpose, model, objective, run.shuffled(data.unlabeled, config.batch_size, "pretext"),
        steps=trainer.updates(epochs, data.unlabeled, config.batch_size), optimizer=optimizer_of(config, model, rate),
        learning_rate=(trainer.stepped(rate, config.pretext_drops, 0.1) if config.pretext_drops
                       else trainer.cosine(rate, config.warmup)),
        images_per_step=config.batch_size, chance=math.log(9 if config.one_tile else config.permutations))
    return model, seconds


# Evaluation
def puzzle_accuracy(run, model, config, test):
    """Percent of the puzzles of test images that are solved (of single tiles: placed); drawn once, as in training."""
    hits = count = 0
    model.eval()
    with torch.no_grad():
        for number, (images, _) in enumerate(test.batches(torch.arange(len(test)).split(250))):
            generator = run.stream("test puzzles", number, run.device)
            tiles, labels = puzzles_of(windows_of(images, config, generator), config, generator)
            with run.autocast():
                hits += int((model(tiles, labels).argmax(1) == labels.flatten()).sum())
            count += labels.numel()
    return 100.0 * hits / count


def frozen_maps(run, encoder, config, split):
    """maps(images) of all layers of a frozen encoder, for the plain probes; its batch-norm statistics are those of the split."""
    encoder = encoder.for_images()

    def maps(images):
        with run.autocast():
            return encoder.maps(whole(images, config))
    frozen.recalibrate(encoder, maps, split)
    return maps


def classify(run, row, encoder, data, rate, epochs):
    """Train an encoder's convolutions and a linear layer on the labels that the row names -> (classifier, steps, seconds)."""
    config, model = run.config, frozen.Classifier(encoder.for_images(), data.classes)
    model.encoder.fc6.requires_grad_(False)  # not in use
    model.to(run.device, memory_format=torch.channels_last)
    return model, *frozen.train_on_labels(
        run, row, model, data, prepare=lambda images: whole(images, config), epochs=epochs,
        batch_size=min(config.batch_size, 64), optimizer=optimizer_of(config, model, rate),
        learning_rate=trainer.cosine(rate, config.warmup))


def evaluate(run, data):
    """Every row of the scale that is not recorded yet; controls and baselines get the same probes as jigsaw."""
    config, networks = run.config, {}

    def network(name):
        """(module with an .encoder, seconds): "jigsaw", "random", "supervised" or a variant of the audit."""
        if name not in networks:
            if name == "random":
                networks[name] = build(run, config), 0.0
            elif name == "supervised":
                model, _, seconds = classify(run, name, build(run, config).encoder, data, config.supervised_rate,
                                             config.supervised_epochs)
                networks[name] = model, seconds
            elif name == "jigsaw":
                networks[name] = pretrain(run, data, config, config.pretext_epochs, name)
            else:
                networks[name] = pretrain(run, data, settings_of(config, name), config.audit_epochs, f"audit/{name}")
        return networks[name]

    def pretext(row, name, settings, epochs, phase):
        frozen.record_measure(run, row, lambda: network(name),
                              lambda model, test: puzzle_accuracy(run, model, settings, test), data.test,
                              steps=trainer.updates(epochs, data.unlabeled, config.batch_size), phase=phase)

    def probes(prefix, name, settings):
        """All plain probes of one network."""
        def maps():
            model, seconds = network(name)
            return frozen_maps(run, model.encoder, settings, data.train), seconds
        frozen.record_probes(run, frozen.probe_rows(PAPER, prefix), maps, data, config.probe_cells)

    def classifier(row, start, rate, epochs):
        """Trained on labels from the untrained network or from jigsaw's."""
        model, before = network(start)
        model, steps, seconds = classify(run, row, model.encoder, data, rate, epochs)
        return model, steps, before + seconds

    pretext("jigsaw/puzzle-accuracy", "jigsaw", config, config.pretext_epochs, "jigsaw")
    for name in ("jigsaw", "random", "supervised"):
        probes(name, name, config)
    for name, start, rate in (("supervised", "random", config.supervised_rate),
                              ("jigsaw/finetuned", "jigsaw", config.finetune_rate)):
        for row in (name, *(f"{name}/labels{count}" for count in LABELS)):
            epochs = config.supervised_epochs if row == name else config.label_epochs
            frozen.record_accuracy(run, row, lambda: classifier(row, start, rate, epochs),
                                   lambda images: whole(images, config), data)
    if run.seed == 0 and not run.plan and networks and run.value("jigsaw/puzzle-accuracy") is not None:
        model, _ = network("jigsaw")  # read, if an earlier start has trained it
        if run.rank == 0:
            figures(run, model, data)
    for variant in VARIANTS:
        name, settings = first_alike(config, variant), settings_of(config, variant)
        measure = "cell-accuracy" if settings.one_tile else "puzzle-accuracy"
        pretext(f"audit/{variant}/{measure}", name, settings, config.audit_epochs, f"audit/{name}")
        probes(f"audit/{variant}", name, settings)


def figures(run, model, data):
    """First-layer filters; six test images as puzzles (left), as the network solves them, and solved."""
    filters = model.encoder.blocks[0][0].weight.detach().float().contiguous()
    save_image(F.interpolate(filters, scale_factor=6), run.suite / f"{run.paper}_filters.png", nrow=16, normalize=True,
               scale_each=True)
    config, generator = run.config, run.stream("figures", 0, run.device)
    images, _ = next(data.test.batches([torch.linspace(0, len(data.test) - 1, min(6, len(data.test))).long()]))
    windows = windows_of(images, config, generator)
    tiles, labels = puzzles_of(windows, config, generator)
    model.eval()
    with torch.no_grad(), run.autocast():
        answers = model(tiles, labels[:, :1]).argmax(1, keepdim=True)  # (N, 1)
    solved = windows[..., config.margin:config.margin + config.tile, config.margin:config.margin + config.tile]
    shuffled = arrange(solved, model.permutations[labels[:, :1]])[:, 0]
    answered = arrange(shuffled, model.permutations[answers].argsort(2))[:, 0]  # argsort inverts a permutation
    panels = [make_grid(each, nrow=3, padding=2, pad_value=1.0) for puzzle in zip(shuffled.cpu(), answered.cpu(), solved.cpu())
              for each in puzzle]
    save_image(F.interpolate(make_grid(panels, nrow=6, padding=4, pad_value=1.0)[None], scale_factor=2),
               run.suite / f"{run.paper}_puzzles.png")


def reproduce(run):
    """Everything of one seed."""
    evaluate(run, load_data(run))


def main(arguments=None):
    """Command line; returns the exit status."""
    return trainer.launch(__file__, Config, list(PAPER), reproduce, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
