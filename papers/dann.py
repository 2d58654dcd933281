"""Ganin, Ustinova, Ajakan, Germain, Larochelle, Laviolette, Marchand, Lempitsky (JMLR 2016): Domain-Adversarial Training of Neural Networks (DANN).

Claim: features from which nobody can tell the domain carry a classifier from labelled source to unlabelled target images.

Method.  Every step sees labelled source images and unlabelled target images in one batch.  A feature extractor feeds two
heads: one names the class of the source images, the other tells source from target.  Between the features and the domain
head lies a reversal layer: it passes features on as they are and multiplies their gradient by -lambda.  So the domain head
learns to tell the domains apart while the features learn to make that impossible.  lambda grows from 0 to 1 while the rate
falls.  A target label is only ever read to count hits in the end; the rows "train-on-target" and "finetuned" say that they
use some.

Deviations
 1. MNIST-M is made here, seeded, from all of MNIST with backgrounds of BSDS500: its train images for train digits, its val
    images for test digits.  (The released set has 59,001 and 9,001 images.)
 2. The paper gives no number of steps: 40,000 at scale full.  Initialisation is torch's default.
 3. Digits: convolutions without padding, so 768 features at 28 pixels; the paper does not say.  SVHN and signs: padded; no
    dropout, no limit on the weights' norm; their layers' widths are from memory.
 4. Subspace alignment: the paper takes the dimension that is best on target test labels; we fix it.  Its linear SVM is
    logistic regression here, and the other rows keep their own last layer.
 5. Proxy A-distance: the authors take the best test error over the SVM's penalties; our logistic regression chooses its
    penalty on a slice of the half that it is trained on.
 6. MNIST <-> USPS, the controls and the rows mmd, coral and finetuned are not in the paper.  They have the same network,
    batches, schedules and budget.  mmd and coral act on the last hidden layer of the label head.
 7. The moons are learnt in batches of 8 points at twice the rate, not point by point.
 8. Left out: Amazon reviews, Office-31 (it starts from a network pre-trained with ImageNet labels).
 9. Convolutions and matrix products of training run in bfloat16 (--set precision=float32 for the original's); losses and
    evaluation in float32.
10. Scale small: fewer steps (see the YAML); values are not comparable, claims are.

    python -m papers.dann --scale small        # two CPU cores: 40 minutes for two seeds side by side
    python -m papers.dann --scale full         # MNIST -> MNIST-M as in Table 2, the USPS pairs, the moons, one data-centre GPU
    python -m papers.dann --scale small --set source=folder:A --set target=folder:B --set image_size=64 --rows 'own/*'
"""
import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from replicate import data as image_data
from replicate import evaluate as frozen
from replicate import trainer

