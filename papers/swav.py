"""Caron et al. (NeurIPS 2020): Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV).

Claim: views of one image that must predict each other's cluster teach more than views compared one with another, and many small
views more than two large ones.

Method (SwAV).  An image is cut into two large and several small random crops ("multi-crop"); the network maps each to a unit vector
z, scored against K unit prototypes.  A code q for each large crop comes from its scores: the Sinkhorn algorithm spreads a batch
over all prototypes evenly, so that not everything ends in one cluster.  Every other crop has to predict that code by
softmax(scores / tau); the loss of a guess is ln K.  A queue of past z makes up for a small batch.  If the codes are too soft
(large epsilon), or not spread evenly, the network collapses: rows of their own show it.

Deviations
 1. Crops are cut on the device from squares decoded once (paper scale: 256 pixels, of the middle of the image), bilinearly and with
    no filter before; sides that stick out of the image are cut off, where torchvision draws again.
 2. Colours are jittered in one order, brightness, contrast, saturation, hue, and cut to 0..1 once, in the end; hue turns about the
    grey axis.  Jitter is half as strong, and nothing blurred, at scales small and full (small images).  Scale paper has the
    paper's strengths.
 3. The Sinkhorn algorithm runs on logarithms, the same numbers without overflow.
 4. Batch-norm, Sinkhorn and queue span all ranks; the official code synchronises batch-norm among 8 GPUs and keeps a queue on each.
 5. DeepCluster-v2's memory starts from whole images, under their own batch-norm statistics, and an image's cluster is read off
    when the image is drawn.
 6. SimCLR, a control: every crop is compared with the large crops; with two crops it is SimCLR's own loss.
 7. Two crops are trained for more epochs, until they have seen as many pixels; the paper compares equal epochs.
 8. Probes see whole images scaled to test_size (paper: the middle 224 of 256 pixels); the linear one is logistic regression without
    augmentation.  Batch-norm statistics of all probed networks, the random one and checkpoints too, are taken anew from 500
    training images; classifiers trained on labels, and the pictures, keep the running ones.  1 % and 10 % of the labels are drawn
    by the seed, class by class; the paper has fixed lists.  Fine-tuning has warm-up and cosine (official code: steps) and a head
    that starts at zero.  Rates of fine-tuning and from scratch: at scale small each the best of the same few on a slice of train,
    else not tuned.  Always the last iterate: the official code reports the best epoch on the validation set.
 9. Convolutions and matrix products run in bfloat16 (--set precision=float32 for none); norms, scores, codes, losses in float32.
10. Left out: transfer to Places205, iNaturalist, VOC and COCO, SeLa-v2, uncurated images.  Wider networks: --set width=2.
11. Scale small: less training and a narrow network of ten layers (see the YAML), with harder codes (epsilon) and a rate chosen
    on a slice of train: at 0.05 so short a training stays near ln K.  They were chosen for SwAV; two crops, DeepCluster-v2 and
    SimCLR take them over, two crops with the official range of 0.08 to 1 of the image.  Values are not comparable, claims are.

    python -m papers.swav --scale small        # Imagenette; two CPU cores: half an hour for two seeds side by side
    python -m papers.swav --scale full         # Imagenette, one data-centre GPU
    torchrun --nnodes=8 --nproc_per_node=8 -m papers.swav --scale paper        # ImageNet, ResNet-50, on each of 8 machines
    python -m papers.swav --scale full --export FILE        # the network of seed 0 for torchvision.models (trains it if need be)
    python -m papers.swav --scale full --evaluate FILE        # k-NN and linear probe of such a file, of torchvision's or the
                                                              # authors' weights
"""
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.utils import save_image

from replicate import evaluate as frozen
from replicate import trainer

# row -> (the paper's value, where, False if only remembered).  A row is named network/probe or ablation/variant/probe.  "loss" and
# "use" (entropy of how often each prototype is the nearest, on test images) are in percent of ln K, "spread" (standard deviation of
# z over test images) in percent of that of vectors spread over the sphere evenly: 0 where all images are mapped to one point.
PAPER = {
    "swav/knn20": (65.7, "the released network, in Caron et al. 2021", True),
    "swav/knn200": (None, "not in the paper", True),
    "swav/linear": (75.3, "official README, 800 epochs", True),
    "swav/percent1": (53.9, "1 % of the labels", True),
    "swav/percent10": (70.2, "10 % of the labels", True),
    "swav/loss": (None, "end of training", True),
    "swav/use": (None, "not in the paper", True),
    "swav/spread": (None, "not in the paper", True),
    "random/knn20": (None, "control", True),
    "random/knn200": (None, "control", True),
    "random/linear": (None, "control", True),
    "supervised/knn20": (None, "control", True),
    "supervised/linear": (None, "control", True),
    "supervised": (76.5, "baseline", True),
    "supervised/percent1": (25.4, "baseline", True),
    "supervised/percent10": (56.4, "baseline", True),
    "two-crops/knn20": (None, "as many pixels", True),
    "two-crops/linear": (None, "as many pixels; 70.1 after 400 epochs", True),
    "two-crops/loss": (None, "end of training", True),
    "deepcluster/knn20": (67.1, "the released network, in Caron et al. 2021", True),
    "deepcluster/linear": (75.2, "DeepCluster-v2, 800 epochs", True),
    "deepcluster/loss": (None, "end of training", True),
    "simclr/knn20": (None, "control, same crops and epochs", True),
    "simclr/linear": (None, "control, same crops and epochs", True),
    "ablation/prototypes-tenth/knn20": (None, "K a tenth", True),
    "ablation/prototypes-tenth/loss": (None, "end of training", True),
    "ablation/prototypes-tenfold/knn20": (None, "K tenfold; at most 0.3, linear, from 3,000 to 100,000", True),
    "ablation/prototypes-tenfold/loss": (None, "end of training", True),
    "ablation/epsilon0.03/knn20": (None, "harder codes", True),
    "ablation/epsilon0.03/loss": (None, "end of training", True),
    "ablation/epsilon0.5/knn20": (None, "soft codes: collapse", True),
    "ablation/epsilon0.5/loss": (None, "end of training", True),
    "ablation/epsilon0.5/use": (None, "soft codes: collapse", True),
    "ablation/epsilon0.5/spread": (None, "soft codes: collapse", True),
    "ablation/no-equipartition/knn20": (None, "codes by softmax alone: collapse", True),
    "ablation/no-equipartition/loss": (None, "end of training", True),
    "ablation/no-equipartition/use": (None, "codes by softmax alone: collapse", True),
    "ablation/no-equipartition/spread": (None, "codes by softmax alone: collapse", True),
    "ablation/small-batch/knn20": (None, "a quarter of the batch", True),
    "ablation/small-batch/loss": (None, "end of training", True),
    "ablation/small-batch-queue/knn20": (None, "the same, queue of 15 batches", True),
    "ablation/small-batch-queue/loss": (None, "end of training", True),
    "checkpoint/knn20": (None, "", True),
    "checkpoint/knn200": (None, "", True),
    "checkpoint/linear": (None, "", True),
    "checkpoint/percent1": (None, "", True),
    "checkpoint/percent10": (None, "", True),
}

