"""Zhang, Isola, Efros (ECCV 2016): Colorful Image Colorization.

Claim: to colour a grey photograph vividly a network has to know what it shows; its features serve other tasks.

Method.  The network sees the lightness L of an image in CIE Lab and says for every fourth pixel, on both axes, how likely each of
313 colours (a, b) is: 10 x 10 cells of the ab plane that hold colours of a screen.  The target spreads each true colour over its
nearest of the 313.  Most pixels of photographs are greyish, so a pixel's loss is weighted by the rarity of its colour.  The
colour shown is the annealed mean: the distribution is sharpened by a temperature, and its mean taken.  Two variants: no
rebalancing ("class"), and regression of (a, b) under squared error ("l2"), which averages over what could be and comes out pale.

Deviations
 1. Images of 96 or 128 pixels and a network of the paper's plan with a width setting at scales small and full; at scale small
    with one convolution for each of its blocks.  Scale paper: the paper's network and ImageNet, decoded to 256 pixels.
 2. The authors start from a data-dependent k-means initialisation.  Ours: He initialisation, inputs divided by 50 and a rate that
    suits them; scale paper scales every convolution by the data (--set rescaled=true), without the k-means.  Zeros in the last
    layer.
 3. Adam with warm-up and cosine, and weight decay 1e-4 in place of 1e-3, at scales small and full.
 4. Each true colour is spread over 5 neighbours (paper); the released code takes 10.
 5. The frequency of colours is counted in at most 10,000 training images, by nearest of the 313, once more for each, then
    smoothed.
 6. Predictions are enlarged so that each lies on the pixel whose colour it was trained to tell (every fourth, from the first).
 7. Test images without colours, which the released code leaves out of training, do not count in the measures of colour, either.
 8. Semantic test: our own network, trained on this data set's colour images, in place of VGG-16.  It sees colours as L, a, b.
 9. AlexNet (scale paper): same crops, batch and schedule as the main network, targets at every fourth pixel, no k-means.
10. Linear probes: logistic regression on maps of at most 4 x 4 (scale paper 2 x 2), of whole images, after pooling; the paper has
    about 9,000 features a layer, random crops and SGD.  The claims' block 4 was chosen beforehand, after the survey's best layer.
    Batch-norm statistics of all networks, the random one too, are taken anew from 500 training images.
11. Convolutions run in bfloat16 and hand it on (--set precision=float32 for the original's); parameters, colours, losses and the
    fitting of plain probes are float32.
12. Left out: human judges (AMT), "L2, fine-tuned", PASCAL VOC, Places.
13. Scale small: less training and a narrower network (see the YAML); values are not comparable, claims are.

    python -m papers.zhang_colorization --scale small        # Imagenette; two CPU cores: 40 minutes for two seeds side by side
    python -m papers.zhang_colorization --scale full         # Imagenette, one data-centre GPU
    torchrun --nproc_per_node=8 -m papers.zhang_colorization --scale paper        # ImageNet
    python -m papers.zhang_colorization --colorize IN OUT [--checkpoint FILE]     # a picture or a folder of them
"""
import copy
import dataclasses
import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid, save_image

from replicate import evaluate as frozen
from replicate import trainer

# row -> (the paper's value, where, False if only remembered).  A row is named method/measure or network/layer/probe.
PAPER = {
    "grey/auc-raw": (89.1, "Table 1", False),
    "random-colors/auc-raw": (84.2, "Table 1", False),
    "prior-mode/auc-raw": (None, "control: the most frequent colour, here the grey one", True),
    "centre/auc-raw": (None, "control: the mean of the 313 colours", True),
    "l2/auc-raw": (91.2, "Table 1", False),
    "class/auc-raw": (91.6, "Table 1", False),
    "full/auc-raw": (89.5, "Table 1", True),
    "grey/auc-rebalanced": (58.0, "Table 1", False),
    "random-colors/auc-rebalanced": (57.3, "Table 1", False),
    "prior-mode/auc-rebalanced": (None, "control: the most frequent colour, here the grey one", True),
    "centre/auc-rebalanced": (None, "control: the mean of the 313 colours", True),
    "l2/auc-rebalanced": (64.4, "Table 1", False),
    "class/auc-rebalanced": (65.1, "Table 1", False),
    "full/auc-rebalanced": (67.3, "Table 1", True),
    "l2/chroma-ratio": (None, "mean chroma over the true one", True),
    "class/chroma-ratio": (None, "mean chroma over the true one", True),
    "full/chroma-ratio": (None, "mean chroma over the true one", True),
    "prior/cross-entropy": (None, "of the train images' frequencies; a guess: 5.746", True),
    "class/cross-entropy": (None, "unweighted", True),
    "full/cross-entropy": (None, "unweighted", True),
    "truth/semantic": (68.3, "Table 1, VGG-16", True),
    "grey/semantic": (52.7, "Table 1, VGG-16", True),
    "random-colors/semantic": (41.0, "Table 1, VGG-16", False),
    "l2/semantic": (54.9, "Table 1, VGG-16", False),
    "class/semantic": (56.6, "Table 1, VGG-16", False),
    "full/semantic": (56.0, "Table 1, VGG-16", True),
    "full/block1/linear": (None, "", True),
    "full/block2/linear": (None, "", True),
    "full/block3/linear": (None, "", True),
    "full/block4/linear": (None, "", True),
    "full/block5/linear": (None, "", True),
    "full/block6/linear": (None, "", True),
    "full/block7/linear": (None, "", True),
    "random/block1/linear": (None, "control", True),
    "random/block2/linear": (None, "control", True),
    "random/block3/linear": (None, "control", True),
    "random/block4/linear": (None, "control", True),
    "random/block5/linear": (None, "control", True),
    "random/block6/linear": (None, "control", True),
    "random/block7/linear": (None, "control", True),
    "supervised-l/block1/linear": (None, "control, sees L", True),
    "supervised-l/block2/linear": (None, "control, sees L", True),
    "supervised-l/block3/linear": (None, "control, sees L", True),
    "supervised-l/block4/linear": (None, "control, sees L", True),
    "supervised-l/block5/linear": (None, "control, sees L", True),
    "supervised-l/block6/linear": (None, "control, sees L", True),
    "supervised-l/block7/linear": (None, "control, sees L", True),
    "supervised-color/block1/linear": (None, "control, sees L, a, b", True),
    "supervised-color/block2/linear": (None, "control, sees L, a, b", True),
    "supervised-color/block3/linear": (None, "control, sees L, a, b", True),
    "supervised-color/block4/linear": (None, "control, sees L, a, b", True),
    "supervised-color/block5/linear": (None, "control, sees L, a, b", True),
    "supervised-color/block6/linear": (None, "control, sees L, a, b", True),
    "supervised-color/block7/linear": (None, "control, sees L, a, b", True),
    "full/block4/labels1": (None, "not in the paper", True),
    "full/block4/labels5": (None, "not in the paper", True),
    "full/block4/labels20": (None, "not in the paper", True),
    "full/block4/labels100": (None, "not in the paper", True),
    "random/block4/labels1": (None, "control", True),
    "random/block4/labels5": (None, "control", True),
    "random/block4/labels20": (None, "control", True),
    "random/block4/labels100": (None, "control", True),
    "supervised-color": (None, "control, sees L, a, b", True),
    "supervised-l": (None, "control, sees L", True),
    "supervised-l/labels1": (None, "control, sees L", True),
    "supervised-l/labels5": (None, "control, sees L", True),
    "supervised-l/labels20": (None, "control, sees L", True),
    "supervised-l/labels100": (None, "control, sees L", True),
    "full/finetuned": (None, "not in the paper", True),
    "full/finetuned/labels1": (None, "not in the paper", True),
    "full/finetuned/labels5": (None, "not in the paper", True),
    "full/finetuned/labels20": (None, "not in the paper", True),
    "full/finetuned/labels100": (None, "not in the paper", True),
    "alexnet/block1/linear": (12.5, "ImageNet, from a survey", True),
    "alexnet/block2/linear": (24.5, "ImageNet, from a survey", True),
    "alexnet/block3/linear": (30.4, "ImageNet, from a survey", True),
    "alexnet/block4/linear": (31.5, "ImageNet, from a survey", True),
    "alexnet/block5/linear": (30.3, "ImageNet, from a survey", True),
    "alexnet-random/block1/linear": (11.6, "ImageNet, from a survey", True),
    "alexnet-random/block2/linear": (17.1, "ImageNet, from a survey", True),
    "alexnet-random/block3/linear": (16.9, "ImageNet, from a survey", True),
    "alexnet-random/block4/linear": (16.3, "ImageNet, from a survey", True),
    "alexnet-random/block5/linear": (14.1, "ImageNet, from a survey", True),
}