# row -> (the paper's target test accuracy in percent, where, False if only remembered).  A row is named source-target/method.
PAPER = {
    "mnist-mnistm/source-only": (52.25, "Table 2", True),
    "mnist-mnistm/subspace-alignment": (56.90, "Table 2", True),
    "mnist-mnistm/dann": (76.66, "Table 2", True),
    "mnist-mnistm/train-on-target": (95.96, "Table 2", True),
    "mnist-mnistm/dann/gap-closed": (None, "Table 2, misprinted there", True),
    "mnist-mnistm/strength0": (None, "control", True),
    "mnist-mnistm/no-reversal": (None, "control", True),
    "mnist-mnistm/mmd": (None, "not in the paper", True),
    "mnist-mnistm/coral": (None, "not in the paper", True),
    "mnist-mnistm/finetuned10": (None, "not in the paper, 10 target labels a class", True),
    "mnist-mnistm/source-only/source-accuracy": (None, "source test", True),
    "mnist-mnistm/dann/source-accuracy": (None, "source test", True),
    "mnist-mnistm/dann/domain-accuracy": (None, "domain head, chance 50", True),
    "mnist-mnistm/source-only/a-distance": (None, "0 to 2", True),
    "mnist-mnistm/dann/a-distance": (None, "0 to 2", True),
    "mnist-usps/source-only": (None, "not in the paper", True),
    "mnist-usps/subspace-alignment": (None, "not in the paper", True),
    "mnist-usps/dann": (None, "not in the paper", True),
    "mnist-usps/train-on-target": (None, "not in the paper", True),
    "mnist-usps/dann/gap-closed": (None, "not in the paper", True),
    "mnist-usps/strength0": (None, "control", True),
    "mnist-usps/no-reversal": (None, "control", True),
    "mnist-usps/mmd": (None, "not in the paper", True),
    "mnist-usps/coral": (None, "not in the paper", True),
    "mnist-usps/finetuned10": (None, "not in the paper, 10 target labels a class", True),
    "mnist-usps/source-only/source-accuracy": (None, "source test", True),
    "mnist-usps/dann/source-accuracy": (None, "source test", True),
    "mnist-usps/dann/domain-accuracy": (None, "domain head, chance 50", True),
    "mnist-usps/source-only/a-distance": (None, "0 to 2", True),
    "mnist-usps/dann/a-distance": (None, "0 to 2", True),
    "usps-mnist/source-only": (None, "not in the paper", True),
    "usps-mnist/subspace-alignment": (None, "not in the paper", True),
    "usps-mnist/dann": (None, "not in the paper", True),
    "usps-mnist/train-on-target": (None, "not in the paper", True),
    "usps-mnist/dann/gap-closed": (None, "not in the paper", True),
    "usps-mnist/strength0": (None, "control", True),
    "usps-mnist/no-reversal": (None, "control", True),
    "usps-mnist/mmd": (None, "not in the paper", True),
    "usps-mnist/coral": (None, "not in the paper", True),
    "usps-mnist/finetuned10": (None, "not in the paper, 10 target labels a class", True),
    "usps-mnist/source-only/source-accuracy": (None, "source test", True),
    "usps-mnist/dann/source-accuracy": (None, "source test", True),
    "usps-mnist/dann/domain-accuracy": (None, "domain head, chance 50", True),
    "usps-mnist/source-only/a-distance": (None, "0 to 2", True),
    "usps-mnist/dann/a-distance": (None, "0 to 2", True),
    "moons/source-only": (None, "toy, a picture in the paper", True),
    "moons/dann": (None, "toy, a picture in the paper", True),
    "svhn-mnist/source-only": (54.90, "Table 2", True),
    "svhn-mnist/subspace-alignment": (59.32, "Table 2", True),
    "svhn-mnist/dann": (73.85, "Table 2", True),
    "svhn-mnist/train-on-target": (99.42, "Table 2", True),
    "svhn-mnist/dann/gap-closed": (42.6, "Table 2", True),
    "synnumbers-svhn/source-only": (86.74, "Table 2", True),
    "synnumbers-svhn/subspace-alignment": (86.44, "Table 2", True),
    "synnumbers-svhn/dann": (91.09, "Table 2", True),
    "synnumbers-svhn/train-on-target": (92.20, "Table 2", True),
    "synnumbers-svhn/dann/gap-closed": (79.7, "Table 2", True),
    "synsigns-gtsrb/source-only": (79.00, "Table 2", True),
    "synsigns-gtsrb/subspace-alignment": (81.65, "Table 2", True),
    "synsigns-gtsrb/dann": (88.65, "Table 2", True),
    "synsigns-gtsrb/train-on-target": (99.80, "Table 2", True),
    "synsigns-gtsrb/dann/gap-closed": (46.4, "Table 2", True),
    # your own images: shown when run
    "own/source-only": (None, "", True),
    "own/subspace-alignment": (None, "", True),
    "own/dann": (None, "", True),
    "own/train-on-target": (None, "", True),
    "own/dann/gap-closed": (None, "", True),
    "own/mmd": (None, "", True),
    "own/coral": (None, "", True),
    "own/finetuned10": (None, "", True),
    "own/source-only/source-accuracy": (None, "", True),
    "own/dann/source-accuracy": (None, "", True),
    "own/source-only/a-distance": (None, "", True),
    "own/dann/a-distance": (None, "", True),
}

# (id, row, sign, other row, margin, statement, where): for ">" row > other row + margin, for "<" row < other row - margin
CLAIMS = [
    ("adapts-to-mnistm", "mnist-mnistm/dann", ">", "mnist-mnistm/source-only", 10.0,
     "DANN beats source only on MNIST -> MNIST-M by 10 points", "Table 2"),
    ("beats-subspace-alignment", "mnist-mnistm/dann", ">", "mnist-mnistm/subspace-alignment", 0.0,
     "DANN beats subspace alignment on MNIST -> MNIST-M", "Table 2"),
    ("adapts-to-usps", "mnist-usps/dann", ">", "mnist-usps/source-only", 2.0,
     "DANN beats source only on MNIST -> USPS by 2 points", "ours"),
    ("adapts-from-usps", "usps-mnist/dann", ">", "usps-mnist/source-only", 2.0,
     "DANN beats source only on USPS -> MNIST by 2 points", "ours"),
    ("adapts-moons", "moons/dann", ">", "moons/source-only", 0.0, "DANN beats source only on the moons", "toy"),
    ("lowers-a-distance", "mnist-mnistm/dann/a-distance", "<", "mnist-mnistm/source-only/a-distance", 0.0,
     "DANN lowers the proxy A-distance of the features", "ours; the paper's figures are on Amazon reviews"),
    ("reversal-matters", "mnist-mnistm/no-reversal", "<", "mnist-mnistm/dann", 5.0,
     "Without reversal DANN loses at least 5 points", "the method"),
    ("no-reversal-no-gain", "mnist-mnistm/no-reversal", "<", "mnist-mnistm/source-only", -2.0,
     "Without reversal less than 2 points are gained on source only", "the method"),
    ("target-bounds", "mnist-mnistm/train-on-target", ">", "mnist-mnistm/dann", 0.0,
     "Training on the target bounds DANN", "Table 2"),
    ("target-bounds-usps", "mnist-usps/train-on-target", ">", "mnist-usps/dann", 0.0,
     "Training on the target bounds DANN on USPS", "ours"),
    ("target-bounds-from-usps", "usps-mnist/train-on-target", ">", "usps-mnist/dann", 0.0,
     "Training on the target bounds DANN from USPS", "ours"),
    ("target-bounds-few-labels", "mnist-mnistm/train-on-target", ">", "mnist-mnistm/finetuned10", 0.0,
     "Training on the target bounds ten labels a class", "ours"),
    ("keeps-source", "mnist-mnistm/dann/source-accuracy", ">", "mnist-mnistm/source-only/source-accuracy", -3.0,
     "DANN stays within 3 points of source only on source test", "ours"),
]

