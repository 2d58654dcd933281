"""Domain-Adversarial Training of Neural Networks (DANN)
Yaroslav Ganin, Evgeniya Ustinova, Hana Ajakan, Pascal Germain, Hugo Larochelle, Francois
Laviolette, Mario Marchand, Victor Lempitsky.  JMLR 17(59), 2016, arXiv 1505.07818.

Claim: features that do not show which domain they come from carry a classifier from labelled source
images to unlabelled target images.
Method: a domain is a kind of images, such as MNIST's digits on black, or digits on photographs.
Every batch holds labelled images of one, the source, and unlabelled ones of another, the target.
One feature extractor feeds two heads: the label head names the class of the source images, the
domain head tells source from target.  Between the features and the domain head lies a reversal
layer: it passes the features on as they are and multiplies their gradient by -lambda.  So the
domain head learns to tell the domains apart while the features learn to make that impossible.
lambda grows from 0 to 1 while the learning rate falls.  Of the methods compared here only
train-on-target and finetuned10 learn from labels of the target.

Deviations from the paper
1. MNIST-M is made here, seeded, from all of MNIST: train digits on BSDS500's train images, test
   digits on its val images (rows shared-backgrounds: on train images).  The authors' release
   (59,001 and 9,001 images) has a rim of 2 pixels around MNIST's 28 and digits made black and white
   before blending.  Pairs: mnist-released-resized; -middle, rim cut off; -binarised, source digits
   black and white, too; mnist-binarised: our own target, blended from black-and-white digits.
2. The paper gives no number of steps: 40,000 at scale full; six times as many for SVHN -> MNIST,
   where 150 epochs (172,000 steps) bring little.  Initialisation is torch's default.
3. Digits: convolutions without padding; the paper does not say.  SVHN and signs: padded, without
   dropout or a limit on the weights' norm; their layers' widths are from memory.
4. Subspace alignment: the paper picks the dimension by target test labels; ours is fixed.  Its
   linear SVM is logistic regression here, and the other rows keep their own last layer.
5. Proxy A-distance: the official code picks the penalty by test error, ours on a slice of train.
6. USPS (20 pixels in a border of 4, as MNIST's digits), the controls and finetuned10 are ours.
7. Left out: Office-31.  The shallow network, its moons and Amazon reviews are in dann_shallow.py.
8. Training multiplies in bfloat16 (float32 takes twice as long on a CPU).  Scale small trains less.

Run:  python -m papers.dann --scale small   (MNIST, USPS; one CPU core: 50 minutes a seed)
      python -m papers.dann --rows 'own/*' --set source=folder:A --set target=folder:B
Result, small: mnist-mnistm/dann 58.8 +- 3.9 against mnist-mnistm/source-only 45.3 (n = 3); paper,
full training: 76.66
"""
import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from replicate import data as image_data
from replicate import evaluate, scatter, trainer
from replicate.classes import match_classes
from replicate.launch import launch
from replicate.outputs import save_image


@dataclass
class Config:
    seed: int
    dataset: str = "mnist"          # "embedded": drawn digits for MNIST, blended ones for MNIST-M
    source: str = ""                # rows own/*: a data set or folder:DIR
    target: str = ""                # rows own/*: likewise, with the same classes
    image_size: int = 28            # rows own/*: files are decoded to this side
    batch_size: int = 64            # Sec. 5.2.2: of each domain
    steps: int = 40000              # ours: the paper gives none; svhn-mnist has six times as many
    usps_steps: int = 10000         # ours: USPS has 7,291 images
    finetune_steps: int = 1000      # ours
    rate: float = 0.01              # Sec. 5.2.2: falls with progress
    finetune_rate: float = 0.001    # ours: about the rate that training ended with
    momentum: float = 0.9           # Sec. 5.2.2
    strength: float = 1.0           # Sec. 5.2.2: lambda at the end
    subspace: int = 40              # ours: the paper takes the best of 2 to 60 on target test
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # ours
    deterministic: bool = True      # ours
    shards: int = 1                 # ours: divided among GPUs

    def __post_init__(self):
        own = "--set source=folder:DIR --set target=folder:DIR"
        assert self.dataset in ("mnist", "embedded"), (
            f"dataset must be mnist or embedded, not '{self.dataset}'; own images: {own}")
        assert bool(self.source) == bool(self.target), f"source and target go together: {own}"
        assert self.batch_size != 1, "batch_size 1: at least 2 images of each domain are needed"
        assert self.steps and self.subspace, "steps and subspace must be above 0"
        assert self.image_size >= 16, f"image_size {self.image_size}: at least 16 pixels are needed"


