"""Gidaris, Singh, Komodakis (ICLR 2018): Unsupervised Representation Learning by Predicting Image Rotations ("RotNet").

Claim: a network that learns nothing but which way up a photograph is learns features that nearly match supervised ones.

Method.  Every image enters the mini-batch four times, turned by 0, 90, 180 and 270 degrees.  A network in network (NIN)
tells the four apart by softmax cross-entropy; a guess costs ln 4.  Turning by quarter turns moves pixels without
resampling, so no trace of the turning itself gives the answer away.  Cropping and flipping come first and the turn last:
a flip after the turn would exchange 90 and 270.  Then the network is frozen, and small classifiers on the feature map of
each block measure what it has learnt; the same classifiers on a network that was never trained are the control.

Deviations
 1. The paper trains 100 epochs, the released code 200 with Nesterov momentum; both lower the rate at 30, 60 and 80 % of the
    run.  We take 100 epochs with Nesterov momentum.
 2. Eight rotations: the paper does not say how it fills the corners of a picture turned by 45 degrees.  We keep the central
    square that no corner reaches, of every copy (22 pixels of 32; the probes see all 32), and shift the copies at multiples of
    90 degrees by the fifth of a pixel that costs as much sharpness as the turn by 45 does; otherwise corners or blur would
    give the class away.
 3. Fine-tuning: the paper gives no schedule.  We use that of the convolutional probe, from a fifth of its rate; at scale small
    with fewer steps than the probe, which costs those rows accuracy.
 4. Plain linear and nearest-neighbour probes are not in the paper: logistic regression and weighted 20-NN on maps averaged
    to at most probe_cells x probe_cells.  The value shown beside ours is from a later paper with the same network.
 5. All probes on one frozen network are trained side by side, each by its own loss, on the same batches.
 6. Linear layers before a batch-norm have no bias, which it would subtract.
 7. Scale paper: ImageNet is decoded to a square of 256 pixels first, and random-sized crops are cut from that; 50 epochs with
    the rate lowered at 15, 30 and 45, as released, where the paper trains 30 with steps at 10 and 20.
 8. Convolutions and matrix products run in bfloat16 and hand it on (--set precision=float32 for the original's); parameters, losses
    and the fitting of plain probes are float32.
 9. Left out: transfer to Places (Table 6) and PASCAL VOC (Table 7), and accuracy over pretext epochs (Fig. 5a).
10. Scale small: narrower network and less training (see the YAML); values are not comparable, claims are.
11. The random control: batch-norm statistics are those of 500 training images, as a trained network's are of its images. The
    released code leaves them at 0 and 1, and convolutions at torch's initialisation: random-official, to compare with the paper.

    python -m papers.gidaris_rotation --scale small        # CIFAR-10; two CPU cores: half an hour for two seeds side by side
    python -m papers.gidaris_rotation --scale full         # CIFAR-10, the paper's protocol, one data-centre GPU
    torchrun --nproc_per_node=8 -m papers.gidaris_rotation --scale paper        # ImageNet, AlexNet
"""
import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as image_functional
from torchvision.transforms import InterpolationMode
from torchvision.utils import save_image

from replicate import evaluate as frozen
from replicate import trainer