# (id, row, sign, other row, margin, statement, where): for ">" row > other row + margin
CLAIMS = [
    ("rebalanced-beats-l2", "full/auc-rebalanced", ">", "l2/auc-rebalanced", 0.0,
     "Where rare colours count as much, the full method beats regression", "Table 1"),
    ("rebalanced-beats-grey", "full/auc-rebalanced", ">", "grey/auc-rebalanced", 0.0,
     "Where rare colours count as much, the full method beats grey", "Table 1"),
    ("rebalanced-beats-centre", "full/auc-rebalanced", ">", "centre/auc-rebalanced", 1.0,
     "And one fixed colour, their mean, by 1 point: it looks at the image", "ours"),
    ("rebalanced-beats-class", "full/auc-rebalanced", ">", "class/auc-rebalanced", 0.0,
     "Where rare colours count as much, rebalancing pays", "Table 1"),
    ("raw-prefers-class", "class/auc-raw", ">", "full/auc-raw", 0.0, "The raw measure does not rank the full method first",
     "Table 1"),
    ("more-vivid-than-class", "full/chroma-ratio", ">", "class/chroma-ratio", 0.0, "Rebalancing makes colours more vivid",
     "by design"),
    ("more-vivid-than-l2", "full/chroma-ratio", ">", "l2/chroma-ratio", 0.0,
     "The full method's colours are more vivid than regression's", "by design"),
    ("beats-prior", "class/cross-entropy", "<", "prior/cross-entropy", 0.2,
     "The classifier knows 0.2 nats more than how frequent colours are", "the method"),
    ("semantic", "full/semantic", ">", "grey/semantic", 0.0, "A classifier reads recoloured images better than grey ones",
     "Table 1"),
    ("beats-random", "full/block4/linear", ">", "random/block4/linear", 3.0,
     "Colorization features beat random ones by 3 points, linear probe", "survey's table"),
    ("first-block-does-not", "full/block1/linear", "<", "random/block1/linear", -3.0,
     "In the first block they gain less than 3 points", "survey's table"),
    ("few-labels", "full/finetuned/labels20", ">", "supervised-l/labels20", 0.0,
     "With 20 labels a class pre-training beats training from scratch", "ours"),
]

# (file suffix, title, x axis, y axis, {line: [(x, row)] or (row, scalar)})
CURVES = [
    ("low_label", "Test accuracy with few labels", "labels a class", "accuracy, %", {
        "colorization, fine-tuned": [(1, "full/finetuned/labels1"), (5, "full/finetuned/labels5"), (20, "full/finetuned/labels20"),
                                     (100, "full/finetuned/labels100")],
        "from scratch, sees L": [(1, "supervised-l/labels1"), (5, "supervised-l/labels5"), (20, "supervised-l/labels20"),
                                 (100, "supervised-l/labels100")],
        "colorization, block 4 frozen": [(1, "full/block4/labels1"), (5, "full/block4/labels5"), (20, "full/block4/labels20"),
                                         (100, "full/block4/labels100")],
        "random, block 4 frozen": [(1, "random/block4/labels1"), (5, "random/block4/labels5"), (20, "random/block4/labels20"),
                                   (100, "random/block4/labels100")]}),
    ("pretext", "Cross-entropy of the colours (a guess costs 5.746)", "step", "nats", {
        "without rebalancing": ("class/cross-entropy", "cross_entropy"), "full": ("full/cross-entropy", "cross_entropy")}),
]

COMPARABLE = ("paper",)

VARIANTS = {  # method -> settings that differ
    "l2": {"loss": "l2"}, "class": {"mix": 1.0}, "full": {}, "alexnet": {"network": "alexnet"},
}
LABELS = (1, 5, 20, 100)  # a class
STRIDE = 4                # of the targets, in pixels