# (id, row, sign, other row, margin in points, statement, where)
CLAIMS = [
    ("beats-random", "swav/knn20", ">", "random/knn20", 10.0, "SwAV beats random features by 10 points, k-NN", "the claim"),
    ("multi-crop", "swav/linear", ">", "two-crops/linear", 0.0, "Multi-crop beats two crops at the same number of pixels seen",
     "the claim"),
    ("beats-simclr", "swav/linear", ">", "simclr/linear", 0.0, "SwAV beats SimCLR with the same crops and epochs", "the claim"),
    ("matches-deepcluster", "swav/linear", ">", "deepcluster/linear", -2.0, "SwAV is less than 2 points below DeepCluster-v2",
     "released networks"),
    ("one-percent", "swav/percent1", ">", "supervised/percent1", 0.0, "With 1 % of the labels SwAV beats training from scratch",
     "semi-supervised table"),
    ("ten-percent", "swav/percent10", ">", "supervised/percent10", 0.0,
     "With 10 % of the labels SwAV beats training from scratch", "semi-supervised table"),
    ("epsilon-collapses", "ablation/epsilon0.5/spread", "<", "swav/spread", 20.0,
     "A large epsilon softens the codes, and all images come to lie together", "the method"),
    ("epsilon-costs", "ablation/epsilon0.5/knn20", "<", "swav/knn20", 5.0,
     "A large epsilon costs 5 points, k-NN", "the method"),
    ("equipartition", "ablation/no-equipartition/use", "<", "swav/use", 20.0,
     "Without equipartition few prototypes are left in use", "the method"),
    ("prototypes-up", "ablation/prototypes-tenfold/knn20", "<", "swav/knn20", -3.0,
     "Ten times the prototypes add less than 3 points, k-NN", "the text: K from 3,000 to 100,000"),
    ("prototypes-down", "ablation/prototypes-tenfold/knn20", ">", "swav/knn20", -3.0,
     "Ten times the prototypes cost less than 3 points, k-NN", "the text: K from 3,000 to 100,000"),
    ("queue", "ablation/small-batch-queue/knn20", ">", "ablation/small-batch/knn20", 0.0, "A queue helps a small batch",
     "ours"),
]

# (file suffix, title, x axis, y axis, {line: [(x, row)] or (row, scalar)})
CURVES = [
    ("pretext", "Loss against ln K", "step", "loss", {
        "SwAV": ("swav/loss", "loss"), "epsilon 0.5": ("ablation/epsilon0.5/loss", "loss"),
        "no equipartition": ("ablation/no-equipartition/loss", "loss"), "ln K": ("swav/loss", "ln K")}),
    ("use", "Prototypes in use: entropy of the nearest, one batch", "step", "entropy, nats", {
        "SwAV": ("swav/loss", "entropy"), "epsilon 0.5": ("ablation/epsilon0.5/loss", "entropy"),
        "no equipartition": ("ablation/no-equipartition/loss", "entropy"), "ln K": ("swav/loss", "ln K")}),
]

COMPARABLE = ("paper",)

