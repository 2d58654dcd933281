"""Doersch, Gupta, Efros (ICCV 2015): Unsupervised Visual Representation Learning by Context Prediction.

Claim: to say where one patch of a photograph lies relative to another, a network has to learn what objects look like.

Method.  Nine patches are cut from an image on a 3 x 3 grid.  The network sees two of them, the middle one and a neighbour,
and tells which of the eight neighbouring places the second takes relative to the first; a guess costs ln 8.  Each patch goes
through the same encoder alone, and the two meet late, by concatenation.  Networks look for easier ways: lines and textures
that run on from patch to patch, the lens's colour fringes, brightness.  So there is a gap of half a patch between the
patches, their places jitter, colours are projected or dropped, contrast is normalised, some patches are pixelated; the
audit rows take each of these away again.

Deviations
 1. Pairs always hold the middle patch, in both orders, so that the eight answers are exactly equally frequent; in the
    released code all adjacent patches are paired, and the best constant answer is right in 15 %.
 2. Images of 96 or 128 pixels, patches of 22 or 30, and a network of that size, at scales small and full; gap and jitter keep
    the paper's proportions.  The grid all but fills these images (92 and 124 pixels), so that a patch's own place gives much of
    the answer away: row audit/one-patch.  Scale paper has the paper's patches and AlexNet, on ImageNet decoded to squares of 448
    pixels, where the paper draws a new size for every image.
 3. Batch-norm without scale and shift in every layer at scales small and full; in the paper from the third convolution on.
 4. SGD with Nesterov momentum 0.9, warm-up and cosine on the mean loss.  The paper's solver, at a fixed rate, took four weeks; scale
    paper has the released code's rate (0.025 for a mean over some 2,500 pairs; there without momentum, in the paper with a high
    one such as 0.999), its 1.7 million updates, its weight decay of 0 (the supervised control too) and about as many patches a
    batch (56 images, 896 pairs with the centre).
 5. Of the paper's two ways with colours, projection at scales small and full: chosen on a slice of train (28 % of positions told
    right after 3 epochs, with dropping 25 %).  Dropping, at scale paper, as the paper says (noise of a hundredth of the kept
    channel's deviation), the channel drawn for each patch, as in the released code.
 6. Evaluation: the paper fine-tunes for detection on VOC.  Ours: plain probes on the feature maps of whole images (at most
    4 x 4, scale paper 2 x 2), batch-norm statistics of all networks, the random one too, taken anew from 500 training images;
    few labels, fine-tuning, and retrieval of patches by conv5 less its mean over the patches, as the supervised control has no
    fc6 (paper: fc6, normalised correlation).  Networks of the audit see images prepared as their patches were, colours never
    dropped.
 7. Convolutions and matrix products run in bfloat16 and hand it on (--set precision=float32 for the original's); parameters, losses
    and the fitting of plain probes are float32.
 8. The rows audit/no-gap and no-jitter are ours: for no-gap the picture is made smaller until touching patches reach as far across
    it as patches with gaps do, so each patch also shows 1.8 times as much of it.
 9. Left out: VOC detection, surface normals (NYUv2), visual data mining.
10. Scale small: less training and a narrower network (see the YAML); values are not comparable, claims are.

    python -m papers.doersch_context --scale small        # Imagenette; two CPU cores: half an hour for two seeds side by side
    python -m papers.doersch_context --scale full         # Imagenette, one data-centre GPU
    torchrun --nproc_per_node=8 -m papers.doersch_context --scale paper        # ImageNet, AlexNet
"""
import copy
import dataclasses
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
    "context/position-accuracy": (40.3, "ImageNet val, chance 12.5", True),
    "context/conv1/linear": (16.2, "ImageNet, from a survey", True),
    "context/conv2/linear": (23.3, "ImageNet, from a survey", True),
    "context/conv3/linear": (30.2, "ImageNet, from a survey", True),
    "context/conv4/linear": (31.7, "ImageNet, from a survey", True),
    "context/conv5/linear": (29.6, "ImageNet, from a survey", True),
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
    "context/conv4/knn": (None, "not in the paper", True),
    "random/conv4/knn": (None, "control", True),
    "supervised/conv4/knn": (None, "control", True),
    "context/finetuned": (None, "not in the paper", True),
    "supervised": (None, "control", True),
    "context/finetuned/labels1": (None, "not in the paper", True),
    "context/finetuned/labels5": (None, "not in the paper", True),
    "context/finetuned/labels20": (None, "not in the paper", True),
    "context/finetuned/labels100": (None, "not in the paper", True),
    "supervised/labels1": (None, "control", True),
    "supervised/labels5": (None, "control", True),
    "supervised/labels20": (None, "control", True),
    "supervised/labels100": (None, "control", True),
    "context/conv4/labels1": (None, "not in the paper", True),
    "context/conv4/labels5": (None, "not in the paper", True),
    "context/conv4/labels20": (None, "not in the paper", True),
    "context/conv4/labels100": (None, "not in the paper", True),
    "random/conv4/labels1": (None, "control", True),
    "random/conv4/labels5": (None, "control", True),
    "random/conv4/labels20": (None, "control", True),
    "random/conv4/labels100": (None, "control", True),
    "context/retrieval": (None, "the paper shows pictures, chance 10", True),
    "random/retrieval": (None, "control", True),
    "supervised/retrieval": (None, "control", True),
    "audit/as-is/position-accuracy": (None, "chance 12.5", True),
    "audit/dropping/position-accuracy": (None, "chance 12.5", True),
    "audit/no-gap/position-accuracy": (None, "patches touch, reach as far across the image; no jitter", True),
    "audit/no-jitter/position-accuracy": (None, "chance 12.5", True),
    "audit/no-normalization/position-accuracy": (None, "chance 12.5", True),
    "audit/no-pixelation/position-accuracy": (None, "chance 12.5", True),
    "audit/no-color-handling/position-accuracy": (None, "chance 12.5", True),
    "audit/aberration/position-accuracy": (None, "fringes, no colour handling", True),
    "audit/aberration-dropping/position-accuracy": (None, "fringes, colours dropped", True),
    "audit/aberration-projection/position-accuracy": (None, "fringes, colours projected", True),
    "audit/one-patch/position-accuracy": (None, "a neighbour alone", True),
    "audit/as-is/conv4/linear": (None, "same budget as the rows below", True),
    "audit/dropping/conv4/linear": (None, "the other way with colours", True),
    "audit/no-gap/conv4/linear": (None, "short-cut open", True),
    "audit/no-jitter/conv4/linear": (None, "short-cut open", True),
    "audit/no-normalization/conv4/linear": (None, "short-cut open", True),
    "audit/no-pixelation/conv4/linear": (None, "short-cut open", True),
    "audit/no-color-handling/conv4/linear": (None, "short-cut open", True),
    "audit/aberration/conv4/linear": (None, "short-cut open", True),
    "audit/aberration-dropping/conv4/linear": (None, "short-cut closed", True),
    "audit/aberration-projection/conv4/linear": (None, "short-cut partly closed", True),
    "audit/one-patch/conv4/linear": (None, "trained to place one patch", True),
}