# row -> (the paper's test accuracy in percent, where, False if only remembered).  A row is named network/block/head:
# conv and nonlinear are the paper's heads, linear is logistic regression, knn 20 neighbours, labels20 means 20 labels a class.
PAPER = {
    "supervised": (92.80, "Table 3", True),
    "random-official/conv": (72.50, "Table 3", True),
    "random/conv": (None, "control", True),
    "rotnet4/block2/nonlinear": (89.06, "Tables 1, 2, 3", True),
    "rotnet4/conv": (91.16, "Table 3", True),
    "rotnet4/nonlinear-finetuned": (91.73, "Table 3", False),
    "rotnet4/conv-finetuned": (92.17, "Table 3", True),
    "rotnet4/block1/nonlinear": (85.07, "Table 1", True),
    "rotnet4/block3/nonlinear": (86.21, "Table 1", True),
    "rotnet4/block4/nonlinear": (61.73, "Table 1", True),
    "random/block1/nonlinear": (None, "control", True),
    "random/block2/nonlinear": (None, "control", True),
    "random/block3/nonlinear": (None, "control", True),
    "random/block4/nonlinear": (None, "control", True),
    "rotnet3/block1/nonlinear": (85.45, "Table 1", True),
    "rotnet3/block2/nonlinear": (88.26, "Table 1", True),
    "rotnet3/block3/nonlinear": (62.09, "Table 1", True),
    "rotnet5/block1/nonlinear": (85.04, "Table 1", False),
    "rotnet5/block2/nonlinear": (None, "Table 1", True),
    "rotnet5/block3/nonlinear": (86.82, "Table 1", False),
    "rotnet5/block4/nonlinear": (74.50, "Table 1", False),
    "rotnet5/block5/nonlinear": (50.37, "Table 1", False),
    "rotations8/block2/nonlinear": (88.51, "Table 2", True),
    "rotations0-180/block2/nonlinear": (87.46, "Table 2", True),
    "rotations90-270/block2/nonlinear": (85.52, "Table 2", True),
    "rotnet4/conv/labels20": (64.63, "Fig. 5b, from a survey", True),
    "rotnet4/conv/labels100": (75.28, "Fig. 5b, from a survey", True),
    "rotnet4/conv/labels400": (82.84, "Fig. 5b, from a survey", True),
    "rotnet4/conv/labels1000": (86.43, "Fig. 5b, from a survey", True),
    "supervised/labels20": (33.66, "Fig. 5b, from a survey", True),
    "supervised/labels100": (47.26, "Fig. 5b, from a survey", True),
    "supervised/labels400": (74.19, "Fig. 5b, from a survey", True),
    "supervised/labels1000": (83.47, "Fig. 5b, from a survey", True),
    "rotnet4/rotation-accuracy": (None, "pretext task, chance 25", True),
    "rotations8/rotation-accuracy": (None, "pretext task, chance 12.5", True),
    "rotations0-180/rotation-accuracy": (None, "pretext task, chance 50", True),
    "rotations90-270/rotation-accuracy": (None, "pretext task, chance 50", True),
    "rotnet4/block1/linear": (None, "not in the paper", True),
    "rotnet4/block2/linear": (81.8, "a later paper", False),
    "rotnet4/block3/linear": (None, "not in the paper", True),
    "rotnet4/block4/linear": (None, "not in the paper", True),
    "random/block1/linear": (None, "control", True),
    "random/block2/linear": (None, "control", True),
    "random/block3/linear": (None, "control", True),
    "random/block4/linear": (None, "control", True),
    "rotnet4/block1/knn": (None, "not in the paper", True),
    "rotnet4/block2/knn": (75.0, "a later paper", False),
    "rotnet4/block3/knn": (None, "not in the paper", True),
    "rotnet4/block4/knn": (None, "not in the paper", True),
    "random/block1/knn": (None, "control", True),
    "random/block2/knn": (None, "control", True),
    "random/block3/knn": (None, "control", True),
    "random/block4/knn": (None, "control", True),
    "alexnet/rotation-accuracy": (None, "pretext task, chance 25", True),
    "alexnet/conv4/nonlinear": (50.0, "Table 4", True),
    "alexnet/conv5/nonlinear": (43.8, "Table 4", True),
    "alexnet/conv1/linear": (18.8, "Table 5", True),
    "alexnet/conv2/linear": (31.7, "Table 5", True),
    "alexnet/conv3/linear": (38.7, "Table 5", True),
    "alexnet/conv4/linear": (38.2, "Table 5", True),
    "alexnet/conv5/linear": (36.5, "Table 5", True),
    "alexnet-random/conv4/nonlinear": (27.1, "Table 4", True),
    "alexnet-random/conv5/nonlinear": (12.0, "Table 4", True),
    "alexnet-random/conv1/linear": (11.6, "Table 5", True),
    "alexnet-random/conv2/linear": (17.1, "Table 5", True),
    "alexnet-random/conv3/linear": (16.9, "Table 5", True),
    "alexnet-random/conv4/linear": (16.3, "Table 5", True),
    "alexnet-random/conv5/linear": (14.1, "Table 5", True),
}

# (id, row, sign, other row, margin in points, statement, where): for ">" row > other row + margin
CLAIMS = [
    ("beats-random", "rotnet4/conv", ">", "random/conv", 5.0,
     "Rotation features beat random ones by 5 points, conv probe", "Table 3"),
    ("middle-beats-first", "rotnet4/block2/nonlinear", ">", "rotnet4/block1/nonlinear", 0.0, "Block 2 beats block 1", "Table 1"),
    ("middle-beats-third", "rotnet4/block2/nonlinear", ">", "rotnet4/block3/nonlinear", 0.0, "Block 2 beats block 3", "Table 1"),
    ("last-falls", "rotnet4/block2/nonlinear", ">", "rotnet4/block4/nonlinear", 5.0,
     "The last block falls behind block 2 by 5 points", "Table 1"),
    ("four-beat-0-180", "rotnet4/block2/nonlinear", ">", "rotations0-180/block2/nonlinear", 0.0,
     "Four rotations beat {0, 180}", "Table 2"),
    ("four-beat-90-270", "rotnet4/block2/nonlinear", ">", "rotations90-270/block2/nonlinear", 0.0,
     "Four rotations beat {90, 270}", "Table 2"),
    ("four-beat-eight", "rotnet4/block2/nonlinear", ">", "rotations8/block2/nonlinear", 0.0,
     "Four rotations beat eight", "Table 2"),
    ("0-180-beat-90-270", "rotations0-180/block2/nonlinear", ">", "rotations90-270/block2/nonlinear", 0.0,
     "{0, 180} beat {90, 270}", "Table 2"),
    ("conv-beats-nonlinear", "rotnet4/conv", ">", "rotnet4/block2/nonlinear", 0.0,
     "The convolutional probe beats the non-linear one", "Table 3"),
    ("more-blocks-lift-later", "rotnet4/block3/nonlinear", ">", "rotnet3/block3/nonlinear", 5.0,
     "A fourth block lifts the third by 5 points", "Table 1"),
    ("few-labels", "rotnet4/conv/labels20", ">", "supervised/labels20", 5.0,
     "With 20 labels a class pre-training beats supervised training by 5 points", "Fig. 5b"),
    ("few-labels-100", "rotnet4/conv/labels100", ">", "supervised/labels100", 0.0,
     "With 100 labels a class pre-training beats supervised training", "Fig. 5b"),
    ("few-labels-400", "rotnet4/conv/labels400", ">", "supervised/labels400", 0.0,
     "With 400 labels a class pre-training beats supervised training", "Fig. 5b"),
    ("near-supervised", "rotnet4/conv", ">", "supervised", -5.0,
     "RotNet + conv comes within 5 points of supervised training (a claim about full training)", "Table 3"),
]

