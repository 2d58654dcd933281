"""Zhang, Isola, Efros (ECCV 2016): Colorful Image Colorization.  arXiv 1603.08511.

Claim: to colour a grey photograph, a network has to know what it shows; so its features are useful.
Method: the network sees the lightness L of an image in CIE Lab and predicts, for every fourth pixel
on both axes, a distribution over 313 colours (a, b): corners of 10 x 10 cells of the ab plane that
a screen's colours reach.  The target spreads each true colour over its five nearest of these.  Most
pixels of photographs are greyish, so a pixel's loss is weighted by the rarity of its colour.  The
colour shown is the annealed mean: a temperature sharpens the distribution, and its mean is taken.
Variants: no rebalancing ("class"), and regression of (a, b) under squared error, which averages
over all that could be ("l2", and "l2-finetuned", begun from the full network).
Official code: resources/caffe_traininglayers.py of github.com/richzhang/colorization/tree/815b3f7
(L46: encoding; L81: weights; L115: grey images, judged on every fourth pixel as here).
Deviations from the paper
 1. Scale small: images of 80 pixels, a narrower network of one convolution a block, less training:
    claims are comparable, values are not.  Scale full: images of 128 pixels.
 2. He initialisation, inputs divided by 50, last layer zero; paper: from data, by k-means.  Scale
    paper divides each convolution's weights by the deviation of its outputs on a batch, no k-means.
 3. Scales small and full: Adam at 1e-3, not 3.16e-5, warm-up and cosine; decay 1e-4, not 1e-3.
 4. Each true colour is spread over 5 neighbours as in the paper; the released code takes 10.
 5. The prior is counted on at most 10,000 training images, from 1 for each colour, and smoothed.
 6. Predictions are enlarged so that each lies on the pixel whose colour it was trained to predict.
 7. Images without colours, which do not teach in the released code, do not count at test, either.
 8. Beside the rebalanced measure, whose weights have no limit, one with the weights of training.
 9. Semantic test: our own network, trained on L, a, b of this data set, in place of VGG-16.
10. AlexNet (scale paper): crops, batch, schedule and target grid of the main network, no k-means.
11. Linear probes: logistic regression on maps of at most 4 x 4 cells (scale paper 2 x 2), with new
    batch-norm statistics; paper: 9,000 features, crops, SGD.  Block 4 was chosen beforehand.
12. Multiplications in bfloat16; parameters, colours, losses and the fitting of probes in float32.
13. Left out: human judges (AMT), PASCAL VOC, Places.
Run:  python -m papers.zhang_colorization --scale small (Imagenette, two CPU cores: 55 min a seed)
      python -m papers.zhang_colorization --colorize IN OUT        (a picture, or a folder of them)
Result, small: full/auc-rebalanced 60.7 +- 0.3 against grey/auc-rebalanced 55.0 (n = 3); paper, full
training: 67.3
"""
import contextlib
import itertools
import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from replicate import evaluate, outputs, trainer
from replicate.launch import launch, pick_device, require_finite, require_whole
from replicate.outputs import save_image


@dataclass
class Config:
    seed: int
    dataset: str = "imagenette"
    image_size: int = 128               # ours: paper 256
    crop_size: int = 96                 # ours: official code 176
    streamed: bool = False              # decode files on the fly, keep none on the device
    network: Literal["paper", "small", "alexnet"] = "paper"     # "small", ours: a layer a block
    width: float = 1.0                  # channels, as a fraction of the network's
    rescaled: bool = False              # ours: start with every convolution scaled by the data
    step: int = 10                      # Sec. 2.1: side of a cell of the ab plane
    neighbors: int = 5                  # Sec. 2.1; official code 10
    sigma: float = 5.0                  # Sec. 2.1, of targets, and 2.2, of the prior
    mix: float = 0.5                    # Sec. 2.2: lambda; 1: no rebalancing, 0: 1 / prior
    loss: Literal["classification", "l2"] = "classification"    # Eq. 2 or Eq. 1
    temperature: float = 0.38           # Sec. 2.3
    batch_size: int = 64                # ours: official code 40
    pretext_epochs: float = 100.0       # ours
    pretext_rate: float = 0.001         # ours: paper 3.16e-5
    pretext_drops: tuple[float, ...] = ()   # paper: shares of the run, by sqrt(10); none: cosine
    finetuning_epochs: float = 25.0     # ours: of L2 from the full network
    supervised_epochs: float = 60.0     # ours: with all labels, from scratch and fine-tuned
    label_steps: int = 1500             # ours: updates on few labels, however few
    supervised_rate: float = 0.002      # ours: from scratch and of fine-tuning
    warmup: float = 0.05                # ours: share of the steps
    momentum: float = 0.9               # official code: Adam's first beta
    second_momentum: float = 0.99       # official code: Adam's second beta
    weight_decay: float = 1e-4          # ours: official code 1e-3
    probe_cells: int = 4                # ours: linear probes see maps of at most 4 x 4
    precision: Literal["bfloat16", "float32"] = "bfloat16"      # ours
    deterministic: bool = True          # ours
    shards: int = 1                     # ours: parts of a batch, divided among GPUs

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in ("width", "neighbors", "sigma", "temperature", "probe_cells"):
                assert value > 0, f"{name} must be above 0, not {value}"
            if name in ("mix", "warmup"):
                assert value <= 1, f"{name} is a share, at most 1, not {value}"
            if name in ("image_size", "crop_size"):
                assert value % 16 == 0 < value, f"{name} must be a multiple of 16, not {value}"
        assert self.crop_size <= self.image_size, (
            f"image_size {self.image_size}: crops of {self.crop_size} pixels do not fit")
        assert self.second_momentum < 1, f"second_momentum {self.second_momentum}: must be below 1"
        assert 4 <= self.step <= 40, (f"step must be 4 to 40, not {self.step}: finer cells give "
                                      "thousands of colours, coarser ones too few")
        assert self.neighbors <= 20, f"neighbors {self.neighbors}: at most 20 of the colours"