# (id, row, sign, other row, margin in points, statement, where)
CLAIMS = [
    ("beats-random", "context/conv4/linear", ">", "random/conv4/linear", 2.0,
     "Context features beat random ones by 2 points, linear probe", "survey's table"),
    ("last-falls", "context/conv4/linear", ">", "context/conv5/linear", 0.0,
     "The best layer is not the last: conv4 beats conv5 (untrained, too)", "survey's table"),
    ("few-labels", "context/finetuned/labels20", ">", "supervised/labels20", 0.0,
     "With 20 labels a class pre-training beats training from scratch", "ours"),
    ("retrieval", "context/retrieval", ">", "random/retrieval", 0.0,
     "Nearest patches share the class more often than by random features", "figure of nearest neighbours"),
    ("gap-matters", "audit/no-gap/position-accuracy", ">", "audit/no-jitter/position-accuracy", 2.0,
     "Without the gap the pretext task gets easier by 2 points (both without jitter; the grid is as large a part of the image)",
     "the method"),
    ("fringes-show", "audit/aberration/position-accuracy", ">", "audit/no-color-handling/position-accuracy", 2.0,
     "Colour fringes give the place away where colours are left alone: 2 points", "the method"),
    ("dropping-hides-fringes", "audit/aberration-dropping/position-accuracy", "<", "audit/dropping/position-accuracy", -2.0,
     "With colours dropped, fringes add less than 2 points", "the method"),
    ("one-patch-tells-less", "audit/one-patch/position-accuracy", "<", "audit/as-is/position-accuracy", 5.0,
     "One patch alone tells its place less well than two by 5 points (after the audit's short training)", "the method"),
]