# (file suffix, title, x axis, y axis, {line: [(x, row)]})
CURVES = [
    ("low_label", "Test accuracy with few labels (Fig. 5b)", "labels a class", "accuracy, %", {
        "RotNet + conv": [(20, "rotnet4/conv/labels20"), (100, "rotnet4/conv/labels100"), (400, "rotnet4/conv/labels400"),
                          (1000, "rotnet4/conv/labels1000"), (5000, "rotnet4/conv")],
        "supervised": [(20, "supervised/labels20"), (100, "supervised/labels100"), (400, "supervised/labels400"),
                       (1000, "supervised/labels1000"), (5000, "supervised")]}),
]

QUARTER_TURNS = (0, 90, 180, 270)
TRUNKS = {  # networks that get probed: name -> (blocks, degrees of the pretext task; none for the untrained control)
    "rotnet4": (4, QUARTER_TURNS), "random": (4, ()), "rotations0-180": (4, (0, 180)), "rotations90-270": (4, (90, 270)),
    "rotnet3": (3, QUARTER_TURNS), "rotnet5": (5, QUARTER_TURNS), "rotations8": (4, tuple(range(0, 360, 45))),
    "random-official": (4, ()), "scratch": (4, ()),
    "alexnet": (5, QUARTER_TURNS), "alexnet-random": (5, ()),
}
LABELS = (20, 100, 400, 1000)  # a class; 5000 is all of CIFAR-10


@dataclass
class Config:
    """Settings of a run.  `drops` are the fractions of a training at which its rate is multiplied by `factor`."""
    seed: int
    dataset: str = "cifar10"            # Sec. 3.1
    image_size: int = 32                # files of folders are decoded to this side
    crop_size: int = 32                 # what the network sees
    crop_padding: int = 4               # official code
    streamed: bool = False              # decode files on the fly rather than keep them on the device
    width: float = 1.0                  # channels, as a fraction of the paper's; below 1: ours, reduced budget
    batch_size: int = 128               # Sec. 3.1: images, each in all its rotations
    pretext_epochs: float = 100.0       # Sec. 3.1
    pretext_rate: float = 0.1           # Sec. 3.1
    pretext_drops: tuple[float, ...] = (0.3, 0.6, 0.8)      # Sec. 3.1, as fractions of the run
    pretext_factor: float = 0.2         # Sec. 3.1
    head_rate: float = 0.1              # official code
    head_factor: float = 0.2            # official code
    nonlinear_epochs: float = 100.0     # official code
    nonlinear_drops: tuple[float, ...] = (0.2, 0.4, 0.45)   # official code
    conv_epochs: float = 100.0          # official code
    conv_drops: tuple[float, ...] = (0.35, 0.7, 0.85)       # official code
    supervised_epochs: float = 200.0    # official code
    supervised_drops: tuple[float, ...] = (0.3, 0.6, 0.8)   # official code
    finetune_epochs: float = 100.0      # ours: as the conv probe
    finetune_rate: float = 0.02         # ours: a fifth of head_rate
    linear_epochs: float = 35.0         # official code, ImageNet only
    linear_drops: tuple[float, ...] = (1 / 7, 3 / 7, 5 / 7)  # official code, ImageNet only
    mean: tuple[float, ...] = (125.3, 123.0, 113.9)         # official code; of the channels, on 0..255
    deviation: tuple[float, ...] = (63.0, 62.1, 66.7)       # official code; standard deviation
    momentum: float = 0.9               # Sec. 3.1
    weight_decay: float = 5e-4          # Sec. 3.1
    probe_cells: int = 8                # ours: linear and k-NN probes see maps of at most 8 x 8
    precision: str = "bfloat16"         # ours: multiplications only; parameters and losses stay float32
    deterministic: bool = True          # ours
    shards: int = 8                     # ours: parts of a batch with random streams of their own; ranks divide it

    def __post_init__(self):
        trainer.check_settings(self, positive=("image_size", "width", "probe_cells"))
        trainer.require(self.crop_size >= 16, f"crop_size {self.crop_size}: the network needs at least 16 pixels")
        for name in ("mean", "deviation"):
            trainer.require(len(getattr(self, name)) == 3, f"{name} must have three values, one a channel")