# ---- The idea: reverse the gradient, more and more ----

def reverse_gradient(features, strength):
    """The features as they are; on the way back their gradient is multiplied by -strength."""
    turned = features.view_as(features)  # so that other uses of the features keep their gradient
    if turned.requires_grad:
        turned.register_hook(lambda gradient: -strength * gradient)
    return turned


def reversal_strength(progress):
    """lambda, which grows from 0 at progress 0 to 0.9999 at progress 1 (Sec. 5.2.2)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def learning_rate(progress, initial=0.01):
    """mu, which falls from `initial` to a sixth of it (Sec. 5.2.2)."""
    return initial / (1 + 10 * progress) ** 0.75


# ---- Networks of Fig. 4: the layers of features, label head and domain head ----
# Pooling comes before ReLU: this gives the same values and has less to do.

def linear_layers(*units):
    """Fully connected layers from each number of units to the next, with ReLU between them."""
    layers = [nn.Linear(before, after) for before, after in zip(units, units[1:])]
    return [part for layer in layers for part in (layer, nn.ReLU())][:-1]


def digit_layers(classes, side):
    """MNIST, MNIST-M, USPS: 48 maps of 4 x 4 (768 features) from 28 x 28 pixels."""
    size = 48 * (((side - 4) // 2 - 4) // 2) ** 2  # a convolution takes 4 pixels, pooling halves
    features = [nn.Conv2d(3, 32, 5), nn.MaxPool2d(2, 2), nn.ReLU(),
                nn.Conv2d(32, 48, 5), nn.MaxPool2d(2, 2), nn.ReLU(), nn.Flatten()]
    return features, linear_layers(size, 100, 100, classes), linear_layers(size, 100, 1)


def svhn_layers(classes, side):
    """SVHN and synthetic numbers: 128 maps of 7 x 7 (6,272 features) from 32 x 32 pixels."""
    features = [nn.Conv2d(3, 64, 5, padding=2), nn.MaxPool2d(3, 2), nn.ReLU(),
                nn.Conv2d(64, 64, 5, padding=2), nn.MaxPool2d(3, 2), nn.ReLU(),
                nn.Conv2d(64, 128, 5, padding=2), nn.ReLU(), nn.Flatten()]
    return features, linear_layers(6272, 3072, 2048, classes), linear_layers(6272, 1024, 1024, 1)


def sign_layers(classes, side):
    """Traffic signs: 256 maps of 5 x 5 (6,400 features) from 40 x 40 pixels."""
    features = [nn.Conv2d(3, 96, 5, padding=2), nn.MaxPool2d(2, 2), nn.ReLU(),
                nn.Conv2d(96, 144, 3, padding=1), nn.MaxPool2d(2, 2), nn.ReLU(),
                nn.Conv2d(144, 256, 5, padding=2), nn.MaxPool2d(2, 2), nn.ReLU(), nn.Flatten()]
    return features, linear_layers(6400, 512, classes), linear_layers(6400, 1024, 1024, 1)


class DomainAdversarialNetwork(nn.Module):
    """uint8 images (N,3,S,S) -> class scores (N,K).

    layers: digit_layers, svhn_layers or sign_layers; mean: (3,S,S) in 0..1, which is subtracted.
    label_head: features (N,D) -> last hidden layer (N,H); classifier: (N,H) -> class scores;
    domain_head: features -> scores (N,), above 0 where an image looks like the target's.
    """

    def __init__(self, layers, classes, mean):
        super().__init__()
        features, (*hidden, classifier), domain_head = layers(classes, mean.shape[-1])
        self.register_buffer("mean", mean, persistent=False)
        self.features = nn.Sequential(*features)
        self.label_head, self.classifier = nn.Sequential(*hidden), classifier
        self.domain_head = nn.Sequential(*domain_head, nn.Flatten(0))

    def encode(self, images):
        """-> features (N,D), the same for both domains."""
        images = images.float() / 255 - self.mean
        return self.features(images.contiguous(memory_format=torch.channels_last))

    def forward(self, images):
        return self.classifier(self.label_head(self.encode(images)))


# ---- Objective ----

def domain_loss(source_scores, target_scores):
    """Logistic loss of telling source (0) from target (1) by scores (N,); at chance 2 ln 2."""
    return F.softplus(source_scores).mean() + F.softplus(-target_scores).mean()


# What lambda is multiplied by: with -1 features help the domain head, as without a reversal layer.
REVERSALS = {"dann": 1, "no-reversal": -1}


def adaptation_losses(model, source, target, labels, method, strength):
    """{"loss", "label" and, where the method adapts, "domain"} of one joint batch.

    source, target: images; labels: (B,) of the source; method: one of METHODS; strength: lambda at
    this step.  Methods that do not adapt leave the target out.
    """
    adapts, count = method in REVERSALS, len(source)
    features = model.encode(torch.cat([source, target]) if adapts else source)
    scores = model.classifier(model.label_head(features[:count]))
    label = F.cross_entropy(scores.float(), labels)
    if not adapts:
        return {"loss": label, "label": label}
    turned = reverse_gradient(features, strength * REVERSALS[method])
    domain = domain_loss(*model.domain_head(turned).float().tensor_split([count]))
    return {"loss": label + domain, "label": label, "domain": domain}


def make_optimizer(config, model):
    """SGD with momentum; run.fit sets the learning rate at every step."""
    return torch.optim.SGD(model.parameters(), momentum=config.momentum, fused=True)


# ---- Pre-training ----

PAIRS = {  # name -> source, target, (a second target, to test on,) layers of the network, side
    "mnist-mnistm": ("mnist", "mnist-m", "mnist-m sharedbackgrounds", digit_layers, 28),
    "mnist-binarised": ("mnist", "mnist-m binarised", digit_layers, 28),
    "mnist-released-resized": ("mnist", "released", digit_layers, 28),
    "mnist-released-middle": ("mnist", "released middle", digit_layers, 28),
    "mnist-released-binarised": ("mnist binarised", "released middle", digit_layers, 28),
    "mnist-usps": ("mnist", "usps", digit_layers, 28),
    "usps-mnist": ("usps", "mnist", digit_layers, 28),
    "svhn-mnist": ("svhn", "mnist", svhn_layers, 32),
    "synnumbers-svhn": ("synnumbers", "svhn", svhn_layers, 32),
    "synsigns-gtsrb": ("synsigns", "gtsrb", sign_layers, 40),
    "own": ("own source", "own target", digit_layers, None)}
METHODS = ("source-only", *REVERSALS, "train-on-target")


class Domains(NamedTuple):
    source: image_data.ImageSet     # uint8 images (N,3,S,S)
    target: image_data.ImageSet     # likewise
    mean: torch.Tensor              # (3,S,S) in 0..1, of the training images of both
    shared: image_data.Resident | None = None  # a second test split of the target


def hide_labels(split):
    """The split with every label -1: the only form in which a target gets into training."""
    return image_data.Resident(split.images, torch.full_like(split.labels, -1))


def in_pairs(run, splits):
    """Batches for run.fit, each of a batch of both splits.  splits: {name of its order: split}."""
    parts = [run.shuffled(split, run.config.batch_size, name) for name, split in splits.items()]
    return lambda first_step: zip(*(part(first_step) for part in parts))


def pretrain(run, data, config, name):
    """-> Trained DomainAdversarialNetwork, the final one.  name: <pair>/<method>; data: Domains."""
    pair, method = name.split("/")
    (source, *_, layers, side), classes = PAIRS[pair], data.source.classes
    constant = pair == "svhn-mnist"  # Sec. 5.2.2: the rate does not fall
    steps = config.usps_steps if "usps" in pair else config.steps * (6 if constant else 1)
    # Weights and the source's order start the same for every method and for all pairs with the
    # same source, network and side, so that their differences are paired by seed
    start = f"{source.split()[0]}/{layers.__name__}/{side}"
    model = run.build(DomainAdversarialNetwork, layers, classes, data.mean, purpose=f"{start}/init")
    labelled, other = data.source.train, hide_labels(data.target.train)
    if method == "train-on-target":  # source only, with the domains exchanged
        labelled, other = data.target.train, hide_labels(data.source.train)

    def loss(batch, step):
        (images, labels), (others, _) = batch
        strength = config.strength * reversal_strength(step / steps)
        return adaptation_losses(model, images, others, labels, method, strength)

    batches = in_pairs(run, {f"{start}/source": labelled, f"{pair}/target": other})
    return run.fit(name, model, loss, batches, steps=steps, optimizer=make_optimizer(config, model),
                   rate=lambda progress: learning_rate(0 if constant else progress, config.rate),
                   chance=math.log(classes) + (2 * math.log(2) if method in REVERSALS else 0))


# ---- Evaluation ----

def accuracy(run, model, test):
    """Percent of the images that are classified correctly."""
    return evaluate.accuracies(lambda images: {"class": model(images)}, test)["class"]


def encode_split(model, split, head=nn.Identity()):
    """head(features) (N,D) of all images of a split; by default the features themselves."""
    return evaluate.extract_features(lambda images: head(model.encode(images)), split)


def domain_accuracy(run, model, source, target):
    """Percent of the images whose domain is recognised, the mean of the two domains."""
    of_source, of_target = (encode_split(model, split, model.domain_head[:-1])
                            for split in (source, target))
    return 50 * float((of_source < 0).float().mean() + (of_target > 0).float().mean())


def proxy_a_distance(source, target, seed):
    """2 (1 - 2 error) of a linear classifier that tells features (N,D) of the source from those
    (M,D) of the target, fitted on half of them: 0 where they are alike, 2 where they are apart."""
    count, parts = min(len(source), len(target)), []
    for features, name in ((source, "source"), (target, "target")):
        order = torch.randperm(len(features), generator=trainer.stream(seed, f"a-distance/{name}"))
        parts.append(features[order[:count].to(features.device)])
    x = torch.stack(parts, 1).flatten(0, 1)  # alternating, so that both halves are balanced
    y = torch.arange(2, device=x.device).repeat(count)
    half = count // 2 * 2
    error = 1 - evaluate.linear_probe(x[:half], y[:half], x[half:], y[half:], seed=seed) / 100
    return 2 * (1 - 2 * min(error, 1 - error))


def a_distance(run, model, source, target):
    """Proxy A-distance of the features of two splits."""
    return proxy_a_distance(encode_split(model, source), encode_split(model, target), run.seed)


def principal_axes(features, count):
    """(N,D), centred -> (D,count), orthonormal: the directions of the largest variance."""
    vectors = torch.linalg.eigh((features.T @ features).double()).eigenvectors
    return vectors[:, -count:].to(features.dtype)


def align_subspaces(source, target, dimension):
    """Centred (N,D), (M,D) -> projections (D,d) of both: principal axes P_t of the target, and
    those of the source turned onto them, P_s P_s^T P_t (Fernando et al. 2013)."""
    source_axes, target_axes = (principal_axes(x, dimension) for x in (source, target))
    return source_axes @ (source_axes.T @ target_axes), target_axes


def subspace_alignment(run, model, source, target, test):
    """Accuracy of a linear classifier on aligned last hidden layers, fitted on source labels."""
    x_source, x_target, x_test = (encode_split(model, split, model.label_head)
                                  for split in (source, target, test))
    x_source, mean = x_source - x_source.mean(0), x_target.mean(0)
    source_axes, target_axes = align_subspaces(x_source, x_target - mean, run.config.subspace)
    return evaluate.linear_probe(x_source @ source_axes, source.labels,
                                 (x_test - mean) @ target_axes, test.labels, seed=run.seed)


def finetune(run, data, config, name, model, count=10):
    """-> Trained: the source-only model, trained on with `count` target images of each class."""
    model, target = copy.deepcopy(model), data.target
    few = target.train.take(evaluate.random_per_class(target.train.labels, count, run.seed))

    def loss(batch, step):
        return {"loss": sum(F.cross_entropy(model(x).float(), labels) for x, labels in batch)}

    batches = in_pairs(run, {f"{name}/source": data.source.train, f"{name}/target": few})
    return run.fit(name, model, loss, batches, steps=config.finetune_steps,
                   rate=lambda progress: config.finetune_rate,
                   optimizer=make_optimizer(config, model), chance=2 * math.log(target.classes))


def gap_closed(low, value, high):
    """Percent of the way from source only (low) to training on the target (high)."""
    return 100 * (value - low) / (high - low)


def reproduce_pair(run, data, pair):
    """The rows of one pair; those that are not in the YAML are not wanted."""
    config, source, target = run.config, data.source, data.target
    measures = {method: (method, accuracy, target.test) for method in METHODS}
    measures |= {  # row -> the method whose network is measured, the measure, the splits it sees
        "subspace-alignment": ("source-only", subspace_alignment, source.train,
                               hide_labels(target.train), target.test),
        "dann/domain-accuracy": ("dann", domain_accuracy, source.test, target.test)}
    for method in ("source-only", "dann"):
        measures |= {f"{method}/source-accuracy": (method, accuracy, source.test),
                     f"{method}/a-distance": (method, a_distance, source.test, target.test),
                     f"{method}/shared-backgrounds": (method, accuracy, data.shared)}
    for name, (method, measure, *splits) in measures.items():
        if run.wants(row := f"{pair}/{name}"):
            trained = pretrain(run, data, config, f"{pair}/{method}")
            other = {"source-only": "dann", "dann": "source-only"}.get(name)
            if pair == "mnist-mnistm" and run.seed == 0 and run.value(f"{pair}/{other}"):
                figures(run, data, pair)  # of both; before the row, so that none is ever missing
            run.record(row, partial(measure, run, trained.model), *splits, after=[trained])
    if run.wants(row := f"{pair}/finetuned10"):
        if target.train.labels.bincount(minlength=target.classes).min() < 10:
            run.record(row, None)  # leaves the row out
        else:
            base = pretrain(run, data, config, f"{pair}/source-only")
            tuned = finetune(run, data, config, row, base.model)
            run.record(row, partial(accuracy, run, tuned.model), target.test, after=[base, tuned])
    ends = [run.value(f"{pair}/{name}") for name in ("source-only", "dann", "train-on-target")]
    if run.wants(row := f"{pair}/dann/gap-closed") and all(ends):
        low, value, high = (record["value"] for record in ends)
        if low != high:
            run.record(row, partial(gap_closed, low, value, high))


def reproduce(run):
    """Every row of one seed; a pair whose data are missing does not stop the others."""
    root, released = image_data.data_root(run.data_folder), "mnist-released-*"
    if run.wants(released) and "mnist-m" not in image_data.on_disk(root):
        run.leave_out(released, f"{root / 'mnist_m'} does not hold the released set", optional=True)
    for pair in PAIRS:
        if run.wants(f"{pair}/*"):
            try:
                data = load_domains(run, pair)
            except image_data.InputError as error:
                run.leave_out(f"{pair}/*", error)
            else:
                reproduce_pair(run, data, pair)


# ---- Data ----

def blend_digits(digits, patches):
    """|patch - digit| in every channel: uint8 digits (N,1,H,W), patches (N,3,H,W) -> (N,3,H,W)."""
    return (patches.short() - digits.short()).abs().to(torch.uint8)  # uint8 would wrap around


def binarise(digits):
    """uint8 digits of any shape in black and white: all that is not black becomes white."""
    return 255 * digits.gt(0).byte()


def cut_backgrounds(pictures, count, side, generator):
    """(count,3,side,side) from random places of random pictures, a list of (3,H,W) uint8."""
    chosen = torch.randint(len(pictures), (count,), generator=generator)
    places = torch.rand(2, count, generator=generator)
    room = torch.tensor([picture.shape[1:] for picture in pictures]) - side + 1  # rows, columns
    corners = (places * room[chosen].T).long().T.tolist()
    return torch.stack([pictures[number][:, top:top + side, left:left + side]
                        for number, (top, left) in zip(chosen.tolist(), corners)])


def make_mnist_m(run, mnist, variant=""):
    """MNIST on BSDS500's train and val pictures, else on CIFAR-10's; the same for every seed.
    Variant binarised: digits are black and white; sharedbackgrounds: test has train's pictures."""
    origin, folder = "BSDS500", image_data.data_root(run.data_folder) / "BSDS500/data/images"
    backgrounds = [[image_data.decode(path) for path in sorted((folder / part).glob("*.jpg"))]
                   for part in ("train", "val")]
    if not all(backgrounds):
        run.say(f"no BSDS500 in {folder}: backgrounds from CIFAR-10")
        origin, cifar = "CIFAR-10", run.load("cifar10")
        backgrounds = [list(split.images.cpu()) for split in (cifar.train, cifar.test)]
    if variant == "sharedbackgrounds":
        backgrounds[1] = backgrounds[0]
    made = []
    for part, split, pictures in zip(("train", "test"), (mnist.train, mnist.test), backgrounds):
        digits, generator = split.images.cpu(), trainer.stream(0, f"mnist-m/{part}")
        digits = binarise(digits) if variant == "binarised" else digits
        patches = cut_backgrounds(pictures, len(digits), digits.shape[-1], generator)
        made.append(image_data.Resident(blend_digits(digits, patches).to(run.device), split.labels))
    called = " ".join(["mnist-m", *variant.split(), "on", origin])
    sha256 = run.sha256[called] = image_data.digest_of(
        tensor.cpu().numpy() for split in made for tensor in (split.images, split.labels))
    return image_data.ImageSet("mnist-m", *made, mnist.classes, sha256)