# (file suffix, title, x axis, y axis, {line: [(x, row)] or (row, scalar)})
CURVES = [
    ("low_label", "Test accuracy with few labels", "labels a class", "accuracy, %", {
        "context, fine-tuned": [(1, "context/finetuned/labels1"), (5, "context/finetuned/labels5"),
                                (20, "context/finetuned/labels20"), (100, "context/finetuned/labels100")],
        "from scratch": [(1, "supervised/labels1"), (5, "supervised/labels5"), (20, "supervised/labels20"),
                         (100, "supervised/labels100")],
        "context, conv4 frozen": [(1, "context/conv4/labels1"), (5, "context/conv4/labels5"), (20, "context/conv4/labels20"),
                                  (100, "context/conv4/labels100")],
        "random, conv4 frozen": [(1, "random/conv4/labels1"), (5, "random/conv4/labels5"), (20, "random/conv4/labels20"),
                                 (100, "random/conv4/labels100")]}),
    ("pretext", "Loss of the pretext task (a guess costs 2.079)", "step", "loss", {
        "context": ("context/position-accuracy", "loss")}),
]

COMPARABLE = ("paper",)

VARIANTS = {  # audit: name -> settings that differ
    "as-is": {}, "dropping": {"colors": "dropping"}, "no-gap": {"touching": True, "jitter": 0}, "no-jitter": {"jitter": 0},
    "no-normalization": {"normalization": False}, "no-pixelation": {"pixelation": 0.0}, "no-color-handling": {"colors": "all"},
    "aberration": {"colors": "all", "fringe": 0.02}, "aberration-dropping": {"colors": "dropping", "fringe": 0.02},
    "aberration-projection": {"colors": "projection", "fringe": 0.02},
    "one-patch": {"one_patch": True},
}
LABELS = (1, 5, 20, 100)  # a class


@dataclass
class Config:
    """Settings of a run.  Lengths in pixels of an image of image_size."""
    seed: int
    dataset: str = "imagenette"
    image_size: int = 128               # ours: the paper's images have 150,000 to 450,000 pixels
    streamed: bool = False              # decode files on the fly rather than keep them on the device
    network: str = "small"              # "small" (ours) or "alexnet" (paper)
    width: float = 1.0                  # channels, as a fraction of the network's
    patch: int = 30                     # paper: 96
    gap: int = 15                       # paper: 48, half a patch
    jitter: int = 2                     # paper: 7, to either side
    colors: str = "projection"          # paper: this or "dropping"; "all" leaves them alone
    pixelation: float = 1 / 3           # official code: share of patches that are pixelated
    normalization: bool = True          # official code: contrast of each patch
    fringe: float = 0.0                 # audit: what the green channel is magnified by
    touching: bool = False              # audit: no gaps; pictures are made smaller, so that the grid reaches as far across them
    one_patch: bool = False             # audit: say where a patch lies, the centre hidden
    batch_size: int = 256               # ours: images, each in 16 pairs
    pretext_epochs: float = 200.0       # ours
    audit_epochs: float = 40.0          # ours
    pretext_rate: float = 0.1           # ours
    supervised_epochs: float = 60.0     # ours: with all labels, from scratch and fine-tuned
    label_epochs: float = 20.0          # ours: with few labels; in epochs of the whole set
    supervised_rate: float = 0.1        # ours
    finetune_rate: float = 0.1          # ours
    warmup: float = 0.05                # ours: share of the steps
    momentum: float = 0.9               # ours
    weight_decay: float = 1e-4          # ours: official code 0
    probe_cells: int = 4                # ours: linear and k-NN probes see maps of at most 4 x 4
    precision: str = "bfloat16"         # ours: multiplications only; parameters and losses stay float32
    deterministic: bool = True          # ours
    shards: int = 8                     # ours: parts of a batch with random streams of their own; ranks divide it

    def __post_init__(self):
        trainer.check_settings(self, positive=("image_size", "width", "patch", "probe_cells"), shares=("pixelation", "warmup"),
                               colors=("dropping", "projection", "all"), network=tuple(NETWORKS))
        require_room(self, self.image_size, "image_size")
        trainer.require(self.patch >= 16, f"patch {self.patch}: the network needs at least 16 pixels")
        trainer.require(self.gap >= 2 * self.jitter or self.jitter == 0, f"gap {self.gap}: with jitter {self.jitter} patches would "
                        f"overlap; at least {2 * self.jitter}, or jitter=0")