# What is pre-trained: name -> settings that differ, given the config
VARIANTS = {
    "swav": lambda config: {},
    "two-crops": lambda config: {
        "crop_sizes": config.crop_sizes[:1], "crop_counts": (2,), "crop_scales": (0.08, 1.0),
        "pretext_epochs": config.pretext_epochs * pixels(config) / (2 * config.crop_sizes[0] ** 2)},
    "deepcluster": lambda config: {"method": "deepcluster"},
    "simclr": lambda config: {"method": "simclr"},
    "ablation/prototypes-tenth": lambda config: {"prototypes": max(2, config.prototypes // 10)},
    "ablation/prototypes-tenfold": lambda config: {"prototypes": 10 * config.prototypes},
    "ablation/epsilon0.03": lambda config: {"epsilon": 0.03},
    "ablation/epsilon0.5": lambda config: {"epsilon": 0.5, "patience": 0.0},
    "ablation/no-equipartition": lambda config: {"iterations": 0, "patience": 0.0},
    "ablation/small-batch": lambda config: quarter_batch(config),
    "ablation/small-batch-queue": lambda config: {**quarter_batch(config), "queue": 15 * quarter_batch(config)["batch_size"]},
}
SHARES = {"percent1": 0.01, "percent10": 0.1}  # of the labels
DIMENSION = 128  # of z, official code
HEADS, KMEANS_ITERATIONS = 3, 10  # DeepCluster-v2, official code
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of each channel
LUMA = (0.299, 0.587, 0.114)


@dataclass
class Config:
    """Settings of a run.  Lengths in pixels, epochs of the pre-training images."""
    seed: int
    dataset: str = "imagenette"
    image_size: int = 128               # ours: paper 256
    streamed: bool = False              # decode files on the fly rather than keep them on the device
    network: str = "resnet18"           # ours: paper "resnet50"; "resnet10" has one block a stage
    width: float = 1.0                  # channels, as a fraction of the network's
    stem: str = "no-pool"               # ours: torchvision's without max-pooling; paper "imagenet"; "cifar" for 32 pixels
    crop_sizes: tuple[int, ...] = (96, 48)      # ours: paper 224 and 96
    crop_counts: tuple[int, ...] = (2, 4)       # ours: paper 2 and 6; codes come from the first two
    crop_scales: tuple[float, ...] = (0.14, 1.0, 0.05, 0.14)    # official code: least and largest share of the area, by size
    jitter: float = 0.5                 # ours: strength, 1 for the paper's (0.8, 0.8, 0.8, 0.2)
    grey: float = 0.2                   # official code: share of crops without colours
    blur: float = 0.0                   # ours: share of blurred crops, paper 0.5
    test_size: int = 128                # what the probes see; paper 224
    method: str = "swav"                # or "deepcluster", "simclr": what the row says
    prototypes: int = 300               # ours: about 10 to 30 a class; paper 3000
    hidden: int = 2048                  # official code: projection head
    temperature: float = 0.1            # official code: tau
    epsilon: float = 0.05               # official code: softness of the codes
    iterations: int = 3                 # official code: of Sinkhorn; 0: codes by softmax alone
    freeze: float = 1.0                 # official code: epochs for which the prototypes stay as drawn
    queue: int = 0                      # official code: 3840 past images where the batch is 256
    queue_start: float = 1.0            # ours: epochs before it fills; official code 15 of 200
    batch_size: int = 256               # ours: paper 4096
    pretext_epochs: float = 50.0        # ours: paper 800
    optimizer: str = "lars"             # official code; or "sgd"
    pretext_rate: float = 0.6           # official code, batches of 256; paper 4.8
    warmup: float = 0.05                # ours: share of the steps; paper 10 of 800 epochs
    momentum: float = 0.9               # official code
    weight_decay: float = 1e-6          # official code
    patience: float = 2.0               # ours: epochs of collapse that end a run; 0: none do
    supervised_epochs: float = 40.0     # ours: with all labels, from scratch
    supervised_rate: float = 0.1        # ours: from scratch, any number of labels
    label_batch: int = 64               # ours: paper 256
    label_passes: tuple[float, ...] = (100.0, 20.0)     # epochs of 1 % and 10 % of the labels; official code 20
    label_rates: tuple[float, ...] = (0.03, 0.03)       # ours: of fine-tuning; official code 0.02 and 0.01
    head_factors: tuple[float, ...] = (10.0, 10.0)      # ours: the linear layer's rate over the network's; official code 250 and 20
    label_decay: float = 5e-4           # ours: official code 0
    checkpoint: str = ""                # --evaluate: the file of a network to probe; nothing is pre-trained
    checkpoint_sha256: str = ""         # of that file, found by itself
    precision: str = "bfloat16"         # ours: multiplications only; parameters and losses stay float32
    deterministic: bool = True          # ours
    shards: int = 8                     # ours: parts of a batch with random streams of their own; ranks divide it

    def __post_init__(self):
        require = trainer.require
        trainer.check_settings(
            self, positive=("image_size", "width", "test_size", "hidden", "temperature", "epsilon", "label_batch"),
            shares=("jitter", "grey", "blur", "warmup"), network=tuple(NETWORKS), stem=tuple(STEMS), method=tuple(METHODS),
            optimizer=tuple(OPTIMIZERS))
        sizes, counts, scales = map(list, (self.crop_sizes, self.crop_counts, self.crop_scales))
        require(sizes and len(counts) == len(sizes) and len(scales) == 2 * len(sizes),
                f"crop_sizes {sizes} need as many crop_counts and twice as many crop_scales")
        reduced = 4 * STEMS[self.stem][1] * (1 + STEMS[self.stem][2])
        require(min(sizes) > reduced, f"crop_sizes {sizes}: with stem '{self.stem}' at least {reduced + 1} pixels are needed, or "
                "layer4 gets a single one")
        require(counts[0] == 2 and min(counts) > 0, f"crop_counts {counts}: two of the first size, at least one of the others")
        require(all(0 < low <= high <= 1 for low, high in zip(scales[::2], scales[1::2])),
                f"crop_scales {scales}: least and largest share of the image for each size, between 0 and 1")
        for name in ("prototypes", "batch_size"):
            require(getattr(self, name) >= 2, f"{name} must be at least 2, not {getattr(self, name)}")
        require(self.queue == 0 or self.queue >= self.batch_size, f"queue {self.queue}: 0, or at least the batch size")
        for name in ("label_passes", "label_rates", "head_factors"):
            pair = list(getattr(self, name))
            require(len(pair) == 2 and min(pair) > 0, f"{name}: two numbers above 0, for 1 % and 10 % of the labels, not {pair}")
        if self.checkpoint and not self.checkpoint_sha256:
            try:
                self.checkpoint_sha256 = hashlib.sha256(Path(self.checkpoint).read_bytes()).hexdigest()
            except OSError as error:
                raise trainer.InputError(f"cannot read {self.checkpoint} ({error.strerror}): --evaluate takes a file") from None


def settings_of(config, name):
    """The config with what one of the VARIANTS changes."""
    return dataclasses.replace(config, **{"method": "swav", **VARIANTS[name](config)})


def quarter_batch(config):
    """A quarter of the batch and of the rate; not below one image a shard."""
    size = max(config.shards, config.batch_size // 4, 2)
    return {"batch_size": size, "pretext_rate": config.pretext_rate * size / config.batch_size, "queue": 0}


def pixels(config):
    """That a step sees of one image."""
    return sum(count * size ** 2 for size, count in zip(config.crop_sizes, config.crop_counts))


# Data: the test split is only ever counted on
def load_data(run):
    """The ImageSet of the config; images without colours are refused."""
    config = run.config
    data = run.load(config.dataset, config.image_size, config.streamed or None)
    channels = data.train.images.shape[1] if hasattr(data.train, "images") else 3
    trainer.require(channels == 3, f"dataset '{config.dataset}' has {channels} colour channel, 3 are needed: --set dataset=cifar10")
    return data


# The idea, first half: multi-crop
def crop_boxes(count, scale, generator, device):
    """Centres (N,2) and sides (N,2) of random boxes, (x, y) as fractions of the image.

    Area uniform in scale, logarithm of width over height uniform between those of 3/4 and 4/3; sides above 1 are cut to 1.
    """
    area, shape, *place = torch.rand(4, count, generator=generator, device=device)
    ratio = torch.exp((2 * shape - 1) * math.log(4 / 3))
    area = scale[0] + (scale[1] - scale[0]) * area
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp_max(1)
    return sides / 2 + torch.stack(place, 1) * (1 - sides), sides


def multi_crop(images, sizes, counts, scales, generator):
    """(N,C,H,W) float -> list of counts[0] crops (N,C,sizes[0],sizes[0]), then counts[1] of the next size, ...

    scales: for each size the least and largest share of the image's area.  Every crop of every image has a box of its own, is
    scaled to its size by bilinear interpolation and mirrored in half of the cases.
    """
    crops = []
    for size, count, scale in zip(sizes, counts, scales):
        steps = (torch.arange(size, device=images.device) + 0.5) / size - 0.5  # middles of the pixels, in sides of the box
        for _ in range(count):
            centres, sides = crop_boxes(len(images), scale, generator, images.device)
            mirror = torch.rand(len(images), generator=generator, device=images.device) < 0.5
            sides[:, 0] = torch.where(mirror, -sides[:, 0], sides[:, 0])
            x, y = (2 * (centres + steps[:, None, None] * sides) - 1).permute(2, 1, 0)  # (N, size), -1 to 1 across the image
            grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
            crops.append(F.grid_sample(images, grid, padding_mode="border", align_corners=False))
    return crops


def distort_colors(images, strength, grey, generator):
    """(N,3,H,W) in 0..1 -> the same: four in five get another brightness, contrast, saturation and hue, a share `grey` loses its
    colours.  One affine map of the colours for each image."""
    count, device = len(images), images.device
    chosen, lost, *factors = torch.rand(6, count, generator=generator, device=device)
    change = (2 * torch.stack(factors) - 1) * (chosen < 0.8) * strength  # (4, N)
    brightness, contrast, saturation = 1 + 0.8 * change[:3]
    saturation = torch.where(lost < grey, 0, saturation)
    angle = 2 * math.pi * 0.2 * change[3]
    a, b, c = ((1 + 2 * (angle + shift).cos()) / 3 for shift in (0, 2 * math.pi / 3, -2 * math.pi / 3))
    turn = torch.stack([a, b, c, c, a, b, b, c, a], 1).view(count, 3, 3)  # a rotation about the axis of greys
    to_grey = torch.stack([(1 - saturation) * share for share in LUMA], 1)[:, None]  # (N, 1, 3), the same for every channel
    matrix = (brightness * contrast)[:, None, None] * (saturation[:, None, None] * turn + to_grey)
    mean = sum(share * channel for share, channel in zip(LUMA, images.mean((2, 3)).unbind(1)))  # (N,)
    offset = ((1 - contrast) * brightness * mean)[:, None, None, None]
    return torch.einsum("nij,njhw->nihw", matrix, images).add_(offset).clamp_(0, 1)


def blur(images, share, generator):
    """(N,3,S,S) -> the same; a share of them blurred by a Gaussian of 0.1 to 2 pixels (official code)."""
    count, _, side, _ = images.shape
    chosen, width = torch.rand(2, count, generator=generator, device=images.device)
    sigma = torch.where(chosen < share, 0.1 + 1.9 * width, 1e-3)
    reach = min(6, side - 1)
    weights = torch.exp(-(torch.arange(-reach, reach + 1, device=images.device) / sigma[:, None]).square() / 2)  # (N, k)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(3, 0)
    planes = F.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[None]  # (1, 3N, h, w)
    planes = F.conv2d(planes, weights[:, None, :, None], groups=3 * count)
    return F.conv2d(planes, weights[:, None, None, :], groups=3 * count)[0].unflatten(0, (count, 3))


def standardize(images):
    """(N,3,H,W) in 0..1 -> what the network sees."""
    return torch.stack([(channel - mean) / deviation for channel, mean, deviation in zip(images.unbind(1), MEAN, DEVIATION)], 1)


def views_of(images, config, generator):
    """(N,3,H,W) uint8 -> list of sum(crop_counts) crops, ready for the network; those of the first size come first."""
    scales = list(zip(config.crop_scales[::2], config.crop_scales[1::2]))
    views = multi_crop(images.float().div_(255), config.crop_sizes, config.crop_counts, scales, generator)
    made = []
    for count in config.crop_counts:  # those of one size at once
        crops = distort_colors(torch.cat(views[len(made):len(made) + count]), config.jitter, config.grey, generator)
        made += standardize(blur(crops, config.blur, generator) if config.blur else crops).chunk(count)
    return made


def whole(images, config):
    """What the network sees of whole images (N,3,H,W) uint8 in the probes."""
    size = (config.test_size, config.test_size)
    images = images.float() / 255
    images = images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True)
    return standardize(images).contiguous(memory_format=torch.channels_last)


# Second half: codes that use all prototypes alike
@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Scores (B,K) -> codes (B,K) float32: each row sums to 1, each prototype gets about B/K (Sec. 3.1).

    The prototypes' shares of exp(scores / epsilon) are made equal, then the samples', `iterations` times.  All on logarithms, the
    maximum subtracted, so that nothing overflows.  With several ranks B is one rank's part and the shares are those of all.
    """
    log_codes = scores.float() / epsilon
    for _ in range(iterations):
        log_codes = log_codes - trainer.over_ranks(log_codes.amax(0), dist.ReduceOp.MAX)
        log_codes = log_codes - trainer.over_ranks(log_codes.exp().sum(0)).log()
        log_codes = log_codes.log_softmax(1)
    return log_codes.softmax(1)


def swapped_prediction_loss(scores, codes, temperature=0.1):
    """Mean cross-entropy of view v's softmax(scores / temperature) against view i's code, over all i and all v other than i.

    scores: list of (B,K), one for each view; codes: list of (B,K) for the first of the views, taken as constants.
    """
    log_p = [(each / temperature).log_softmax(1) for each in scores]
    losses = [-(q.detach() * log_p[v]).sum(1).mean() for i, q in enumerate(codes) for v in range(len(scores)) if v != i]
    return torch.stack(losses).mean()


class FeatureQueue(nn.Module):
    """The latest `length` embeddings of each view, newest first, of no use before it is full; it is saved with the model."""

    def __init__(self, views, length, dimension):
        super().__init__()
        self.register_buffer("features", torch.zeros(views, length, dimension))
        self.count = 0

    def push(self, embeddings):
        """(views,B,D) in, the B oldest out."""
        length = self.features.shape[1]
        self.features.copy_(torch.cat([embeddings, self.features], 1)[:, :length])
        self.count = min(self.count + embeddings.shape[1], length)

    def read(self, view, rank=0, ranks=1):
        """This rank's share (length/ranks,D); nothing, (0,D), before the queue is full."""
        full = self.count == self.features.shape[1]
        return self.features[view].chunk(ranks)[rank] if full else self.features[view, :0]

    def get_extra_state(self):
        return torch.tensor(self.count)

    def set_extra_state(self, state):
        self.count = int(state)


# Networks
NETWORKS = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}
STEMS = {"imagenet": (7, 2, True), "no-pool": (7, 2, False), "cifar": (3, 1, False)}  # kernel, stride, max-pooling
STAGES = ("layer1", "layer2", "layer3", "layer4")


class Encoder(ResNet):
    """torchvision's ResNet without its last layer: (N,3,H,W) -> (N,channels).  At width 1 all parameters have torchvision's names
    and shapes, but for conv1 of the stem "cifar"."""

    def __init__(self, network="resnet18", width=1.0, stem="imagenet"):
        self.width = width
        super().__init__(*NETWORKS[network])
        kernel, stride, pool = STEMS[stem]
        first = self.scaled(64)
        self.conv1 = nn.Conv2d(3, first, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1, self.avgpool, self.fc = nn.BatchNorm2d(first), nn.Identity(), nn.Identity()
        self.maxpool = self.maxpool if pool else nn.Identity()
        self.channels = self.inplanes

    def scaled(self, planes):
        return max(4, round(planes * self.width))

    def _make_layer(self, block, planes, *rest, **options):
        if planes == 64:
            self.inplanes = self.scaled(64)
        return super()._make_layer(block, self.scaled(planes), *rest, **options)

    def maps(self, images):
        """[feature map of layer1, ..., of layer4]."""
        maps = [self.maxpool(self.relu(self.bn1(self.conv1(images))))]
        for name in STAGES:
            maps.append(getattr(self, name)(maps[-1]))
        return maps[1:]

    def forward(self, images):
        return self.maps(images)[-1].float().mean((2, 3))


class ClusteringNetwork(nn.Module):
    """Encoder, projection to unit vectors z, and what the method needs: prototypes and a queue (swav), or a memory of the z of
    `images` images and centroids (deepcluster)."""

    def __init__(self, config, images=0):
        super().__init__()
        self.encoder = Encoder(config.network, config.width, config.stem)
        self.projection = nn.Sequential(nn.Linear(self.encoder.channels, config.hidden), nn.BatchNorm1d(config.hidden), nn.ReLU(),
                                        nn.Linear(config.hidden, DIMENSION))
        self.prototypes = self.queue = None
        if config.method == "swav":
            self.prototypes = nn.Linear(DIMENSION, config.prototypes, bias=False)
            self.normalize_prototypes()
            length = config.queue // config.batch_size * config.batch_size
            self.queue = FeatureQueue(2, length, DIMENSION) if length else None
        if config.method == "deepcluster":
            self.register_buffer("memory", torch.zeros(2, images, DIMENSION))
            self.register_buffer("centroids", torch.zeros(HEADS, config.prototypes, DIMENSION))
        self.register_buffer("watched", torch.zeros(2))  # sums of loss and largest share, for the watch on collapse

    @torch.no_grad()
    def normalize_prototypes(self):
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def project(self, features):
        return F.normalize(self.projection(features).float(), dim=1)

    def embed(self, views):
        """List of V views (B,3,s,s) -> list of V unit vectors (B,D); crops of one size go through the encoder together."""
        sizes = [torch.cat(list(group)) for _, group in itertools.groupby(views, key=lambda view: view.shape[-1])]
        features = [self.encoder(crops.contiguous(memory_format=torch.channels_last)) for crops in sizes]
        return self.project(torch.cat(features)).split(len(views[0]))


def load_encoder(run, path, stem):
    """-> Encoder from a checkpoint of ours, of torchvision's shape, or as SwAV's are published.

    Prefixes ("module.", "encoder.", ...) and heads are dropped; network and width are read off the weights; the stem's pooling is
    not in them: that of `stem`, but the authors' and torchvision's networks, told by their heads, pool.  Raises InputError with
    one line that lists what is missing or does not fit.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # rubbish can make torch.load raise nearly anything
        raise trainer.InputError(f"{path} is no checkpoint of weights ({type(error).__name__})") from None
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    stems = [name for name in state if str(name).endswith("conv1.weight")] if isinstance(state, dict) else []
    trainer.require(stems, f"{path} holds no conv1.weight: not a ResNet")
    prefix = min(stems, key=len).removesuffix("conv1.weight")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    published = "projection_head.0.weight" in state or bool(torch.as_tensor(state.get("fc.weight", 0)).any())  # ours have neither
    state = {name: tensor for name, tensor in state.items() if name.split(".")[0] in ("conv1", "bn1", *STAGES)}
    kernel, width = state["conv1.weight"].shape[-1], len(state["conv1.weight"]) / 64
    network = "resnet50" if "layer1.0.conv3.weight" in state else "resnet18" if "layer1.1.conv1.weight" in state else "resnet10"
    if published or (STEMS[stem][0] == 3) != (kernel == 3):
        stem = "cifar" if kernel == 3 else "imagenet"
    encoder = Encoder(network, width, stem)
    try:
        found = encoder.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise trainer.InputError(f"{path} does not fit {network}: {' '.join(str(error).split())[:300]}") from None
    for what, names in (("lacks", found.missing_keys), ("has too much:", found.unexpected_keys)):
        trainer.require(not names, f"{path}, read as {network}, {what} {', '.join(names[:5])}" + " ..." * (len(names) > 5))
    run.say(f"{path}: {network}, width {width:g}, stem {stem} (another with --set stem=...), prefix '{prefix}'")
    return encoder.to(run.device, memory_format=torch.channels_last)


# Objectives: (network, z of the views, the images' numbers, config, whether prototypes are trained, whether the queue takes part)
# -> (loss, scores of the views (B,K))
def swav_loss(model, embeddings, numbers, config, learned, queued):
    """Each view has to predict the codes of the large crops.  Prototypes not yet learned get no gradient and stay as they are."""
    if learned:
        model.normalize_prototypes()
    prototypes = model.prototypes.weight if learned else model.prototypes.weight.detach()
    scores = [F.linear(z, prototypes) for z in embeddings]  # (B, K)
    codes, rank, ranks = [], *trainer.rank_and_ranks()
    with torch.no_grad():
        for view in range(2):
            past = model.queue.read(view, rank, ranks) if model.queue else embeddings[view][:0]
            rows = torch.cat([F.linear(past, prototypes), scores[view]])
            codes.append(sinkhorn(rows, config.epsilon, config.iterations)[len(past):])
        if model.queue and queued:
            model.queue.push(torch.stack([trainer.rows_of_all_ranks(z) for z in embeddings[:2]]))
    return swapped_prediction_loss(scores, codes, config.temperature), scores


def deepcluster_loss(model, embeddings, numbers, config, learned, queued):
    """Each view has to name the cluster that its image's z of the epoch before is in, for each of several clusterings."""
    losses = []
    for head, centroids in enumerate(model.centroids):
        clusters = (model.memory[head % 2, numbers] @ centroids.T).argmax(1)
        losses += [F.cross_entropy(F.linear(z, centroids) / config.temperature, clusters) for z in embeddings]
    with torch.no_grad():
        model.memory[:, trainer.rows_of_all_ranks(numbers)] = torch.stack([trainer.rows_of_all_ranks(z) for z in embeddings[:2]])
    return torch.stack(losses).mean(), [F.linear(z.detach(), model.centroids[0]) for z in embeddings]


def simclr_loss(model, embeddings, numbers, config, learned, queued):
    """Each view has to tell the large crops of its own image from those of all others (NT-Xent)."""
    large = [trainer.rows_of_all_ranks(z) for z in embeddings[:2]]  # (B of all ranks, D)
    rank, _ = trainer.rank_and_ranks()
    count, losses = len(embeddings[0]), []
    own = torch.arange(len(large[0]), device=large[0].device) == torch.arange(count, device=large[0].device)[:, None] + rank * count
    for v, z in enumerate(embeddings):
        others = [(F.linear(z, each) / config.temperature).masked_fill(own, -math.inf) for each in large]
        negative = torch.cat(others, 1).logsumexp(1)  # (B,)
        losses += [F.softplus(negative - (z * embeddings[i]).sum(1) / config.temperature).mean() for i in range(2) if i != v]
    return torch.stack(losses).mean(), []


METHODS = {"swav": swav_loss, "deepcluster": deepcluster_loss, "simclr": simclr_loss}


def loss_of_guess(config):
    """ln K, or for SimCLR that of one among its negatives."""
    return math.log(1 + 2 * (config.batch_size - 1) if config.method == "simclr" else config.prototypes)


@torch.no_grad()
def spherical_kmeans(features, count, iterations, generator):
    """Unit vectors (N,D) -> centroids (count,D), of unit length: k-means by cosine, from random samples; one that loses all of its
    samples stays where it is."""
    centroids = features[torch.randperm(len(features), generator=generator)[:count].to(features.device)]
    for _ in range(iterations):
        nearest = torch.cat([(part @ centroids.T).argmax(1) for part in features.split(10000)])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, features)
        centroids = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centroids)
    return centroids


