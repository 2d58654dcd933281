"""RotNet: Unsupervised Representation Learning by Predicting Image Rotations
Spyros Gidaris, Praveer Singh, Nikos Komodakis.  ICLR 2018, arXiv 1803.07728.

Claim: telling which way up a photograph is teaches features that nearly match supervised ones.
Method: every image enters the mini-batch four times, turned by 0, 90, 180 and 270 degrees.  A
convolutional network, the trunk, learns by cross-entropy which turn it sees (by chance ln 4).
Quarter turns move pixels without resampling, so no trace of the turning gives the answer away.
Then the trunk is frozen, and a head, a classifier on the feature map of one of its blocks, measures
what that block has learnt.  The same heads on a trunk that was never trained are the control.

Deviations (official code: github.com/gidariss/FeatureLearningRotNet, commit 8539de6)
 1. We train 100 epochs as in the paper (released code: 200), with the released Nesterov momentum.
 2. Eight rotations: corners and blur of a turn by 45 degrees would tell the answer.  We keep the
    central square (22 pixels of 32; heads see all 32) and blur the other four copies as much.
 3. Fine-tuning: the paper gives no schedule.  Ours is the conv head's, from a fifth of its rate.
 4. Plain probes are ours: logistic regression and 20 nearest neighbours on averaged feature maps.
 5. Heads on one frozen trunk are trained side by side.  Layers before a batch-norm have no bias.
 6. Scale paper: crops of squares of 256 pixels; 50 epochs and their drops as released (paper: 30).
 7. Convolutions and matrix products run in bfloat16 (--set precision=float32 for the original's).
 8. Left out: Places (Table 6), PASCAL VOC (Table 7).  Fig. 5a has a plain probe, at three points.
 9. Scale small: narrower, less training (supervised as long as heads), other rates and drops; heads
    learn from two views of each image, encoded once.  Claims are comparable, values are not.
10. Our control, random, has batch-norm statistics of 500 images, as a trained network has.  The
    released code's, random-official, has means of 0, variances of 1 and torch's own weights.
python -m papers.gidaris_rotation --scale small   # CIFAR-10, two CPU cores: 50 minutes a seed
Result, small: rotnet4/conv 50.6 +- 0.9 against supervised 57.9 (n = 3); paper, full training: 91.16
"""
import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from replicate import data as image_data
from replicate import evaluate, trainer
from replicate.launch import launch
from replicate.outputs import save_image


@dataclass
class Config:
    """Settings of a run.  drops: fractions of a training at which its rate falls by a factor."""
    seed: int
    dataset: str = "cifar10"            # Sec. 3.1
    image_size: int = 32                # files of folders are decoded to this side
    crop_size: int = 32                 # what the network sees
    crop_padding: int = 4               # official code
    streamed: bool = False              # decode files on the fly, do not keep them on the device
    width: float = 1.0                  # ours: channels, as a fraction of the paper's
    batch_size: int = 128               # Sec. 3.1: images, each in all its rotations
    head_batch_size: int = 128          # official code: heads and supervised training
    views: int = 0                      # ours: crops an image that heads learn from; 0: always new
    pretext_epochs: float = 100.0       # Sec. 3.1
    pretext_rate: float = 0.1           # Sec. 3.1
    pretext_drops: tuple[float, ...] = (0.3, 0.6, 0.8)      # Sec. 3.1
    pretext_factor: float = 0.2         # Sec. 3.1
    head_rate: float = 0.1              # official code
    head_factor: float = 0.2            # official code
    nonlinear_epochs: float = 100.0     # official code
    nonlinear_drops: tuple[float, ...] = (0.2, 0.4, 0.45)   # official code
    conv_epochs: float = 100.0          # official code
    conv_drops: tuple[float, ...] = (0.35, 0.7, 0.85)       # official code
    supervised_epochs: float = 200.0    # official code
    supervised_drops: tuple[float, ...] = (0.3, 0.6, 0.8)   # official code
    finetune_epochs: float = 100.0      # ours: as conv_epochs
    finetune_rate: float = 0.02         # ours: a fifth of head_rate
    linear_epochs: float = 35.0         # official code, ImageNet only
    linear_drops: tuple[float, ...] = (1 / 7, 3 / 7, 5 / 7)  # official code, ImageNet only
    mean: tuple[float, ...] = (125.3, 123.0, 113.9)         # official code: on 0..255
    deviation: tuple[float, ...] = (63.0, 62.1, 66.7)       # official code: standard deviation
    momentum: float = 0.9               # Sec. 3.1
    weight_decay: float = 5e-4          # Sec. 3.1
    probe_cells: int = 8                # ours: plain probes see maps of at most 8 x 8
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # ours: multiplications only
    deterministic: bool = True          # ours
    shards: int = 1                     # ours: parts of a batch, divided among GPUs

    def __post_init__(self):
        least = min(self.image_size, self.width, self.probe_cells)
        assert least > 0, "image_size, width and probe_cells must be above 0"
        assert self.crop_size >= 16, f"crop_size {self.crop_size}: the network needs 16 pixels"
        assert len(self.mean) == len(self.deviation) == 3, "mean, deviation: one value a channel"