def require_room(config, side, what):
    """Raise InputError, naming the patch that would fit, unless images of `side` pixels hold the grid and its jitter."""
    extra = 2 * config.gap + 2 * config.jitter
    trainer.require(side >= 3 * config.patch + extra, f"{what} {side}: three patches of {config.patch}, two gaps of {config.gap} "
                    f"and jitter {config.jitter} need {3 * config.patch + extra} pixels; "
                    f"patch={max(0, (side - extra) // 3)} would fit")


# Data: the test split is only ever counted on
def load_data(run):
    """The ImageSet of the config; images too small for the patches are refused."""
    config = run.config
    data = run.load(config.dataset, config.image_size, config.streamed or None)
    side = data.train.images.shape[-1] if hasattr(data.train, "images") else config.image_size
    require_room(config, side, f"images of '{config.dataset}' of side")
    return data


# The idea: where does this patch lie?
def neighbor_position(row, column):
    """0..7, row by row without the centre, of a neighbour's place in the 3 x 3 grid; ValueError for the centre or outside."""
    if not (0 <= row <= 2 and 0 <= column <= 2) or (row, column) == (1, 1):
        raise ValueError(f"row {row}, column {column} is no neighbour of the centre of a 3 x 3 grid")
    place = 3 * row + column
    return place - (place > 4)


