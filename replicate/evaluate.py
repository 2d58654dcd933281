"""Protocols on features, the same for every paper.  Accuracies are in percent.

No test label is seen before the final count: the linear probe chooses its penalty on train.
"""
import contextlib
import functools
import hashlib
import warnings

import torch
from torch import nn
from torch.nn import functional as F


def in_order(split, batch_size=500):
    """Yield (images, labels) of a split, in order."""
    yield from split.batches(torch.arange(len(split)).split(batch_size))


@torch.no_grad()
def extract_features(encoder, images, batch_size=500):
    """encoder(images (B,C,H,W)) -> float32 (N,D), any further dimensions flattened.

    images: a tensor (N,C,H,W) or a split of replicate.data.  A module is in eval mode meanwhile.
    OverflowError where the features hold NaN or infinity, with which any probe would be a guess.
    """
    training = getattr(encoder, "training", False)
    if training:
        encoder.eval()
    batches = images.split(batch_size) if torch.is_tensor(images) else \
        (batch for batch, _ in in_order(images, batch_size))
    features = torch.cat([encoder(batch).flatten(1).float() for batch in batches])
    if not features.isfinite().all():
        raise OverflowError("features hold NaN or infinity")
    if training:
        encoder.train()
    return features


@torch.no_grad()
def accuracies(predict, split, batch_size=500):
    """predict(images) -> {name: scores (B,K)}; returns {name: percent of the split that its scores
    classify correctly}."""
    correct = {}
    for images, labels in in_order(split, batch_size):
        for name, scores in predict(images).items():
            correct[name] = correct.get(name, 0) + (scores.argmax(1) == labels).sum()
    return {name: 100.0 * float(count) / len(split) for name, count in correct.items()}


@contextlib.contextmanager
def frozen(module):
    """Within this block nothing may change a weight or buffer of the module: checked at the end."""
    def digest():
        state = b"".join(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                         for t in module.state_dict().values())
        return hashlib.sha256(state).digest()
    before = digest()
    yield module.eval().requires_grad_(False)
    assert digest() == before, "the frozen network has moved"


# Probes on features (N,D) with labels (N,)
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)