# ---- The idea: turn, and ask how far ----

def rotate_four_ways(images):
    """(N,C,S,S), any dtype -> (images (4N,C,S,S), quarter_turns (4N,) int64): all N unrotated, then
    all by 90, 180 and 270 degrees counter-clockwise (Sec. 2.2).  ValueError if not square."""
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(f"images of {height} x {width} cannot be batched with their quarter turns")
    turned = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


def blurred_centre(images):
    """(N,C,S,S) uint8 -> (N,C,s,s), s = S / sqrt(2): the square that a turn by 45 degrees leaves
    whole, with as much blur as that turn makes (deviation 2).  On each axis the turn mixes two
    neighbours with weights 1 - t and t, t from 0 to 1, which leaves (1 - t)^2 + t^2 of the variance
    of noise, on average 2/3.  Here a fixed t leaves 2/3.
    """
    values, t = images.float(), (1 - 3 ** -0.5) / 2
    values = torch.lerp(values, values.roll(-1, 3), t)
    return even_centre(torch.lerp(values, values.roll(-1, 2), t)).round().to(images.dtype)


def even_centre(images):
    """The central square of even side that no corner reaches when it is turned."""
    return centre(images, int(images.shape[-1] / math.sqrt(2)) // 2 * 2)


def centre(images, side):
    """(N,C,S,S) -> (N,C,side,side): the central square."""
    edge = (images.shape[-1] - side) // 2
    return images[:, :, edge:edge + side, edge:edge + side]


def rotate_eight_ways(images):
    """(N,C,S,S) uint8 -> (images (8N,C,s,s), eighth_turns (8N,)); s = S / sqrt(2)."""
    from torchvision.transforms import functional as transforms  # its import takes seconds

    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would be half a pixel off
        slanted = transforms.rotate(images.float(), 45, transforms.InterpolationMode.BILINEAR)
    slanted, _ = rotate_four_ways(even_centre(slanted).round().to(images.dtype))
    straight = blurred_centre(rotate_four_ways(images)[0])  # last: the blur has a direction
    turned = torch.stack([x.unflatten(0, (4, -1)) for x in (straight, slanted)], 1).flatten(0, 2)
    return turned, torch.arange(8, device=images.device).repeat_interleave(len(images))


def rotate(images, degrees):
    """(N,C,S,S) -> copies (KN,C,s,s) turned by each of K degrees, labels (KN,): which of them."""
    if len(degrees) == 4:
        return rotate_four_ways(images)
    if len(degrees) == 8:
        return rotate_eight_ways(images)
    turned = torch.cat([torch.rot90(images, angle // 90, (2, 3)) for angle in degrees])
    return turned, torch.arange(len(degrees), device=images.device).repeat_interleave(len(images))


def pad_crop_and_flip(images, generator, size=32, pad=4):
    """(N,C,S,S) -> (N,C,size,size): zero padding, a random crop, one in two mirrored."""
    count, device = len(images), images.device
    room = images.shape[-1] + 2 * pad - size + 1
    top, left = torch.randint(room, (2, count, 1), generator=generator, device=device)
    flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
    window = torch.arange(size, device=device)
    rows, columns = top + window, left + torch.where(flip, size - 1 - window, window)  # (N, size)
    samples = torch.arange(count, device=device)[:, None, None]
    padded = F.pad(images, (pad, pad, pad, pad))
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # was NHWC


def resized_crop_and_flip(images, generator, size=224):
    """(N,C,H,W) -> float (N,C,size,size), for ImageNet: area 0.08 to 1, width/height 3/4 to 4/3."""
    area, aspect, x, y, flip = torch.rand(5, len(images), generator=generator, device=images.device)
    area, aspect = 0.08 + 0.92 * area, torch.exp((2 * aspect - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    zero, mirrored = torch.zeros_like(area), torch.where(flip < 0.5, -width, width)
    # From positions in the crop to positions in the image, both -1 to 1 on each axis.
    affine = torch.stack([mirrored, zero, (2 * x - 1) * (1 - width),
                          zero, height, (2 * y - 1) * (1 - height)], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def normalize(images, config):
    """(N,3,H,W) in 0..255 -> float, minus the mean and over the standard deviation of a channel."""
    channels = [(images[:, c].float() - config.mean[c]) / config.deviation[c] for c in range(3)]
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last)


# ---- Network ----

def conv_norm_relu(inputs, outputs, kernel, stride=1, padding="same"):
    """Convolution, batch-norm, ReLU; He initialisation by fan-out (official code)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def linear_layer(inputs, outputs, bias=True):
    """A linear layer with weights of variance 2 / outputs and biases of 0 (official code)."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / outputs))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def hidden_layer(inputs, outputs):
    """The three layers of a hidden layer with batch-norm."""
    return linear_layer(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)


class GlobalAverage(nn.Module):
    def forward(self, maps):  # (N,C,h,w) -> (N,C)
        return maps.mean((2, 3))  # adaptive pooling has no deterministic backward on a GPU


class BlockNetwork(nn.Module):
    """A chain of blocks, counted from 1, and a classifier on the last block's feature map."""

    def __init__(self, blocks, classifier):
        super().__init__()
        self.blocks, self.classifier = nn.ModuleList(blocks), classifier

    def maps(self, images):
        """Normalised images (N,3,S,S) -> [feature map (N,C,h,w) of block 1, of block 2, ...]."""
        maps = [images]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    def features(self, images, block):
        """The feature map (N,C,h,w) of one block; ValueError where there is no such block."""
        if not 1 <= block <= len(self.blocks):
            raise ValueError(f"block {block} of a network with blocks 1 to {len(self.blocks)}")
        return self.maps(images)[block - 1]

    def forward(self, images):
        return self.classifier(self.maps(images)[-1])


def nin_block(number, inputs, width=1.0):
    """-> (block `number` of a Network in Network, its output channels): a k x k and two 1 x 1
    convolutions; max-pooling after block 1, average pooling after block 2 (official code)."""
    channels = (192, 160, 96) if number == 1 else (192, 192, 192)
    first, second, third = (max(8, 8 * round(c * width / 8)) for c in channels)
    kernel = 5 if number <= 2 else 3
    layers = [conv_norm_relu(inputs, first, kernel), conv_norm_relu(first, second, 1),
              conv_norm_relu(second, third, 1)]
    if number <= 2:
        layers.append(nn.MaxPool2d(3, 2, 1) if number == 1 else nn.AvgPool2d(3, 2, 1))
    return nn.Sequential(*layers), third


class NetworkInNetwork(BlockNetwork):
    """The CIFAR-10 network (Sec. 3.1): 3 to 5 blocks, global average, linear classifier.
    Maps for 32 pixels at width 1: 96 x 16 x 16 after block 1, then 192 x 8 x 8."""

    def __init__(self, blocks=4, classes=4, width=1.0):
        layers, channels = [], 3
        for number in range(1, blocks + 1):
            block, channels = nin_block(number, channels, width)
            layers.append(block)
        super().__init__(layers, nn.Sequential(GlobalAverage(), nn.Linear(channels, classes)))
        nn.init.zeros_(self.classifier[1].bias)  # the weights stay torch's (official code)


class AlexNet(BlockNetwork):
    """The ImageNet network (Sec. 3.2): no groups, batch-norm everywhere, no dropout.  Maps for 224
    pixels: 64 x 55 x 55, 192 x 27 x 27, 384 x 13 x 13, 256 x 13 x 13 twice; then 256 x 6 x 6."""

    def __init__(self, classes=4, width=1.0):
        c64, c192, c384, c256, c4096 = (max(8, round(c * width)) for c in (64, 192, 384, 256, 4096))
        pool = nn.MaxPool2d(3, 2)
        super().__init__(
            [conv_norm_relu(3, c64, 11, stride=4, padding=2),
             nn.Sequential(pool, conv_norm_relu(c64, c192, 5)),
             nn.Sequential(pool, conv_norm_relu(c192, c384, 3)),
             conv_norm_relu(c384, c256, 3), conv_norm_relu(c256, c256, 3)],
            nn.Sequential(pool, nn.Flatten(), *hidden_layer(c256 * 6 * 6, c4096),
                          *hidden_layer(c4096, c4096), nn.Linear(c4096, classes)))


# ---- Objective ----

def pretext_loss(scores, labels):
    """Scores (B,classes), labels (B,) -> mean cross-entropy and the share of correct answers."""
    return {"loss": F.cross_entropy(scores.float(), labels),
            "accuracy": (scores.argmax(1) == labels).float().mean()}


def make_optimizer(config, model):
    """SGD with Nesterov momentum; run.fit sets the learning rate at every step."""
    return torch.optim.SGD(model.parameters(), momentum=config.momentum,
                           weight_decay=config.weight_decay, nesterov=config.momentum > 0,
                           fused=True)


# ---- Pre-training ----

QUARTER_TURNS = (0, 90, 180, 270)
TRUNKS = {  # name -> (number of blocks, the rotations that it tells apart in degrees)
    "rotnet4": (4, QUARTER_TURNS), "rotnet3": (3, QUARTER_TURNS), "rotnet5": (5, QUARTER_TURNS),
    "rotations0-180": (4, (0, 180)), "rotations90-270": (4, (90, 270)),
    "rotations8": (4, tuple(range(0, 360, 45))), "rotations4-centre": (4, QUARTER_TURNS),
    "alexnet": (5, QUARTER_TURNS)}
CURVE = (5, 20, 50)  # percent of RotNet's training after which it is measured too (Fig. 5a)


def rotated_copies(images, name):
    """(N,C,S,S) uint8 -> (what a trunk sees of them (KN,C,s,s), its labels (KN,))."""
    rotated, labels = rotate(images, TRUNKS[name][1])
    if name == "rotations4-centre":  # sees as much of an image as rotations8 does
        rotated = blurred_centre(rotated)  # last, since the blur has a direction
    return rotated, labels


def pretrain(run, data, config, name):
    """-> Trained: one of the TRUNKS, which has learnt to tell its rotations apart (Eq. 1 to 3)."""
    blocks, degrees = TRUNKS[name]
    if name == "alexnet":
        model = run.build(AlexNet, len(degrees), config.width)
        crop = partial(resized_crop_and_flip, size=config.crop_size)
    else:
        model = run.build(NetworkInNetwork, blocks, len(degrees), config.width)
        crop = partial(pad_crop_and_flip, size=config.crop_size, pad=config.crop_padding)

    def loss(batch, step):
        images, _ = batch  # the class labels stay unused
        images = run.augment(crop, images, f"{name}/augment", step)
        rotated, labels = rotated_copies(images, name)  # last: mirrored, 90 would look like 270
        return pretext_loss(model(normalize(rotated, config)), labels)

    steps = trainer.steps_in(config, config.pretext_epochs, data.unlabeled)
    return run.fit(
        name, model, loss, run.shuffled(data.unlabeled, config.batch_size, name), steps=steps,
        optimizer=make_optimizer(config, model), chance=math.log(len(degrees)),
        keep=[max(1, steps * percent // 100) for percent in CURVE] if name == "rotnet4" else [],
        rate=trainer.stepped(config.pretext_rate, config.pretext_drops, config.pretext_factor))


# ---- Evaluation ----

def released_control(blocks, classes, width):
    """The official code's control: it never calls its own initialisation, so torch's stays."""
    model = NetworkInNetwork(blocks, classes, width)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return model


def network(run, data, name):
    """-> Trained: one of the TRUNKS, or one that is never trained: "random", "random-official",
    "alexnet-random", or "scratch", with which supervised training begins.  "rotnet4/after20": as
    it was after 20 % of its training."""
    trunk, _, percent = name.partition("/after")
    if trunk in TRUNKS:
        trained = pretrain(run, data, run.config, trunk)
        if percent and trained.kept:  # a plan keeps nothing
            step = max(1, trained.steps * int(percent) // 100)
            trained.model.load_state_dict(trained.kept[step])
        return trained
    if name == "alexnet-random":  # one class, since its own classifier is never used
        return trainer.Trained(run.build(AlexNet, 1, run.config.width))
    make = released_control if name == "random-official" else NetworkInNetwork
    model = run.build(make, 4, 1, run.config.width)
    if name == "random":  # a trained network has statistics of its images, too
        evaluate.recalibrate(model, partial(central_maps, run, model), data.train)
    return trainer.Trained(model)


def conv_head(shape, classes, width=1.0, block=2):
    """A fresh third block, for maps of shape (N,C,h,w): the rest of a supervised NIN (Sec. 3.1)."""
    third, channels = nin_block(3, shape[1], width)
    return nn.Sequential(third, GlobalAverage(), linear_layer(channels, classes))


def nonlinear_head(shape, classes, width=1.0, block=2):
    """Two hidden layers of min(20 classes, 2048) units (Sec. 3.1, official code)."""
    hidden = min(20 * classes, 2048)
    return nn.Sequential(nn.Flatten(), *hidden_layer(math.prod(shape[1:]), hidden),
                         *hidden_layer(hidden, hidden), linear_layer(hidden, classes))


def alexnet_linear_head(shape, classes, width=1.0, block=5):
    """Max-pooling to side x side, about 9,000 features; batch-norm, linear layer (Sec. 3.2)."""
    side = {1: 12, 2: 7, 3: 5, 4: 6, 5: 6}[block]  # official code
    size = shape[1] * side * side
    return nn.Sequential(nn.AdaptiveMaxPool2d(side), nn.Flatten(),
                         nn.BatchNorm1d(size, affine=False), linear_layer(size, classes))


def alexnet_nonlinear_head(shape, classes, width=1.0, block=5):
    """The rest of AlexNet after a block, untrained (Table 4)."""
    rest = AlexNet(classes, width)
    return nn.Sequential(*rest.blocks[block:], rest.classifier)


def head_scores(heads, rows, maps):
    """{block: feature map} -> {row: scores (N,classes)}; rows: {row: block}."""
    return {row: heads[row](maps[block]).float() for row, block in rows.items()}


def encode_views(run, train, count, see, name):
    """-> a split of `count` augmented images of train, drawn once: maps, side by side (count,D);
    labels.  see(images (N,C,S,S), generator) -> {block: map}.  The same for any number of ranks."""
    passes = [torch.randperm(len(train), generator=run.stream(f"{name}/order", number))
              for number in range(math.ceil(count / len(train)))]
    features, labels = [], []
    for number, chosen in enumerate(torch.cat(passes)[:count].split(500)):
        images, targets = next(train.batches([chosen]))
        with torch.no_grad(), run.autocast():
            maps = see(images, run.stream(f"{name}/views", number, run.device))
        features.append(torch.cat([each.flatten(1) for each in maps.values()], 1))
        labels.append(targets)
    return image_data.Resident(torch.cat(features), torch.cat(labels))


def fit_heads(run, data, name, trunk, make_head, schedule, rows=None, finetune=False):
    """Train a head for each row, side by side, and record their test accuracies.

    trunk: a name for `network`; finetune: train the trunk, too.  schedule: epochs, drops, rate; an
    epoch is as long with few labels as with all (Sec. 3.1, official code).  rows: {row: block its
    head sees}, else {name: 2}; --rows changes no number, since all these heads are trained anyway.
    """
    rows = rows or {name: 2}
    if not run.wants(*rows):
        return
    config, train, (epochs, drops, rate) = run.config, data.train, schedule
    if not evaluate.enough_labels(train.labels, name):
        return run.record(name, None)  # leaves the row out
    if labels := evaluate.labels_of(name):
        train = train.take(evaluate.first_per_class(train.labels, labels))  # official code
    start = network(run, data, trunk)
    encoder, side = start.model.eval(), config.crop_size
    encoder.blocks = encoder.blocks[:max(rows.values())]  # no head sees the others
    crop = partial(pad_crop_and_flip, size=side, pad=config.crop_padding)

    def encode(images):
        maps = encoder.maps(normalize(images, config))
        return {block: maps[block - 1] for block in sorted(set(rows.values()))}

    maps = encode(torch.zeros(2, 3, side, side, device=run.device))
    run.seed_global(f"{name}/init")
    heads = nn.ModuleDict({row: make_head(maps[block].shape, data.classes, config.width, block)
                           for row, block in rows.items()})
    heads = heads.to(run.device, memory_format=torch.channels_last)
    trained = nn.ModuleDict({"heads": heads, "blocks": encoder.blocks} if finetune else
                            {"heads": heads})
    shapes = {block: each.shape[1:] for block, each in maps.items()}

    def cached_batches(first_step):  # run.fit calls it only if steps are left to train
        count = config.views * (len(train) if run.plan else len(data.train))
        split = encode_views(run, train, count, lambda images, generator:
                             encode(crop(images, generator)), name)
        return run.shuffled(split, config.head_batch_size, name)(first_step)

    def loss(batch, step):
        inputs, labels = batch
        if inputs.dim() == 2:
            parts = inputs.split([math.prod(shape) for shape in shapes.values()], 1)
            seen = {b: part.view(-1, *shapes[b]) for b, part in zip(shapes, parts)}
        else:
            seen = encode(run.augment(crop, inputs, f"{name}/augment", step))
        scores = head_scores(heads, rows, seen)
        return {"loss": sum(F.cross_entropy(each, labels) for each in scores.values())}

    encoder.train(finetune)
    cached = config.views and not finetune
    with contextlib.nullcontext() if finetune else evaluate.frozen(encoder):
        fitted = run.fit(name, trained, loss, cached_batches if cached else
                         run.shuffled(train, config.head_batch_size, name),
                         steps=trainer.steps_in(config, epochs, data.train, config.head_batch_size),
                         optimizer=make_optimizer(config, trained),
                         rate=trainer.stepped(rate, drops, config.head_factor),
                         chance=len(rows) * math.log(data.classes))  # the losses are added
    run.record(rows, partial(head_accuracies, run, encoder.eval(), heads.eval(), rows), data.test,
               after=[start, fitted])


def central_maps(run, model, images):
    """The feature maps at test time: of whole CIFAR-10 images, of the centre of larger ones."""
    images = centre(images, run.config.crop_size)
    with run.autocast():
        return model.maps(normalize(images, run.config))


def head_accuracies(run, encoder, heads, rows, test):
    """{row: percent of the test images that its head classifies correctly}"""
    def scores(images):
        return head_scores(heads, rows, dict(enumerate(central_maps(run, encoder, images), 1)))

    with run.autocast():
        return evaluate.accuracies(scores, test)


@torch.no_grad()
def rotation_accuracy(run, model, name, test):
    """Percent of all rotated copies of the test images whose rotation is predicted correctly."""
    model, side, trunk = model.eval(), run.config.crop_size, name.split("/")[0]
    correct = 0
    for images, _ in evaluate.in_order(test, 250):
        rotated, labels = rotated_copies(centre(images, side), trunk)
        with run.autocast():
            correct += int((model(normalize(rotated, run.config)).argmax(1) == labels).sum())
    return 100.0 * correct / (len(TRUNKS[trunk][1]) * len(test))


def block_probes(run, model, rows, train, test):
    """{row: accuracy} of rows <network>/block<number>/<linear or knn>."""
    with evaluate.frozen(model):
        return evaluate.probe(partial(central_maps, run, model), evaluate.blocks_and_kinds(rows),
                              train, test, run.config.probe_cells, run.seed)


def reproduce(run):
    """Every row of one seed; what several rows share is trained once, then read from its file."""
    config, crop = run.config, run.config.crop_size
    data = run.load(config.dataset, config.image_size, config.streamed or None, channels=3)
    if (side := next(evaluate.in_order(data.test, 1))[0].shape[-1]) < crop:
        raise trainer.InputError(f"images of '{config.dataset}' have {side} pixels, fewer than "
                                 f"crop_size={crop}: lower it with --set crop_size={side}")
    conv = config.conv_epochs, config.conv_drops, config.head_rate
    nonlinear = config.nonlinear_epochs, config.nonlinear_drops, config.head_rate
    linear = config.linear_epochs, config.linear_drops, config.head_rate
    tuning = config.finetune_epochs, config.conv_drops, config.finetune_rate
    supervised = config.supervised_epochs, config.supervised_drops, config.head_rate
    # Table 3 and Fig. 5b.  The supervised network is two blocks and a conv head from scratch.
    fit_heads(run, data, "random/conv", "random", conv_head, conv)
    fit_heads(run, data, "random-official/conv", "random-official", conv_head, conv)
    for kind, head in (("conv", conv_head), ("nonlinear", nonlinear_head)):
        fit_heads(run, data, f"rotnet4/{kind}-finetuned", "rotnet4", head, tuning, finetune=True)
    for labels in ("", "/labels20", "/labels100", "/labels400", "/labels1000"):
        fit_heads(run, data, f"rotnet4/conv{labels}", "rotnet4", conv_head, conv)
        fit_heads(run, data, f"supervised{labels}", "scratch", conv_head, supervised, finetune=True)
    for trunk, first, last in (("rotnet4", 1, 4), ("random", 1, 4), ("rotnet3", 1, 3),
                               ("rotnet5", 1, 5), ("rotations0-180", 2, 2),
                               ("rotations90-270", 2, 2), ("rotations8", 2, 2),
                               ("rotations4-centre", 2, 2)):  # Tables 1 and 2
        rows = {f"{trunk}/block{block}/nonlinear": block for block in range(first, last + 1)}
        fit_heads(run, data, f"{trunk}/nonlinear", trunk, nonlinear_head, nonlinear, rows)
    for trunk in ("alexnet", "alexnet-random"):  # Tables 5 and 4
        rows = {f"{trunk}/conv{block}/linear": block for block in (1, 2, 3, 4, 5)}
        fit_heads(run, data, f"{trunk}/linear", trunk, alexnet_linear_head, linear, rows)
        rows = {f"{trunk}/conv{block}/nonlinear": block for block in (4, 5)}
        fit_heads(run, data, f"{trunk}/nonlinear", trunk, alexnet_nonlinear_head, nonlinear, rows)
    on_the_way = (f"rotnet4/after{percent}" for percent in CURVE)  # Fig. 5a
    for name in (*TRUNKS, "random", *on_the_way):  # the pretext task itself, and plain probes
        if run.wants(row := f"{name}/rotation-accuracy"):
            trained = network(run, data, name)
            if name == "rotnet4" and run.seed == run.rank == 0 and not run.plan:
                figures(run, trained.model, data.test)
            run.record(row, partial(rotation_accuracy, run, trained.model, name), data.test,
                       after=[trained])
        if rows := run.wants(f"{name}/block?/linear", f"{name}/block?/knn"):
            trained = network(run, data, name)
            run.record(rows, partial(block_probes, run, trained.model, rows), data.train, data.test,
                       after=[trained])


# ---- Figures ----

def figures(run, model, test):
    """First-layer filters, and mean absolute activations, like the paper's attention maps."""
    path = run.suite / run.paper
    filters = F.interpolate(model.blocks[0][0][0].weight.detach().contiguous(), scale_factor=8)
    save_image(filters, f"{path}_filters.png", nrow=16, normalize=True, scale_each=True)
    images, _ = next(evaluate.in_order(test, 12))
    images = centre(images, run.config.crop_size)
    columns = [images.float() / 255]
    with torch.no_grad():
        for maps in model.eval().maps(normalize(images, run.config)):
            heat = maps.abs().mean(1, keepdim=True)
            heat = F.interpolate(heat / heat.amax((2, 3), keepdim=True), images.shape[2:])
            columns.append(heat.expand(-1, 3, -1, -1))
    grid = torch.stack(columns, 1).flatten(0, 1)  # image, block 1, ..., block 4 of each test image
    save_image(F.interpolate(grid, scale_factor=3), f"{path}_attention.png", nrow=2 * len(columns))


def main(arguments=None):
    return launch(__file__, Config, reproduce, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