def cut_patches(images, patch, gap, jitter, generator):
    """(N,C,H,W) -> (patches (N,9,C,p,p), corners (N,9,2)): a 3 x 3 grid of patches at a random place of each image.

    Neighbours' corners lie patch + gap apart, give or take the jitter of each (-jitter..jitter on both axes), and all patches
    lie inside the image (Sec. 3).  corners: row and column of each patch's first pixel.  Raises ValueError where the
    grid does not fit.
    """
    count, pitch = len(images), patch + gap
    span = 3 * patch + 2 * gap + 2 * jitter
    room = torch.tensor([side - span + 1 for side in images.shape[-2:]])
    if room.min() < 1:
        raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels; patches of {patch}, gaps of {gap} and "
                         f"jitter {jitter} need {span}")
    device = images.device
    phase = (torch.rand(count, 1, 2, generator=generator, device=device) * room.to(device)).long()
    moved = torch.randint(2 * jitter + 1, (count, 9, 2), generator=generator, device=device)
    place = torch.arange(9, device=device)
    grid = torch.stack([place // 3, place % 3], 1)  # (9, 2)
    corners = phase + pitch * grid + moved  # (N, 9, 2)
    window = torch.arange(patch, device=device)
    rows, columns = (corners[..., axis, None] + window for axis in (0, 1))  # (N, 9, p)
    samples = torch.arange(count, device=device)[:, None, None, None]
    patches = images[samples, :, rows[..., :, None], columns[..., None, :]]  # (N, 9, p, p, C)
    return patches.permute(0, 1, 4, 2, 3), corners


def drop_colors(patches, generator):
    """(...,3,p,p) float -> the same with one random channel of each patch kept, less its mean, and the others replaced by
    Gaussian noise of a hundredth of its standard deviation (Sec. 3)."""
    shape = patches.shape
    patches = patches.flatten(0, -4)
    kept = torch.randint(3, (len(patches), 1, 1, 1), generator=generator, device=patches.device)
    channel = patches.gather(1, kept.expand(-1, 1, *shape[-2:]))
    channel = channel - channel.mean((2, 3), keepdim=True)
    noise = torch.randn(patches.shape, generator=generator, device=patches.device)
    noise = noise * channel.std((2, 3), keepdim=True) / 100
    positions = torch.arange(3, device=patches.device).view(1, 3, 1, 1)
    return torch.where(positions == kept, channel, noise).view(shape)


def project_green_magenta(images):
    """(...,3,H,W) float -> the same without what lies along green - magenta, a = (-1, 2, -1): each pixel times
    I - a'a / (a a') (Sec. 3).  Grey stays."""
    axis = torch.tensor([-1.0, 2.0, -1.0], device=images.device).view(3, 1, 1)
    return images - axis * (axis * images).sum(-3, keepdim=True) / 6


def pixelation_matrices(size):
    """(size + 1, size, size): matrix s averages `size` pixels down to s and interpolates back up; the first two do nothing."""
    identity = torch.eye(size)
    made = [F.interpolate(F.adaptive_avg_pool1d(identity[None], side), size, mode="linear")[0].T for side in range(2, size + 1)]
    return torch.stack([identity, identity, *made])


def pixelate(patches, share, matrices, generator):
    """(N,9,3,p,p) float -> the same with a share of the patches at a lower resolution, a tenth of the side to all of it, areas
    equally likely (official code).  matrices: pixelation_matrices(p)."""
    size, device = patches.shape[-1], patches.device
    least = max(2, round(size * 10 / 96))
    drawn = torch.rand(2, *patches.shape[:2], generator=generator, device=device)
    sides = (least ** 2 + drawn[0] * ((size - 1) ** 2 - least ** 2)).sqrt().round().long()
    chosen = matrices[torch.where(drawn[1] < share, sides, size)][:, :, None]  # (N, 9, 1, p, p); the last one does nothing
    return chosen @ patches @ chosen.mT


def normalize_contrast(patches):
    """(...,C,p,p) -> mean 0 and root mean square 1 over each patch, all channels together; one of a single level becomes 0 (official
    code)."""
    centred = patches - patches.mean((-3, -2, -1), keepdim=True)
    return centred / centred.square().mean((-3, -2, -1), keepdim=True).sqrt().clamp_min(0.01)


def prepare(patches, config, matrices, generator):
    """(N,9,3,p,p) in 0..1 -> what the network sees: pixelation, colours, contrast."""
    if config.pixelation:
        patches = pixelate(patches, config.pixelation, matrices, generator)
    if config.colors == "dropping":
        patches = drop_colors(patches, generator)
    elif config.colors == "projection":
        patches = project_green_magenta(patches)
    return normalize_contrast(patches) if config.normalization else (patches - 0.5 * (config.colors != "dropping")) / 0.25


def whole(images, config):
    """What the network sees of whole images (N,3,S,S) uint8 in the probes: contrast as for patches, colours projected if they
    were in pre-training, never dropped."""
    images = images.float() / 255
    images = project_green_magenta(images) if config.colors == "projection" else images
    images = normalize_contrast(images) if config.normalization else (images - 0.5) / 0.25
    return images.contiguous(memory_format=torch.channels_last)


def pairs_with_centre(embeddings, both=True):
    """(N,9,D) -> (first (16N,D), second (16N,D), positions (16N,)): each neighbour after the centre, then the centre after each
    neighbour; turned round, position l becomes 7 - l.  both=False: only the first half."""
    places = [place for place in range(9) if place != 4]
    around = embeddings[:, places].flatten(0, 1)  # (8N, D)
    centre = embeddings[:, 4].repeat_interleave(8, 0)
    positions = torch.tensor([neighbor_position(*divmod(place, 3)) for place in places], device=around.device)
    positions = positions.repeat(len(embeddings))
    if not both:
        return centre, around, positions
    return torch.cat([centre, around]), torch.cat([around, centre]), torch.cat([positions, 7 - positions])


# Networks
NETWORKS = {  # (channels, kernel, stride, batch-norm, pooling, local response norm) of conv1 to conv5; units of fc6 and of the head
    "small": (((64, 5, 2, True, True, False), (192, 3, 1, True, True, False), (384, 3, 1, True, False, False),
               (256, 3, 1, True, False, False), (256, 3, 1, True, False, False)), 512, 512),
    "alexnet": (((96, 11, 4, False, True, True), (256, 5, 1, False, True, True), (384, 3, 1, True, False, False),
                 (384, 3, 1, True, False, False), (256, 3, 1, True, True, False)), 4096, 4096),
}


class PatchEncoder(nn.Module):
    """conv1 to conv5 and fc6, for one patch alone: (N,3,p,p) -> (N,D).  `maps` gives what every convolution puts out, also for
    whole images."""

    def __init__(self, network="small", width=1.0, patch=96):
        super().__init__()
        layers, units, _ = NETWORKS[network]
        blocks, inputs = [], 3
        for channels, kernel, stride, norm, pooling, local in layers:
            outputs = max(8, round(channels * width))
            block = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)]
            block += [nn.BatchNorm2d(outputs, affine=False)] if norm else []
            block += [nn.ReLU()] + [nn.MaxPool2d(3, 2, ceil_mode=True)] * pooling + [trainer.LocalResponseNorm()] * local
            blocks.append(nn.Sequential(*block))
            inputs = outputs
        self.blocks, self.channels = nn.ModuleList(blocks), inputs
        with torch.no_grad():
            flat = self.eval().maps(torch.zeros(1, 3, patch, patch))[-1].numel()
        self.dimension = max(8, round(units * width))
        self.fc6 = nn.Sequential(nn.Flatten(), nn.Linear(flat, self.dimension, bias=False),
                                 nn.BatchNorm1d(self.dimension, affine=False), nn.ReLU())
        self.apply(initialize).train()

    def maps(self, images):
        """[feature map of conv1, ..., of conv5], pooled where the network pools."""
        maps = []
        for block in self.blocks:
            maps.append(block(maps[-1] if maps else images))
        return maps

    def forward(self, patches):
        return self.fc6(self.maps(patches)[-1])