@dataclass
class Config:
    """Settings of a run."""
    seed: int
    dataset: str = "imagenette"
    image_size: int = 128               # ours: paper 256
    crop_size: int = 96                 # ours: official code 176
    streamed: bool = False              # decode files on the fly rather than keep them on the device
    network: str = "paper"              # "paper", "small" (ours) or "alexnet" (paper)
    width: float = 1.0                  # channels, as a fraction of the network's
    rescaled: bool = False              # ours: start with every convolution scaled by the data
    step: int = 10                      # paper: side of a cell of the ab plane
    neighbors: int = 5                  # paper; official code 10
    sigma: float = 5.0                  # paper
    mix: float = 0.5                    # paper: lambda, the share of equal frequencies; 1: no rebalancing
    loss: str = "classification"        # or "l2"
    temperature: float = 0.38           # paper
    batch_size: int = 64                # ours: official code 40
    pretext_epochs: float = 100.0       # ours
    pretext_rate: float = 0.001         # ours: paper 3.16e-5
    pretext_drops: tuple[float, ...] = ()   # paper: fractions of the run at which the rate falls by sqrt(10); none: cosine
    supervised_epochs: float = 60.0     # ours: with all labels, from scratch and fine-tuned
    label_epochs: float = 20.0          # ours: with few labels; in epochs of the whole set
    supervised_rate: float = 0.002      # ours: from scratch and of fine-tuning
    warmup: float = 0.05                # ours: share of the steps
    momentum: float = 0.9               # official code: Adam's first beta
    second_momentum: float = 0.99       # official code: Adam's second beta
    weight_decay: float = 1e-4          # ours: official code 1e-3
    probe_cells: int = 4                # ours: linear probes see maps of at most 4 x 4
    precision: str = "bfloat16"         # ours: multiplications only; parameters and losses stay float32
    deterministic: bool = True          # ours
    shards: int = 8                     # ours: parts of a batch with random streams of their own; ranks divide it

    def __post_init__(self):
        trainer.check_settings(
            self, positive=("image_size", "crop_size", "width", "step", "neighbors", "sigma", "temperature", "probe_cells"),
            shares=("mix", "warmup"), network=KINDS, loss=("classification", "l2"))
        trainer.require(self.second_momentum < 1, f"second_momentum must be below 1, not {self.second_momentum}")
        for name in ("image_size", "crop_size"):
            trainer.require(getattr(self, name) % 16 == 0, f"{name} must be a multiple of 16, not {getattr(self, name)}")
        trainer.require(self.image_size >= self.crop_size,
                        f"image_size {self.image_size}: crops of {self.crop_size} pixels do not fit")
        trainer.require(4 <= self.step <= 40, f"step must be 4 to 40, not {self.step}: finer cells give thousands of colours, "
                        "coarser ones too few")
        trainer.require(self.neighbors <= 20, f"neighbors {self.neighbors}: at most 20 of the colours")


# Data: the test split is only ever counted on
def load_data(run):
    """The ImageSet of the config; images smaller than the crops are refused."""
    config = run.config
    data = run.load(config.dataset, config.image_size, config.streamed or None)
    side = data.train.images.shape[-1] if hasattr(data.train, "images") else config.image_size
    trainer.require(side == config.image_size, f"images of '{config.dataset}' have {side} pixels: --set image_size={side}, and a "
                    "crop_size that fits")
    return data


def crop_and_flip(images, size, generator):
    """(N,C,H,W), any dtype -> (N,C,size,size): a random crop of each image, mirrored in half of the cases."""
    count, device = len(images), images.device
    top, left = ((torch.rand(count, 1, generator=generator, device=device) * (side - size + 1)).long()
                 for side in images.shape[-2:])
    flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
    window = torch.arange(size, device=device)
    rows, columns = top + window, left + torch.where(flip, size - 1 - window, window)  # (N, size)
    samples = torch.arange(count, device=device)[:, None, None]
    return images[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# The idea: colours as a distribution over a few hundred
TO_XYZ = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
                      dtype=torch.float64) / torch.tensor([[0.95047], [1.0], [1.08883]], dtype=torch.float64)  # white: 1, 1, 1


def linear_rgb(values):
    """sRGB in 0..1 -> proportional to light."""
    return torch.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)


@functools.lru_cache(maxsize=None)
def constants(device, dtype):
    """(TO_XYZ, its inverse, linear RGB of each of 256 levels) on a device, copied there once."""
    levels = linear_rgb(torch.arange(256, dtype=torch.float64) / 255)
    return tuple(tensor.to(device, dtype) for tensor in (TO_XYZ, TO_XYZ.inverse(), levels))


def linear_to_lab(linear):
    """(N,3,H,W) linear RGB -> CIE Lab under D65: L in 0..100, a and b in about -108..98."""
    with torch.autocast(linear.device.type, enabled=False):  # bfloat16 would be off by several a or b
        xyz = torch.einsum("ij,njhw->nihw", constants(linear.device, linear.dtype)[0], linear)
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def rgb_to_lab(rgb):
    """(N,3,H,W) sRGB in 0..1 -> CIE Lab.  In float64 inside: the way back multiplies errors."""
    return linear_to_lab(linear_rgb(rgb.double())).to(rgb.dtype)


def lab_to_rgb(lab):
    """(N,3,H,W) CIE Lab -> sRGB in 0..1; colours outside are cut off."""
    lightness, a, b = lab.double().unbind(1)
    y = (lightness + 16) / 116
    roots = torch.stack([y + a / 500, y, y - b / 200], 1)
    xyz = torch.where(roots > 0.2068966, roots ** 3, (roots - 16 / 116) / 7.787)
    linear = torch.einsum("ij,njhw->nihw", constants(lab.device, torch.float64)[1], xyz).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear).to(lab.dtype)


def lab_of(images):
    """(N,3,H,W) uint8 -> CIE Lab, in float32: within 1e-3."""
    levels = constants(images.device, torch.float32)[2]
    return linear_to_lab(levels.index_select(0, images.flatten().int()).view(images.shape))


def gamut_bins(step=10):
    """(Q,2) float32, a then b rising: corners of the step x step cells of the ab plane that overlap, with an area, the convex hull
    of all sRGB colours.  313 for a step of 10, the paper's own set."""
    level = torch.arange(0, 256, 5, dtype=torch.float64) / 255
    first, second = torch.meshgrid(level, level, indexing="ij")
    faces = [torch.stack(channels) for end in (torch.zeros_like(first), torch.ones_like(first))
             for channels in ((end, first, second), (first, end, second), (first, second, end))]
    points = rgb_to_lab(torch.stack(faces))[:, 1:].permute(0, 2, 3, 1).flatten(0, 2)  # the cube's surface holds the extremes
    angle = torch.linspace(0, 2 * math.pi, 1801, dtype=torch.float64)[:-1]
    normals = torch.stack([angle.cos(), angle.sin()], 1)  # (1800, 2)
    extent = torch.cat([(points @ part.T).max(0).values for part in normals.split(100)])  # the hull: normal . x <= extent
    ticks = step * torch.arange(math.floor(-128 / step), math.ceil(128 / step), dtype=torch.float64)
    low = torch.cartesian_prod(ticks, ticks)  # corners of cells, (M, 2)
    corners = low[:, None] + step * torch.cartesian_prod(torch.arange(2), torch.arange(2))  # (M, 4, 2)
    inside = ((corners @ normals.T).min(1).values < extent - 1e-9).all(1)  # no normal separates cell and hull
    return corners[inside].flatten(0, 1).unique(dim=0).float()