# (file suffix, title, x axis, y axis, {line: (row, scalar)}): learning curves of a row's record
CURVES = [
    ("learning", "DANN on MNIST -> MNIST-M, seed by seed mean", "step", "loss", {
        "label loss": ("mnist-mnistm/dann", "label"), "domain loss": ("mnist-mnistm/dann", "domain"),
        "label loss, source only": ("mnist-mnistm/source-only", "label")}),
]

PAIRS = {  # source and target set, network
    "mnist-mnistm": ("mnist", "mnist-m", "digits"), "mnist-usps": ("mnist", "usps", "digits"),
    "usps-mnist": ("usps", "mnist", "digits"), "svhn-mnist": ("svhn", "mnist", "svhn"),
    "synnumbers-svhn": ("synnumbers", "svhn", "svhn"), "synsigns-gtsrb": ("synsigns", "gtsrb", "signs"),
    "own": ("own source", "own target", "digits"),
}
NETWORKS = {  # side of the images; (channels, kernel, pooling) of each convolution; hidden units of label and domain head (Fig. 4)
    "digits": (28, ((32, 5, 2), (48, 5, 2)), (100, 100), (100,)),
    "svhn": (32, ((64, 5, 3), (64, 5, 3), (128, 5, 0)), (3072, 2048), (1024, 1024)),
    "signs": (40, ((96, 5, 2), (144, 3, 2), (256, 5, 2)), (512,), (1024, 1024)),
}
METHODS = ("source-only", "dann", "strength0", "no-reversal", "mmd", "coral")
LABELS = 10  # a class, for "finetuned10"


@dataclass
class Config:
    """Settings of a run; a step is one batch of source and one of target images."""
    seed: int
    dataset: str = "mnist"          # "embedded": drawn digits for MNIST, drawn blended ones for MNIST-M
    source: str = ""                # rows own/*: a data set or folder:DIR
    target: str = ""                # rows own/*: likewise, with the same classes
    mnist_m: str = ""               # a ready-made MNIST-M: folder with train/<class>/ and test/<class>/
    image_size: int = 28            # rows own/*: files are decoded to this side
    batch_size: int = 64            # paper: of each domain
    steps: int = 40000              # ours: the paper gives none
    usps_steps: int = 10000         # ours: USPS has 7,291 images
    finetune_steps: int = 1000      # ours
    moons_epochs: int = 500         # official code
    rate: float = 0.01              # paper, falling with progress
    finetune_rate: float = 0.001    # ours: about the rate that training ended with
    moons_rate: float = 0.1         # ours, for batches of 8; official code: 0.05 for single points
    momentum: float = 0.9           # paper
    strength: float = 1.0           # paper: lambda at the end
    moons_strength: float = 6.0     # official code
    mmd_weight: float = 1.0         # ours
    coral_weight: float = 1.0       # ours
    subspace: int = 40              # ours: the paper takes the best of 2 to 60 on target test
    precision: str = "bfloat16"     # ours: multiplications only; parameters and losses stay float32
    deterministic: bool = True      # ours
    shards: int = 8                 # ours: ranks divide it

    def __post_init__(self):
        trainer.require(self.dataset in ("mnist", "embedded"), f"dataset must be mnist or embedded, not '{self.dataset}'; for "
                        "your own images --set source=folder:DIR --set target=folder:DIR")
        trainer.require(self.batch_size != 1, "batch_size 1: at least 2 images of each domain are needed")
        trainer.check_settings(self, positive=("steps", "subspace"))
        trainer.require(self.image_size >= 16, f"image_size {self.image_size}: the network needs at least 16 pixels")
        trainer.require(bool(self.source) == bool(self.target), "source and target go together: --set source=folder:DIR "
                        "--set target=folder:DIR")