class RelativePositionNet(nn.Module):
    """Two embeddings (N,D) -> scores (N,8) of the second patch's place around the first: late fusion by concatenation (Fig. 3).

    one_patch: the first embedding is hidden, for the audit.
    """

    def __init__(self, encoder, units=4096, one_patch=False):
        super().__init__()
        self.encoder, self.one_patch = encoder, one_patch
        self.head = nn.Sequential(
            nn.Linear(2 * encoder.dimension, units, bias=False), nn.BatchNorm1d(units, affine=False), nn.ReLU(),
            nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 8))
        self.head.apply(initialize)

    def forward(self, first, second):
        return self.head(torch.cat([torch.zeros_like(first) if self.one_patch else first, second], 1))


def initialize(layer):
    """Xavier initialisation (official code)."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# Objective
def position_loss(scores, positions):
    """Mean cross-entropy over all pairs and the share told right."""
    return {"loss": F.cross_entropy(scores.float(), positions), "accuracy": (scores.argmax(1) == positions).float().mean()}


def optimizer_of(config, parameters, rate):
    return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=config.weight_decay,
                           nesterov=config.momentum > 0)


# Pre-training.  Of `run` (replicate/trainer.py): fit loops over "set the rate, take objective(batch, step), step the
# optimiser"; shuffled gives endless shuffled batches; augment calls a function with generators fixed by seed, purpose and step;
# wanted says which rows are still to do; record writes a result; measure times an evaluation.
def settings_of(config, variant):
    """The config with what an audit's variant changes."""
    return dataclasses.replace(config, **VARIANTS[variant])


def build(run, config):
    """The untrained network: the same weights for every user of the seed."""
    run.seed_global("init")
    encoder = PatchEncoder(config.network, config.width, config.patch)
    units = max(8, round(NETWORKS[config.network][2] * config.width))
    return RelativePositionNet(encoder, units, config.one_patch).to(run.device, memory_format=torch.channels_last)


def patches_of(images, config, matrices, generator):
    """(N,3,S,S) uint8 -> (N,9,3,p,p), ready for the network."""
    images, gap = images.float() / 255, config.gap
    images = frozen.add_fringes(images, config.fringe) if config.fringe else images
    if config.touching:
        side = round(images.shape[-1] * 3 * config.patch / (3 * config.patch + 2 * gap))
        images, gap = F.interpolate(images, (side, side), mode="bilinear", antialias=True), 0
    patches, _ = cut_patches(images, config.patch, gap, config.jitter, generator)
    return prepare(patches, config, matrices, generator)


def embed(model, patches):
    """(N,9,3,p,p) -> (N,9,D): each patch by itself, all at once."""
    flat = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return model.encoder(flat).to(patches.dtype).unflatten(0, patches.shape[:2])  # sums over pairs, on the way back, in float32