def linear_probe(train_x, train_y, test_x, test_y, penalties=PENALTIES, iterations=20, seed=0):
    """Multinomial logistic regression on standardised features; test accuracy.

    The L2 penalty is chosen on a tenth of train: from the largest on, each fit starts from the one
    before, until the accuracy falls.  Then the model is fitted on all of train.  Where fewer than
    ten samples a class are held out, the middle penalty is taken.  A UserWarning says when the
    first or the last penalty is the best.
    """
    train_y, test_y = train_y.to(train_x.device), test_y.to(test_x.device)
    scale = 1.0 / train_x.std(0).clamp_min(1e-6)
    mean = train_x.mean(0)
    train_x, test_x = (train_x - mean) * scale, (test_x - mean) * scale
    classes, penalty, model = int(train_y.max()) + 1, penalties[len(penalties) // 2], None
    order = shuffled_indices(train_y, seed)
    held, kept = order[:len(order) // 10], order[len(order) // 10:]
    if len(penalties) > 1 and len(held) >= 10 * classes:
        part, held = (train_x[kept], train_y[kept]), (train_x[held], train_y[held])
        best, now = -1.0, None
        for each in penalties:
            now = _fit_logistic(*part, classes, each, iterations, now)
            accuracy = _accuracy(now, *held)
            if accuracy < best:
                break
            if accuracy > best:
                best, penalty, model = accuracy, each, now
        if penalty in (penalties[0], penalties[-1]):
            warnings.warn(f"linear probe: the best penalty, {penalty:g}, is the last of those "
                          "tried", stacklevel=2)
    model = _fit_logistic(train_x, train_y, classes, penalty, iterations, model)
    return _accuracy(model, test_x, test_y)


def _accuracy(model, x, y):
    return 100.0 * float((F.linear(x, *model).argmax(1) == y).float().mean())


def _fit_logistic(x, y, classes, penalty, iterations, start=None):
    """-> weight (K,D), bias (K,), by at most so many steps of L-BFGS from `start` or from zero."""
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, tolerance_change=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y)
        loss = loss + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


@torch.no_grad()
def knn_accuracy(train_x, train_y, test_x, test_y, k=20, temperature=0.07, batch_size=500):
    """Votes of the k nearest by cosine, weighted by exp(similarity / temperature) (Wu et al. 2018);
    percent of correct ones."""
    train_y, test_y = train_y.to(train_x.device), test_y.to(test_x.device)
    train_x, classes, correct = F.normalize(train_x.float(), dim=1), int(train_y.max()) + 1, 0
    for x, y in zip(test_x.split(batch_size), test_y.split(batch_size)):
        similarity = F.normalize(x.float(), dim=1) @ train_x.T
        similarity, nearest = similarity.topk(min(k, len(train_x)), dim=1)  # (B, k)
        votes = F.one_hot(train_y[nearest], classes) * (similarity / temperature).exp().unsqueeze(2)
        correct += int((votes.sum(1).argmax(1) == y).sum())
    return 100.0 * correct / len(test_x)


def low_shot(train_x, train_y, test_x, test_y, shots, seed=0):
    """{k: linear-probe accuracy with k labelled samples a class, drawn from train by the seed}."""
    parts = {k: random_per_class(train_y, k, seed) for k in shots}
    return {k: linear_probe(train_x[part], train_y[part], test_x, test_y, seed=seed)
            for k, part in parts.items()}


def blocks_and_kinds(rows):
    """Rows .../<layer><number>/<linear, knn or labels<number>> -> the `rows` that `probe` takes."""
    parts = {row: row.split("/")[-2:] for row in rows}
    return {row: (int(layer[-1]), labels_of(row) or kind) for row, (layer, kind) in parts.items()}


def probe(maps, rows, train, test, cells=4, seed=0):
    """{row: accuracy} of plain probes on feature maps averaged to at most cells x cells.

    maps(images) -> [map of block 1, ...]; rows: {row: (block, "linear", "knn" or labels a class)}.
    A row whose labels are too few gets None.
    """
    needed, values = sorted({block for block, _ in rows.values()}), {}
    together = hasattr(train, "images")  # of a streamed set not all blocks' features would fit
    for blocks in [needed] if together else [[block] for block in needed]:
        def encode(images):
            chosen = [made for number, made in enumerate(maps(images), 1) if number in blocks]
            return [F.adaptive_avg_pool2d(made.float(), min(*made.shape[2:], cells)).flatten(1)
                    for made in chosen]

        with torch.no_grad():
            widths = [features.shape[1] for features in encode(next(in_order(test, 2))[0])]
        train_x, test_x = (extract_features(lambda images: torch.cat(encode(images), 1), split)
                           .split(widths, 1) for split in (train, test))
        for row, kind in [(row, kind) for row, (block, kind) in rows.items() if block in blocks]:
            place, y = blocks.index(rows[row][0]), train.labels
            x, *held_out = train_x[place], test_x[place], test.labels
            if kind == "linear":
                values[row] = linear_probe(x, y, *held_out, seed=seed)
            elif kind == "knn":
                values[row] = knn_accuracy(x, y, *held_out)
            else:
                enough = int(y.bincount().min()) >= kind
                values[row] = low_shot(x, y, *held_out, [kind], seed)[kind] if enough else None
    return values


@torch.no_grad()
def recalibrate(module, forward, split, count=500):
    """Batch-norm statistics of forward(images) on `count` images of a split of train; eval mode.

    OverflowError where they are not finite, as after a training that has run away.
    """
    norms = [m for m in module.train().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    spread = torch.linspace(0, len(split) - 1, min(count, len(split))).long()
    forward(next(split.batches([spread]))[0])
    for layer, momentum in zip(norms, momenta):
        layer.momentum = momentum
        if not layer.running_var.isfinite().all():
            raise OverflowError("batch-norm statistics hold NaN or infinity")
    return module.eval()


# Few labels
def shuffled_indices(labels, seed):
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order.to(labels.device)


def first_per_class(labels, count):
    """Indices of the first `count` samples of every class; ValueError where a class has fewer."""
    chosen = [torch.nonzero(labels == c).flatten()[:count] for c in range(int(labels.max()) + 1)]
    if min(map(len, chosen)) < count:
        raise ValueError(f"a class has fewer than {count} samples")
    return torch.cat(chosen).sort().values


def random_per_class(labels, count, seed):
    """The same, `count` samples drawn by the seed."""
    order = shuffled_indices(labels, seed)
    return order[first_per_class(labels[order], count)]


# Training on labels
class Classifier(nn.Module):
    """The last of encoder.maps(images), averaged, and a linear layer that starts at zero."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.linear = encoder, nn.Linear(encoder.channels, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images):
        return self.linear(self.encoder.maps(images)[-1].mean((2, 3)))


def mirror_and_shift(images, generator):
    """(N,C,S,S) -> the same, each mirrored at random and shifted by up to an eighth of its side."""
    count, side, device = len(images), images.shape[-1], images.device
    flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
    most = side // 8
    shift = torch.randint(-most, most + 1, (2, count, 1), generator=generator, device=device)
    positions = torch.arange(side, device=device)
    rows = (positions + shift[0]).clamp(0, side - 1)
    columns = torch.where(flip, side - 1 - positions, positions)
    columns = (columns + shift[1]).clamp(0, side - 1)
    samples = torch.arange(count, device=device)[:, None, None]
    return images[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train_on_labels(run, data, name, model, see, labels=None, **fit):
    """Train all of a classifier -> Trained.  see(uint8 images): what it sees, mirrored and shifted.

    labels: so many of each class, drawn by the seed; None: all.  fit: for run.fit and `batch_size`.
    """
    train, batch_size = data.train, fit.pop("batch_size")
    if labels:
        train = train.take(random_per_class(train.labels, labels, run.seed))

    def loss(batch, step):
        images, targets = batch
        images = run.augment(mirror_and_shift, images, f"{name}/augment", step)
        return {"loss": F.cross_entropy(model(see(images)).float(), targets)}

    model.train()
    return run.fit(name, model, loss, run.shuffled(train, batch_size, name), **fit)


def class_accuracy(run, model, see, test):
    """Percent of test images whose class a classifier names correctly."""
    model.eval()
    with run.autocast():
        return accuracies(lambda images: {"class": model(see(images))}, test)["class"]


def labels_of(row):
    """The labels a class that a row ending in /labels<number> may use; None: all."""
    count = row.rsplit("/", 1)[-1].removeprefix("labels")
    return int(count) if count.isdigit() else None


def enough_labels(labels, row):
    """Whether every class has as many of the labels (N,) as the row asks for."""
    return int(labels.bincount().min()) >= (labels_of(row) or 0)


# A short cut to put into images, for audits
@functools.cache  # every training step asks for the same
def resampling_matrix(size, scale, device="cpu"):
    """(size, size): Lanczos interpolation at positions scaled about the middle."""
    positions = (torch.arange(size) - (size - 1) / 2) / scale + (size - 1) / 2
    distances = positions.clamp(0, size - 1)[:, None] - torch.arange(size)
    weights = torch.sinc(distances) * torch.sinc(distances / 8) * (distances.abs() < 8)
    return (weights / weights.sum(1, keepdim=True)).to(device)


def add_fringes(images, amount):
    """(N,3,H,W) float -> the same with the green channel magnified: a lens's colour fringes."""
    rows, columns = (resampling_matrix(side, 1 + amount, images.device)
                     for side in images.shape[-2:])
    green = rows @ images[:, 1] @ columns.T
    return torch.stack([images[:, 0], green, images[:, 2]], 1)