# Data
@dataclass
class Domains:
    """source and target: ImageSet of (N,3,S,S) uint8; mean: the joint mean of their training images, (3,S,S) in 0..1."""
    source: image_data.ImageSet
    target: image_data.ImageSet
    mean: torch.Tensor


def blend_digits(digits, patches):
    """|patch - digit| in every channel: digits (N,1,H,W) and patches (N,3,H,W), both uint8 -> uint8 (N,3,H,W).

    Signed in between: in uint8 a difference would wrap around and the digit vanish.
    """
    return (patches.short() - digits.short()).abs().to(torch.uint8)


def cut_patches(pictures, count, side, generator):
    """count patches (count,3,side,side) at random places of random pictures, a list of (3,H,W) uint8."""
    chosen = torch.randint(len(pictures), (count,), generator=generator)
    top, left = torch.rand(2, count, generator=generator)
    window = torch.arange(side)
    patches = torch.empty(count, 3, side, side, dtype=torch.uint8)
    of_picture = chosen.argsort(stable=True).split(chosen.bincount(minlength=len(pictures)).tolist())
    for picture, mine in zip(pictures, of_picture):
        rows, columns = ((place[mine] * (room - side + 1)).long()[:, None] + window
                         for place, room in zip((top, left), picture.shape[1:]))
        patches[mine] = picture[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
    return patches


def backgrounds(run):
    """(pictures for train, pictures for test, their name): BSDS500's train and val images, else CIFAR-10's train and test."""
    folder = image_data.data_root(run.data_argument) / "BSDS500" / "data" / "images"
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        parts = [[image_data.decode(path) for path in sorted((folder / part).glob("*.jpg"))] for part in ("train", "val")]
        if all(parts):
            return *parts, "BSDS500"
    run.say(f"no BSDS500 in {folder}: backgrounds from CIFAR-10")
    cifar = run.load("cifar10")
    return list(cifar.train.images.cpu()), list(cifar.test.images.cpu()), "CIFAR-10"


def make_mnist_m(run, mnist):
    """MNIST blended over patches, the same for every seed: an ImageSet with the digits, order and labels of `mnist`."""
    splits = []
    *pictures, origin = backgrounds(run)
    for part, split, available in zip(("train", "test"), (mnist.train, mnist.test), pictures):
        digits = split.images.cpu()
        patches = cut_patches(available, len(digits), digits.shape[-1], trainer.stream(0, f"mnist-m/{part}"))
        splits.append(image_data.Resident(blend_digits(digits, patches).to(run.device), split.labels))
    name = f"mnist-m on {origin}"
    sha256 = image_data.digest_of(tensor.cpu().numpy() for split in splits for tensor in (split.images, split.labels))
    run.sha256[name] = sha256
    return image_data.ImageSet(name, *splits, mnist.classes, sha256)


class DataMissing(Exception):
    """A pair's data cannot be had; the other pairs may go on."""


def load_set(run, name, size):
    """An ImageSet of (N,3,size,size): grey sets get three equal channels, smaller or larger ones are resized."""
    config = run.config
    if name.startswith("own "):
        loaded = run.load(getattr(config, name.split()[1]), size, False, name)
    elif config.dataset == "embedded":
        loaded = run.load("embedded-digits-blended" if name == "mnist-m" else "embedded-digits")
    elif name == "mnist-m":
        loaded = (run.load(f"folder:{config.mnist_m}", size, False, name) if config.mnist_m
                  else make_mnist_m(run, run.load("mnist")))
    elif name in ("synnumbers", "synsigns", "gtsrb"):
        loaded = run.load(f"folder:{image_data.data_root(run.data_argument) / name}", size, False, name)
    else:
        loaded = run.load(name)

    def fit_in(split):
        images = split.images
        if images.shape[-1] != size:
            images = torch.cat([F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().byte()
                                for part in images.split(5000)])
        return image_data.Resident(images.expand(-1, 3, -1, -1), split.labels)

    return image_data.ImageSet(loaded.name, fit_in(loaded.train), fit_in(loaded.test), loaded.classes, loaded.sha256,
                               class_names=loaded.class_names)


def load_data(run, pair):
    """The Domains of a pair; refused unless both have the same classes."""
    source_name, target_name, network = PAIRS[pair]
    size = run.config.image_size if pair == "own" else NETWORKS[network][0]
    source, target = load_set(run, source_name, size), load_set(run, target_name, size)
    odd = sorted(set(source.class_names) ^ set(target.class_names))
    trainer.require(not odd or not source.class_names or not target.class_names,
                    f"source and target have different classes: {', '.join(odd[:5])}")
    trainer.require(source.classes == target.classes, f"source has {source.classes} classes, target {target.classes}")
    total = sum(split.images.sum(0, dtype=torch.int64) for split in (source.train, target.train))
    return Domains(source, target, total / (255 * (len(source.train) + len(target.train))))


def without_labels(split):
    """The split with every label -1: the only form in which a target gets into training without labels."""
    return image_data.Resident(split.images, torch.full_like(split.labels, -1))


# The idea: reverse a gradient, more and more
class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, features, strength):
        context.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(context, gradient):
        return -context.strength * gradient, None