def candidate_colors(bins, neighbors, cell=2.0):
    """(S,S,C) int64: for every cell x cell square of the ab plane, from -128 to 128, colours among which the nearest `neighbors`
    of any point of the square are."""
    ticks = torch.arange(-128 + cell / 2, 128, cell)
    distances, order = torch.cdist(torch.cartesian_prod(ticks, ticks), bins.cpu()).sort(1)
    count = int((distances <= distances[:, neighbors - 1:neighbors] + cell * 2 ** 0.5 + 1e-3).sum(1).max())
    return order[:, :count].reshape(len(ticks), len(ticks), count).to(bins.device)


def nearest_colors(ab, bins, neighbors, candidates=None):
    """(M,2) -> (squared distances (M,k), rising, and indices (M,k)) of the k nearest of bins (Q,2).

    candidates: candidate_colors(bins, k or more) saves nearly all of the work; points must then lie within -128..128.
    """
    if candidates is None:
        near = torch.arange(len(bins), device=ab.device).expand(len(ab), -1)
    else:
        side = len(candidates)
        row, column = ((ab + 128) * (side / 256)).long().clamp(0, side - 1).unbind(1)
        near = candidates[row, column]  # (M, C)
    squares = (ab[:, None] - F.embedding(near, bins)).square().sum(2)
    squares, chosen = squares.topk(neighbors, dim=1, largest=False)
    return squares, near.gather(1, chosen)


def spread_colors(ab, bins, neighbors, sigma, candidates=None):
    """(N,2,H,W) -> shares (N,H,W,k), falling, of sum 1, that each colour has in its nearest of bins (Q,2), and which these are."""
    squares, chosen = nearest_colors(ab.permute(0, 2, 3, 1).flatten(0, 2), bins, neighbors, candidates)
    shares = torch.softmax(-squares / (2 * sigma ** 2), 1)
    return tuple(each.view(len(ab), *ab.shape[2:], neighbors) for each in (shares, chosen))


def soft_encode(ab, bins, neighbors=5, sigma=5.0, candidates=None):
    """(N,2,H,W) -> (N,Q,H,W): each colour spread over its nearest of bins (Q,2), weights exp(-d^2 / 2 sigma^2), of sum 1."""
    return dense(*spread_colors(ab, bins, neighbors, sigma, candidates), len(bins))


def dense(shares, chosen, count):
    """(N,H,W,k) both -> (N,count,H,W), zero for what is not chosen."""
    return torch.zeros(*shares.shape[:3], count, device=shares.device).scatter_(3, chosen, shares).permute(0, 3, 1, 2)


def rebalancing_weights(prior, mix=0.5):
    """(Q,) -> (Q,): 1 / ((1 - mix) prior + mix / Q), scaled so that the mean over the prior is 1 (Eq. 4).  mix=1: all ones."""
    weights = 1 / ((1 - mix) * prior + mix / len(prior)).clamp_min(1e-12)
    return weights / (prior * weights).sum()


def annealed_mean(logits, bins, temperature=0.38):
    """(N,Q,H,W) -> (N,2,H,W): mean colour of the distribution sharpened by the temperature (Eq. 5)."""
    return torch.einsum("nqhw,qc->nchw", torch.softmax(logits / temperature, 1), bins)


def color_auc(predicted_ab, true_ab, weights=None):
    """Share of pixels whose (a, b) is less than t off, averaged over t from 0 to 150: 1 - mean(min(error, 150)) / 150.

    (N,2,H,W) both; weights (N,H,W) or None; returns a number in 0..1.
    """
    error = (predicted_ab - true_ab).square().sum(1).sqrt().clamp_max(150)
    weights = torch.ones_like(error) if weights is None else weights
    return 1 - float((weights.double() * error.double()).sum() / (150 * weights.double().sum()))


def is_colored(ab):
    """(N,2,H,W) -> (N,) bool: some pixel has |a| or |b| above 5; others do not teach (official code) nor count (ours)."""
    return (ab.abs() > 5).flatten(1).any(1)


@dataclass
class Palette:
    """bins (Q,2), their table of candidates, prior (Q,): frequencies in train images."""
    bins: torch.Tensor
    candidates: torch.Tensor
    prior: torch.Tensor


def make_palette(run, split):
    """The Palette of a run: colours counted at every fourth pixel of train images, then smoothed by a Gaussian of sigma."""
    bins = gamut_bins(run.config.step).to(run.device)
    candidates = candidate_colors(bins, run.config.neighbors)
    counts = torch.ones(len(bins), dtype=torch.int64, device=run.device)  # none at 0
    spread = torch.linspace(0, len(split) - 1, min(len(split), 10000)).long()
    for images, _ in split.batches(spread.split(250)):
        ab = lab_of(images[..., ::STRIDE, ::STRIDE])[:, 1:]
        ab = ab[is_colored(ab)].permute(0, 2, 3, 1).flatten(0, 2)
        counts += nearest_colors(ab, bins, 1, candidates)[1].flatten().bincount(minlength=len(bins))
    trainer.require(int(counts.sum()) > len(bins), f"all images of '{run.config.dataset}' are grey: there are no colours to learn")
    kernel = torch.exp(-torch.cdist(bins, bins).square() / (2 * run.config.sigma ** 2))
    prior = (kernel / kernel.sum(0)) @ (counts / counts.sum())
    return Palette(bins, candidates, prior / prior.sum())


def examples(images, config, palette, weights, generator):
    """(N,3,S,S) uint8 -> lightness (N,1,s,s) less 50, colours (N,2,s/4,s/4), their encoding (N,Q,s/4,s/4), weights (N,s/4,s/4)."""
    lab = lab_of(crop_and_flip(images, config.crop_size, generator))
    ab = lab[:, 1:, ::STRIDE, ::STRIDE]
    shares, chosen = spread_colors(ab, palette.bins, config.neighbors, config.sigma, palette.candidates)
    encoded = dense(shares, chosen, len(palette.bins))
    return lab[:, :1] - 50, ab, encoded, weights[chosen[..., 0]] * is_colored(lab[:, 1:])[:, None, None]


# Network
NETWORKS = {  # (channels, convolutions, stride of the last, dilation) of blocks 1 to 7; channels and convolutions of block 8
    "paper": (((64, 2, 2, 1), (128, 2, 2, 1), (256, 3, 2, 1), (512, 3, 1, 1), (512, 3, 1, 2), (512, 3, 1, 2), (512, 3, 1, 1)),
              256, 2),
    "small": (((64, 1, 2, 1), (128, 1, 2, 1), (256, 1, 2, 1), (512, 1, 1, 1), (512, 1, 1, 2), (512, 1, 1, 2), (512, 1, 1, 1)),
              256, 1),
}


