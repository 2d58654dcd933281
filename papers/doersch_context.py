"""Unsupervised Visual Representation Learning by Context Prediction
Carl Doersch, Abhinav Gupta, Alexei A. Efros.  ICCV 2015, arXiv 1505.05192.
Official code: https://github.com/cdoersch/deepcontext/blob/5307282/train.py (L92: its line 92)

Claim: a network that learns to place one patch of a photograph beside another learns objects.
Method: nine patches are cut from an image on a 3 x 3 grid.  The network sees two adjacent ones and
predicts in which of eight positions the second lies around the first (by chance 15 % are right, and
the loss is 2.06).  One encoder turns each patch into a vector; two vectors go into a small network.
Against short cuts (lines that run on, colour fringes, brightness) patches have gaps and jitter and
lose colours and contrast, a third of them also resolution; an audit undoes these measures.

Deviations from the paper
 1. Small and full: images of 128 pixels, patches of 28, a network made for these; at small half as
    wide and trained less.  Compare their claims, not values.  Scale paper: the paper's patches and
    AlexNet, squares of 448 pixels (paper: random sizes).
 2. Small and full: batch-norm in all convolutions, no LRN; paper: from the third on, LRN before.
 3. SGD with Nesterov momentum 0.9, warm-up, cosine; paper: momentum 0.999, four weeks at a fixed
    rate; official code: no momentum, 1.7 million updates at 1e-5 on the sum over some 2,500 pairs.
    Scale paper: as many at 0.025 on the mean of 2,240, no momentum or weight decay, but a cosine.
 4. Colours: small and full project them, scale paper drops them, patch by patch (L99).  Projection
    was chosen on held-out train images: after 3 epochs 28 % of positions right, by dropping 25 %.
 5. Paper: fine-tuning for VOC, retrieval by fc6.  Ours: plain probes, few labels, fine-tuning and
    retrieval by conv5, with batch-norm statistics of 500 images; colours are never dropped there.
 6. Multiplications in bfloat16 (--set precision=float32 for the original's), the rest in float32.
 7. audit/no-gap: neither gap nor jitter.  Control: no-gap-hidden-rims, so that nothing runs on.
 8. Left out: VOC detection, surface normals (NYUv2), visual data mining.
python -m papers.doersch_context --scale small   # Imagenette, two CPU cores: 60 minutes a seed
Result, small: context/conv4/linear 66.9 +- 0.6 against random/conv4/linear 59.6 (n = 3);
        paper's weights on ImageNet, from a survey: 31.7
"""
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
    image_size: int = 128               # ours: the paper's images have 150,000 to 450,000 pixels
    streamed: bool = False              # ours: decode files on the fly, do not keep them in memory
    network: Literal["small", "alexnet"] = "small"      # "small": ours; "alexnet": the paper's
    width: float = 1.0                  # ours: channels, as a fraction of the network's
    patch: int = 28                     # ours; Sec. 3 and L14: 96
    gap: int = 14                       # ours; Sec. 3 and L16: 48, half a patch
    jitter: int = 2                     # ours; Sec. 3 and L17: 7, to either side
    colors: Literal["dropping", "projection", "all"] = "projection"  # Sec. 3; "all": audit
    pixelation: float = 1 / 3           # official code, L92: share of patches that are pixelated
    normalization: bool = True          # official code, L110: contrast of each patch
    fringe: float = 0.0                 # audit: the green channel is magnified by 1 + fringe
    hidden_rims: bool = False           # audit: a tenth of a patch is blank along each side
    one_patch: bool = False             # audit: the first patch of each pair is hidden
    batch_size: int = 256               # ours: images, each in 40 pairs
    pretext_epochs: float = 200.0       # ours
    audit_epochs: float = 40.0          # ours
    pretext_rate: float = 0.1           # ours
    supervised_epochs: float = 60.0     # ours: with all labels, from scratch and fine-tuned
    label_steps: int = 1500             # ours: updates on few labels, however few
    supervised_rate: float = 0.1        # ours
    finetune_rate: float = 0.1          # ours
    warmup: float = 0.05                # ours: share of the steps
    momentum: float = 0.9               # ours
    weight_decay: float = 1e-4          # ours; official code, L332: 0
    probe_cells: int = 4                # ours: probes see maps of at most 4 x 4
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # ours: of multiplications
    deterministic: bool = True          # ours
    shards: int = 1                     # ours: parts of a batch, divided among GPUs

    def __post_init__(self):
        room = 2 * self.gap + 2 * self.jitter
        assert self.image_size >= 3 * self.patch + room, (
            f"image_size {self.image_size} ({self.dataset}): {3 * self.patch + room} are needed; "
            f"patch={max(0, (self.image_size - room) // 3)} would fit")
        assert self.patch >= 16, f"patch {self.patch}: the network needs at least 16 pixels"
        assert self.gap >= 2 * self.jitter or self.jitter == 0, (
            f"gap {self.gap}: patches would overlap; at least {2 * self.jitter}, or jitter=0")
        assert self.width * self.probe_cells > 0, "width and probe_cells must be above 0"
        assert max(self.pixelation, self.warmup) <= 1, "pixelation, warmup: shares, at most 1"


