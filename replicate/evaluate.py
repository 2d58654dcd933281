"""Protocols on frozen features, the same for every paper.

Nothing here sees a test label before the final count of hits: the linear probe chooses its penalty on a slice of train.
Accuracies are in percent.
"""
import hashlib

import torch
from torch.nn import functional as F


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