# Data: the test split is only ever counted on
def load_data(run):
    """The ImageSet of the config; images smaller than the network's crop are refused."""
    config = run.config
    data = run.load(config.dataset, config.image_size, config.streamed or None)
    side = data.train.images.shape[-1] if hasattr(data.train, "images") else config.image_size
    trainer.require(side >= config.crop_size, f"images of '{config.dataset}' have {side} pixels, fewer than "
                    f"crop_size={config.crop_size}: lower it with --set crop_size={side}")
    return data


# The idea: turn, and ask how far
def rotate_four_ways(images):
    """(N,C,H,W), square, any dtype -> (images (4N,C,H,W), quarter_turns (4N,) int64).

    All N unrotated first, then all turned by 90, 180 and 270 degrees counter-clockwise (Sec. 2.2): pixels are moved, never
    resampled.  Raises ValueError for images that are not square.
    """
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]} cannot be batched with their quarter turns")
    turned = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


def rotate_eight_ways(images):
    """(N,C,S,S) uint8 -> (images (8N,C,s,s), eighth_turns (8N,)), s = S / sqrt(2) rounded down to even (deviation 2).

    Blending two neighbours with weights 1 - t and t scales the variance of white noise by t^2 + (1 - t)^2.  A bilinear turn
    by 45 degrees has t spread evenly over 0..1, on average 2/3; the constant `shift` gives 2/3 too: equally blurred.
    """
    side = int(images.shape[-1] / math.sqrt(2)) // 2 * 2
    values = images.float()
    with torch.autocast(images.device.type, enabled=False):  # geometry in full precision
        slanted = image_functional.rotate(values, 45, InterpolationMode.BILINEAR)
    shift = (1 - 3 ** -0.5) / 2
    blurred = torch.lerp(values, values.roll(-1, 3), shift)
    blurred = torch.lerp(blurred, blurred.roll(-1, 2), shift)
    pair = [image_functional.center_crop(copies, [side, side]).round().to(images.dtype) for copies in (blurred, slanted)]
    upright, slanted = (rotate_four_ways(copies)[0].unflatten(0, (4, -1)) for copies in pair)  # (4, N, C, s, s)
    turned = torch.stack([upright, slanted], dim=1).flatten(0, 2)  # 0, 45, 90, 135, ... degrees
    return turned, torch.arange(8, device=images.device).repeat_interleave(len(images))