# ---- The idea: where does this patch lie? ----

def neighbor_position(row, column):
    """Number of a place in the 3 x 3 grid: 0 to 7, row by row without the centre; or ValueError."""
    place = 3 * row + column
    if not (0 <= row <= 2 and 0 <= column <= 2) or place == 4:
        raise ValueError(f"row {row}, column {column} of 3 x 3 is no neighbour of the centre")
    return place - (place > 4)


def cut_patches(images, patch, gap, jitter, generator):
    """(N,C,H,W) -> patches (N,9,C,p,p), corners (N,9,2): a 3 x 3 grid, at random in each image.

    Neighbours lie patch + gap apart, each off by -jitter to jitter on both axes (Sec. 3).
    corners: row and column of a patch's first pixel.  ValueError where the grid does not fit.
    """
    count, device = len(images), images.device
    span = 3 * patch + 2 * gap + 2 * jitter
    if min(images.shape[-2:]) < span:
        raise ValueError(f"images of shape {tuple(images.shape)}: the grid needs {span} pixels")
    down, right = torch.rand(2, count, 1, generator=generator, device=device)
    rows, columns = (side - span + 1 for side in images.shape[-2:])  # places for the grid
    origin = torch.stack([down * rows, right * columns], 2).long()  # (N, 1, 2)
    moved = torch.randint(2 * jitter + 1, (count, 9, 2), generator=generator, device=device)
    place = torch.arange(9, device=device)
    corners = origin + (patch + gap) * torch.stack([place // 3, place % 3], 1) + moved  # (N, 9, 2)
    return cut_squares(images, corners, patch), corners


def cut_squares(images, corners, side):
    """(N,C,H,W), row and column (N,K,2) of the first pixels -> squares (N,K,C,side,side)."""
    samples = torch.arange(len(images), device=images.device)[:, None]
    rows, columns = corners.unbind(2)
    windows = images.unfold(2, side, 1).unfold(3, side, 1)  # a view: every square of the image
    return windows[samples, :, rows, columns]


def drop_colors(patches, generator):
    """(...,3,p,p) float -> the same; each patch keeps one random channel, minus its mean, and gets
    Gaussian noise of a hundredth of its standard deviation for the other two (Sec. 3)."""
    device, shape = patches.device, patches.shape
    kept = torch.randint(3, (*shape[:-3], 1, 1, 1), generator=generator, device=device)
    channel = patches.take_along_dim(kept, -3)  # (..., 1, p, p)
    channel = channel - channel.mean((-2, -1), keepdim=True)
    noise = torch.randn(shape, generator=generator, device=device)
    noise = noise * channel.std((-2, -1), keepdim=True) / 100
    return torch.where(torch.arange(3, device=device).view(3, 1, 1) == kept, channel, noise)


def project_green_magenta(images):
    """(...,3,H,W) float -> each pixel times I - a'a / (a a') for a = (-1, 2, -1) (Sec. 3)."""
    red, green, blue = images.unbind(-3)
    along = (2 * green - red - blue) / 6  # the pixel times a', and a a' is 6
    return torch.stack([red + along, green - 2 * along, blue + along], -3)


@lru_cache(maxsize=4)
def pixelation_matrices(size, device="cpu"):
    """(size + 1, size, size): matrix s averages a line down to s pixels and interpolates back."""
    identity = torch.eye(size)
    small = [F.adaptive_avg_pool1d(identity[None], side) for side in range(1, size + 1)]
    back = [F.interpolate(lines, size, mode="linear")[0].T for lines in small]
    return torch.stack([identity, *back]).to(device)  # number 0 is not in use


def pixelate(patches, share, generator):
    """(N,9,3,p,p) float -> a share of them at a lower resolution, down to a tenth (L92)."""
    size, device, flat = patches.shape[-1], patches.device, patches.flatten(0, 1)
    least, count = max(2, round(size * 10 / 96)), round(share * len(flat))
    chosen = torch.randperm(len(flat), generator=generator, device=device)[:count]
    part = torch.rand(count, generator=generator, device=device)  # area is uniform, not the side
    sides = (least ** 2 + part * ((size - 1) ** 2 - least ** 2)).sqrt().round().long()
    matrices = pixelation_matrices(size, device)[sides][:, None]  # (count, 1, p, p)
    return flat.index_copy(0, chosen, matrices @ flat[chosen] @ matrices.mT).view_as(patches)


def normalize_contrast(patches):
    """(...,C,p,p) -> the same, each patch with mean 0 and root mean square 1 (L110)."""
    centred = patches - patches.mean((-3, -2, -1), keepdim=True)
    return centred / centred.square().mean((-3, -2, -1), keepdim=True).sqrt().clamp_min(0.01)


def sample_patches(images, generator, config):
    """(N,3,S,S) uint8 -> patches (N,9,3,p,p) as the network sees them, short cuts closed."""
    if config.fringe:
        images = evaluate.add_fringes(images.float(), config.fringe)
    rim = config.patch // 10 if config.hidden_rims else 0
    images = F.pad(images, 4 * [-rim])  # cropped: then each patch is the inside of the same one
    patches, _ = cut_patches(images, config.patch - 2 * rim, config.gap + 2 * rim, config.jitter,
                             generator)
    patches = patches.float() / 255
    if config.pixelation:
        patches = pixelate(patches, config.pixelation, generator)
    if config.colors == "dropping":
        patches = drop_colors(patches, generator)
    elif config.colors == "projection":
        patches = project_green_magenta(patches)
    mean = 0.0 if config.colors == "dropping" else 0.5  # drop_colors leaves a mean of 0
    patches = normalize_contrast(patches) if config.normalization else (patches - mean) / 0.25
    return F.pad(patches, 4 * [rim])


@lru_cache(maxsize=4)
def adjacent_places(device="cpu"):
    """-> first, second, positions (40,): all adjacent places of the grid in both orders (L225)."""
    grid = [divmod(place, 3) for place in range(9)]  # (row, column) of each place
    pairs = [(3 * r + c, 3 * s + d, neighbor_position(1 + s - r, 1 + d - c)) for r, c in grid
             for s, d in grid if max(abs(s - r), abs(d - c)) == 1]
    return torch.tensor(pairs, device=device).unbind(1)


def pair_neighbors(embeddings, one_patch=False):
    """(N,9,D) -> first, second (40N,D), the second's position (40N,); one_patch: first is 0."""
    first, second, positions = adjacent_places(embeddings.device)
    first, second = (embeddings.index_select(1, each).flatten(0, 1) for each in (first, second))
    first = torch.zeros_like(first) if one_patch else first
    return first, second, positions.repeat(len(embeddings))


# ---- Network ----

def conv_relu(inputs, outputs, kernel, stride=1, norm=True, pool=False):
    """The layers of a convolution, batch-norm without scale and shift, pooling, and ReLU."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)]
    layers += [nn.BatchNorm2d(outputs, affine=False)] if norm else []
    layers += [nn.MaxPool2d(3, 2, ceil_mode=True)] if pool else []
    return [*layers, nn.ReLU()]  # after pooling it gives the same and has less to do


class PatchEncoder(nn.Module):
    """conv1 to conv5 and fc6: patches (N,3,p,p) -> (N,D); or `maps` of images of any size."""

    def __init__(self, network="small", width=1.0, patch=96):
        super().__init__()
        small = network == "small"
        channels = (64, 192, 384, 256, 256, 512) if small else (96, 256, 384, 384, 256, 4096)
        c1, c2, c3, c4, c5, units = (max(8, round(count * width)) for count in channels)
        if small:
            blocks = [conv_relu(3, c1, 5, stride=2, pool=True), conv_relu(c1, c2, 3, pool=True),
                      conv_relu(c2, c3, 3), conv_relu(c3, c4, 3), conv_relu(c4, c5, 3)]
        else:  # official code, L54
            blocks = [[*conv_relu(3, c1, 11, 4, norm=False, pool=True), LocalResponseNorm()],
                      [*conv_relu(c1, c2, 5, norm=False, pool=True), LocalResponseNorm()],
                      conv_relu(c2, c3, 3), conv_relu(c3, c4, 3), conv_relu(c4, c5, 3, pool=True)]
        self.blocks = nn.ModuleList(nn.Sequential(*layers) for layers in blocks)
        self.channels, self.dimension = c5, units
        flat = self.eval().maps(torch.zeros(1, 3, patch, patch))[-1].numel()  # inputs of fc6
        self.fc6 = nn.Sequential(nn.Flatten(), nn.Linear(flat, units, bias=False),
                                 nn.BatchNorm1d(units, affine=False), nn.ReLU())
        self.apply(initialize).train()

    def maps(self, images):
        """[feature map of conv1, ..., of conv5], pooled where the network pools."""
        maps = [images]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    def forward(self, patches):
        return self.fc6(self.maps(patches)[-1])


class RelativePositionNet(nn.Module):
    """Two embeddings (N,D) -> scores (N,8) of the second's position around the first (Fig. 3)."""

    def __init__(self, network="small", width=1.0, patch=96):
        super().__init__()
        self.encoder = PatchEncoder(network, width, patch)
        units = self.encoder.dimension
        self.head = nn.Sequential(
            nn.Linear(2 * units, units, bias=False), nn.BatchNorm1d(units, affine=False), nn.ReLU(),
            nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 8))
        self.head.apply(initialize)

    def embed(self, patches):
        """(N,9,3,p,p) -> (N,9,D): each patch by itself, all at once."""
        flat = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.encoder(flat).to(patches.dtype).unflatten(0, patches.shape[:2])

    def forward(self, first, second):
        return self.head(torch.cat([first, second], 1))


def initialize(layer):
    """Xavier initialisation (official code, L24)."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# ---- Objective ----

CHANCE = -0.6 * math.log(0.15) - 0.4 * math.log(0.1)  # of 40 pairs: each side 6, each corner 4


def pretext_loss(scores, labels):
    """Scores (B,classes), labels (B,) -> mean cross-entropy and the share of correct answers."""
    return {"loss": F.cross_entropy(scores.float(), labels),
            "accuracy": (scores.argmax(1) == labels).float().mean()}


def make_optimizer(config, model):
    """SGD with Nesterov momentum; run.fit sets the learning rate at every step."""
    return torch.optim.SGD(model.parameters(), momentum=config.momentum, fused=True,
                           weight_decay=config.weight_decay, nesterov=config.momentum > 0)


# ---- Pre-training ----

def pretrain(run, data, config, name):
    """-> Trained RelativePositionNet.  run: trainer.Run; config: its own or an audit variant's."""
    model = run.build(RelativePositionNet, config.network, config.width, config.patch)

    def loss(batch, step):
        images, _ = batch  # the class labels stay unused
        patches = run.augment(sample_patches, images, "augment", step, config=config)
        *pair, positions = pair_neighbors(model.embed(patches), config.one_patch)
        return pretext_loss(model(*pair), positions)

    return run.fit(name, model, loss, run.shuffled(data.unlabeled, config.batch_size, "pretext"),
                   steps=trainer.steps_in(config, config.pretext_epochs, data.unlabeled),
                   optimizer=make_optimizer(config, model), chance=CHANCE,
                   rate=trainer.cosine(config.pretext_rate, config.warmup))


# ---- Evaluation ----

NETWORKS = ("context", "random", "supervised")
FRINGE = 0.005  # an aberration of half a percent of the distance to the middle of the image
VARIANTS = {  # name -> settings that differ from the run's
    "one-patch": {"one_patch": True}, "audit/as-is": {}, "audit/dropping": {"colors": "dropping"},
    "audit/no-jitter": {"jitter": 0}, "audit/no-gap": {"gap": 0, "jitter": 0},
    "audit/no-jitter-hidden-rims": {"jitter": 0, "hidden_rims": True},
    "audit/no-gap-hidden-rims": {"gap": 0, "jitter": 0, "hidden_rims": True},
    "audit/no-pixelation": {"pixelation": 0.0}, "audit/no-normalization": {"normalization": False},
    "audit/no-color-handling": {"colors": "all"},
    "audit/aberration": {"colors": "all", "fringe": FRINGE},
    "audit/aberration-dropping": {"colors": "dropping", "fringe": FRINGE},
    "audit/aberration-projection": {"colors": "projection", "fringe": FRINGE}}


def variant_config(config, name):
    """The settings of a network: the run's, or a variant's; the audit trains for audit_epochs."""
    epochs = config.audit_epochs if name.startswith("audit/") else config.pretext_epochs
    return replace(config, pretext_epochs=epochs, **VARIANTS.get(name, {}))


@torch.no_grad()
def position_accuracy(run, model, config, test):
    """Percent of the pairs of test images whose position is predicted correctly."""
    model.eval()
    correct = count = 0
    for number, (images, _) in enumerate(evaluate.in_order(test, 250)):
        patches = sample_patches(images, run.stream("test patches", number, run.device), config)
        with run.autocast():
            *pair, positions = pair_neighbors(model.embed(patches), config.one_patch)
            correct += int((model(*pair).argmax(1) == positions).sum())
        count += len(positions)
    return 100.0 * correct / count


def normalize(images, config, crop=False):
    """(N,3,H,W) uint8, or float in 0..1 -> as in pre-training, but colours are never dropped.
    crop: the middle 3/4, a random crop of images that have been shifted by up to an eighth."""
    images = F.pad(images, 4 * [-(images.shape[-1] // 8)]) if crop else images
    images = images if images.is_floating_point() else images.float() / 255
    if config.colors == "projection":
        images = project_green_magenta(images)
    images = normalize_contrast(images) if config.normalization else (images - 0.5) / 0.25
    return images.contiguous(memory_format=torch.channels_last)


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


def random_patches(run, images, number):
    """(n,3,S,S) uint8 -> (n,3,p,p) in 0..1: a patch of each image, always the same for a number."""
    generator = run.stream("retrieval", number, run.device)
    return cut_patches(images.float() / 255, run.config.patch, 0, 0, generator)[0][:, 4]  # centre


def query_patches(run, test, count=2000):
    """Patches (n,3,p,p) in 0..1 of test images spread over the set, and their labels (n,)."""
    spread = torch.linspace(0, len(test) - 1, min(count, len(test))).long()
    images, labels = next(test.batches([spread]))
    return random_patches(run, images, 0), labels


@torch.no_grad()
def unit_features(run, encoder, patches, train):
    """(n,3,p,p) in 0..1 -> (n,D): conv5 minus its mean over the patches, scaled to length 1."""
    maps = partial(feature_maps, run, encoder, replace(run.config, normalization=True))
    evaluate.recalibrate(encoder, lambda images: maps(random_patches(run, images, 1)), train)
    features = torch.cat([maps(part)[-1].flatten(1).float() for part in patches.split(250)])
    return F.normalize(features - features.mean(0), dim=1)


def retrieval(run, encoder, train, test):
    """Percent of a patch's ten nearest patches of other test images that are of its class."""
    patches, labels = query_patches(run, test)
    features = unit_features(run, encoder, patches, train)
    similarity = (features @ features.T).fill_diagonal_(-2)  # below any: none is its own neighbour
    nearest = similarity.topk(min(10, len(labels) - 1), dim=1).indices
    return 100 * float((labels[nearest] == labels[:, None]).float().mean())


def network(run, data, name):
    """-> Trained, whose model has an encoder: one of NETWORKS or of VARIANTS."""
    config = run.config
    if name not in ("random", "supervised"):
        return pretrain(run, data, variant_config(config, name), name)
    model = run.build(RelativePositionNet, config.network, config.width, config.patch)
    if name == "random":
        return trainer.Trained(model)
    return train_classifier(run, data, name, model.encoder, config.supervised_rate)


def reproduce(run):
    """Every row of one seed; what several rows share is trained once, then read from its file."""
    config = run.config
    data = run.load(config.dataset, config.image_size, config.streamed or None, channels=3)
    if hasattr(data.train, "images"):  # some sets have a size of their own: Config checks it again
        replace(config, image_size=data.train.images.shape[-1])
    for name in (*NETWORKS, *VARIANTS):
        settings = variant_config(config, name)
        if run.wants(f"{name}/position-accuracy"):
            trained = network(run, data, name)
            measure = partial(position_accuracy, run, trained.model, settings)
            run.record(f"{name}/position-accuracy", measure, data.test, after=[trained])
        if rows := run.wants(f"{name}/conv*"):
            trained = network(run, data, name)
            measure = partial(plain_probes, run, trained.model.encoder, settings, rows)
            run.record(rows, measure, data.train, data.test, after=[trained])
        if run.wants(f"{name}/retrieval"):
            trained = network(run, data, name)
            measure = partial(retrieval, run, trained.model.encoder, data.train)
            if run.seed == 0 and all(run.value(f"{one}/retrieval") for one in {*NETWORKS} - {name}):
                figures(run, data)  # the last of the three is about to be recorded
            run.record(f"{name}/retrieval", measure, data.test, after=[trained])
    for row in run.wants("supervised", "supervised/labels*", "context/finetuned*"):
        if not evaluate.enough_labels(data.train.labels, row):
            run.record(row, None)  # leaves the row out
            continue
        finetuned = row.startswith("context")
        start = network(run, data, "context" if finetuned else "random")
        rate = config.finetune_rate if finetuned else config.supervised_rate
        final = train_classifier(run, data, row, start.model.encoder, rate)
        see = partial(normalize, config=config)
        measure = partial(evaluate.class_accuracy, run, final.model, see)
        run.record(row, measure, data.test, after=[start, final])


# ---- Figures ----

def figures(run, data):
    """Six test patches and the nearest others by each of the NETWORKS."""
    patches, _ = query_patches(run, data.test)
    queries, panels = torch.linspace(0, len(patches) - 1, 6).long(), []
    for encoder in [network(run, data, name).model.encoder for name in NETWORKS]:
        features = unit_features(run, encoder, patches, data.train)
        nearest = (features[queries] @ features.T).topk(min(7, len(patches)), dim=1).indices
        tiles = patches[nearest.flatten()].cpu()  # each query first: it is nearest to itself
        panels.append(make_grid(tiles, nrow=nearest.shape[1], padding=1, pad_value=1.0))
    grid = make_grid(panels, padding=6, pad_value=1.0)[None]
    save_image(F.interpolate(grid, scale_factor=2), run.suite / f"{run.paper}_neighbours.png")


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