@torch.no_grad()
def use_of_prototypes(scores):
    """Scores (N,K) -> (entropy in nats, largest share) of how often each prototype is the nearest, on all ranks."""
    counts = torch.zeros(scores.shape[1], device=scores.device)
    counts.index_add_(0, scores.argmax(1), torch.ones(len(scores), device=scores.device))
    share = trainer.over_ranks(counts)
    share = share / share.sum()
    return -torch.special.xlogy(share, share).sum(), share.max()


# Optimisation
class LARS(torch.optim.Optimizer):
    """SGD with momentum; each parameter's gradient, weight decay included, is multiplied by trust * |parameter| / |gradient|
    (You et al. 2017).  On every parameter, biases and batch-norm too (official code)."""

    def __init__(self, parameters, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                size, steepness, decay = p.norm(), p.grad.norm(), group["weight_decay"]
                ratio = group["trust"] * size / (steepness + decay * size + 1e-8)
                gradient = torch.where((size > 0) & (steepness > 0), (p.grad + decay * p) * ratio, p.grad)
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                p.sub_(group["lr"] * buffer.mul_(group["momentum"]).add_(gradient))


OPTIMIZERS = {"sgd": torch.optim.SGD, "lars": LARS}


def warmed_cosine(rate, warmup, first=1 / 16, last=1 / 1000):
    """From first * rate up to rate over the share `warmup`, then down to last * rate along a cosine (official code)."""
    def at(progress):
        if progress < warmup:
            return rate * (first + (1 - first) * progress / warmup)
        fall = (progress - warmup) / max(1 - warmup, 1e-9)
        return rate * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * fall)))
    return at


