"""Protocols, the same for every paper: probes on frozen features, training on labels, pictures of features, colour fringes.

Nothing here sees a test label before the final count of hits: the linear probe chooses its penalty on a slice of train.
Accuracies are in percent.
"""
import hashlib
import math

import torch
from torch import nn
from torch.nn import functional as F

from replicate import trainer


def pieces(images, batch_size=500):
    """Yield the batches (B,C,H,W) of a tensor (N,C,H,W) or of a split, in order."""
    if torch.is_tensor(images):
        yield from images.split(batch_size)
    else:
        for batch, _ in images.batches(torch.arange(len(images)).split(batch_size)):
            yield batch


@torch.no_grad()
def extract_features(encoder, images, batch_size=500):
    """encoder(batch (B,C,H,W)) -> any shape; returns float32 (N,D) on the device of the encoder's output.

    images: a tensor (N,C,H,W) or a split of replicate.data.  A module is put into eval mode and back.
    """
    training = getattr(encoder, "training", False)
    if training:
        encoder.eval()
    try:
        return torch.cat([encoder(batch).flatten(1).float() for batch in pieces(images, batch_size)])
    finally:
        if training:
            encoder.train()


def average_cells(features, cells):
    """Average a feature map (N,C,H,W) down to at most cells x cells -> (N, C*cells*cells) or less; no gradient."""
    side = min(features.shape[-1], features.shape[-2], cells)
    return F.adaptive_avg_pool2d(features.detach().float(), side).flatten(1)


@torch.no_grad()
def accuracies(predict, split, batch_size=500):
    """Percent of the split's images that each classifier gets right: predict(images) -> {name: scores (B, classes)}."""
    hits = {}
    for images, labels in split.batches(torch.arange(len(split)).split(batch_size)):
        for name, scores in predict(images).items():
            hits[name] = hits.get(name, 0) + (scores.argmax(1) == labels).sum()
    return {name: 100.0 * float(count) / len(split) for name, count in hits.items()}


def linear_probe(train_x, train_y, test_x, test_y, penalties=(1e-4, 1e-3, 1e-2), iterations=60, seed=0):
    """Multinomial logistic regression on frozen features; test accuracy in percent.

    train_x (N,D) float, train_y (N,) int64, likewise test.  Features are standardised by train's mean and deviation.
    The L2 penalty is chosen on a tenth of train held out by the seed, then the model is fitted on all of train;
    L-BFGS with a strong Wolfe line search, from zero, so nothing else is random.
    """
    train_y, test_y = train_y.to(train_x.device), test_y.to(test_x.device)
    mean, deviation = train_x.mean(0), train_x.std(0)
    scale = 1.0 / deviation.clamp_min(1e-6)
    train_x, test_x = (train_x - mean) * scale, (test_x - mean) * scale
    classes = int(train_y.max()) + 1
    if len(penalties) > 1:
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed)).to(train_x.device)
        held, kept = order[:len(order) // 10], order[len(order) // 10:]
        if len(held) >= classes:
            held_x, held_y, kept_x, kept_y = train_x[held], train_y[held], train_x[kept], train_y[kept]
            hits = [_hits(_fit_logistic(kept_x, kept_y, classes, penalty, iterations), held_x, held_y)
                    for penalty in penalties]
            penalties = (penalties[max(range(len(hits)), key=hits.__getitem__)],)
            del held_x, kept_x
    return _hits(_fit_logistic(train_x, train_y, classes, penalties[0], iterations), test_x, test_y)


def _hits(model, x, y):
    weight, bias = model
    return 100.0 * float((torch.addmm(bias, x, weight).argmax(1) == y).float().mean())


def _fit_logistic(x, y, classes, penalty, iterations):
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(bias, x, weight), y) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


@torch.no_grad()
def knn_accuracy(train_x, train_y, test_x, test_y, k=20, temperature=0.07, batch_size=500):
    """Weighted k-nearest-neighbour accuracy in percent: cosine similarity, votes exp(similarity / temperature)
    (Wu et al. 2018, Sec. 3.4).  Features (N,D), labels (N,)."""
    k = min(k, len(train_x))
    train_y, test_y = train_y.to(train_x.device), test_y.to(test_x.device)
    train_x = F.normalize(train_x.float(), dim=1)
    classes = int(train_y.max()) + 1
    hits = 0
    for x, y in zip(test_x.split(batch_size), test_y.split(batch_size)):
        similarity, nearest = (F.normalize(x.float(), dim=1) @ train_x.T).topk(k, dim=1)  # (B, k)
        votes = F.one_hot(train_y[nearest], classes) * (similarity / temperature).exp().unsqueeze(2)  # (B, k, classes)
        hits += int((votes.sum(1).argmax(1) == y).sum())
    return 100.0 * hits / len(test_x)