class ColorizationNetwork(nn.Module):
    """Lightness less 50 (N,1,H,W) -> scores (N,Q,H/4,W/4) of the colours `bins` (Q,2), or colours (N,2,H/4,W/4) in tens.

    `maps` gives what blocks 1 to 7 (conv1 to conv5 of AlexNet) put out.  inputs: 3 for the control that sees colours.
    """

    def __init__(self, network="paper", width=1.0, bins=None, loss="classification", inputs=1, image_size=256):
        super().__init__()
        self.register_buffer("bins", gamut_bins() if bins is None else bins.clone())
        # what it takes to build the network again from a checkpoint
        self.register_buffer("architecture", torch.tensor([KINDS.index(network), width, loss == "l2", image_size]))
        outputs = 2 if loss == "l2" else len(self.bins)
        if network == "alexnet":
            blocks, channels = alexnet_blocks(inputs, width)
            units = scaled(4096, width)
            self.head = nn.Sequential(  # fc6 to fc8 as convolutions, then from a sixteenth to a quarter of the side
                nn.MaxPool2d(3, 1, 1), *normed(nn.Conv2d(channels, units, 6, padding=5, dilation=2)),
                *normed(nn.Conv2d(units, units, 1)), nn.Conv2d(units, outputs, 1), Enlarge())
        else:
            specifications, units, convolutions = NETWORKS[network]
            blocks, channels = main_blocks(specifications, inputs, width)
            units = scaled(units, width)
            layers = [nn.ConvTranspose2d(channels, units, 4, 2, 1), nn.ReLU()]
            for _ in range(convolutions):
                layers += [nn.Conv2d(units, units, 3, padding=1), nn.ReLU()]
            self.head = nn.Sequential(*layers, nn.Conv2d(units, outputs, 1))
        self.blocks, self.channels = nn.ModuleList(blocks), channels
        self.apply(initialize)
        last = [layer for layer in self.head if isinstance(layer, nn.Conv2d)][-1]
        nn.init.zeros_(last.weight)  # so that all colours start equally likely

    def maps(self, images):
        """[feature map of block 1, of block 2, ...]."""
        maps = []
        for block in self.blocks:
            maps.append(block(maps[-1] if maps else images / 50))
        return maps

    def forward(self, lightness):
        return self.head(self.maps(lightness)[-1])


KINDS = (*NETWORKS, "alexnet")


def scaled(channels, width):
    """An even number of channels, for AlexNet's groups."""
    return max(8, 2 * round(channels * width / 2))


def main_blocks(specifications, inputs, width):
    """Blocks 1 to 7: 3 x 3 convolutions with ReLU, batch-norm without scale and shift at the end of each block (official code)."""
    blocks = []
    for channels, convolutions, stride, dilation in specifications:
        layers = []
        for number in range(convolutions):
            outputs, last = scaled(channels, width), number == convolutions - 1
            layers += [nn.Conv2d(inputs, outputs, 3, stride if last else 1, dilation, dilation), nn.ReLU()]
            inputs = outputs
        blocks.append(nn.Sequential(*layers, nn.BatchNorm2d(inputs, affine=False)))
    return blocks, inputs


def alexnet_blocks(inputs, width):
    """conv1 to conv5 of the paper's AlexNet (official code)."""
    blocks = []
    for channels, kernel, stride, padding, groups, pooling in (
            (96, 11, 4, 5, 1, True), (256, 5, 1, 2, 2, True), (384, 3, 1, 1, 1, False), (384, 3, 1, 1, 2, False),
            (256, 3, 1, 1, 2, False)):
        outputs = scaled(channels, width)
        blocks.append(nn.Sequential(*normed(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)),
                                    *[nn.MaxPool2d(3, 2, 1)] * pooling))
        inputs = outputs
    return blocks, inputs


def normed(convolution):
    return convolution, nn.BatchNorm2d(convolution.out_channels, affine=False), nn.ReLU()


class Enlarge(nn.Module):
    """(N,C,h,w) -> (N,C,4h,4w), by `enlarge`."""

    def forward(self, maps):
        size = [STRIDE * side for side in maps.shape[-2:]]
        with torch.autocast(maps.device.type, enabled=False):
            return enlarge(maps.float(), size, size)


def enlarge(maps, seen, size, rows=slice(None)):
    """(N,C,h,w), a value for every fourth pixel, from the first, of a picture of `seen` = (rows, columns) pixels -> (N,C,rows,
    columns), a value for every pixel of some or all rows of the same picture at another size.

    Linear interpolation, held at the borders, as matrix products, whose backward is deterministic on a GPU.
    """
    places = [((torch.arange(side, device=maps.device) + 0.5) * own / side - 0.5) / STRIDE for side, own in zip(size, seen)]
    down, across = ((1 - (each.clamp(0, count - 1)[:, None] - torch.arange(count, device=maps.device)).abs()).clamp_min(0)
                    for each, count in zip((places[0][rows], places[1]), maps.shape[-2:]))
    return down @ maps @ across.T