# Pre-training.  Of `run` (replicate/trainer.py): fit loops over "set the rate, take objective(batch, step), step the
# optimiser"; shuffled gives endless shuffled batches; augment calls a function with generators fixed by seed, purpose and step;
# wanted says which rows are still to do; record writes a result; measure times an evaluation.
def build(run, config, images=0):
    """The untrained network: the same encoder and projection for every method and user of the seed."""
    run.seed_global("init")
    return ClusteringNetwork(config, images).to(run.device, memory_format=torch.channels_last)


def pretrain(run, data, config, purpose):
    """-> (network, seconds): trained by the config's method; config is the run's or that of one of the VARIANTS."""
    split = copy.copy(data.unlabeled)
    split.labels = torch.arange(len(split), device=split.labels.device)  # in place of classes, for DeepCluster's memory
    trainer.require(config.method != "deepcluster" or len(split) >= config.prototypes,
                    f"{config.prototypes} prototypes for {len(split)} images: lower prototypes with --set")
    model = build(run, config, len(split))
    steps, epoch = trainer.updates(config.pretext_epochs, split, config.batch_size), len(split) / config.batch_size
    frozen_steps, queue_start = round(config.freeze * epoch), round(config.queue_start * epoch)
    settled = max(frozen_steps, round(config.warmup * steps))
    guess = loss_of_guess(config)

    def objective(batch, step):
        images, numbers = batch
        views = run.augment(lambda part, generator: views_of(part, config, generator), images, "augment", step)
        if config.method == "deepcluster" and step * config.batch_size // len(split) > (step - 1) * config.batch_size // len(split):
            recluster(run, model, config, split, step)
        embeddings = model.embed(views)
        with torch.autocast(run.device.type, enabled=False):
            loss, scores = METHODS[config.method](model, embeddings, numbers, config, step >= frozen_steps, step >= queue_start)
        everyone = trainer.over_ranks(loss.detach().clone()) / run.ranks
        scalars = {"loss": loss + (everyone - loss.detach())}  # logged for all ranks, its gradient this rank's own
        if scores:
            scalars["entropy"], scalars["largest"] = use_of_prototypes(torch.cat(scores[:2]))
        if step >= settled and config.patience:
            watch(model, config, purpose, scalars, guess, step, max(1, round(config.patience * epoch)), settled)
        return scalars

    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), config.pretext_rate, config.momentum,
                                             weight_decay=config.weight_decay)
    seconds = run.fit(purpose, model, objective, run.shuffled(split, config.batch_size, "pretext"), steps=steps,
                      optimizer=optimizer, learning_rate=warmed_cosine(config.pretext_rate, config.warmup),
                      images_per_step=config.batch_size, chance=guess)
    run.history[purpose]["ln K"] = [[step, round(guess, 4)] for step, _ in run.history[purpose]["loss"]]
    return model, seconds