# ---- The idea: a colour is a distribution over a few hundred ----

STRIDE = 4  # the network predicts the colour of every fourth pixel on both axes
NETWORKS = ("paper", "small", "alexnet")  # as numbered in checkpoints


def gamut_bins(step=10):
    """(Q,2) float32, a then b rising: corners of step x step cells of the ab plane.  Those cells
    count that overlap the convex hull of all sRGB colours (Sec. 2.1); step 10 gives the 313."""
    level = torch.arange(0, 256, 5, dtype=torch.float64) / 255
    cube = torch.cartesian_prod(level, level, level)
    surface = cube[((cube == 0) | (cube == 1)).any(1)]  # the hull's corners are among these
    points = rgb_to_lab(surface[:, :, None, None])[:, 1:, 0, 0]
    angle = torch.linspace(0, 2 * math.pi, 1801, dtype=torch.float64)[:-1]  # 1,800 directions
    normals = torch.stack([angle.cos(), angle.sin()], 1)  # (1800, 2)
    extent = torch.cat([(points @ part.T).max(0).values for part in normals.split(100)])
    ticks = step * torch.arange(math.floor(-128 / step), math.ceil(128 / step), dtype=torch.float64)
    offsets = step * torch.cartesian_prod(torch.arange(2), torch.arange(2))
    cells = torch.cartesian_prod(ticks, ticks)[:, None] + offsets  # (M, 4, 2), their corners
    overlaps = ((cells @ normals.T).min(1).values < extent - 1e-9).all(1)  # no line parts the two
    return cells[overlaps].flatten(0, 1).unique(dim=0).float()


def neighbor_shares(ab, bins, neighbors=5, sigma=5.0, candidates=None):
    """(N,2,H,W) -> indices (N,H,W,k) of the nearest of bins (Q,2), the nearest first, and the share
    (N,H,W,k) of each in the colour, in proportion to exp(-d^2 / 2 sigma^2) (Sec. 2.1)."""
    squares, nearest = nearest_bins(ab, bins, neighbors, candidates)
    return nearest, torch.softmax(-squares / (2 * sigma ** 2), 3)


def soft_encode(ab, bins, neighbors=5, sigma=5.0):
    """(N,2,H,W) -> (N,Q,H,W): the same over all bins, most of them 0 (used by tests only)."""
    nearest, shares = neighbor_shares(ab, bins, neighbors, sigma)
    encoded = torch.zeros(*shares.shape[:3], len(bins), device=ab.device)
    return encoded.scatter_(3, nearest, shares).permute(0, 3, 1, 2)


def annealed_mean(logits, bins, temperature=0.38):
    """(N,Q,H,W) -> (N,2,H,W): mean of the distribution sharpened by the temperature (Eq. 5)."""
    return torch.einsum("nqhw,qc->nchw", torch.softmax(logits / temperature, 1), bins)


def rebalancing_weights(prior, mix=0.5):
    """(Q,) -> (Q,): 1 / ((1 - mix) prior + mix / Q), of mean 1 over the prior (Eq. 4)."""
    weights = 1 / ((1 - mix) * prior + mix / len(prior)).clamp_min(1e-12)
    return weights / (prior * weights).sum()


def is_colored(ab):
    """(N,2,H,W) -> (N,) bool: some |a| or |b| is above 5.  Others do not teach (official code)."""
    return (ab.abs() > 5).flatten(1).any(1)


@dataclass
class Palette:
    bins: torch.Tensor          # (Q,2): the colours that the network tells apart
    candidates: torch.Tensor    # candidate_bins: where to look for a colour's nearest bins
    prior: torch.Tensor         # (Q,): how frequent each bin is in training images


def make_palette(run, split):
    """The Palette of a run.  The prior counts the bin nearest to every fourth pixel of training
    images, and is smoothed by a Gaussian in the ab plane (Sec. 2.2)."""
    bins = gamut_bins(run.config.step).to(run.device)
    candidates = candidate_bins(bins, run.config.neighbors)
    counts = torch.ones(len(bins), dtype=torch.int64, device=run.device)  # no frequency is 0
    chosen = torch.linspace(0, len(split) - 1, min(len(split), 10000)).long()
    for images, _ in split.batches(chosen.split(250)):
        ab = rgb_to_lab(images[..., ::STRIDE, ::STRIDE])[:, 1:]
        _, nearest = nearest_bins(ab[is_colored(ab)], bins, 1, candidates)
        counts += nearest.flatten().bincount(minlength=len(bins))
    if int(counts.sum()) == len(bins):
        raise trainer.InputError(f"all images of '{run.config.dataset}' are grey: nothing to learn")
    kernel = torch.exp(-torch.cdist(bins, bins).square() / (2 * run.config.sigma ** 2))
    prior = (kernel / kernel.sum(0)) @ (counts / counts.sum())
    return Palette(bins, candidates, prior / prior.sum())