def load_set(run, name, side):
    """The ImageSet of that name in PAIRS: images (N,3,side,side), grey ones in three channels."""
    config, root, cut, border = run.config, image_data.data_root(run.data_folder), 0, 0
    folders = {each: f"folder:{root / each}" for each in ("synnumbers", "synsigns", "gtsrb")}
    folders |= {"own source": config.source, "own target": config.target}
    kind, *variant = name.split()
    if config.dataset == "embedded" and kind != "own":
        loaded = run.load("embedded-digits-blended" if kind == "mnist-m" else "embedded-digits")
    elif name in folders:
        loaded = run.load(folders[name], side, False, called=name)
    elif kind == "mnist-m":
        loaded = make_mnist_m(run, run.load("mnist"), *variant)
    elif kind == "released":
        loaded, cut = run.load("mnist-m", called="mnist-m as released"), 2 if variant else 0
    else:
        loaded, border = run.load(kind), 4 if kind == "usps" else 0  # as around MNIST's digits
    for split in (loaded.train, loaded.test):
        images = binarise(split.images) if name == "mnist binarised" else split.images
        parts = [F.interpolate(part.float(), side - 2 * border, mode="bilinear", antialias=True)
                 for part in F.pad(images, 4 * [-cut]).split(5000)]
        images = torch.cat([part.round().byte() for part in parts])
        split.images = F.pad(images, 4 * [border]).expand(-1, 3, -1, -1)
    return loaded