def reverse_gradient(features, strength):
    """The features as they are; on the way back their gradient is multiplied by -strength."""
    return _ReverseGradient.apply(features, strength)


def reversal_strength(progress):
    """lambda: 0 at progress 0, 0.9999 at progress 1."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def learning_rate(progress, initial=0.01):
    """mu: falls from `initial` to a sixth of it."""
    return initial / (1 + 10 * progress) ** 0.75


# Network
class DomainAdversarialNetwork(nn.Module):
    """Features, label head and domain head of Fig. 4.

    images (N,3,S,S) in 0..1 less the mean -> features (N,D), D = 768 for "digits" at 28 pixels; label_head: features ->
    hidden (N,H), classifier: hidden -> class scores; domain_head: features -> (N,) scores, above 0 for target.
    """

    def __init__(self, network="digits", classes=10, size=None):
        super().__init__()
        side, convolutions, label_units, domain_units = NETWORKS[network]
        layers, channels = [], 3
        for outputs, kernel, pooling in convolutions:
            layers += [nn.Conv2d(channels, outputs, kernel, padding=0 if network == "digits" else kernel // 2), nn.ReLU()]
            layers += [nn.MaxPool2d(pooling, 2)] if pooling else []
            channels = outputs
        self.features = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            width = self.features(torch.zeros(1, 3, size or side, size or side)).shape[1]
        self.label_head = nn.Sequential(*dense(width, label_units))
        self.classifier = nn.Linear(label_units[-1], classes)
        self.domain_head = nn.Sequential(*dense(width, domain_units), nn.Linear(domain_units[-1], 1), nn.Flatten(0))

    def forward(self, images):
        return self.classifier(self.label_head(self.features(images)))


def dense(inputs, units):
    """Fully connected layers with ReLU."""
    return [layer for before, after in zip((inputs, *units), units) for layer in (nn.Linear(before, after), nn.ReLU())]


# Objectives
def domain_loss(source_scores, target_scores):
    """Logistic loss of telling source (0) from target (1): mean over source plus mean over target, 2 ln 2 for a guess."""
    return F.softplus(source_scores).mean() + F.softplus(-target_scores).mean()


def maximum_mean_discrepancy(source, target):
    """Squared MMD of (N,D) and (M,D) with the sum of five Gaussian kernels, widths 1/4 to 4 times the mean squared distance
    (Long et al. 2015), which counts as 1 at least: where features are all but equal, narrower kernels would tear them apart."""
    joint = torch.cat([source, target])
    squares = joint.square().sum(1)
    distances = (squares[:, None] + squares[None] - 2 * joint @ joint.T).clamp_min(0)
    width = distances.detach().mean().clamp_min(1)
    kernel = sum(torch.exp(-distances / (width * factor)) for factor in (0.25, 0.5, 1, 2, 4))
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def coral_loss(source, target):
    """Squared Frobenius distance of the two covariances over 4 D^2 (Sun and Saenko 2016)."""
    def covariance(features):
        centred = features - features.mean(0)
        return centred.T @ centred / (len(features) - 1)
    return (covariance(source) - covariance(target)).square().sum() / (4 * source.shape[1] ** 2)


def adaptation_losses(model, source, target, labels, method, strength, config):
    """{"loss", "label"[, "domain"]} of one joint batch.

    source, target: (B,3,S,S) less the mean; labels (B,) of source.  strength: lambda at this step.  For "source-only" the
    target images run along and are dropped, so that "strength0" can be compared with it bit for bit.
    """
    features = model.features(torch.cat([source, target]))
    hidden = model.label_head(features)
    label = F.cross_entropy(model.classifier(hidden[:len(source)]).float(), labels)
    if method == "source-only":
        return {"loss": label, "label": label}
    if method in ("mmd", "coral"):
        with torch.autocast(hidden.device.type, enabled=False):  # differences of squares need all digits
            own, other = (trainer.rows_of_all_ranks(half) for half in hidden.float().split([len(source), len(target)]))
            domain = maximum_mean_discrepancy(own, other) if method == "mmd" else coral_loss(own, other)
        weight = strength * (config.mmd_weight if method == "mmd" else config.coral_weight)
        return {"loss": label + weight * domain, "label": label, "domain": domain}
    reversal = strength * {"dann": 1, "strength0": 0, "no-reversal": -1}[method]
    scores = model.domain_head(reverse_gradient(features, reversal)).float()
    domain = domain_loss(*scores.split([len(source), len(target)]))
    return {"loss": label + domain, "label": label, "domain": domain}


# Training.  Of `run` (replicate/trainer.py): fit loops over "set the rate, take objective(batch, step), step the optimiser";
# shuffled gives endless shuffled batches; wanted says which rows are still to do; record writes a result.
def build(run, pair, domains):
    """The untrained network of a pair: the same weights for every method."""
    run.seed_global(f"{pair}/init")
    size = domains.mean.shape[-1]
    model = DomainAdversarialNetwork(PAIRS[pair][2], domains.source.classes, size)
    return model.to(run.device, memory_format=torch.channels_last)


def centred(images, mean):
    """uint8 (N,3,S,S) -> float in 0..1 less the joint mean of both domains: one transform for both."""
    return (images.float() / 255 - mean).contiguous(memory_format=torch.channels_last)


def total_steps(config, pair):
    return config.usps_steps if "usps" in pair else config.steps


def train(run, pair, domains, method):
    """-> (network, seconds).  method: one of METHODS, or "train-on-target", which is source only with the domains exchanged."""
    config, steps, purpose = run.config, total_steps(run.config, pair), f"{pair}/{method}"
    model = build(run, pair, domains)
    labelled, other = domains.source.train, without_labels(domains.target.train)
    if method == "train-on-target":
        labelled, other, method = domains.target.train, without_labels(domains.source.train), "source-only"
    labelled = run.shuffled(labelled, config.batch_size, f"{pair}/source")
    other = run.shuffled(other, config.batch_size, f"{pair}/target")  # a stream of its own: no order in common

    def objective(batch, step):
        (source, labels), (target, _) = batch
        strength = config.strength * reversal_strength(step / steps)
        return adaptation_losses(model, centred(source, domains.mean), centred(target, domains.mean), labels, method, strength,
                                 config)

    anneal = PAIRS[pair][2] != "svhn"  # paper: no annealing for SVHN
    seconds = run.fit(
        purpose, model, objective, lambda first: zip(labelled(first), other(first)), steps=steps,
        optimizer=torch.optim.SGD(model.parameters(), lr=config.rate, momentum=config.momentum),
        learning_rate=lambda progress: learning_rate(progress if anneal else 0, config.rate),
        images_per_step=2 * config.batch_size,
        chance=math.log(domains.source.classes) + (2 * math.log(2) if method in ("dann", "strength0", "no-reversal") else 0))
    return model, seconds


def finetune(run, pair, domains, model):
    """-> (network, seconds): the source-only network, trained on with LABELS target images a class and the source."""
    config, model, purpose = run.config, copy.deepcopy(model), f"{pair}/finetuned{LABELS}"
    few = domains.target.train.take(frozen.random_per_class(domains.target.train.labels, LABELS, run.seed))
    source = run.shuffled(domains.source.train, config.batch_size, f"{purpose}/source")
    target = run.shuffled(few, config.batch_size, f"{purpose}/target")

    def objective(batch, step):
        return {"loss": sum(F.cross_entropy(model(centred(images, domains.mean)).float(), labels) for images, labels in batch)}

    seconds = run.fit(
        purpose, model, objective, lambda first: zip(source(first), target(first)), steps=config.finetune_steps,
        optimizer=torch.optim.SGD(model.parameters(), lr=config.finetune_rate, momentum=config.momentum),
        learning_rate=lambda progress: config.finetune_rate, images_per_step=2 * config.batch_size,
        chance=2 * math.log(domains.source.classes))
    return model, seconds


# Evaluation: target labels are read here only.  Every measure is a function of (run, model, domains, splits).
def accuracy(run, model, domains, split):
    """Percent of a split's images whose class is told right."""
    return frozen.accuracies(lambda images: {"class": model(centred(images, domains.mean))}, split)["class"]