def recluster(run, model, config, split, step):
    """DeepCluster-v2, at the start of every epoch: cluster the memory anew for each head; the first time fill it."""
    if step == 0:
        start = split.take(range(min(len(split), 2000))) if run.plan else split
        recalibrate(run, model, config, start)
        embeddings = embeddings_of(run, model, config, start)
        model.memory[:, :len(embeddings)] = embeddings
        model.train()
        torch.clear_autocast_cache()  # or the step would take the weights cast here, without gradient
    for head in range(HEADS):
        generator = run.stream(f"k-means {head}", step)
        with torch.autocast(run.device.type, enabled=False):
            centroids = spherical_kmeans(model.memory[head % 2], config.prototypes, KMEANS_ITERATIONS, generator)
        if run.ranks > 1:
            dist.broadcast(centroids, 0)  # the same to the last bit
        model.centroids[head] = centroids


def watch(model, config, purpose, scalars, guess, step, window, start):
    """Raise TrainingFailed if over a window of steps, counted from `start`, the loss was within 1 % of a guess's or one prototype
    took 90 % of the crops.

    The sums are part of the model, so that a resumed run sees the same; the device is waited for once a window."""
    with torch.no_grad():
        model.watched += torch.stack([scalars["loss"], scalars.get("largest", torch.zeros_like(scalars["loss"]))])
    if (step + 1 - start) % window:
        return
    loss, largest = (model.watched / window).tolist()
    model.watched.zero_()
    remedy = (f"lower epsilon (now {config.epsilon:g})" if config.method == "swav" and config.epsilon > 0.5 * config.temperature
              else f"raise iterations (now {config.iterations})" if config.method == "swav" and config.iterations < 3
              else f"lower pretext_rate (now {config.pretext_rate:g}) or raise freeze (now {config.freeze:g})")
    for collapsed, what in ((loss > 0.99 * guess, f"the loss stayed at {loss:.3f}, that of a guess {guess:.3f}"),
                            (largest > 0.9, f"one prototype took {100 * largest:.0f} % of the crops")):
        if collapsed:
            raise trainer.TrainingFailed(f"{purpose} collapsed: from step {step + 1 - window} to {step + 1} {what}; {remedy} with "
                                         "--set, or wait longer with --set patience=...")