def pretrain(run, data, config, epochs, purpose):
    """-> (network, seconds): trained to place patches; config is the run's or that of one of the audit's VARIANTS."""
    model, matrices = build(run, config), pixelation_matrices(config.patch).to(run.device)

    def objective(batch, step):
        images, _ = batch  # the class labels stay unused
        patches = run.augment(lambda part, generator: patches_of(part, config, matrices, generator), images, "augment", step)
        first, second, positions = pairs_with_centre(embed(model, patches), not config.one_patch)
        return position_loss(model(first, second), positions)

    seconds = run.fit(
        purpose, model, objective, run.shuffled(data.unlabeled, config.batch_size, "pretext"),
        steps=trainer.updates(epochs, data.unlabeled, config.batch_size),
        optimizer=optimizer_of(config, model.parameters(), config.pretext_rate),
        learning_rate=trainer.cosine(config.pretext_rate, config.warmup), images_per_step=config.batch_size, chance=math.log(8))
    return model, seconds


# Evaluation
def position_accuracy(run, model, config, test):
    """Percent of the pairs of test images whose position is told right; patches are drawn once, as in training."""
    hits, count, matrices = 0, 0, pixelation_matrices(config.patch).to(run.device)
    model.eval()
    with torch.no_grad():
        for number, (images, _) in enumerate(test.batches(torch.arange(len(test)).split(250))):
            patches = patches_of(images, config, matrices, run.stream("test patches", number, run.device))
            with run.autocast():
                first, second, positions = pairs_with_centre(embed(model, patches), not config.one_patch)
                hits += int((model(first, second).argmax(1) == positions).sum())
            count += len(positions)
    return 100.0 * hits / count


def frozen_maps(run, encoder, config, split):
    """maps(images) of all layers of a frozen encoder, for the plain probes; its batch-norm statistics are those of the split."""
    encoder = copy.deepcopy(encoder)

    def maps(images):
        with run.autocast():
            return encoder.maps(whole(images, config))
    frozen.recalibrate(encoder, maps, split)
    return maps


def classify(run, row, encoder, data, rate, epochs):
    """Train an encoder's convolutions and a linear layer on the labels that the row names -> (classifier, steps, seconds)."""
    config, model = run.config, frozen.Classifier(copy.deepcopy(encoder), data.classes)
    model.to(run.device, memory_format=torch.channels_last)
    return model, *frozen.train_on_labels(
        run, row, model, data, prepare=lambda images: whole(images, config), epochs=epochs,
        batch_size=min(config.batch_size, 64), optimizer=optimizer_of(config, model.parameters(), rate),
        learning_rate=trainer.cosine(rate, config.warmup))


def random_patches(config, images, generator):
    """(n,3,S,S) uint8 -> (n,3,p,p) in 0..1: a random patch of each image."""
    return cut_patches(images.float() / 255, config.patch, 0, 0, generator)[0][:, 4]


def query_patches(run, test, count=2000):
    """(patches (n,3,p,p) in 0..1, labels (n,)): a random patch of each of `count` test images, spread over the set."""
    images, labels = next(test.batches([torch.linspace(0, len(test) - 1, min(count, len(test))).long()]))
    return random_patches(run.config, images, run.stream("retrieval", 0, run.device)), labels


def unit_features(run, encoder, patches, train):
    """(n,3,p,p) in 0..1 -> (n,D): conv5 of each patch less its mean over all patches, of length 1; the encoder's batch-norm
    statistics are those of patches of the split `train`."""
    config, encoder = run.config, copy.deepcopy(encoder)

    def features(patches):
        patches = project_green_magenta(patches) if config.colors == "projection" else patches
        with run.autocast():
            return encoder.maps(normalize_contrast(patches).contiguous(memory_format=torch.channels_last))[-1].flatten(1).float()

    frozen.recalibrate(encoder, lambda images: features(random_patches(config, images, run.stream("retrieval", 1, run.device))), train)
    with torch.no_grad():
        found = torch.cat([features(part) for part in patches.split(250)])
    return F.normalize(found - found.mean(0), dim=1)


def retrieval(run, encoder, train, test):
    """Percent of the ten nearest patches, of other test images, whose image has the query's class."""
    patches, labels = query_patches(run, test)
    features = unit_features(run, encoder, patches, train)
    similarity = (features @ features.T).fill_diagonal_(-2)
    nearest = similarity.topk(min(10, len(labels) - 1), dim=1).indices
    return 100 * float((labels[nearest] == labels[:, None]).float().mean())