def encode(model, domains, split, head=lambda features: features):
    """head(features) of all images of a split, (N,D)."""
    return frozen.extract_features(lambda images: head(model.features(centred(images, domains.mean))), split)


def domain_accuracy(run, model, domains, source, target):
    """Percent of the images of two splits whose domain is told right, mean of the two domains."""
    scores = [encode(model, domains, split, lambda features: model.domain_head(features)[:, None]) for split in (source, target)]
    return 50 * float((scores[0] < 0).float().mean() + (scores[1] > 0).float().mean())


def proxy_a_distance(source, target, seed):
    """2 (1 - 2 error) of a linear classifier of the domain: 0 for equal distributions, 2 for separable ones.

    source (N,D), target (M,D): features.  Logistic regression on one half, its error counted on the other.
    """
    count = min(len(source), len(target))
    source, target = (features[torch.randperm(len(features), generator=trainer.stream(seed, f"a-distance/{name}"))[:count]
                               .to(features.device)] for name, features in (("source", source), ("target", target)))
    x = torch.stack([source, target], 1).flatten(0, 1)  # alternating, so that both halves are balanced
    y = torch.arange(2, device=x.device).repeat(count)
    half = count // 2 * 2
    error = 1 - frozen.linear_probe(x[:half], y[:half], x[half:], y[half:], seed=seed) / 100
    return 2 * (1 - 2 * min(error, 1 - error))