def make_examples(images, generator, config, palette, bin_weights):
    """(N,3,S,S) uint8, weights (Q,) of the bins -> lightness less 50 (N,1,s,s), that the network
    sees; for every fourth pixel colour (N,2,h,w), its nearest bins (N,h,w,k), their shares in it
    (N,h,w,k), its weight in the loss (N,h,w): the first bin's, or 0 in images without colours."""
    crops = crop_and_flip(images, generator, config.crop_size)
    ab = rgb_to_lab(crops[..., ::STRIDE, ::STRIDE])[:, 1:]
    nearest, shares = neighbor_shares(ab, palette.bins, config.neighbors, config.sigma,
                                      palette.candidates)
    weights = bin_weights[nearest[..., 0]] * is_colored(ab)[:, None, None]
    return lightness(crops) - 50, ab, nearest, shares, weights


# ---- Network ----

def convolutions(count, inputs, outputs, stride=1, dilation=1):
    """3 x 3 convolutions and ReLUs, the stride in the last; batch-norm without scale and shift."""
    layers = []
    for number in range(1, count + 1):
        own_stride = stride if number == count else 1
        layers += [nn.Conv2d(inputs, outputs, 3, own_stride, dilation, dilation), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs, affine=False))


def main_network(width, inputs, outputs, two=2, three=3):
    """[block 1, ..., block 7], the head (block 8 and the scores), and the channels of block 7.
    two, three: how many convolutions the blocks have that have two, or three, in the paper."""
    c64, c128, c256, c512 = (max(8, 2 * round(c * width / 2)) for c in (64, 128, 256, 512))
    blocks = [convolutions(two, inputs, c64, stride=2),       # 1/2 of the image's side
              convolutions(two, c64, c128, stride=2),         # 1/4
              convolutions(three, c128, c256, stride=2),      # 1/8, as all that follow
              convolutions(three, c256, c512),
              convolutions(three, c512, c512, dilation=2),
              convolutions(three, c512, c512, dilation=2),
              convolutions(three, c512, c512)]
    block8 = [nn.ConvTranspose2d(c512, c256, 4, 2, 1), nn.ReLU()]  # 1/4
    for _ in range(two):
        block8 += [nn.Conv2d(c256, c256, 3, padding=1), nn.ReLU()]
    return blocks, nn.Sequential(*block8, nn.Conv2d(c256, outputs, 1)), c512


class ColorizationNetwork(nn.Module):
    """Lightness less 50 (N,1,H,W) -> scores (N,Q,H/4,W/4) of the bins (Q,2); with loss "l2" colours
    / 10 (N,2,H/4,W/4).  inputs: 3 for a control that sees L, a, b."""

    def __init__(self, network="paper", width=1.0, bins=None, loss="classification", inputs=1,
                 image_size=256):
        super().__init__()
        self.register_buffer("bins", gamut_bins() if bins is None else bins.clone())
        self.register_buffer("architecture", torch.tensor(  # from which load_colorizer builds it
            [NETWORKS.index(network), width, loss == "l2", image_size]))
        outputs = 2 if loss == "l2" else len(self.bins)
        if network == "alexnet":
            blocks, self.head, self.channels = alexnet(width, inputs, outputs)
        else:
            counts = (2, 3) if network == "paper" else (1, 1)
            blocks, self.head, self.channels = main_network(width, inputs, outputs, *counts)
        self.blocks = nn.ModuleList(blocks)
        self.apply(initialize)
        last = [layer for layer in self.head if isinstance(layer, nn.Conv2d)][-1]
        nn.init.zeros_(last.weight)  # all colours start equally likely

    def maps(self, images):
        """[feature map of block 1, of block 2, ...]"""
        maps = [images / 50]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    def forward(self, lightness):
        return self.head(self.maps(lightness)[-1])