def evaluate(run, data):
    """Every row of the scale that is not recorded yet; controls and baselines get the same probes as context."""
    config, networks = run.config, {}

    def network(name):
        """(module with an .encoder, seconds): "context", "random", "supervised" or a variant of the audit."""
        if name not in networks:
            if name == "random":
                networks[name] = build(run, config), 0.0
            elif name == "supervised":
                model, _, seconds = classify(run, name, build(run, config).encoder, data, config.supervised_rate,
                                             config.supervised_epochs)
                networks[name] = model, seconds
            elif name == "context":
                networks[name] = pretrain(run, data, config, config.pretext_epochs, name)
            else:
                networks[name] = pretrain(run, data, settings_of(config, name), config.audit_epochs, f"audit/{name}")
        return networks[name]

    def pretext(row, name, settings, epochs, phase):
        frozen.record_measure(run, row, lambda: network(name),
                              lambda model, test: position_accuracy(run, model, settings, test), data.test,
                              steps=trainer.updates(epochs, data.unlabeled, config.batch_size), phase=phase)

    def probes(prefix, name, settings):
        """All plain probes of one network."""
        def maps():
            model, seconds = network(name)
            return frozen_maps(run, model.encoder, settings, data.train), seconds
        frozen.record_probes(run, frozen.probe_rows(PAPER, prefix), maps, data, config.probe_cells)

    def classifier(row, start, rate, epochs):
        """Trained on labels from the untrained network or from context's."""
        model, before = network(start)
        model, steps, seconds = classify(run, row, model.encoder, data, rate, epochs)
        return model, steps, before + seconds

    pretext("context/position-accuracy", "context", config, config.pretext_epochs, "context")
    for name in ("context", "random", "supervised"):
        probes(name, name, config)
        frozen.record_measure(run, f"{name}/retrieval", lambda: network(name),
                              lambda model, test: retrieval(run, model.encoder, data.train, test), data.test)
    for name, start, rate in (("supervised", "random", config.supervised_rate),
                              ("context/finetuned", "context", config.finetune_rate)):
        for row in (name, *(f"{name}/labels{count}" for count in LABELS)):
            epochs = config.supervised_epochs if row == name else config.label_epochs
            frozen.record_accuracy(run, row, lambda: classifier(row, start, rate, epochs),
                                   lambda images: whole(images, config), data)
    shown = ("context", "random", "supervised")
    if run.seed == 0 and not run.plan and networks and all(run.value(f"{name}/retrieval") is not None for name in shown):
        encoders = {name: network(name)[0].encoder for name in shown}  # those that an earlier start has trained are read
        if run.rank == 0:
            figures(run, encoders, data)
    for variant in VARIANTS:
        settings = settings_of(config, variant)
        pretext(f"audit/{variant}/position-accuracy", variant, settings, config.audit_epochs, f"audit/{variant}")
        probes(f"audit/{variant}", variant, settings)


def figures(run, encoders, data):
    """First-layer filters; for six patches of test images the six nearest others by context, random and supervised features,
    side by side (the paper's figure of nearest neighbours)."""
    filters = encoders["context"].blocks[0][0].weight.detach().float().contiguous()
    save_image(F.interpolate(filters, scale_factor=6), run.suite / f"{run.paper}_filters.png", nrow=16, normalize=True,
               scale_each=True)
    patches, _ = query_patches(run, data.test)
    queries = torch.linspace(0, len(patches) - 1, 6).long()
    panels = []
    for encoder in encoders.values():
        features = unit_features(run, encoder, patches, data.train)
        order = (features[queries.to(features.device)] @ features.T).topk(min(7, len(patches)), dim=1).indices  # the query first
        panels.append(make_grid(patches[order.flatten()].cpu(), nrow=order.shape[1], padding=1, pad_value=1.0))
    save_image(F.interpolate(make_grid(panels, padding=6, pad_value=1.0)[None], scale_factor=2),
               run.suite / f"{run.paper}_neighbours.png")


def reproduce(run):
    """Everything of one seed."""
    evaluate(run, load_data(run))


def main(arguments=None):
    """Command line; returns the exit status."""
    return trainer.launch(__file__, Config, list(PAPER), reproduce, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