def a_distance(run, model, domains, source, target):
    """Proxy A-distance of the features of two splits."""
    return proxy_a_distance(encode(model, domains, source), encode(model, domains, target), run.seed)


def align_subspaces(source, target, dimension):
    """(N,D), (M,D), both centred -> projections (D,d) for source and target: principal axes P_s and P_t of both domains,
    the source's turned onto the target's, P_s P_s^T P_t (Fernando et al. 2013)."""
    source_axes, target_axes = (frozen.principal_axes(features, dimension) for features in (source, target))
    return source_axes @ (source_axes.T @ target_axes), target_axes


def subspace_alignment(run, model, domains, source_split, target_split, test_split):
    """Target test accuracy of a linear classifier on the aligned last hidden layer of the source-only network."""
    source, target, test = (encode(model, domains, split, model.label_head)
                            for split in (source_split, target_split, test_split))
    source_mean, target_mean = source.mean(0), target.mean(0)
    source_projection, target_projection = align_subspaces(source - source_mean, target - target_mean, run.config.subspace)
    return frozen.linear_probe((source - source_mean) @ source_projection, source_split.labels,
                               (test - target_mean) @ target_projection, test_split.labels, seed=run.seed)


def adapt(run, pair):
    """Every row of a pair that is wanted and not recorded yet."""
    wanted = run.wanted(*(row for row in PAPER if row.startswith(f"{pair}/")))
    if not wanted:
        return
    run.sha256 = {}  # a record names the data of its own pair
    try:
        domains, networks = load_data(run, pair), {}
    except image_data.InputError as error:
        raise DataMissing(error) from None
    source, target = domains.source, domains.target

    def network(method):
        if method not in networks:
            if method.startswith("finetuned"):
                model, before = network("source-only")
                model, own = finetune(run, pair, domains, model)
                networks[method] = model, before + own
            else:
                networks[method] = train(run, pair, domains, method)
            networks[method][0].eval()
        return networks[method]

    # name of the row, network, measure, splits, its name
    table = [(method, method, accuracy, [target.test], "accuracy") for method in (*METHODS, "train-on-target", f"finetuned{LABELS}")]
    table += [("subspace-alignment", "source-only", subspace_alignment, [source.train, target.train, target.test], "accuracy"),
              ("dann/domain-accuracy", "dann", domain_accuracy, [source.test, target.test], "accuracy")]
    for method in ("source-only", "dann"):
        table += [(f"{method}/source-accuracy", method, accuracy, [source.test], "accuracy"),
                  (f"{method}/a-distance", method, a_distance, [source.test, target.test], "A-distance")]
    for name, method, function, splits, metric in table:
        row = f"{pair}/{name}"
        if row not in PAPER or not run.wanted(row):
            continue
        if method.startswith("finetuned") and int(target.train.labels.bincount(minlength=target.classes).min()) < LABELS:
            run.say(f"seed {run.seed}  {row}: left out, a class has fewer than {LABELS} target images")
            continue
        model, seconds = network(method)
        value, own = run.measure(lambda *splits: function(run, model, domains, *splits), *splits)
        run.record(row, value, steps=total_steps(run.config, pair) + run.config.finetune_steps * method.startswith("finetuned"),
                   seconds=seconds + own, metric=metric, history=run.history.get(f"{pair}/{method}") if name == method else None)
    known = [run.value(f"{pair}/{method}") for method in ("source-only", "dann", "train-on-target")]
    if run.wanted(f"{pair}/dann/gap-closed") and None not in known and known[0] != known[2]:
        run.record(f"{pair}/dann/gap-closed", gap_closed(*known), steps=total_steps(run.config, pair), seconds=0,
                   metric="percent of the gap")
    if pair == "mnist-mnistm" and run.seed == 0 and run.rank == 0 and not run.plan:
        figures(run, domains, {method: network(method)[0] for method in ("source-only", "dann") if method in networks})


def gap_closed(low, value, high):
    """Percent of the way from source only (low) to training on the target (high)."""
    return 100 * (value - low) / (high - low)


# The toy: two moons and the same two, turned
def two_moons(count, degrees, generator):
    """(count,2) points of two inter-twinning half circles of radius 2 with noise, turned about their centre; labels (count,)
    (official code)."""
    labels = torch.arange(count) % 2
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    points = torch.where(labels[:, None] == 0, upper, -upper) + 0.05 * torch.randn(count, 2, generator=generator)
    turn = math.radians(degrees)
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return 2 * points @ rotation.T, labels