def initialize(layer):
    """He initialisation; double in transposed ones, whose outputs see a quarter of the kernel."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        transposed = isinstance(layer, nn.ConvTranspose2d)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out" if transposed else "fan_in",
                                nonlinearity="relu").data.mul_(2 if transposed else 1)
        nn.init.zeros_(layer.bias)


# ---- Objective ----

def classification_loss(scores, nearest, shares, weights):
    """Scores (N,Q,h,w), bins and shares (N,h,w,k) as neighbor_shares gives them, weights (N,h,w) ->
    cross-entropy with these soft targets, each pixel times its weight (Eq. 2), and its unweighted
    mean over the pixels with a weight."""
    logs = scores.permute(0, 2, 3, 1).float().log_softmax(3)  # (N, h, w, Q)
    entropies = -(logs.gather(3, nearest) * shares).sum(3)  # the other bins have no share
    taught = (weights > 0).float()
    return {"loss": (weights * entropies).mean(),
            "cross_entropy": (taught * entropies).sum() / taught.sum().clamp_min(1)}


def regression_loss(predicted, ab, weights):
    """Half the squared error (Eq. 1) of colours (N,2,h,w), predicted in tens; weights (N,h,w)."""
    return {"loss": 0.5 * (weights * (predicted.float() - ab / 10).square().sum(1)).mean()}


def make_optimizer(config, model):
    """Adam; run.fit sets the learning rate at every step."""
    return torch.optim.Adam(model.parameters(), betas=(config.momentum, config.second_momentum),
                            weight_decay=config.weight_decay, fused=True)


# ---- Pre-training ----

VARIANTS = {  # of the network: name -> settings that differ from the run's
    "full": {}, "class": {"mix": 1.0}, "l2": {"loss": "l2"}, "l2-finetuned": {"loss": "l2"},
    "alexnet": {"network": "alexnet"}}


def pretrain(run, data, config, name, palette, start=None):
    """-> Trained ColorizationNetwork.  config: that of one of the VARIANTS; start: a network that
    is trained further, if it is not a new one."""
    model = run.build(ColorizationNetwork, config.network, config.width, palette.bins, config.loss,
                      1, config.image_size)
    examples = partial(make_examples, config=config, palette=palette,
                       bin_weights=rebalancing_weights(palette.prior, config.mix))
    if start:  # all but the last layer, which puts out something else
        model.blocks.load_state_dict(start.blocks.state_dict())
        model.head[:-1].load_state_dict(start.head[:-1].state_dict())
    elif config.rescaled:  # by the same images on every rank
        images, _ = next(evaluate.in_order(data.unlabeled, config.batch_size))
        rescale(model, examples(images, run.stream("rescale", 0, run.device))[0])

    def loss(batch, step):
        images, _ = batch  # the class labels stay unused
        seen, ab, *targets, weights = run.augment(examples, images, "augment", step)
        scores = model(seen.contiguous(memory_format=torch.channels_last))
        if config.loss == "l2":
            return regression_loss(scores, ab, (weights > 0).float())
        return classification_loss(scores, *targets, weights)

    rate = trainer.cosine(config.pretext_rate, config.warmup)
    if config.pretext_drops:
        rate = trainer.stepped(config.pretext_rate, config.pretext_drops, 10 ** -0.5)
    epochs = config.finetuning_epochs if start else config.pretext_epochs
    return run.fit(name, model, loss, run.shuffled(data.unlabeled, config.batch_size, "pretext"),
                   steps=trainer.steps_in(config, epochs, data.unlabeled),
                   optimizer=make_optimizer(config, model), rate=rate,
                   chance=None if config.loss == "l2" else math.log(len(palette.bins)))


# ---- Evaluation ----

# A colorizer is a function: pictures (N,3,H,W) in Lab -> their colours (a, b), (N,2,H,W).
CONTROLS = ("truth", "grey", "random-colors", "centre")     # without a network
FIGURED = ("l2", "class", "full")   # side by side in a figure, which waits for all three


@torch.no_grad()
def network_scores(autocast, model, lab):
    """What a network puts out for pictures (N,3,H,W) in Lab, of which it sees L: float32."""
    with autocast():
        seen = (lab[:, :1] - 50).contiguous(memory_format=torch.channels_last)
        return model.eval()(seen).float()


def network_colors(autocast, model, temperature, lab, size=None):
    """A network's colorizer, less the first three arguments; size: colours' (rows, columns)."""
    scores = network_scores(autocast, model, lab)
    with torch.autocast(lab.device.type, enabled=False):  # bfloat16 would be a level off
        ab = 10 * scores if scores.shape[1] == 2 else annealed_mean(scores, model.bins, temperature)
        return enlarge(ab, lab.shape[-2:], size or lab.shape[-2:])


def control_colors(name, palette, others, lab):
    """A control's colorizer, less the first three; others: batches of random training images."""
    if name == "random-colors":
        return rgb_to_lab(next(others)[0][:len(lab)])[:, 1:]
    if name == "truth":
        return lab[:, 1:]
    color = palette.bins.mean(0) if name == "centre" else torch.zeros_like(palette.bins[0])
    return color.view(1, 2, 1, 1).expand_as(lab[:, 1:])


def make_colorizer(run, data, palette, name, model):
    """The colorizer of a network, or of the control `name` where there is none."""
    if model:
        return partial(network_colors, run.autocast, model, run.config.temperature)
    draws = run.stream("random colors")
    others = data.train.batches(torch.randint(len(data.train), (100,), generator=draws)
                                for _ in itertools.count())
    return partial(control_colors, name, palette, others)


def color_auc(predicted_ab, true_ab, weights=None):
    """Share of pixels whose (a, b) is less than t off, averaged over t from 0 to 150, which equals
    1 - mean(min(error, 150)) / 150.  (N,2,H,W) both, weights (N,H,W) or None -> 0..1."""
    error = (predicted_ab - true_ab).square().sum(1).sqrt().clamp_max(150)
    weights = torch.ones_like(error) if weights is None else weights
    return 1 - float((weights.double() * error.double()).sum() / (150 * weights.double().sum()))


def colored_pictures(test):
    """Yield the test images that have colours, in Lab (N,3,H,W), batch by batch."""
    pictures = (rgb_to_lab(images) for images, _ in evaluate.in_order(test, 100))
    yield from filter(len, (lab[is_colored(lab[:, 1:])] for lab in pictures))