# Evaluation
def features_of(run, config, split, function):
    """(N,D) float32: function(what the network sees of whole images), under autocast."""
    def encode(images):
        with run.autocast():
            return function(whole(images, config))
    return frozen.extract_features(encode, split)


def recalibrate(run, model, config, split):
    """A network in eval mode, all of its batch-norm statistics those of whole images of the split, of which each rank takes a share."""
    rank, ranks = trainer.rank_and_ranks()

    def forward(images):
        share = len(images) // ranks
        features = model.encoder(whole(images[rank * share:(rank + 1) * share], config))
        return model.project(features) if hasattr(model, "project") else features
    with run.autocast():
        return frozen.recalibrate(model, forward, split)


def embeddings_of(run, model, config, split):
    """(N,D): the z of each image."""
    return features_of(run, config, split, lambda images: model.project(model.encoder(images)))


def prototype_scores(model, embeddings):
    """(N,D) -> (N,K): each z against each prototype."""
    return F.linear(embeddings, F.normalize(model.prototypes.weight.detach(), dim=1))


def measures(run, model, config, kinds, train, test):
    """{kind: value} for the wanted kinds of a network with a frozen .encoder: "knn20", "knn200", "linear" in percent, on the
    average of the last feature map; "use" in percent of ln K; "spread" in percent of that of vectors spread evenly."""
    model = recalibrate(run, copy.deepcopy(model), config, train)
    values, probes = {}, [kind for kind in kinds if kind not in ("loss", "use", "spread")]
    if probes:
        train_x, test_x = (features_of(run, config, split, model.encoder) for split in (train, test))
    for kind in probes:
        values[kind] = (frozen.linear_probe(train_x, train.labels, test_x, test.labels, seed=run.seed) if kind == "linear" else
                        frozen.knn_accuracy(train_x, train.labels, test_x, test.labels, k=int(kind.removeprefix("knn"))))
    if "use" in kinds or "spread" in kinds:
        z = embeddings_of(run, model, config, test)
        values["use"] = 100 * float(use_of_prototypes(prototype_scores(model, z))[0]) / math.log(config.prototypes)
        values["spread"] = 100 * math.sqrt(DIMENSION) * float(z.std(0).mean())
    return values


def share_of_labels(labels, share, seed):
    """Indices of a share of every class, at least one of each, drawn by the seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    shuffled = labels[order]
    members = [order[shuffled == label] for label in labels.unique()]
    return torch.cat([each[:max(1, round(share * len(each)))] for each in members]).sort().values


def label_budget(config, row):
    """(network to start from, share of the labels, epochs of them, rate, its factor for the linear layer) of a classifier's row."""
    name, _, kind = row.partition("/")
    if not kind:
        return "random", 1, config.supervised_epochs, config.supervised_rate, 1.0
    place = list(SHARES).index(kind)
    rates = (config.supervised_rate, 1.0) if name == "supervised" else (config.label_rates[place], config.head_factors[place])
    return "random" if name == "supervised" else name, SHARES[kind], config.label_passes[place], *rates


def classify(run, row, encoder, data, share, epochs, rate, factor):
    """Train a copy of an encoder and a linear layer on a share of the labels -> (classifier, steps, seconds)."""
    config = run.config
    model = frozen.Classifier(copy.deepcopy(encoder), data.classes).to(run.device, memory_format=torch.channels_last).train()
    train = data.train if share == 1 else data.train.take(share_of_labels(data.train.labels, share, run.seed))

    def crop(images, generator):
        return standardize(multi_crop(images.float() / 255, config.crop_sizes[:1], (1,), [(0.08, 1.0)], generator)[0])

    def objective(batch, step):
        images, labels = batch
        images = run.augment(crop, images, f"{row}/augment", step).contiguous(memory_format=torch.channels_last)
        return {"loss": F.cross_entropy(model(images).float(), labels)}

    steps = trainer.updates(epochs, train, config.label_batch)
    groups = [{"params": model.encoder.parameters()}, {"params": model.linear.parameters(), "scale": factor}]
    return model, steps, run.fit(
        row, model, objective, run.shuffled(train, config.label_batch, row), steps=steps, images_per_step=config.label_batch,
        optimizer=torch.optim.SGD(groups, lr=rate, momentum=config.momentum, weight_decay=config.label_decay),
        learning_rate=trainer.cosine(rate, config.warmup), chance=math.log(data.classes))