class ShallowNetwork(nn.Module):
    """15 sigmoid units, softmax over two classes, one domain unit: the toy's network and its initialisation (official code)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, 15), nn.Sigmoid())
        self.classifier = nn.Linear(15, 2)
        self.domain_head = nn.Sequential(nn.Linear(15, 1), nn.Flatten(0))
        for layer in (self.features[0], self.classifier):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for parameter in self.domain_head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, points):
        return self.classifier(self.features(points))


def moons(run):
    """The toy's rows: 300 labelled points, 300 unlabelled ones turned by 35 degrees, 1000 turned ones to test on."""
    config, batch_size = run.config, 8
    wanted = run.wanted("moons/source-only", "moons/dann")
    run.sha256 = {}
    source, target, test = (
        image_data.Resident(*(tensor.to(run.device) for tensor in two_moons(count, degrees, run.stream(f"moons/{part}"))))
        for part, count, degrees in (("source", 300, 0), ("target", 300, 35), ("test", 1000, 35)))
    for row in wanted:
        run.seed_global("moons/init")
        model = ShallowNetwork().to(run.device)
        strength = config.moons_strength * (row == "moons/dann")  # constant, and of both players (official code)
        labelled = run.shuffled(source, batch_size, "moons/source")
        other = run.shuffled(without_labels(target), batch_size, "moons/target")

        def objective(batch, step):
            (points, labels), (others, _) = batch
            with torch.autocast(points.device.type, enabled=False):  # two players, few units: bfloat16 is too coarse
                features = model.features(torch.cat([points, others]))
                scores = model.domain_head(reverse_gradient(features, 1.0))
                label = F.cross_entropy(model.classifier(features[:len(points)]), labels)
                domain = domain_loss(*scores.split([len(points), len(others)]))
            return {"loss": label + strength * domain, "label": label, "domain": domain}

        steps, rate = config.moons_epochs * len(source) // batch_size, config.moons_rate
        seconds = run.fit(row, model, objective, lambda first: zip(labelled(first), other(first)), steps=steps,
                          optimizer=torch.optim.SGD(model.parameters(), lr=rate), learning_rate=lambda progress: rate,
                          images_per_step=2 * batch_size, chance=math.log(2) * (1 + 2 * strength))
        value, own = run.measure(lambda test: frozen.accuracies(lambda points: {"class": model(points)}, test)["class"], test)
        run.record(row, value, steps=steps, seconds=seconds + own)


def pairs_of(config):
    """The pairs that make sense for a config: your own domains alone; of drawn digits one pair; or all of the paper's."""
    if config.source:
        return ["own"]
    return ["mnist-mnistm", "moons"] if config.dataset == "embedded" else [p for p in (*PAIRS, "moons") if p != "own"]


def evaluate(run):
    """Every row that is wanted and not recorded yet."""
    missing = []
    for pair in pairs_of(run.config):
        try:
            moons(run) if pair == "moons" else adapt(run, pair)
        except DataMissing as error:  # the other pairs first
            missing.append(str(error))
    trainer.require(not missing, "; ".join(missing))


def figures(run, domains, networks):
    """Digits of both domains; what the features of both look like without (left) and with adaptation (right)."""
    pairs = torch.stack([domains.source.train.images[:32], domains.target.train.images[:32]], 1).flatten(0, 1)
    save_image(pairs.float() / 255, run.suite / f"{run.paper}_digits.png", nrow=16, padding=1)
    count = min(300, len(domains.source.test), len(domains.target.test))
    colors = torch.tensor([[0.1, 0.3, 0.9], [0.9, 0.2, 0.1]]).repeat_interleave(count, 0)  # source blue, target red
    order = torch.randperm(2 * count, generator=run.stream("figures"))  # neither domain covers the other
    panels = {"pca": [], "tsne": []}
    for model in networks.values():
        points = torch.cat([encode(model, domains, split.take(range(count))) for split in
                            (domains.source.test, domains.target.test)]).cpu()
        panels["pca"].append(frozen.scatter(frozen.project(points)[order], colors[order]))
        panels["tsne"].append(frozen.scatter(frozen.tsne(points, run.stream("tsne"))[order], colors[order]))
    for name, pictures in panels.items():
        if len(pictures) == 2:
            save_image(make_grid(pictures, padding=4), run.suite / f"{run.paper}_{name}.png")


def main(arguments=None):
    """Command line; returns the exit status."""
    def rows(config):
        return [row for row in PAPER if row.split("/")[0] in pairs_of(config)]
    return trainer.launch(__file__, Config, rows, evaluate, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