def mean_average_precision(scores, targets):
    """Mean over classes of the area under the precision-recall curve, in percent (VOC's definition from 2010 on, without
    interpolation).  scores (N,K) float; targets (N,K): 1 present, 0 absent, -1 not counted ("difficult")."""
    precisions = []
    for score, target in zip(scores.T.double(), targets.T):
        counted = target >= 0
        order = score[counted].argsort(descending=True, stable=True)
        hit = target[counted][order].long()  # (n,); whole numbers, whose running sum is deterministic on a GPU too
        if hit.sum() == 0:
            continue
        precision = hit.cumsum(0).double() / torch.arange(1, len(hit) + 1, device=hit.device)
        precisions.append((precision * hit).sum() / hit.sum())
    return 100.0 * float(torch.stack(precisions).mean())


def block_probes(maps, train, test, wanted, cells=4, seed=0):
    """{(block, kind): test accuracy in percent} for the wanted pairs, on feature maps averaged to at most cells x cells.

    maps(images (B,C,H,W)) -> [feature map of block 1, of block 2, ...]; blocks count from 1; train and test are splits.
    kind: "linear" (logistic regression on all of train), "knn" (20 neighbours), "labels5" (logistic regression on five
    images a class, drawn by the seed; any number).  Images as they are, no augmentation.
    """
    blocks = sorted({block for block, _ in wanted})

    def encode(images):
        made = maps(images)
        return [average_cells(made[block - 1], cells) for block in blocks]

    with torch.no_grad():
        widths = [features.shape[1] for features in encode(next(pieces(test, 2)))]
    train_x, test_x = (extract_features(lambda images: torch.cat(encode(images), 1), split).split(widths, 1)
                       for split in (train, test))
    values = {}
    for block, kind in wanted:
        x, y, *held_out = train_x[blocks.index(block)], train.labels, test_x[blocks.index(block)], test.labels
        if kind == "linear":
            values[block, kind] = linear_probe(x, y, *held_out, seed=seed)
        elif kind == "knn":
            values[block, kind] = knn_accuracy(x, y, *held_out)
        else:
            count = int(kind.removeprefix("labels"))
            values[block, kind] = low_shot(x, y, *held_out, shots=[count], seed=seed)[count]
    return values