def rotate(images, degrees):
    """The pretext task with any of the paper's four sets of rotations -> (images (len(degrees)*N,...), labels).

    A label is the position in `degrees`.  The eight-way images are smaller.
    """
    if degrees == QUARTER_TURNS:
        return rotate_four_ways(images)
    if len(degrees) == 8:
        return rotate_eight_ways(images)
    turned = torch.cat([torch.rot90(images, angle // 90, (2, 3)) for angle in degrees])
    return turned, torch.arange(len(degrees), device=images.device).repeat_interleave(len(images))


def crop_and_flip(images, generator, size=32, pad=4):
    """(N,C,S,S) -> (N,C,size,size): zero padding, a random crop and a random mirror image for each (official code)."""
    count, device = len(images), images.device
    room = images.shape[-1] + 2 * pad - size + 1
    offsets = torch.randint(room, (2, count), generator=generator, device=device)  # top, left
    flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
    positions = torch.arange(size, device=device)
    rows = offsets[0, :, None] + positions  # (N, size)
    columns = offsets[1, :, None] + torch.where(flip, size - 1 - positions, positions)
    padded = F.pad(images, (pad, pad, pad, pad))
    samples = torch.arange(count, device=device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # from (N, size, size, C)


def resized_crop_and_flip(images, generator, size=224):
    """(N,C,H,W) -> (N,C,size,size) float: area 0.08..1, aspect 3/4..4/3, bilinear (ImageNet pretext, official code)."""
    area, aspect, x, y, flip = torch.rand(5, len(images), generator=generator, device=images.device)
    area, aspect = 0.08 + 0.92 * area, torch.exp((2 * aspect - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    zero = torch.zeros_like(area)
    mirrored = torch.where(flip < 0.5, -width, width)
    affine = torch.stack([torch.stack([mirrored, zero, (2 * x - 1) * (1 - width)], 1),
                          torch.stack([zero, height, (2 * y - 1) * (1 - height)], 1)], 1)  # (N, 2, 3)
    grid = F.affine_grid(affine, (len(images), images.shape[1], size, size), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def normalize(images, mean, deviation):
    """(N,3,H,W) in 0..255 -> float, less mean[c] and divided by deviation[c] in channel c; stored channels last."""
    channels = [(images[:, c].float() - mean[c]) / deviation[c] for c in range(3)]
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last)


# Networks
def convolution(inputs, outputs, kernel, stride=1, padding=None):
    """Convolution without bias + batch-norm + ReLU, He initialisation by fan-out (official code)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class GlobalAverage(nn.Module):
    """(N,C,h,w) -> (N,C)."""

    def forward(self, maps):
        return maps.mean((2, 3))  # not adaptive pooling, whose backward is not deterministic on a GPU


class Encoder(nn.Module):
    """A chain of blocks and a classifier; `maps` gives what every block puts out."""

    def __init__(self, blocks, classifier):
        super().__init__()
        self.blocks, self.classifier = nn.ModuleList(blocks), classifier

    def maps(self, images, last):
        """[feature map of block 1, ..., of block `last`], from normalised images (N,3,S,S)."""
        maps = []
        for block in self.blocks[:last]:
            maps.append(block(maps[-1] if maps else images))
        return maps

    def features(self, images, block):
        """The feature map (N,C,h,w) of a block, counted from 1.  Raises ValueError for a block that is not there."""
        if not 1 <= block <= len(self.blocks):
            raise ValueError(f"block {block} of a network with blocks 1 to {len(self.blocks)}")
        return self.maps(images, block)[-1]

    def forward(self, images):
        return self.classifier(self.features(images, len(self.blocks)))


def nin_block(inputs, number, width):
    """Block `number` of the network in network, and its output channels: k x k, 1 x 1, 1 x 1 convolution, pooling.

    k is 5 in blocks 1 and 2, then 3; block 1 ends in max-pooling, block 2 in average pooling, the others in none (official
    code).  Channels are multiples of 8 at reduced width.
    """
    channels = [max(8, 8 * round(c * width / 8)) if width != 1 else c for c in ((192, 160, 96) if number == 1 else (192,) * 3)]
    pooling = {1: [nn.MaxPool2d(3, 2, 1)], 2: [nn.AvgPool2d(3, 2, 1)]}.get(number, [])
    return nn.Sequential(convolution(inputs, channels[0], 5 if number <= 2 else 3), convolution(channels[0], channels[1], 1),
                         convolution(channels[1], channels[2], 1), *pooling), channels[2]


class NetworkInNetwork(Encoder):
    """The CIFAR-10 network (Sec. 3.1): 3 to 5 blocks, global average pooling, linear classifier.

    features(images (N,3,32,32), block) -> (N,96,16,16) for block 1, (N,192,8,8) for the others (width 1).
    """

    def __init__(self, blocks=4, classes=4, width=1.0):
        layers, channels = [], 3
        for number in range(1, blocks + 1):
            layer, channels = nin_block(channels, number, width)
            layers.append(layer)
        super().__init__(layers, nn.Sequential(GlobalAverage(), nn.Linear(channels, classes)))
        nn.init.zeros_(self.classifier[1].bias)  # its weights stay torch's (official code)


class AlexNet(Encoder):
    """The ImageNet network (Sec. 3.2): no groups, no local normalisation, batch-norm everywhere, no dropout.

    Maps for 224 pixels: 64x55x55, 192x27x27, 384x13x13, 256x13x13, 256x13x13; pooling opens the next block, and the
    classifier sees 256x6x6.
    """

    def __init__(self, classes=4, width=1.0):
        c64, c192, c384, c256, c4096 = (max(8, round(c * width)) for c in (64, 192, 384, 256, 4096))
        pool = nn.MaxPool2d(3, 2)
        super().__init__(
            [convolution(3, c64, 11, 4, 2), nn.Sequential(pool, convolution(c64, c192, 5)),
             nn.Sequential(pool, convolution(c192, c384, 3)), convolution(c384, c256, 3), convolution(c256, c256, 3)],
            nn.Sequential(pool, nn.Flatten(), *dense(c256 * 36, c4096), *dense(c4096, c4096), nn.Linear(c4096, classes)))


def dense(inputs, outputs):
    """Fully connected layer without bias, batch-norm, ReLU; weights of variance 2 / outputs (official code)."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / outputs))
    return layer, nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)


# Heads, on a feature map of shape (N,C,h,w)
def linear(inputs, outputs):
    """The last layer of the probes' heads: weights of variance 2 / outputs, biases 0 (official code)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / outputs))
    nn.init.zeros_(layer.bias)
    return layer


def nonlinear_head(shape, classes):
    """Flattened map -> 200 -> 200 -> classes (Sec. 3.1; hidden units min(20 classes, 2048), official code)."""
    hidden = min(20 * classes, 2048)
    return nn.Sequential(nn.Flatten(), *dense(math.prod(shape[1:]), hidden), *dense(hidden, hidden), linear(hidden, classes))


def conv_head(shape, classes, width):
    """A fresh third NIN block, global average, linear layer: with blocks 1 and 2 the supervised network (Sec. 3.1)."""
    block, channels = nin_block(shape[1], 3, width)
    return nn.Sequential(block, GlobalAverage(), linear(channels, classes))


def alexnet_linear_head(shape, classes, side):
    """Maxima of side x side cells, batch-norm without scale and shift, one linear layer (Sec. 3.2, official code)."""
    return nn.Sequential(nn.AdaptiveMaxPool2d(side), nn.Flatten(), nn.BatchNorm1d(shape[1] * side * side, affine=False),
                         linear(shape[1] * side * side, classes))


def alexnet_nonlinear_head(shape, classes, width, fresh_conv5):
    """The rest of AlexNet, fresh: with conv5 on conv4's map, without it on conv5's (Table 4)."""
    rest = AlexNet(classes, width)
    return nn.Sequential(*([rest.blocks[4]] if fresh_conv5 else []), rest.classifier)


# Objective
def rotation_loss(scores, labels):
    """Mean cross-entropy over all copies (Eq. 3) and the share told right."""
    return {"loss": F.cross_entropy(scores.float(), labels), "accuracy": (scores.argmax(1) == labels).float().mean()}


def optimizer_of(config, parameters):
    """SGD with Nesterov momentum (official code); the rate given here is replaced at every step of run.fit."""
    return torch.optim.SGD(parameters, lr=config.head_rate, momentum=config.momentum, weight_decay=config.weight_decay,
                           nesterov=config.momentum > 0)


# Pre-training.  Of `run` (replicate/trainer.py): fit loops over "set the rate, take objective(batch, step), step the
# optimiser"; shuffled gives endless shuffled batches; augment calls a function with generators fixed by seed, purpose and step;
# wanted says which rows are still to do; record writes a result; measure times an evaluation.
def build(run, name):
    """The untrained network of a trunk: the same weights for every user of the seed."""
    blocks, degrees = TRUNKS[name]
    run.seed_global("init")
    classes = max(len(degrees), 1)  # the control's classifier is never used
    model = (AlexNet(classes, run.config.width) if name.startswith("alexnet")
             else NetworkInNetwork(blocks, classes, run.config.width))
    if name == "random-official":  # the released networks' own initialisation is never called, which leaves torch's
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
    return model.to(run.device, memory_format=torch.channels_last)


def random_crop(config):
    """Random crop of the padded image and mirror image: pretext on CIFAR-10, all classifiers."""
    return lambda images, generator: crop_and_flip(images, generator, config.crop_size, config.crop_padding)


def random_sized_crop(config):
    """Random-sized crop and mirror image: pretext on ImageNet."""
    return lambda images, generator: resized_crop_and_flip(images, generator, config.crop_size)


def pretrain(run, data, name):
    """-> (network, seconds): trained to tell rotations apart, or as initialised for the controls (deviation 11)."""
    config, (_, degrees) = run.config, TRUNKS[name]
    model = build(run, name)
    if name == "random":
        with run.autocast():
            frozen.recalibrate(model, lambda images: model(central(config, images)), data.train)
    if not degrees:
        return model, 0.0
    augmentation = random_sized_crop(config) if name.startswith("alexnet") else random_crop(config)

    def objective(batch, step):
        images, _ = batch  # the class labels stay unused
        images = run.augment(augmentation, images, f"{name}/augment", step)
        rotated, labels = rotate(images, degrees)
        return rotation_loss(model(normalize(rotated, config.mean, config.deviation)), labels)

    seconds = run.fit(
        name, model, objective, run.shuffled(data.unlabeled, config.batch_size, name),
        steps=trainer.updates(config.pretext_epochs, data.unlabeled, config.batch_size),
        optimizer=optimizer_of(config, model.parameters()),
        learning_rate=trainer.stepped(config.pretext_rate, config.pretext_drops, config.pretext_factor),
        images_per_step=config.batch_size * len(degrees), chance=math.log(len(degrees)))
    return model, seconds


# Evaluation
def central(config, images):
    """What a network sees at test time: the whole CIFAR-10 image, the central crop of a larger one."""
    return normalize(image_functional.center_crop(images, [config.crop_size] * 2), config.mean, config.deviation)


def rotation_accuracy(run, model, degrees, test):
    """Percent of all rotated copies of the test images whose rotation is told right."""
    model.eval()
    hits = count = 0
    with torch.no_grad(), run.autocast():
        for images, _ in test.batches(torch.arange(len(test)).split(250)):
            rotated, labels = rotate(image_functional.center_crop(images, [run.config.crop_size] * 2), degrees)
            hits += int((model(normalize(rotated, run.config.mean, run.config.deviation)).argmax(1) == labels).sum())
            count += len(labels)
    return 100.0 * hits / count


def frozen_maps(run, encoder):
    """maps(images) of all blocks of a frozen encoder, for the plain probes."""
    def maps(images):
        with run.autocast():
            return encoder.maps(central(run.config, images), len(encoder.blocks))
    encoder.eval()
    return maps


def classify(run, purpose, encoder, heads, data, train, *, epochs, drops, rate, finetune=False):
    """Train classifiers on an encoder's feature maps, then count hits on the test set -> ({head: percent}, steps, seconds).

    heads: name -> (block, module).  The encoder is frozen and in eval mode, or trained along if finetune: the supervised
    network is a fine-tuned random one.  One epoch draws as many samples as all of train holds, however few images `train`
    has, so that the number of updates does not depend on the number of labels (Sec. 3.1, official code).
    """
    config = run.config
    last = max(block for block, _ in heads.values())
    encoder = copy.deepcopy(encoder)
    encoder.blocks = encoder.blocks[:last]
    encoder.requires_grad_(finetune).train(finetune)
    before = None if finetune else frozen.fingerprint(encoder.blocks)
    classifiers = nn.ModuleDict({name: head for name, (_, head) in heads.items()})
    classifiers.to(run.device, memory_format=torch.channels_last)
    trained = nn.ModuleDict({"heads": classifiers, **({"blocks": encoder.blocks} if finetune else {})})

    def scores(images):
        with torch.set_grad_enabled(finetune and torch.is_grad_enabled()):
            maps = encoder.maps(images, last)
        return {name: classifiers[name](maps[block - 1]).float() for name, (block, _) in heads.items()}

    def objective(batch, step):
        images, labels = batch
        images = run.augment(random_crop(config), images, f"{purpose}/augment", step)
        predicted = scores(normalize(images, config.mean, config.deviation))
        return {"loss": sum(F.cross_entropy(each, labels) for each in predicted.values())}

    steps = trainer.updates(epochs, data.train, config.batch_size)
    seconds = run.fit(
        purpose, trained, objective, run.shuffled(train, config.batch_size, purpose), steps=steps,
        optimizer=optimizer_of(config, trained.parameters()), learning_rate=trainer.stepped(rate, drops, config.head_factor),
        images_per_step=config.batch_size, chance=len(heads) * math.log(data.classes))
    if not finetune and frozen.fingerprint(encoder.blocks) != before:
        raise AssertionError(f"{purpose}: the frozen network has moved")
    encoder.eval(), classifiers.eval()
    with run.autocast():
        accuracies, counting = run.measure(
            lambda test: frozen.accuracies(lambda images: scores(central(config, images)), test), data.test)
    return accuracies, steps, seconds + counting


def evaluate(run, data):
    """Every row of the scale that is not recorded yet; controls and baselines get the same probes as RotNet."""
    config, trunks = run.config, {}

    def trunk(name):
        if name not in trunks:
            trunks[name] = pretrain(run, data, name)
        return trunks[name]

    def probe(purpose, name, rows, make_head, labels=None, **budget):
        """rows: {row: block}.  All rows of a call are trained, side by side, whichever of them are wanted: so --rows
        changes no number.  make_head(shape of the block's map, block) -> module.

        labels: train on the first so many images of each class (official code), None for all.
        """
        wanted = run.wanted(*rows)
        if wanted and labels and int(data.train.labels.bincount().min()) < labels:
            run.say(f"seed {run.seed}  {', '.join(wanted)}: left out, a class has fewer than {labels} training images")
            return
        if not wanted:
            return
        train = data.train if labels is None else data.train.take(frozen.first_per_class(data.train.labels, labels))
        encoder, seconds = trunk(name)
        with torch.no_grad():
            maps = encoder.eval().maps(torch.zeros(2, 3, config.crop_size, config.crop_size, device=run.device),
                                       max(rows.values()))
        run.seed_global(f"{purpose}/init")
        heads = {row: (block, make_head(maps[block - 1].shape, block)) for row, block in rows.items()}
        accuracies, steps, own = classify(run, purpose, encoder, heads, data, train, **budget)
        for row in wanted:
            run.record(row, accuracies[row], steps=steps, seconds=seconds + own)

    def nonlinear(shape, block):
        return nonlinear_head(shape, data.classes)

    def conv(shape, block):
        return conv_head(shape, data.classes, config.width)

    def linear_on_alexnet(shape, block):
        return alexnet_linear_head(shape, data.classes, {1: 12, 2: 7, 3: 5, 4: 6, 5: 6}[block])

    def nonlinear_on_alexnet(shape, block):
        return alexnet_nonlinear_head(shape, data.classes, config.width, fresh_conv5=block == 4)

    on_nonlinear = dict(epochs=config.nonlinear_epochs, drops=config.nonlinear_drops, rate=config.head_rate)
    on_conv = dict(epochs=config.conv_epochs, drops=config.conv_drops, rate=config.head_rate)
    on_linear = dict(epochs=config.linear_epochs, drops=config.linear_drops, rate=config.head_rate)
    on_everything = dict(epochs=config.supervised_epochs, drops=config.supervised_drops, rate=config.head_rate, finetune=True)
    on_finetuning = dict(epochs=config.finetune_epochs, drops=config.conv_drops, rate=config.finetune_rate, finetune=True)

    # Table 3.  The supervised network is the untrained trunk's blocks 1 and 2 and a conv head, all trained.
    for name in ("random", "random-official"):
        probe(f"{name}/conv", name, {f"{name}/conv": 2}, conv, **on_conv)
    probe("rotnet4/conv", "rotnet4", {"rotnet4/conv": 2}, conv, **on_conv)
    probe("supervised", "scratch", {"supervised": 2}, conv, **on_everything)
    probe("rotnet4/conv-finetuned", "rotnet4", {"rotnet4/conv-finetuned": 2}, conv, **on_finetuning)
    probe("rotnet4/nonlinear-finetuned", "rotnet4", {"rotnet4/nonlinear-finetuned": 2}, nonlinear, **on_finetuning)
    # Tables 1 and 2
    for name in ("rotnet4", "random", "rotnet3", "rotnet5"):
        blocks = range(1, TRUNKS[name][0] + 1)
        probe(f"{name}/nonlinear", name, {f"{name}/block{b}/nonlinear": b for b in blocks}, nonlinear, **on_nonlinear)
    for name in ("rotations0-180", "rotations90-270", "rotations8"):
        probe(f"{name}/nonlinear", name, {f"{name}/block2/nonlinear": 2}, nonlinear, **on_nonlinear)
    # Tables 4 and 5
    for name in ("alexnet", "alexnet-random"):
        probe(f"{name}/linear", name, {f"{name}/conv{b}/linear": b for b in range(1, 6)}, linear_on_alexnet, **on_linear)
        probe(f"{name}/nonlinear", name, {f"{name}/conv{b}/nonlinear": b for b in (4, 5)}, nonlinear_on_alexnet, **on_nonlinear)
    # Fig. 5b
    for count in LABELS:
        for name, start, budget in (("rotnet4/conv", "rotnet4", on_conv), ("supervised", "scratch", on_everything)):
            row = f"{name}/labels{count}"
            probe(row, start, {row: 2}, conv, labels=count, **budget)
    # Beyond the paper: the pretext task itself, linear and nearest-neighbour probes
    for name, (_, degrees) in TRUNKS.items():
        if f"{name}/rotation-accuracy" in PAPER and run.wanted(f"{name}/rotation-accuracy"):
            model, seconds = trunk(name)
            value, own = run.measure(lambda test: rotation_accuracy(run, model, degrees, test), data.test)
            run.record(f"{name}/rotation-accuracy", value, seconds=seconds + own, history=run.history.get(name),
                       steps=trainer.updates(config.pretext_epochs, data.unlabeled, config.batch_size))
    for name in ("rotnet4", "random"):
        rows = {f"{name}/block{block}/{kind}": (block, kind) for block in range(1, 5) for kind in ("linear", "knn")}
        frozen.record_probes(run, rows, lambda: (frozen_maps(run, trunk(name)[0]), trunk(name)[1]), data, config.probe_cells)
    if "rotnet4" in trunks and run.seed == 0 and run.rank == 0 and not run.plan:
        figures(run, trunks["rotnet4"][0], data)


def figures(run, encoder, data):
    """First-layer filters, and where each block is active (mean absolute activation) on the first test images: like the
    paper's figures of filters and attention maps, for the CIFAR-10 network."""
    encoder.eval()
    filters = encoder.blocks[0][0][0].weight.detach().float().contiguous()  # (192 width, 3, 5, 5)
    save_image(F.interpolate(filters, scale_factor=8), run.suite / f"{run.paper}_filters.png", nrow=16, normalize=True,
               scale_each=True)
    images = next(data.test.batches([torch.arange(min(12, len(data.test)))]))[0]
    with torch.no_grad():
        maps = encoder.maps(central(run.config, images), len(encoder.blocks))
    side = run.config.crop_size
    columns = [image_functional.center_crop(images, [side, side]).float() / 255]
    for features in maps:
        heat = features.float().abs().mean(1, keepdim=True)
        heat = heat / heat.amax((2, 3), keepdim=True)
        columns.append(F.interpolate(heat, (side, side)).expand(-1, 3, -1, -1))
    grid = F.interpolate(torch.stack(columns, 1).flatten(0, 1), scale_factor=3)  # rows: image, block 1, block 2, ...
    save_image(grid, run.suite / f"{run.paper}_attention.png", nrow=2 * len(columns))


def reproduce(run):
    """Everything of one seed."""
    evaluate(run, load_data(run))


def main(arguments=None):
    """Command line; returns the exit status."""
    return trainer.launch(__file__, Config, list(PAPER), reproduce, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