def load_domains(run, pair):
    """The Domains of a pair; InputError where they have different classes."""
    *names, _, side = PAIRS[pair]
    names = names[:2] if run.config.dataset == "embedded" else names
    run.sha256 = {}  # a record names the data of its own pair
    source, target, *more = (load_set(run, name, side or run.config.image_size) for name in names)
    match_classes(source, target)
    total = sum(each.train.images.sum(0, dtype=torch.int64) for each in (source, target))
    mean = total / (255 * (len(source.train) + len(target.train)))
    return Domains(source, target, mean, *(each.test for each in more))


# ---- Figures ----

def figures(run, data, pair):
    """Digits of both domains; source (blue) and target (red) features without and with DANN."""
    digits = torch.stack([data.source.train.images[:32], data.target.train.images[:32]], 1)
    tests = data.source.test, data.target.test
    count = min(300, *map(len, tests))
    colors = torch.tensor([[0.1, 0.3, 0.9], [0.9, 0.2, 0.1]]).repeat_interleave(count, 0)
    order = torch.randperm(2 * count, generator=run.stream("figures"))  # neither covers the other
    plots = []
    for method in ("source-only", "dann"):
        model = pretrain(run, data, run.config, f"{pair}/{method}").model
        x = torch.cat([encode_split(model, test.take(range(count))) for test in tests]).cpu()
        x = (x - x.mean(0)).double()
        points = scatter.tsne(x, x @ principal_axes(x, 2), run.stream("tsne")).float()
        plots.append(scatter.draw(points[order], colors[order]))
    file = f"{run.suite}/{run.paper}"
    save_image(digits.flatten(0, 1).float() / 255, f"{file}_digits.png", nrow=16, padding=1)
    save_image(plots, f"{file}_tsne.png", padding=4)


def rows(config):
    """Globs of the rows that settings allow; [!s]: drawn digits have no row shared-backgrounds."""
    drawn, others = ["mnist-mnistm/*[!s]"], [f"{pair}/*" for pair in PAIRS if pair != "own"]
    return ["own/*"] if config.source else drawn if config.dataset == "embedded" else others


def main(arguments=None):
    return launch(__file__, Config, reproduce, arguments, rows=rows)


if __name__ == "__main__":
    raise SystemExit(main())
