"""RotNet: Unsupervised Representation Learning by Predicting Image Rotations
Spyros Gidaris, Praveer Singh, Nikos Komodakis.  ICLR 2018, arXiv 1803.07728.

Claim: telling which way up a photograph is teaches features that nearly match supervised ones.

Method: every image enters the mini-batch four times, turned by 0, 90, 180 and 270 degrees.  A
network in network tells the four apart by softmax cross-entropy; chance is ln 4.  Quarter turns
move pixels without resampling, so no trace of the turning gives the answer away.  Then the network
is frozen, and small classifiers on the feature map of each block measure what it has learnt.  The
same classifiers on a network that was never trained are the control.

Deviations (official code: github.com/gidariss/FeatureLearningRotNet, commit 8539de6)
 1. We train 100 epochs as in the paper (released code: 200), with the released Nesterov momentum.
 2. Eight rotations: the paper does not say how it fills the corners of a picture turned by 45
    degrees.  We keep the central square that no corner reaches (22 pixels of 32; the probes see all
    32), and blur the other copies as much as that turn does, or corners or blur would tell.
 3. Fine-tuning: the paper gives no schedule.  Ours is the conv probe's, from a fifth of its rate.
 4. Plain probes are ours: logistic regression and weighted 20-NN on maps averaged to at most
    probe_cells x probe_cells.  The values shown beside them are from a later paper's same network.
 5. Heads on one frozen network are trained side by side; no bias before any batch-norm.
 6. Scale paper: crops are cut from ImageNet decoded to squares of 256 pixels; 50 epochs with drops
    at 15, 30 and 45 as released, where the paper has 30 with drops at 10 and 20.
 7. Convolutions and matrix products run in bfloat16 (--set precision=float32 for the original's).
 8. Left out: Places (Table 6), PASCAL VOC (Table 7), accuracy over pretext epochs (Fig. 5a).
 9. Scale small: narrower, less training (fine-tuning least); values are not comparable, claims are.
10. The random control has batch-norm statistics of 500 images, as a trained network has.  Those of
    the released control, random-official, are 0 and 1, and its convolutions' weights are torch's.

Run: python -m papers.gidaris_rotation --scale small   (CIFAR-10; two CPU cores: half an hour for
two seeds side by side).  --scale full: the paper's protocol, one GPU.  --scale paper: ImageNet.
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
from torchvision.transforms import functional as transforms
from torchvision.utils import save_image

from replicate import evaluate, trainer
from replicate.launch import launch


@dataclass
class Config:
    seed: int
    dataset: str = "cifar10"            # Sec. 3.1
    image_size: int = 32                # files of folders are decoded to this side
    crop_size: int = 32                 # what the network sees
    crop_padding: int = 4               # official code
    streamed: bool = False              # decode files on the fly, do not keep them on the device
    width: float = 1.0                  # of the paper's channels; below 1: ours, reduced budget
    batch_size: int = 128               # Sec. 3.1: images, each in all its rotations
    pretext_epochs: float = 100.0       # Sec. 3.1
    pretext_rate: float = 0.1           # Sec. 3.1
    pretext_drops: tuple[float, ...] = (0.3, 0.6, 0.8)      # Sec. 3.1: fractions of the training
    pretext_factor: float = 0.2         # Sec. 3.1: of the rate, at each drop
    head_rate: float = 0.1              # official code
    head_factor: float = 0.2            # official code
    nonlinear_epochs: float = 100.0     # official code
    nonlinear_drops: tuple[float, ...] = (0.2, 0.4, 0.45)   # official code
    conv_epochs: float = 100.0          # official code
    conv_drops: tuple[float, ...] = (0.35, 0.7, 0.85)       # official code
    supervised_epochs: float = 200.0    # official code
    supervised_drops: tuple[float, ...] = (0.3, 0.6, 0.8)   # official code
    finetune_epochs: float = 100.0      # ours: as the convolutional probe
    finetune_rate: float = 0.02         # ours: a fifth of head_rate
    linear_epochs: float = 35.0         # official code, ImageNet only
    linear_drops: tuple[float, ...] = (1 / 7, 3 / 7, 5 / 7)  # official code, ImageNet only
    mean: tuple[float, ...] = (125.3, 123.0, 113.9)         # official code: of channels, on 0..255
    deviation: tuple[float, ...] = (63.0, 62.1, 66.7)       # official code: standard deviation
    momentum: float = 0.9               # Sec. 3.1
    weight_decay: float = 5e-4          # Sec. 3.1
    probe_cells: int = 8                # ours: plain probes see maps of at most 8 x 8
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # ours: multiplications only
    deterministic: bool = True          # ours
    shards: int = 8                     # ours: parts of a batch with random streams of their own

    def __post_init__(self):
        for name in ("image_size", "width", "probe_cells"):
            assert getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}"
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


def rotate_eight_ways(images):
    """(N,C,S,S) uint8 -> (images (8N,C,s,s), eighth_turns (8N,)); s = S / sqrt(2) (deviation 2).

    Blending neighbours with weights 1 - t and t scales white noise's variance by t^2 + (1 - t)^2.
    In a turn by 45 degrees t takes all values in 0..1, on average that makes 2/3; so does `shift`.
    """
    side = int(images.shape[-1] / math.sqrt(2)) // 2 * 2
    values, shift = images.float(), (1 - 3 ** -0.5) / 2
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would be half a pixel off
        slanted = transforms.rotate(values, 45, transforms.InterpolationMode.BILINEAR)
    upright = torch.lerp(values, values.roll(-1, 3), shift)
    upright = torch.lerp(upright, upright.roll(-1, 2), shift)
    copies = transforms.center_crop(torch.cat([upright, slanted]), [side, side])
    turned, _ = rotate_four_ways(copies.round().to(images.dtype))  # 0, 45, 90, 135, ... degrees
    return turned, torch.arange(8, device=images.device).repeat_interleave(len(images))


def rotate(images, degrees):
    """(N,C,S,S) -> (images (len(degrees) * N,C,s,s), labels): the pretext task with one of the
    paper's four sets of rotations.  A label is a position in `degrees`."""
    if len(degrees) == 4:
        return rotate_four_ways(images)
    if len(degrees) == 8:
        return rotate_eight_ways(images)
    turned = torch.cat([torch.rot90(images, angle // 90, (2, 3)) for angle in degrees])
    return turned, torch.arange(len(degrees), device=images.device).repeat_interleave(len(images))


# Crop and flip come first, the turn last: a flip after the turn would exchange 90 and 270 degrees.
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
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop_and_flip(images, generator, size=224):
    """The same for ImageNet: crops of area 0.08 to 1, aspect 3/4 to 4/3, resized bilinearly."""
    area, aspect, x, y, flip = torch.rand(5, len(images), generator=generator, device=images.device)
    area, aspect = 0.08 + 0.92 * area, torch.exp((2 * aspect - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    zero, mirrored = torch.zeros_like(area), torch.where(flip < 0.5, -width, width)
    affine = torch.stack([mirrored, zero, (2 * x - 1) * (1 - width),
                          zero, height, (2 * y - 1) * (1 - height)], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def normalize(images, config):
    """(N,3,H,W) in 0..255 -> float, less the mean and over the deviation of each channel."""
    channels = [(images[:, c].float() - config.mean[c]) / config.deviation[c] for c in range(3)]
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last)


# ---- Network ----

def conv_norm_relu(inputs, outputs, kernel, stride=1, padding="same"):
    """Convolution, batch-norm, ReLU; He initialisation by fan-out (official code)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def linear_layer(inputs, outputs, bias=True):
    """Weights of variance 2 / outputs, biases 0 (official code)."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / outputs))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def hidden_layer(inputs, outputs):
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
    """-> (a block of the network in network, its output channels): a k x k and two 1 x 1
    convolutions; max-pooling after block 1, average pooling after block 2 (official code)."""
    channels = (192, 160, 96) if number == 1 else (192, 192, 192)
    first, second, third = (max(8, 8 * round(c * width / 8)) for c in channels)
    kernel = 5 if number <= 2 else 3
    pooling = {1: nn.MaxPool2d(3, 2, 1), 2: nn.AvgPool2d(3, 2, 1)}.get(number, nn.Identity())
    return nn.Sequential(conv_norm_relu(inputs, first, kernel), conv_norm_relu(first, second, 1),
                         conv_norm_relu(second, third, 1), pooling), third


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

def rotation_loss(scores, labels):
    """Mean cross-entropy over all copies (Eq. 3), and the share of correct answers."""
    return {"loss": F.cross_entropy(scores.float(), labels),
            "accuracy": (scores.argmax(1) == labels).float().mean()}


def make_optimizer(config, parameters):
    """SGD with Nesterov momentum; run.fit sets the learning rate at every step."""
    return torch.optim.SGD(parameters, momentum=config.momentum,
                           weight_decay=config.weight_decay, nesterov=config.momentum > 0)


# ---- Pre-training ----

QUARTER_TURNS = (0, 90, 180, 270)
TRUNKS = {  # name -> (blocks, degrees of its pretext task; none: it is never trained)
    "rotnet4": (4, QUARTER_TURNS), "rotnet3": (3, QUARTER_TURNS), "rotnet5": (5, QUARTER_TURNS),
    "rotations0-180": (4, (0, 180)), "rotations90-270": (4, (90, 270)),
    "rotations8": (4, tuple(range(0, 360, 45))), "random": (4, ()), "random-official": (4, ()),
    "scratch": (4, ()), "alexnet": (5, QUARTER_TURNS), "alexnet-random": (5, ()),
}


def pretrain(run, data, config, name):
    """-> Trained: one of TRUNKS, trained to tell rotations apart, or a control as initialised."""
    blocks, degrees = TRUNKS[name]
    classes = max(len(degrees), 1)  # a control's own classifier is never used
    crop = partial(pad_crop_and_flip, size=config.crop_size, pad=config.crop_padding)
    if name.startswith("alexnet"):
        model = run.build(AlexNet, classes, config.width)
        crop = partial(resized_crop_and_flip, size=config.crop_size)
    elif name == "random-official":
        model = run.build(released_control, blocks, classes, config.width)
    else:
        model = run.build(NetworkInNetwork, blocks, classes, config.width)
    if name == "random":  # deviation 10
        evaluate.recalibrate(model, partial(central_maps, run, model), data.train)
    if not degrees:
        return trainer.Trained(model)

    def loss(batch, step):
        images, _ = batch  # the class labels stay unused
        images = run.augment(crop, images, f"{name}/augment", step)
        rotated, labels = rotate(images, degrees)
        return rotation_loss(model(normalize(rotated, config)), labels)

    return run.fit(
        name, model, loss, run.shuffled(data.unlabeled, config.batch_size, name),
        steps=trainer.steps_in(config, config.pretext_epochs, data.unlabeled),
        optimizer=make_optimizer(config, model.parameters()), chance=math.log(len(degrees)),
        rate=trainer.stepped(config.pretext_rate, config.pretext_drops, config.pretext_factor))


# ---- Evaluation ----

def released_control(blocks, classes, width):
    """A network whose own initialisation is never called, which leaves torch's (official code)."""
    model = NetworkInNetwork(blocks, classes, width)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return model


def conv_head(shape, classes, width=1.0, block=2):
    """A fresh third NIN block: with blocks 1 and 2 it is the supervised network (Sec. 3.1)."""
    third, channels = nin_block(3, shape[1], width)
    return nn.Sequential(third, GlobalAverage(), linear_layer(channels, classes))


def nonlinear_head(shape, classes, width=1.0, block=2):
    """Two hidden layers of min(20 classes, 2048) units (Sec. 3.1, official code)."""
    hidden = min(20 * classes, 2048)
    return nn.Sequential(nn.Flatten(), *hidden_layer(math.prod(shape[1:]), hidden),
                         *hidden_layer(hidden, hidden), linear_layer(hidden, classes))


def alexnet_linear_head(shape, classes, width=1.0, block=5):
    """Maxima of side x side cells, about 9,000 numbers, batch-norm, linear layer (Sec. 3.2)."""
    side = {1: 12, 2: 7, 3: 5, 4: 6, 5: 6}[block]  # official code
    size = shape[1] * side * side
    return nn.Sequential(nn.AdaptiveMaxPool2d(side), nn.Flatten(),
                         nn.BatchNorm1d(size, affine=False), linear_layer(size, classes))


def alexnet_nonlinear_head(shape, classes, width=1.0, block=5):
    """The rest of AlexNet after a block, untrained (Table 4)."""
    rest = AlexNet(classes, width)
    return nn.Sequential(*rest.blocks[block:], rest.classifier)


def head_scores(heads, rows, maps):
    """[feature map of block 1, ...] -> {row: scores (N,classes)}; rows: {row: block}."""
    return {row: heads[row](maps[block - 1]).float() for row, block in rows.items()}


def probe(run, data, name, trunk, head, schedule, rows=None):
    """Train a head for each row, side by side, and record their test accuracies.

    trunk: one of TRUNKS.  schedule: epochs, drops, rate, and whether the trunk is trained along.
    rows: {row: block its head sees}, by default {name: 2}; all are trained whichever are wanted,
    so that --rows changes no number.  An epoch draws as many images as all of train holds, so that
    few labels do not mean few updates (Sec. 3.1, official code).
    """
    rows = rows or {name: 2}
    if not run.wants(*rows):
        return
    config, train, (epochs, drops, rate, finetune) = run.config, data.train, schedule
    if not evaluate.enough_labels(train.labels, name):
        return run.record(name, None)
    if labels := evaluate.labels_of(name):
        train = train.take(evaluate.first_per_class(train.labels, labels))  # official code
    begun = pretrain(run, data, config, trunk)
    encoder = begun.model.eval()
    encoder.blocks = encoder.blocks[:max(rows.values())]
    side = config.crop_size
    maps = encoder.maps(torch.zeros(2, 3, side, side, device=run.device))
    run.seed_global(f"{name}/init")
    heads = nn.ModuleDict({row: head(maps[block - 1].shape, data.classes, config.width, block)
                           for row, block in rows.items()})
    heads = heads.to(run.device, memory_format=torch.channels_last)
    trained = nn.ModuleDict({"heads": heads, **({"blocks": encoder.blocks} if finetune else {})})
    crop = partial(pad_crop_and_flip, size=config.crop_size, pad=config.crop_padding)

    def loss(batch, step):
        images, labels = batch
        images = run.augment(crop, images, f"{name}/augment", step)
        scores = head_scores(heads, rows, encoder.maps(normalize(images, config)))
        return {"loss": sum(F.cross_entropy(each, labels) for each in scores.values())}

    with contextlib.nullcontext(encoder.train()) if finetune else evaluate.frozen(encoder):
        fitted = run.fit(name, trained, loss, run.shuffled(train, config.batch_size, name),
                         steps=trainer.steps_in(config, epochs, data.train),
                         optimizer=make_optimizer(config, trained.parameters()),
                         rate=trainer.stepped(rate, drops, config.head_factor),
                         chance=len(rows) * math.log(data.classes))
    run.record(rows, partial(head_accuracies, run, encoder.eval(), heads.eval(), rows), data.test,
               after=[begun, fitted])


def central_maps(run, model, images):
    """The feature maps at test time: of whole CIFAR-10 images, of the centre of larger ones."""
    images = transforms.center_crop(images, [run.config.crop_size] * 2)
    with run.autocast():
        return model.maps(normalize(images, run.config))


def head_accuracies(run, encoder, heads, rows, test):
    """{row: percent of the test images whose class its head names}"""
    with run.autocast():
        return evaluate.accuracies(
            lambda images: head_scores(heads, rows, central_maps(run, encoder, images)), test)


@torch.no_grad()
def rotation_accuracy(run, model, degrees, test):
    """Percent of all rotated copies of the test images whose rotation the network names."""
    model, side = model.eval(), run.config.crop_size
    correct = count = 0
    for images, _ in evaluate.in_order(test, 250):
        rotated, labels = rotate(transforms.center_crop(images, [side, side]), degrees)
        with run.autocast():
            correct += int((model(normalize(rotated, run.config)).argmax(1) == labels).sum())
        count += len(labels)
    return 100.0 * correct / count


def block_probes(run, model, rows, train, test):
    """{row: accuracy} of rows <network>/block<number>/<linear or knn>, on the frozen network."""
    kinds = {row: (int(row.split("/")[1][-1]), row.split("/")[2]) for row in rows}
    with evaluate.frozen(model):
        return evaluate.probe(partial(central_maps, run, model), kinds, train, test,
                              run.config.probe_cells, run.seed)


def reproduce(run):
    """Every row of one seed; what several rows share is trained once, then read from its file."""
    config, crop = run.config, run.config.crop_size
    data = run.load(config.dataset, config.image_size, config.streamed or None, channels=3)
    side = next(data.test.batches([torch.arange(1)]))[0].shape[-1]
    if side < crop:
        raise trainer.InputError(f"images of '{config.dataset}' have {side} pixels, fewer than "
                                 f"crop_size={crop}: lower it with --set crop_size={side}")
    conv = config.conv_epochs, config.conv_drops, config.head_rate, False
    nonlinear = config.nonlinear_epochs, config.nonlinear_drops, config.head_rate, False
    linear = config.linear_epochs, config.linear_drops, config.head_rate, False
    finetuning = config.finetune_epochs, config.conv_drops, config.finetune_rate, True
    supervised = config.supervised_epochs, config.supervised_drops, config.head_rate, True
    # Table 3 and Fig. 5b; the supervised network is an untrained trunk's blocks 1 and 2 and a head
    probe(run, data, "random/conv", "random", conv_head, conv)
    probe(run, data, "random-official/conv", "random-official", conv_head, conv)
    probe(run, data, "rotnet4/conv-finetuned", "rotnet4", conv_head, finetuning)
    probe(run, data, "rotnet4/nonlinear-finetuned", "rotnet4", nonlinear_head, finetuning)
    for labels in ("", "/labels20", "/labels100", "/labels400", "/labels1000"):
        probe(run, data, f"rotnet4/conv{labels}", "rotnet4", conv_head, conv)
        probe(run, data, f"supervised{labels}", "scratch", conv_head, supervised)
    for trunk in ("rotnet4", "random", "rotnet3", "rotnet5"):  # Table 1
        rows = {f"{trunk}/block{b}/nonlinear": b for b in range(1, TRUNKS[trunk][0] + 1)}
        probe(run, data, f"{trunk}/nonlinear", trunk, nonlinear_head, nonlinear, rows)
    for trunk in ("rotations0-180", "rotations90-270", "rotations8"):  # Table 2
        rows = {f"{trunk}/block2/nonlinear": 2}
        probe(run, data, f"{trunk}/nonlinear", trunk, nonlinear_head, nonlinear, rows)
    for trunk in ("alexnet", "alexnet-random"):  # Tables 5 and 4
        rows = {f"{trunk}/conv{block}/linear": block for block in (1, 2, 3, 4, 5)}
        probe(run, data, f"{trunk}/linear", trunk, alexnet_linear_head, linear, rows)
        rows = {f"{trunk}/conv{block}/nonlinear": block for block in (4, 5)}
        probe(run, data, f"{trunk}/nonlinear", trunk, alexnet_nonlinear_head, nonlinear, rows)
    for name, (_, degrees) in TRUNKS.items():  # the pretext task itself, and probes of ours
        if run.wants(row := f"{name}/rotation-accuracy"):
            trained = pretrain(run, data, config, name)
            run.record(row, partial(rotation_accuracy, run, trained.model, degrees), data.test,
                       after=[trained])
            if name == "rotnet4" and run.seed == run.rank == 0 and run.value(row):
                figures(run, trained.model, data.test)
        if rows := run.wants(f"{name}/block*/linear", f"{name}/block*/knn"):
            trained = pretrain(run, data, config, name)
            run.record(rows, partial(block_probes, run, trained.model, rows), data.train, data.test,
                       after=[trained])


# ---- Figures ----

def figures(run, model, test):
    """First-layer filters, and mean absolute activations, like the paper's attention maps."""
    path = run.suite / run.paper
    filters = F.interpolate(model.blocks[0][0][0].weight.detach().contiguous(), scale_factor=8)
    save_image(filters, f"{path}_filters.png", nrow=16, normalize=True, scale_each=True)
    images, _ = next(test.batches([torch.arange(min(12, len(test)))]))
    images = transforms.center_crop(images, [run.config.crop_size] * 2)
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