def color_measures(name, colorizer, palette, test):
    """{name/auc-raw, name/auc-rebalanced, name/auc-bounded: percent, name/chroma-ratio: chroma over
    the true one} of a colorizer.  Rebalanced: a pixel counts by the rarity of its colour in train
    images, without limit; bounded: by its weight in training, at most Q + 1 times another's."""
    weigh_by = {f"{name}/auc-{kind}": rebalancing_weights(palette.prior, mix) for kind, mix in
                (("raw", 1.0), ("rebalanced", 0.0), ("bounded", 0.5))}  # mix 1: all 1, 0: 1 / prior
    sums = {row: torch.zeros(2, dtype=torch.float64) for row in (*weigh_by, f"{name}/chroma-ratio")}
    for lab in colored_pictures(test):
        true_ab, ab = lab[:, 1:], colorizer(lab)
        _, nearest = nearest_bins(true_ab, palette.bins, 1, palette.candidates)
        for row in weigh_by:
            weights = weigh_by[row][nearest[..., 0]]  # (N, H, W)
            total = float(weights.double().sum())
            sums[row] += torch.tensor([100 * total * color_auc(ab, true_ab, weights), total])
        sums[f"{name}/chroma-ratio"] += torch.tensor(
            [float(colors.square().sum(1).sqrt().double().sum()) for colors in (ab, true_ab)])
    return {row: float(value / count) for row, (value, count) in sums.items()}


def recolor(images, colorizer):
    """(N,3,H,W) uint8 -> the same lightness in other colours, as uint8 (N,3,H,W)."""
    lab = rgb_to_lab(images)
    return (lab_to_rgb(torch.cat([lab[:, :1], colorizer(lab)], 1)) * 255).round().byte()


def network_input(images, model):
    """Whole images (N,3,S,S) uint8 as a network sees them: L less 50, and a, b if it takes them."""
    grey = model.blocks[0][0].in_channels == 1
    seen = lightness(images) if grey else rgb_to_lab(images)
    seen[:, 0] -= 50
    return seen.contiguous(memory_format=torch.channels_last)


def semantic_accuracy(run, classifier, colorizer, test):
    """Percent of recoloured test images whose class a classifier of colour images names."""
    classifier.eval()
    with run.autocast():
        return evaluate.accuracies(lambda images: {"class": classifier(
            network_input(recolor(images, colorizer), classifier.encoder))}, test, 100)["class"]


def block_maps(run, model, images):
    """[feature map of block 1, of block 2, ...] of whole images."""
    with run.autocast():
        return model.maps(network_input(images, model))


def probe_blocks(run, model, rows, train, test):
    """{row: accuracy} of rows <network>/block<number>/<linear or labels<number a class>>."""
    maps = partial(block_maps, run, model)
    evaluate.recalibrate(model, maps, train)  # the random network has no statistics of its own
    with evaluate.frozen(model):
        return evaluate.probe(maps, evaluate.blocks_and_kinds(rows), train, test,
                              run.config.probe_cells, run.seed)


def fit_classifier(run, data, row, model):
    """-> Trained: the model's blocks and a linear layer, on the labels that a row may use."""
    config, labels = run.config, evaluate.labels_of(row)
    model.head.requires_grad_(False)  # not in use
    classifier = evaluate.Classifier(model, data.classes).to(run.device)
    steps = config.label_steps if labels else trainer.steps_in(
        config, config.supervised_epochs, data.train)
    return evaluate.train_on_labels(
        run, data, row, classifier, partial(network_input, model=model), labels,
        batch_size=config.batch_size, steps=steps, optimizer=make_optimizer(config, classifier),
        rate=trainer.cosine(config.supervised_rate, config.warmup), chance=math.log(data.classes))


def network(run, data, palette, name):
    """-> Trained: one of the VARIANTS; "random", or "alexnet-random" with alexnet's settings; the
    classifier for the row of that name; or, without a model, one of the CONTROLS."""
    if name in CONTROLS:
        return trainer.Trained(None)
    config = replace(run.config, **VARIANTS.get(name.removesuffix("-random"), {}))
    if name in VARIANTS:
        start = network(run, data, palette, "full").model if name == "l2-finetuned" else None
        return pretrain(run, data, config, name, palette, start)
    if name.startswith("full/finetuned"):
        return fit_classifier(run, data, name, network(run, data, palette, "full").model)
    model = run.build(ColorizationNetwork, config.network, config.width, palette.bins, config.loss,
                      3 if name.startswith("supervised-color") else 1, config.image_size)
    untrained = name in ("random", "alexnet-random")
    return trainer.Trained(model) if untrained else fit_classifier(run, data, name, model)


def trainings(run, data, palette, name):
    """-> [Trained, ...]: the network of that name, and before it what it begins from."""
    first = ["full"] if name.startswith(("l2-finetuned", "full/finetuned")) else []
    return [network(run, data, palette, each) for each in (*first, name)]