@torch.no_grad()
def recalibrate(module, forward, split, count=500):
    """Set all batch-norm statistics to those of forward(images) on `count` images spread over a split of train; returns the
    module, in eval mode.  So an untrained network is normalised as a trained one is, and one trained on patches sees whole
    images as it saw patches."""
    norms = [layer for layer in module.train().modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    forward(next(split.batches([torch.linspace(0, len(split) - 1, min(count, len(split))).long()]))[0])
    for layer, momentum in zip(norms, momenta):
        layer.momentum = momentum
    return module.eval()


def record_probes(run, rows, network, data, cells=4):
    """Record those of the rows that are wanted, on one network, its features computed once, or row by row for streamed sets.

    rows: {row: (block, kind)} and cells as in block_probes; network() -> (maps, seconds it cost), called where it is needed.
    """
    wanted = {row: rows[row] for row in run.wanted(*rows) if enough_labels(run, row, data)}
    if not wanted:
        return
    maps, seconds = network()
    together = hasattr(data.train, "images")  # the features of all blocks of a streamed set would not fit
    for part in ([wanted] if together else [{row: pair} for row, pair in wanted.items()]):
        # a plan's part of train has few images a class
        timed = [pair for row, pair in part.items() if not run.plan or labels_of(row) is None]
        values, own = run.measure(lambda train, test: block_probes(maps, train, test, timed, cells, run.seed),
                                  data.train, data.test)
        for row, pair in part.items():
            run.record(row, values.get(pair), steps=0, seconds=seconds + own)


def probe_rows(rows, prefix):
    """{row: (block, kind)} for record_probes: those of the rows named prefix/<layer><block>/<kind>, such as prefix/conv4/knn."""
    parts = {row: row.removeprefix(f"{prefix}/").split("/") for row in rows if row.startswith(f"{prefix}/")}
    return {row: (int(part[0][-1]), part[1]) for row, part in parts.items() if len(part) == 2 and part[0][-1].isdigit()}


def record_measure(run, row, network, function, test, *, steps=0, metric="accuracy", phase=None):
    """Record function(module, test) if the row is wanted; network() -> (module, seconds it cost), phase: whose learning curves."""
    if run.wanted(row):
        module, seconds = network()
        value, own = run.measure(lambda test: function(module, test), test)
        run.record(row, value, steps=steps, seconds=seconds + own, metric=metric, history=run.history.get(phase))


def labels_of(row):
    """The labels a class that a row ending in /labels<count> may use; None: all."""
    count = row.rsplit("/", 1)[-1].removeprefix("labels")
    return int(count) if count.isdigit() else None


def enough_labels(run, row, data):
    """Whether every class has the labels that the row wants; says so where one has not."""
    count = labels_of(row)
    enough = count is None or int(data.train.labels.bincount(minlength=data.classes).min()) >= count
    if not enough:
        run.say(f"seed {run.seed}  {row}: left out, a class has fewer than {count} training images")
    return enough


def mirror_and_shift(images, generator):
    """(N,C,H,W), square -> the same with a random mirror image and a shift by up to an eighth of the side for each."""
    count, side, device = len(images), images.shape[-1], images.device
    flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
    shift = torch.randint(-(side // 8), side // 8 + 1, (2, count, 1), generator=generator, device=device)
    positions = torch.arange(side, device=device)
    rows = (positions + shift[0]).clamp(0, side - 1)
    columns = (torch.where(flip, side - 1 - positions, positions) + shift[1]).clamp(0, side - 1)
    samples = torch.arange(count, device=device)[:, None, None]
    return images[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Classifier(nn.Module):
    """An encoder's feature maps, `encoder.maps(images)`, global average of the last, `encoder.channels` wide, a linear layer."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.channels, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images):
        return self.linear(self.encoder.maps(images)[-1].mean((2, 3)))


def train_on_labels(run, row, model, data, *, prepare, epochs, batch_size, optimizer, learning_rate):
    """Train all of a classifier -> (steps, seconds): on all labels, or on as many a class as the row names, drawn by the seed.

    prepare(uint8 images) -> what the model sees, after mirror_and_shift.  One epoch draws as many images as all of train holds,
    so that the number of updates does not depend on the labels.
    """
    count = labels_of(row)
    train = data.train if count is None else data.train.take(random_per_class(data.train.labels, count, run.seed))

    def objective(batch, step):
        images, labels = batch
        images = run.augment(mirror_and_shift, images, f"{row}/augment", step)
        return {"loss": F.cross_entropy(model(prepare(images)).float(), labels)}

    steps = trainer.updates(epochs, data.train, batch_size)
    model.train()
    return steps, run.fit(row, model, objective, run.shuffled(train, batch_size, row), steps=steps, optimizer=optimizer,
                          learning_rate=learning_rate, images_per_step=batch_size, chance=math.log(data.classes))


def record_accuracy(run, row, train, prepare, data):
    """Record the test accuracy of a trained classifier if the row is wanted; train() -> (classifier, steps, seconds)."""
    if run.wanted(row) and enough_labels(run, row, data):
        model, steps, seconds = train()
        value, own = run.measure(lambda test: class_accuracy(run, model, prepare, test), data.test)
        run.record(row, value, steps=steps, seconds=seconds + own, history=run.history.get(row))


def class_accuracy(run, model, prepare, test):
    """Percent of test images whose class the model tells right; prepare(uint8 images) -> what it sees."""
    model.eval()
    with run.autocast():
        return accuracies(lambda images: {"class": model(prepare(images))}, test)["class"]


def first_per_class(labels, count):
    """Indices (count * classes,) of the first `count` samples of every class, in the order of the data."""
    classes = int(labels.max()) + 1
    chosen = [torch.nonzero(labels == c).flatten()[:count] for c in range(classes)]
    short = [c for c, indices in enumerate(chosen) if len(indices) < count]
    if short:
        raise ValueError(f"class {short[0]} has {len(chosen[short[0]])} samples, fewer than {count}")
    return torch.cat(chosen).sort().values


def random_per_class(labels, count, seed):
    """Indices (count * classes,) of `count` samples of every class, drawn by the seed; ValueError where a class has fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    return order[first_per_class(labels[order], count)]


def low_shot(train_x, train_y, test_x, test_y, shots, seed=0):
    """{k: linear-probe accuracy with k random labelled samples a class} for k in shots; drawn from train by the seed."""
    chosen = {k: random_per_class(train_y, k, seed) for k in shots}
    return {k: linear_probe(train_x[chosen[k]], train_y[chosen[k]], test_x, test_y, seed=seed) for k in shots}


def fingerprint(module):
    """SHA-256 of a module's parameters and buffers: the same before and after a probe if the trunk is frozen."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# What features look like
def principal_axes(features, count):
    """(N,D), centred -> (D,count), orthonormal: the directions of the largest variance."""
    return torch.linalg.eigh((features.T @ features).double()).eigenvectors[:, -count:].to(features.dtype)


def project(features):
    """(N,D) -> (N,2): the two principal components."""
    centred = features - features.mean(0)
    return centred @ principal_axes(centred, 2)


def tsne(features, generator, perplexity=30.0, iterations=500):
    """(N,D) -> (N,2), N at most 2,000: t-distributed stochastic neighbour embedding (van der Maaten and Hinton 2008), exact,
    started from the principal components."""
    count = len(features)
    if count > 2000:
        raise ValueError(f"{count} points; exact t-SNE takes at most 2000")
    distances = torch.cdist(features.double(), features.double()).square()
    distances.fill_diagonal_(math.inf)
    low, high = torch.zeros(count, 1, dtype=torch.float64), torch.full((count, 1), math.inf, dtype=torch.float64)
    precision = 1 / distances.sort(1).values[:, :int(perplexity)].mean(1, keepdim=True)
    for _ in range(50):  # bisection for the precision that gives the perplexity
        p = torch.softmax(-distances * precision, 1)
        too_wide = -(p * p.clamp_min(1e-300).log()).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(too_wide, precision, low), torch.where(too_wide, high, precision)
        precision = torch.where(high.isinf(), 2 * precision, (low + high) / 2)
    p = ((p + p.T) / (2 * count)).clamp_min(1e-12)
    y = project(features.double())
    y = 1e-4 * (y / y.std(0) + 1e-2 * torch.randn(y.shape, generator=generator, dtype=y.dtype))
    velocity = torch.zeros_like(y)
    for step in range(iterations):
        exaggeration, momentum = (12, 0.5) if step < 100 else (1, 0.8)
        weights = 1 / (1 + torch.cdist(y, y).square())
        weights.fill_diagonal_(0)
        pull = (exaggeration * p - weights / weights.sum()) * weights
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        velocity = momentum * velocity - count / 12 * gradient
        y = y + velocity
    return y.float()


def scatter(points, colors, side=360):
    """(N,2) points and (N,3) colours in 0..1 -> picture (3,side,side) of 3 x 3 dots on white."""
    low, high = points.min(0).values, points.max(0).values
    places = ((points - low) / (high - low).clamp_min(1e-12) * (side - 9) + 3).long()
    picture = torch.ones(3, side, side)
    for down in range(3):
        for right in range(3):
            picture[:, places[:, 1] + down, places[:, 0] + right] = colors.T
    return picture


# A short-cut to put into images, for audits
def resampling_matrix(size, scale):
    """(size, size): interpolation at positions scaled about the middle, by Lanczos kernels of eight pixels to either side, since
    shorter ones blur, and more in some places than in others."""
    positions = ((torch.arange(size) - (size - 1) / 2) / scale + (size - 1) / 2).clamp(0, size - 1)
    distances = positions[:, None] - torch.arange(size)
    weights = torch.sinc(distances) * torch.sinc(distances / 8) * (distances.abs() < 8)
    return weights / weights.sum(1, keepdim=True)


def add_fringes(images, amount):
    """(N,3,H,W) float -> the same with the green channel magnified by 1 + amount about the middle: a lens's colour fringes."""
    rows, columns = (resampling_matrix(side, 1 + amount).to(images.device) for side in images.shape[-2:])
    green = rows @ images[:, 1] @ columns.T
    return torch.stack([images[:, 0], green, images[:, 2]], 1)