def evaluate(run, data):
    """Every row of the scale that is not recorded yet; controls and baselines get the same probes as SwAV."""
    config, networks = run.config, {}

    def network(name):
        """(module with an .encoder, seconds): one of VARIANTS, "random", "supervised" or "checkpoint"."""
        if name not in networks:
            if name == "supervised":
                model, _, seconds = classifier(name)
                networks[name] = model, seconds
            elif name in VARIANTS:
                networks[name] = pretrain(run, data, settings_of(config, name), name)
            else:
                networks[name] = build(run, config), 0.0
            if name == "checkpoint":
                networks[name][0].encoder = load_encoder(run, config.checkpoint, config.stem)
        return networks[name]

    def classifier(row):
        start, *budget = label_budget(config, row)
        model, before = network(start)
        model, steps, seconds = classify(run, row, model.encoder, data, *budget)
        return model, steps, before + seconds

    def probes(name):
        """All rows name/kind but those of classifiers."""
        rows = {row: kind for row in PAPER for prefix, _, kind in [row.rpartition("/")] if prefix == name and kind not in SHARES}
        wanted = {row: rows[row] for row in run.wanted(*rows)}
        if not wanted:
            return
        settings = settings_of(config, name) if name in VARIANTS else config
        model, seconds = network(name)
        values, own = run.measure(lambda train, test: measures(run, model, settings, wanted.values(), train, test),
                                  data.train, data.test)
        for row, kind in wanted.items():
            history = run.history[name] if kind == "loss" else None
            value = 100 * history["loss"][-1][1] / loss_of_guess(settings) if kind == "loss" else values[kind]
            steps = trainer.updates(settings.pretext_epochs, data.unlabeled, settings.batch_size) if name in VARIANTS else 0
            run.record(row, value, steps=steps, seconds=seconds + own, history=history,
                       metric={"loss": "% of ln K", "use": "% of ln K", "spread": "% of an even spread"}.get(kind, "accuracy"))

    for name in ["checkpoint"] if config.checkpoint else dict.fromkeys(["swav", "random", "supervised", *VARIANTS]):
        probes(name)
        for row in (name, *(f"{name}/{kind}" for kind in SHARES)):
            if row in PAPER:
                frozen.record_accuracy(run, row, lambda: classifier(row), lambda images: whole(images, config), data)
        if name == "swav" and name in networks and run.seed == 0 and run.rank == 0 and not run.plan:
            figures(run, networks[name][0], data)


def figures(run, model, data):
    """The eight test images nearest to each of 16 prototypes; for how many each prototype is the nearest (red: all alike)."""
    model.eval()
    scores = prototype_scores(model, embeddings_of(run, model, run.config, data.test))
    counts = scores.argmax(1).bincount(minlength=scores.shape[1]).cpu()
    prototypes = counts.argsort(descending=True, stable=True)[torch.linspace(0, len(counts) - 1, 16).long()]
    nearest = scores[:, prototypes.to(scores.device)].topk(min(8, len(scores)), 0).indices.T  # (16, 8)
    images, _ = next(data.test.batches([nearest.flatten().cpu()]))
    save_image(images.float() / 255, run.suite / f"{run.paper}_nearest.png", nrow=nearest.shape[1])
    heights = counts.sort(descending=True).values.float().repeat_interleave(max(1, 600 // len(counts)))
    top = float(heights.max())
    level = torch.arange(200, 0, -1)[:, None] / 200 * top  # (200, 1)
    picture = torch.where(level <= heights, 0.4, 1.0).expand(3, -1, -1).clone()
    picture[1:, round(199 * (1 - float(counts.float().mean()) / top))] = 0  # red
    save_image(picture, run.suite / f"{run.paper}_use_of_prototypes.png")


def export(run, path):
    """Write the encoder of "swav" as torchvision's state dict, its last layer zero."""
    config = run.config
    trainer.require(config.width == 1 and config.network != "resnet10" and config.stem != "cifar",
                    f"torchvision has no {config.network} of width {config.width:g} with stem {config.stem}: --set "
                    "network=resnet18 --set width=1 --set stem=imagenet")
    model, _ = pretrain(run, load_data(run), settings_of(config, "swav"), "swav")
    state = {**model.encoder.state_dict(), "fc.weight": torch.zeros(1000, model.encoder.channels), "fc.bias": torch.zeros(1000)}
    if run.rank == 0 and not run.plan:
        buffer = io.BytesIO()
        torch.save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, buffer)
        try:
            trainer.write_atomically(Path(path), buffer.getbuffer())
        except OSError as error:
            raise trainer.InputError(f"cannot write {path} ({error.strerror}): give another file with --export FILE") from None
        run.say(f"{path}: {config.network}, stem {config.stem}")


def reproduce(run):
    """Everything of one seed."""
    evaluate(run, load_data(run))


def rows_of(config):
    """Those of a given checkpoint, or all others."""
    return [row for row in PAPER if row.startswith("checkpoint/") == bool(config.checkpoint)]


def main(arguments=None):
    """Command line; returns the exit status.  --export FILE and --evaluate FILE are this script's own."""
    arguments, files = list(sys.argv[1:] if arguments is None else arguments), {}
    for option in ("--export", "--evaluate"):
        if option in arguments[:-1]:
            place = arguments.index(option)
            files[option] = arguments[place + 1]
            arguments[place:place + 2] = []
    given = [word.split("=")[0] for word in arguments]
    if files and "--seeds" not in given:
        arguments += ["--seeds", "0"]
    if "--evaluate" in files:
        arguments += ["--set", f"checkpoint={json.dumps(files['--evaluate'])}"]
        arguments += [] if "--rows" in given else ["--rows", "checkpoint/knn*,checkpoint/linear"]
    if "--export" in files:
        return trainer.launch(__file__, Config, ["swav/export"], lambda run: export(run, files["--export"]), arguments)
    return trainer.launch(__file__, Config, rows_of, reproduce, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