def load_images(run):
    """The run's images; InputError where they have no colours or another size."""
    config = run.config
    data = run.load(config.dataset, config.image_size, config.streamed or None)
    channels, side = next(evaluate.in_order(data.test, 1))[0].shape[1:3]
    if channels != 3 or side % 16:
        raise trainer.InputError(
            f"dataset '{config.dataset}' has {channels} colour channel(s) and {side} pixels a "
            "side, but 3 and a multiple of 16 are needed, since colours are what is predicted: "
            "--set dataset=cifar10 --set image_size=32 --set crop_size=32")
    if side != config.image_size:
        raise trainer.InputError(f"images of '{config.dataset}' have {side} pixels: --set "
                                 f"image_size={side} --set crop_size={min(side, config.crop_size)}")
    if next(colored_pictures(data.test), None) is None:
        raise trainer.InputError("all test images are grey: there are no colours to compare with")
    return data


def reproduce(run):
    """Every row of one seed; what several rows share is trained once, then read from its file."""
    data = load_images(run)
    palette = make_palette(run, data.unlabeled)
    for name in (*CONTROLS, *VARIANTS):
        if rows := run.wants(f"{name}/auc-*", f"{name}/chroma-ratio"):
            after = trainings(run, data, palette, name)
            colorizer = make_colorizer(run, data, palette, name, after[-1].model)
            others = [f"{one}/auc-rebalanced" for one in FIGURED if one != name]
            if run.seed == run.rank == 0 and len(others) == 2 and all(map(run.value, others)):
                figures(run, data, palette)  # the last of the three is about to be recorded
            measure = partial(color_measures, name, colorizer, palette)
            run.record(rows, measure, data.test, after=after)
        if run.wants(f"{name}/semantic"):
            classifier = network(run, data, palette, "supervised-color")
            after = trainings(run, data, palette, name)
            colorizer = make_colorizer(run, data, palette, name, after[-1].model)
            measure = partial(semantic_accuracy, run, classifier.model, colorizer)
            run.record(f"{name}/semantic", measure, data.test, after=[classifier, *after])
    for name in ("full", "random", "supervised-l", "alexnet", "alexnet-random"):
        if rows := run.wants(f"{name}/block*"):
            trained = network(run, data, palette, name)
            model = getattr(trained.model, "encoder", trained.model)  # a classifier's own network
            measure = partial(probe_blocks, run, model, rows)
            run.record(rows, measure, data.train, data.test, after=[trained])
    for row in run.wants("supervised-color", "supervised-l", "supervised-l/labels*",
                         "full/finetuned*"):
        if not evaluate.enough_labels(data.train.labels, row):
            run.record(row, None)  # leaves the row out
            continue
        after = trainings(run, data, palette, row)
        see = partial(network_input, model=after[-1].model.encoder)
        measure = partial(evaluate.class_accuracy, run, after[-1].model, see)
        run.record(row, measure, data.test, after=after)


# ---- Figures ----

def figures(run, data, palette):
    """Twelve test images in grey, by the networks FIGURED and as they are; six at falling
    temperatures; the bins in the ab plane, brighter the more frequent they are."""
    names = ("grey", *FIGURED, "truth")
    models = {name: network(run, data, palette, name).model for name in names}
    colorizers = [make_colorizer(run, data, palette, name, models[name]) for name in names]
    falling = [partial(network_colors, run.autocast, models["full"], temperature)
               for temperature in (1.0, 0.77, 0.58, 0.38, 0.29, 0.14, 0.01)]
    twelve = torch.linspace(0, len(data.test) - 1, min(12, len(data.test))).long()
    for name, chosen, methods, columns in (("pictures", twelve, colorizers, 10),
                                           ("temperature", twelve[:6], falling, 7)):
        images, _ = next(data.test.batches([chosen]))
        tiles = torch.stack([recolor(images, method) for method in methods], 1).flatten(0, 1) / 255
        save_image(tiles, run.suite / f"{run.paper}_{name}.png", nrow=columns, padding=1)
    bins, frequency = palette.bins.cpu(), palette.prior.cpu().log()[:, None]
    bright = 15 + 75 * (frequency - frequency.min()) / (frequency.max() - frequency.min())
    colors = lab_to_rgb(torch.cat([bright, bins], 1)[:, :, None, None])[:, :, 0, 0]
    panel, step = torch.full((1, 3, *[240 // run.config.step + 1] * 2), 0.5), run.config.step
    panel[0][:, *((bins + 120) / step).round().long().unbind(1)] = colors.T
    save_image(F.interpolate(panel, scale_factor=14), run.suite / f"{run.paper}_bins.png")


# ---- Parts that the method calls: crops, colour arithmetic, AlexNet, rescaling ----

def crop_and_flip(images, generator, size):
    """(N,C,H,W) -> (N,C,size,size): a random crop of each, mirrored in half of the cases."""
    count, device = len(images), images.device
    top, left = ((torch.rand(count, generator=generator, device=device) * (side - size + 1)).long()
                 for side in images.shape[-2:])
    flip = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.5
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view: every square of the image
    crops = windows[torch.arange(count, device=device), :, top, left]
    return torch.where(flip, crops.flip(3), crops)


@lru_cache(maxsize=None)
def xyz_matrices(device, dtype):
    """(3,3) from linear RGB to XYZ, in which white is 1, 1, 1, and (3,3) back."""
    matrix = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
                           [0.019334, 0.119193, 0.950227]], dtype=torch.float64)
    matrix /= torch.tensor([[0.95047], [1.0], [1.08883]], dtype=torch.float64)
    return matrix.to(device, dtype), matrix.inverse().to(device, dtype)


@lru_cache(maxsize=None)
def linear_levels(device):
    """(256,) float32: linear RGB of every byte."""
    return linear_rgb(torch.arange(256, dtype=torch.float64) / 255).float().to(device)


def linear_rgb(rgb):
    """sRGB -> linear RGB, in proportion to light: floats in 0..1 in float64, since colours multiply
    errors; bytes by a table, as float32."""
    if rgb.dtype == torch.uint8:
        return linear_levels(rgb.device).index_select(0, rgb.flatten().int()).view(rgb.shape)
    rgb = rgb.double()
    return torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)