def initialize(layer):
    """He initialisation."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        transposed = isinstance(layer, nn.ConvTranspose2d)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out" if transposed else "fan_in", nonlinearity="relu")
        if transposed:  # each output gets a quarter of the kernel
            layer.weight.data.mul_(2)
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def rescale(model, lightness):
    """Divide every convolution's weights by the standard deviation of its outputs, channel by channel, on a batch (N,1,H,W); the
    last layer stays zero (after Kraehenbuehl et al. 2016, without their k-means)."""
    def divide(layer, inputs, output):
        deviation = output.std((0, 2, 3)).clamp_min(1e-3)
        layer.weight.div_(deviation.view(1, -1, 1, 1) if isinstance(layer, nn.ConvTranspose2d) else deviation.view(-1, 1, 1, 1))
        return output / deviation.view(1, -1, 1, 1)

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and bool(layer.weight.any())]
    hooks = [layer.register_forward_hook(divide) for layer in layers]
    model(lightness)
    for hook in hooks:
        hook.remove()


# Objective
def color_loss(scores, encoded, weights):
    """Cross-entropy of soft targets, each pixel multiplied by the weight of its colour (Eq. 2), and without weights, of the pixels
    that have one.

    scores, encoded (N,Q,h,w), weights (N,h,w).  (The official code weights the gradient alone and prints the unweighted loss.)
    """
    scores, targets = (tensor.permute(0, 2, 3, 1).flatten(0, 2) for tensor in (scores.float(), encoded))
    entropies = -(scores.log_softmax(1) * targets).sum(1).view(weights.shape)
    taught = (weights > 0).float()
    return {"loss": (weights * entropies).mean(), "cross_entropy": (taught * entropies).sum() / taught.sum().clamp_min(1)}


def regression_loss(predicted, ab, weights):
    """Half the mean squared error of colours in tens; weights (N,h,w)."""
    return {"loss": 0.5 * (weights * (predicted.float() - ab / 10).square().sum(1)).mean()}


def optimizer_of(config, parameters, rate):
    return torch.optim.Adam(parameters, rate, (config.momentum, config.second_momentum), weight_decay=config.weight_decay)


# Pre-training.  Of `run` (replicate/trainer.py): fit loops over "set the rate, take objective(batch, step), step the
# optimiser"; shuffled gives endless shuffled batches; augment calls a function with generators fixed by seed, purpose and step;
# wanted says which rows are still to do; record writes a result; measure times an evaluation.
def settings_of(config, variant):
    """The config with what a variant changes."""
    return dataclasses.replace(config, **VARIANTS[variant])


def build(run, config, bins, inputs=1):
    """The untrained network: the same weights for every user of the seed."""
    run.seed_global("init")
    model = ColorizationNetwork(config.network, config.width, bins, config.loss, inputs, config.image_size)
    return model.to(run.device, memory_format=torch.channels_last)


def pretrain(run, data, config, palette, purpose):
    """-> (network, seconds): trained to colour; config is the run's or that of one of the VARIANTS."""
    model = build(run, config, palette.bins)
    weights = rebalancing_weights(palette.prior, config.mix)

    def draw(images, generator):
        return examples(images, config, palette, weights, generator)

    if config.rescaled:  # the same on every rank
        images, _ = next(data.unlabeled.batches([torch.arange(min(config.batch_size, len(data.unlabeled)))]))
        rescale(model, draw(images, run.stream("rescale", 0, run.device))[0])

    def objective(batch, step):
        images, _ = batch  # the class labels stay unused
        lightness, ab, encoded, pixels = run.augment(draw, images, "augment", step)
        scores = model(lightness.contiguous(memory_format=torch.channels_last))
        return regression_loss(scores, ab, (pixels > 0).float()) if config.loss == "l2" else color_loss(scores, encoded, pixels)

    rate = config.pretext_rate
    seconds = run.fit(
        purpose, model, objective, run.shuffled(data.unlabeled, config.batch_size, "pretext"),
        steps=trainer.updates(config.pretext_epochs, data.unlabeled, config.batch_size),
        optimizer=optimizer_of(config, model.parameters(), rate),
        learning_rate=(trainer.stepped(rate, config.pretext_drops, 10 ** -0.5) if config.pretext_drops
                       else trainer.cosine(rate, config.warmup)),
        images_per_step=config.batch_size, chance=None if config.loss == "l2" else math.log(len(palette.bins)))
    return model, seconds


# Evaluation
@torch.no_grad()
def scores_of(run, model, lab):
    """What a network says of pictures (N,3,H,W) in Lab, of which it sees L: float32."""
    model.eval()
    with run.autocast():
        return model((lab[:, :1] - 50).contiguous(memory_format=torch.channels_last)).float()


def colors_of(model, scores, temperature):
    """Scores (N,Q,h,w), or colours in tens (N,2,h,w) of a network with l2 loss -> colours (N,2,h,w)."""
    return 10 * scores if scores.shape[1] == 2 else annealed_mean(scores, model.bins, temperature)


def network_colorizer(run, model, temperature):
    """Pictures (N,3,H,W) in Lab -> colours (N,2,H,W)."""
    def color(lab):
        scores = scores_of(run, model, lab)
        with torch.autocast(lab.device.type, enabled=False):  # bfloat16 would be a level off
            return enlarge(colors_of(model, scores, temperature), lab.shape[-2:], lab.shape[-2:])
    return color


def baseline_colorizer(run, name, palette, train):
    """The controls: "truth", "grey", "prior-mode" (the most frequent colour), "centre" (the mean of the colours),
    "random-colors" (a random training image's)."""
    generator = run.stream("random colors")
    others = train.batches(torch.randint(len(train), (100,), generator=generator) for _ in itertools.count())
    mode, centre = (color.view(1, 2, 1, 1) for color in (palette.bins[palette.prior.argmax()], palette.bins.mean(0)))
    return {"truth": lambda lab: lab[:, 1:], "grey": lambda lab: torch.zeros_like(lab[:, 1:]),
            "prior-mode": lambda lab: mode.expand_as(lab[:, 1:]), "centre": lambda lab: centre.expand_as(lab[:, 1:]),
            "random-colors": lambda lab: lab_of(next(others)[0][:len(lab)])[:, 1:]}[name]


def colored_pictures(test):
    """The test images that have colours, in Lab (N,3,H,W), batch by batch."""
    found = False
    for images, _ in test.batches(torch.arange(len(test)).split(100)):
        lab = lab_of(images)
        kept = is_colored(lab[:, 1:])
        if kept.any():
            found = True
            yield lab[kept]
    trainer.require(found, "all test images are grey: there are no colours to compare with")


def color_measures(color, palette, test):
    """{"auc-raw", "auc-rebalanced": percent, "chroma-ratio"} of a way to colour; rebalanced: pixels count by the rarity of their
    colour in train images."""
    rare, sums = rebalancing_weights(palette.prior, mix=0.0), torch.zeros(6, dtype=torch.float64)
    for lab in colored_pictures(test):
        true, ab = lab[:, 1:], color(lab)
        nearest = nearest_colors(true.permute(0, 2, 3, 1).flatten(0, 2), palette.bins, 1, palette.candidates)[1]
        weights = rare[nearest].view(true[:, 0].shape)
        count, heavy = weights.numel(), float(weights.double().sum())
        chroma, true_chroma = (float(each.square().sum(1).sqrt().double().sum()) for each in (ab, true))
        sums += torch.tensor([count * color_auc(ab, true), count, heavy * color_auc(ab, true, weights), heavy, chroma, true_chroma])
    raw, rebalanced, ratio = (sums[::2] / sums[1::2]).tolist()
    return {"auc-raw": 100 * raw, "auc-rebalanced": 100 * rebalanced, "chroma-ratio": ratio}