def perceived(xyz):
    """XYZ relative to white -> how strong it looks, 0 to 1: a cube root above a straight line."""
    return torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)


def rgb_to_lab(rgb):
    """(N,3,H,W) sRGB -> CIE Lab under D65: L in 0..100, a and b in about -108..98.  Floats lie in
    0..1; bytes are quicker, and right to 1e-3."""
    linear = linear_rgb(rgb)
    with torch.autocast(rgb.device.type, enabled=False):  # bfloat16 would be off by several a or b
        xyz = torch.einsum("ij,njhw->nihw", xyz_matrices(rgb.device, linear.dtype)[0], linear)
    x, y, z = perceived(xyz).unbind(1)
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    return lab if rgb.dtype == torch.uint8 else lab.to(rgb.dtype)


def lightness(rgb):
    """(N,3,H,W) -> (N,1,H,W): the L of rgb_to_lab, at a third of the cost."""
    linear = linear_rgb(rgb)
    weights = xyz_matrices(rgb.device, linear.dtype)[0][1].view(3, 1, 1)
    return 116 * perceived((linear * weights).sum(1, keepdim=True)) - 16


def lab_to_rgb(lab):
    """(N,3,H,W) CIE Lab -> sRGB in 0..1; colours outside are cut off."""
    lightness, a, b = lab.double().unbind(1)
    y = (lightness + 16) / 116
    roots = torch.stack([y + a / 500, y, y - b / 200], 1)
    xyz = torch.where(roots > 0.2068966, roots ** 3, (roots - 16 / 116) / 7.787)
    linear = torch.einsum("ij,njhw->nihw", xyz_matrices(lab.device, torch.float64)[1], xyz)
    linear = linear.clamp(0, 1)
    rgb = torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.to(lab.dtype)


def candidate_bins(bins, neighbors, cell=2.0):
    """(S,S,C) int64: for every square, `cell` wide, of the ab plane from -128 to 128, C bins among
    which are the nearest `neighbors` of bins (Q,2) of each of its points."""
    ticks = torch.arange(-128 + cell / 2, 128, cell)
    distances, order = torch.cdist(torch.cartesian_prod(ticks, ticks), bins.cpu()).sort(1)
    # Distances from a point and from the square's middle differ by half a diagonal at most.
    reach = distances[:, neighbors - 1:neighbors] + cell * 2 ** 0.5 + 1e-3
    count = int((distances <= reach).sum(1).max())
    return order[:, :count].reshape(len(ticks), len(ticks), count).to(bins.device)


def nearest_bins(ab, bins, neighbors, candidates=None):
    """(N,2,H,W) -> squared distances (N,H,W,k), rising, and indices (N,H,W,k) of the nearest bins.
    candidates: candidate_bins(bins, k or more), which saves most of the work."""
    points = ab.permute(0, 2, 3, 1)  # (N, H, W, 2)
    near = torch.arange(len(bins), device=ab.device).expand(*points.shape[:3], -1)
    if candidates is not None:
        side = len(candidates)
        row, column = ((points + 128) * (side / 256)).long().clamp(0, side - 1).unbind(3)
        near = F.embedding(side * row + column, candidates.flatten(0, 1))  # (N, H, W, C)
    squares = (points.unsqueeze(3) - F.embedding(near, bins)).square().sum(4)  # (N, H, W, C)
    squares, chosen = squares.topk(neighbors, dim=3, largest=False)
    return squares, near.gather(3, chosen)


def enlarge(maps, seen, size):
    """(N,C,h,w), the values of every fourth pixel, from the first on, of a picture of `seen`
    pixels, (rows, columns) -> (N,C,*size), those of all pixels of the same picture at another size.
    Linear, by matrix products, whose backward is deterministic on a GPU."""
    weights = []
    for side, own, count in zip(size, seen, maps.shape[-2:]):
        places = ((torch.arange(side, device=maps.device) + 0.5) * own / side - 0.5) / STRIDE
        places = places.clamp(0, count - 1)[:, None]  # held at the borders
        distances = (places - torch.arange(count, device=maps.device)).abs()
        weights.append((1 - distances).clamp_min(0))
    return weights[0] @ maps @ weights[1].T


class Enlarge(nn.Module):
    def forward(self, maps):  # (N,C,h,w) -> (N,C,4h,4w)
        size = [STRIDE * side for side in maps.shape[-2:]]
        with torch.autocast(maps.device.type, enabled=False):
            return enlarge(maps.float(), size, size)


def normed_conv(*shape, **settings):
    """A convolution, batch-norm without scale and shift, and ReLU."""
    layer = nn.Conv2d(*shape, **settings)
    return layer, nn.BatchNorm2d(layer.out_channels, affine=False), nn.ReLU()


def alexnet(width, inputs, outputs):
    """[conv1, ..., conv5], the head (fc6 to fc8 as convolutions; its scores are enlarged from 1/16
    to 1/4 of the side), and the channels of conv5 (official code, train_alexnet)."""
    c96, c256, c384, c4096 = (max(8, 2 * round(c * width / 2)) for c in (96, 256, 384, 4096))
    blocks = [
        nn.Sequential(*normed_conv(inputs, c96, 11, 4, 5), nn.MaxPool2d(3, 2, 1)),
        nn.Sequential(*normed_conv(c96, c256, 5, 1, 2, groups=2), nn.MaxPool2d(3, 2, 1)),
        nn.Sequential(*normed_conv(c256, c384, 3, 1, 1)),
        nn.Sequential(*normed_conv(c384, c384, 3, 1, 1, groups=2)),
        nn.Sequential(*normed_conv(c384, c256, 3, 1, 1, groups=2))]
    head = nn.Sequential(
        nn.MaxPool2d(3, 1, 1), *normed_conv(c256, c4096, 6, padding=5, dilation=2),
        *normed_conv(c4096, c4096, 1), nn.Conv2d(c4096, outputs, 1), Enlarge())
    return blocks, head, c256


@torch.no_grad()
def rescale(model, lightness):
    """Divide the weights of every convolution by the standard deviation of its outputs on a batch
    (N,1,H,W), channel by channel; the last stays zero (Kraehenbuehl et al. 2016, no k-means)."""
    maps = lightness / 50
    for layer in itertools.chain(*model.blocks, model.head):
        maps = layer(maps)
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and bool(layer.weight.any()):
            deviation = maps.std((0, 2, 3)).clamp_min(1e-3)
            axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0  # of the output channels
            layer.weight.transpose(0, axis).div_(deviation.view(-1, 1, 1, 1))
            maps = maps / deviation.view(1, -1, 1, 1)


# ---- Use ----

def options(parser):
    parser.add_argument("--colorize", nargs=2, metavar=("IN", "OUT"), help="colour a picture, or "
                        "every picture of a folder, and stop; no file is ever overwritten")
    parser.add_argument("--checkpoint", metavar="FILE", help="for --colorize; default: the newest")


def load_colorizer(path, device):
    """(network, side in pixels that it was trained at, whether its training is finished, after how
    many steps) from a checkpoint of pretrain."""
    require_whole(path)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        state, steps, finished = saved["model"], saved.get("step", 0), "optimizer" not in saved
        number, width, regression, side = state["architecture"].tolist()
        model = ColorizationNetwork(NETWORKS[int(number)], width, state["bins"],
                                    "l2" if regression else "classification")
        model.load_state_dict(state, assign=True)
    except Exception as error:  # rubbish can make torch.load raise nearly anything
        raise trainer.InputError(f"{path} is no checkpoint of a colorization network "
                                 f"({type(error).__name__})") from None
    require_finite(path, state)
    model = model.float().to(device, memory_format=torch.channels_last).eval()
    return model, int(side), finished, steps


def colorize(model, picture, side, temperature=0.38):
    """RGB picture -> the same in colour: the network sees it with its shorter side `side` pixels
    long, or shorter if it is; its colours are enlarged, the lightness stays as it was."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image  # takes seconds

    scale = min(1, side / min(picture.size))
    size = [max(16, round(length * scale / 16) * 16) for length in picture.size]
    pixels, small = pil_to_tensor(picture), pil_to_tensor(picture.resize(size, Image.BILINEAR))
    lab = rgb_to_lab(small[None].to(model.bins.device))
    ab = network_colors(contextlib.nullcontext, model, temperature, lab, pixels.shape[-2:])
    for strip, colors in zip(pixels.split(64, 1), ab.split(64, 2)):  # in place, to save memory
        strip[:] = recolor(strip[None].to(ab.device), lambda lab: colors)[0].cpu()
    return to_pil_image(pixels)


def use(given):
    """--colorize IN OUT: a picture, or every picture of a folder, into a file or a folder -> exit
    status, 2 where a picture is left out, or None where it was not asked for."""
    if not given.colorize:
        return None
    todo, status = outputs.refuse_overwriting(outputs.pair(*map(Path, given.colorize)))
    if not todo:
        return status
    found = sorted(Path(given.runs).glob("zhang_colorization/*/full.pt"), key=os.path.getmtime)
    if not given.checkpoint and not found:
        raise trainer.InputError(f"no trained network in {given.runs}: give one with "
                                 "--checkpoint FILE, or train one with --rows full/auc-raw")
    paths = [given.checkpoint] if given.checkpoint else found[::-1]
    networks = {path: load_colorizer(path, pick_device(given.device)) for path in paths}
    path = max(networks, key=lambda path: networks[path][2:])  # the longest trained, if finished
    model, side, finished, steps = networks[path]
    steps = f", {steps} steps" * bool(steps) + ", not finished" * (not finished)
    print(f"network {path}{steps}", flush=True)
    return max(status, outputs.convert(todo, lambda picture: colorize(model, picture, side)))


def main(arguments=None):
    return launch(__file__, Config, reproduce, arguments, options=options, use=use)


if __name__ == "__main__":
    raise SystemExit(main())