def prior_scores(palette):
    """Scores that say for every pixel how frequent colours are in train images."""
    def score(lab):
        height, width = (side // STRIDE for side in lab.shape[-2:])
        return palette.prior.log().view(1, -1, 1, 1).expand(len(lab), -1, height, width)
    return score


def cross_entropy(score, config, palette, test):
    """Mean cross-entropy in nats, without weights, of score(pictures in Lab) -> (N,Q,h,w) on the encoded colours of test images."""
    total = count = 0
    for lab in colored_pictures(test):
        encoded = soft_encode(lab[:, 1:, ::STRIDE, ::STRIDE], palette.bins, config.neighbors, config.sigma, palette.candidates)
        ones = torch.ones_like(encoded[:, 0])
        total += ones.numel() * float(color_loss(score(lab), encoded, ones)["loss"])
        count += ones.numel()
    return total / count


def recolored(images, color):
    """uint8 (N,3,H,W) -> the same lightness in other colours, as uint8 (N,3,H,W)."""
    lab = lab_of(images)
    return (lab_to_rgb(torch.cat([lab[:, :1], color(lab)], 1)) * 255).round().byte()


def semantic_accuracy(run, classifier, color, test):
    """Percent of recoloured test images whose class a classifier trained on colour images tells right."""
    see = seen_by(True)
    classifier.eval()
    with run.autocast():
        return frozen.accuracies(lambda images: {"class": classifier(see(recolored(images, color)))}, test, 100)["class"]


def seen_by(color):
    """What a network sees of whole images (N,3,S,S) uint8: L less 50, and a, b too if it sees colours."""
    def see(images):
        lab = lab_of(images)
        lab[:, 0] -= 50
        return lab[:, :3 if color else 1].contiguous(memory_format=torch.channels_last)
    return see


def frozen_maps(run, model, see, split):
    """maps(images) of all blocks of a frozen network, for the linear probes; its batch-norm statistics are those of the split."""
    model = copy.deepcopy(model)

    def maps(images):
        with run.autocast():
            return model.maps(see(images))
    frozen.recalibrate(model, maps, split)
    return maps


def classify(run, row, model, data, rate, epochs):
    """Train a network's blocks and a linear layer on the labels that the row names -> (classifier, steps, seconds)."""
    config, color = run.config, model.blocks[0][0].in_channels == 3
    classifier = frozen.Classifier(copy.deepcopy(model), data.classes)
    classifier.encoder.head.requires_grad_(False)  # not in use
    classifier.to(run.device, memory_format=torch.channels_last)
    return classifier, *frozen.train_on_labels(
        run, row, classifier, data, prepare=seen_by(color), epochs=epochs, batch_size=min(config.batch_size, 64),
        optimizer=optimizer_of(config, classifier.parameters(), rate), learning_rate=trainer.cosine(rate, config.warmup))


def evaluate(run, data):
    """Every row of the scale that is not recorded yet; controls and baselines get the same probes as colorization."""
    config, networks = run.config, {}
    palette = make_palette(run, data.unlabeled)

    def network(name):
        """(module, seconds): a variant, "random", "alexnet-random", or the classifier "supervised-l", "supervised-color"."""
        if name not in networks:
            if name in VARIANTS:
                networks[name] = pretrain(run, data, settings_of(config, name), palette, name)
            elif name.endswith("random"):
                networks[name] = build(run, settings_of(config, "alexnet" if name.startswith("alexnet") else "full"), palette.bins), 0.0
            else:
                networks[name] = supervised(name)[::2]
        return networks[name]

    def supervised(row, epochs=config.supervised_epochs):
        model = build(run, config, palette.bins, inputs=3 if row.startswith("supervised-color") else 1)
        return classify(run, row, model, data, config.supervised_rate, epochs)

    def finetuned(row, epochs):
        model, before = network("full")
        classifier, steps, seconds = classify(run, row, model, data, config.supervised_rate, epochs)
        return classifier, steps, before + seconds

    def colorizer(name):
        """(function of pictures in Lab, seconds that it cost)."""
        if name not in VARIANTS:
            return baseline_colorizer(run, name, palette, data.train), 0.0
        model, seconds = network(name)
        return network_colorizer(run, model, config.temperature), seconds

    steps = trainer.updates(config.pretext_epochs, data.unlabeled, config.batch_size)
    for name in ("grey", "random-colors", "prior-mode", "centre", "l2", "class", "full"):
        wanted = run.wanted(*(f"{name}/{measure}" for measure in ("auc-raw", "auc-rebalanced", "chroma-ratio")
                              if f"{name}/{measure}" in PAPER))
        if wanted:
            color, seconds = colorizer(name)
            values, own = run.measure(lambda test: color_measures(color, palette, test), data.test)
            for row in wanted:
                measure = row.split("/")[1]
                run.record(row, values[measure], steps=steps * (name in VARIANTS), seconds=seconds + own,
                           metric="ratio" if measure == "chroma-ratio" else "AuC, %")
    shown = ("l2", "class", "full")
    if (run.seed == 0 and not run.plan and (networks or not (run.suite / f"{run.paper}_bins.png").exists())
            and all(run.value(f"{name}/auc-raw") is not None for name in shown)):
        models = {name: network(name)[0] for name in shown}  # those that an earlier start has trained are read
        if run.rank == 0:
            figures(run, models, palette, data)
    frozen.record_measure(run, "prior/cross-entropy", lambda: (prior_scores(palette), 0.0),
                          lambda score, test: cross_entropy(score, config, palette, test), data.test, metric="nats")
    for name in ("class", "full"):
        frozen.record_measure(
            run, f"{name}/cross-entropy", lambda: network(name),
            lambda model, test: cross_entropy(lambda lab: scores_of(run, model, lab), config, palette, test), data.test,
            steps=steps, metric="nats", phase=name)
    for name in ("truth", "grey", "random-colors", "l2", "class", "full"):
        def both():
            (color, seconds), (classifier, before) = colorizer(name), network("supervised-color")
            return (classifier, color), seconds + before
        frozen.record_measure(run, f"{name}/semantic", both, lambda pair, test: semantic_accuracy(run, *pair, test), data.test,
                              steps=steps * (name in VARIANTS))
    for name in ("full", "random", "supervised-l", "supervised-color", "alexnet", "alexnet-random"):
        def maps():
            model, seconds = network(name)
            return frozen_maps(run, getattr(model, "encoder", model), seen_by(name == "supervised-color"), data.train), seconds
        frozen.record_probes(run, frozen.probe_rows(PAPER, name), maps, data, config.probe_cells)
    for name, train in (("supervised-color", supervised), ("supervised-l", supervised), ("full/finetuned", finetuned)):
        for row in (name, *(f"{name}/labels{count}" for count in LABELS)):
            if row in PAPER:
                epochs = config.supervised_epochs if row == name else config.label_epochs
                frozen.record_accuracy(run, row, lambda: train(row, epochs), seen_by(name == "supervised-color"), data)


def figures(run, models, palette, data):
    """Test images in grey, by L2, class and full, and as they are: twelve fixed ones, and six that the full method gets best and
    worst, by its error over that of grey; six at falling temperatures; the colours in the ab plane and how frequent they are
    (grey: not among the colours)."""
    colorizers = {"grey": baseline_colorizer(run, "grey", palette, data.train),
                  **{name: network_colorizer(run, model, run.config.temperature) for name, model in models.items()},
                  "truth": baseline_colorizer(run, "truth", palette, data.train)}

    def save(name, images, colorizers, columns):
        pictures = torch.stack([recolored(images, color) for color in colorizers], 1).flatten(0, 1).float() / 255
        save_image(pictures, run.suite / f"{run.paper}_{name}.png", nrow=columns, padding=1)

    def spread(count, among):
        return among[torch.linspace(0, len(among) - 1, min(count, len(among))).long()]

    some = spread(1000, torch.arange(len(data.test)))
    fixed = next(data.test.batches([spread(12, some)]))[0]
    save("pictures", fixed, colorizers.values(), 2 * len(colorizers))
    save("temperature", fixed[:6], [network_colorizer(run, models["full"], temperature)
                                    for temperature in (1.0, 0.77, 0.58, 0.38, 0.29, 0.14, 0.01)], 7)
    errors = []
    for images, _ in data.test.batches(some.split(100)):
        lab = lab_of(images)
        own, grey = ((color(lab) - lab[:, 1:]).square().sum(1).sqrt().mean((1, 2))
                     for color in (colorizers["full"], colorizers["grey"]))
        errors.append(torch.where(is_colored(lab[:, 1:]), own / grey, math.nan))
    errors = torch.cat(errors).cpu()
    order = some[errors.argsort()][:int(errors.isfinite().sum())]  # those without colours come last
    extremes = next(data.test.batches([torch.cat([order[:6], order[-6:]])]))[0]
    save("best_and_worst", extremes, colorizers.values(), 2 * len(colorizers))

    side = 240 // run.config.step + 1
    place, panels = ((palette.bins.cpu() + 120) / run.config.step).round().long(), torch.full((2, 3, side, side), 0.5)
    lab = torch.cat([torch.full((len(place), 1), 60.0), palette.bins.cpu()], 1)
    frequency = palette.prior.cpu().log()
    panels[0, :, place[:, 0], place[:, 1]] = lab_to_rgb(lab[:, :, None, None])[:, :, 0, 0].T
    panels[1, 0, place[:, 0], place[:, 1]] = (frequency - frequency.min()) / (frequency.max() - frequency.min())  # black to red
    panels[1, 1:, place[:, 0], place[:, 1]] = 0
    save_image(make_grid(F.interpolate(panels, scale_factor=14), padding=4), run.suite / f"{run.paper}_bins.png")


def reproduce(run):
    """Everything of one seed."""
    evaluate(run, load_data(run))


# Use
def load_colorizer(path, device):
    """(network in eval mode, side in pixels that it was trained at) from a checkpoint of pretrain; InputError where it is none."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)["model"]
        number, width, regression, side = state["architecture"].tolist()
        model = ColorizationNetwork(KINDS[int(number)], width, state["bins"],
                                    "l2" if regression else "classification")
        model.load_state_dict(state, assign=True)
    except Exception as error:  # rubbish can make torch.load raise nearly anything
        raise trainer.InputError(f"{path} is no checkpoint of a colorization network ({type(error).__name__})") from None
    return model.to(device, memory_format=torch.channels_last).eval(), int(side)


@torch.no_grad()
def colorize(model, picture, side, temperature=0.38):
    """PIL picture -> the same in colour: the network sees it with its shorter side `side` pixels long, or shorter if it is; its
    colours are enlarged, the lightness stays as it was."""
    device = model.bins.device
    if picture.mode.startswith("I"):  # 16 bits
        picture = picture.convert("I").point(lambda level: level / 256)
    picture = picture.convert("RGB")
    scale = min(1, side / min(picture.size))
    small = picture.resize([max(16, round(length * scale / 16) * 16) for length in picture.size], Image.BILINEAR)
    lab, pixels = lab_of(pil_to_tensor(small)[None].to(device)), pil_to_tensor(picture)
    ab = colors_of(model, model((lab[:, :1] - 50).contiguous(memory_format=torch.channels_last)), temperature)
    for top in range(0, pixels.shape[1], 64):  # strip by strip and in place, so that large pictures take little memory
        rows = slice(top, top + 64)
        lightness = lab_of(pixels[None, :, rows].to(device))[:, :1]
        made = lab_to_rgb(torch.cat([lightness, enlarge(ab, lab.shape[-2:], pixels.shape[-2:], rows)], 1))
        pixels[:, rows] = (made[0] * 255).round().byte().cpu()
    return to_pil_image(pixels)


def colorize_files(arguments):
    """--colorize IN OUT: a picture, or every picture of a folder.  Returns the exit status."""
    parser = trainer._Parser(prog="python -m papers.zhang_colorization", allow_abbrev=False)
    parser.add_argument("--colorize", nargs=2, metavar=("IN", "OUT"))
    parser.add_argument("--checkpoint", default="", metavar="FILE", help="default: the newest in runs/")
    parser.add_argument("--device", default="auto")
    try:
        options = parser.parse_args(arguments)
        source, target = map(Path, options.colorize)
        trainer.require(source.exists(), f"no picture or folder {source}")
        trainer.require(source.resolve() != target.resolve(), f"{target} is the input: give another place to write to")
        files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
        trainer.require(files, f"no files in {source}")
        trained = sorted((trainer.ROOT / "runs" / "zhang_colorization").glob("*/full.pt"), key=lambda path: path.stat().st_mtime)
        trainer.require(options.checkpoint or trained, "no trained network in runs/: give one with --checkpoint FILE, or train one "
                        "with --rows full/auc-raw")
        checkpoint = options.checkpoint or trained[-1]
        model, side = load_colorizer(checkpoint, trainer.pick_device(options.device))
        print(f"network {checkpoint}", flush=True)
        done = [save_colored(model, side, path, target, f"{number}/{len(files)}") for number, path in enumerate(files, 1)]
        return 0 if all(done) else 2
    except trainer.InputError as error:
        trainer.tell(f"error: {error}")
        return 2


def save_colored(model, side, path, target, progress):
    """Colour one file into the folder `target`, or into the file of that name; say so, or why not; return whether it went well."""
    kinds, start = (".jpg", ".jpeg", ".png"), time.perf_counter()
    if target.suffix.lower() not in kinds or target.is_dir():
        target = target / (path.name if path.suffix.lower() in kinds else f"{path.name}.png")
    try:
        with Image.open(path) as picture:
            made = colorize(model, ImageOps.exif_transpose(picture), side)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.save(target, **({} if target.suffix.lower() == ".png" else {"quality": 95}))
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        trainer.tell(f"error: {path} cannot be coloured ({(str(error) or type(error).__name__).splitlines()[0]})")
        return False
    print(f"{progress}  {target}  {made.width} x {made.height}  {time.perf_counter() - start:.1f} s", flush=True)
    return True


def main(arguments=None):
    """Command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--colorize" in arguments:
        return colorize_files(arguments)
    return trainer.launch(__file__, Config, list(PAPER), reproduce, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
