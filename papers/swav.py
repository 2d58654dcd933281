"""Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV)
Mathilde Caron, Ishan Misra, Julien Mairal, Priya Goyal, Piotr Bojanowski, Armand Joulin.
NeurIPS 2020, arXiv 2006.09882.

Claim: views of one image that must predict each other's cluster teach more than views compared
one with another, and many small views teach more than two large ones.

Method: random crops of an image, two large ones and several small ones, are its views.  The network
maps each to a unit vector z and scores it by its cosines with K learnt unit vectors, the prototypes
of K clusters.  The Sinkhorn algorithm turns the scores of a batch's large crops (and of a queue of
past ones, where the batch is small) into codes that use all prototypes equally, so that not all
images end in one cluster.  Each code is predicted, by softmax(scores / tau), from all other views.

Deviations from the paper
 1. Bilinear crops of squares decoded once (scale paper: the middle 256 pixels), antialiased only
    where a size shrinks its usual box by 1.25 or more: of the scales here, in demo's small crops.
    Boxes longer than the image are cut off.  Colours change in one order and are clipped once, hue
    about the grey axis; but for scale paper half as much, and without blur.
 2. Batch-norm and queue span all GPUs as Sinkhorn does (official code: groups of 8; one GPU).
 3. DeepCluster-v2's memory of z starts from whole images; clusters are looked up image by image.
 4. SimCLR, a control of ours, compares every crop with the large crops of all images.  In public
    tables of small sets neither is always ahead on CIFAR-10, SwAV is on Imagenette.
 5. The arm two-crops trains until it has seen as many pixels (paper: equal epochs); ablations for
    audit_epochs; they are compared with ablation/as-is, which does so, too.
 6. Probes: whole images (paper: a central crop), batch-norm statistics of 500 images of train,
    logistic regression without augmentation.  Always the last iterate (official code: best epoch).
 7. Labels drawn by the seed (paper: fixed lists); cosine schedule, a head that starts at zero.
 8. bfloat16 multiplications; norms, scores, codes and losses in float32.
 9. Left out: transfer to other data sets, SeLa-v2, uncurated images.
10. Scale small: images of 64 pixels, larger boxes, a narrow ResNet-10, 60 epochs (paper: 800 of
    ImageNet); pretext_rate and epsilon tuned for SwAV, used for the controls, too; label rates
    tuned for each; all on held-out train images.  Claims are comparable, values are not.
Run:  python -m papers.swav --scale small        (Imagenette, two CPU cores: 45 minutes a seed)
Result, small: swav/knn20 41.9 +- 1.3 against random/knn20 29.2 (n = 3); paper, full training: 65.7
"""
import copy
import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from replicate import checkpoints, evaluate, trainer
from replicate.launch import launch
from replicate.outputs import save_image


@dataclass
class Config:
    seed: int
    dataset: str = "imagenette"
    image_size: int = 128               # ours: paper 256
    streamed: bool = False              # ours: decode files on the fly, do not keep them in memory
    network: Literal["resnet10", "resnet18", "resnet50"] = "resnet18"   # ours: paper resnet50
    width: float = 1.0                  # ours: channels, as a fraction of the network's
    stem: Literal["imagenet", "no-pool", "cifar"] = "no-pool"   # ours: paper imagenet
    crop_sizes: tuple[int, ...] = (96, 48)      # ours: paper 224 and 96 pixels
    crop_counts: tuple[int, ...] = (2, 4)       # ours: paper 2 and 6
    crop_scales: tuple[float, ...] = (0.14, 1.0, 0.05, 0.14)    # official code: shares of area
    jitter: float = 0.5                 # ours: strength, paper 1
    grey: float = 0.2                   # official code: share of crops without colours
    blur: float = 0.0                   # ours: share of crops, paper 0.5
    test_size: int = 128                # ours: what probes see, paper 224
    method: Literal["swav", "deepcluster", "simclr"] = "swav"   # set by `variants`, row by row
    prototypes: int = 300               # ours: K, 10 to 30 a class; paper 3000
    hidden: int = 2048                  # official code: of the projection
    temperature: float = 0.1            # official code: tau
    epsilon: float = 0.05               # official code: softness of the codes
    iterations: int = 3                 # official code: of Sinkhorn; 0: codes by softmax alone
    freeze: float = 1.0                 # official code: epochs in which prototypes stay as drawn
    queue: int = 0                      # official code: 3840 images where the batch is 256
    queue_start: float = 1.0            # ours: epochs; official code 15 of 200
    batch_size: int = 256               # ours: paper 4096
    pretext_epochs: float = 50.0        # ours: paper 800
    audit_epochs: float = 20.0          # ours: of the ablations; paper 400
    pretext_rate: float = 0.6           # official code for batches of 256; paper 4.8
    warmup: float = 0.05                # ours: share of the steps; paper 10 of 800 epochs
    momentum: float = 0.9               # official code
    weight_decay: float = 1e-6          # official code
    patience: float = 2.0               # ours: epochs of collapse that end a run; 0: none ends it
    supervised_epochs: float = 40.0     # ours: with all labels, from scratch
    supervised_rate: float = 0.1        # ours: with all labels, from scratch
    label_batch: int = 64               # ours: paper 256
    label_passes: tuple[float, ...] = (100.0, 20.0)     # ours: epochs on 1 % and on 10 % of labels
    label_rates: tuple[float, ...] = (0.03, 0.03)       # ours: official code 0.02 and 0.01
    scratch_rates: tuple[float, ...] = (0.1, 0.1)       # ours: the same, from scratch
    head_factors: tuple[float, ...] = (10.0, 10.0)      # ours: official code 250 and 20
    label_decay: float = 5e-4           # ours: official code 0
    checkpoint: str = ""                # --evaluate: the file of the network
    checkpoint_sha256: str = ""         # --evaluate
    precision: Literal["bfloat16", "float32"] = "bfloat16"      # ours
    deterministic: bool = True          # ours
    shards: int = 1                     # ours: parts of a batch, divided among GPUs

    def __post_init__(self):
        sizes, counts, scales = map(list, (self.crop_sizes, self.crop_counts, self.crop_scales))
        least = {"imagenet": 17, "no-pool": 9, "cifar": 5}[self.stem]
        assert 0 < len(sizes) == len(counts) == len(scales) / 2, (
            f"crop_sizes {sizes} need as many crop_counts and twice as many crop_scales")
        assert min(sizes) >= least, f"crop_sizes {sizes}: at least {least} pixels for {self.stem}"
        assert counts[0] == 2 and min(counts) > 0, f"crop_counts {counts}: two of the first size"
        assert all(0 < low <= high <= 1 for low, high in zip(scales[::2], scales[1::2])), (
            f"crop_scales {scales}: least and largest share of the area, for each size")
        assert min(self.prototypes, self.batch_size, self.label_batch) >= 2, (
            "prototypes, batch_size, label_batch: at least 2")
        assert not 0 < self.queue < self.batch_size, "queue: 0, or at least the batch size"
        assert not self.checkpoint or self.checkpoint_sha256, "checkpoint: give it as --evaluate"
        for name in "image_size width test_size hidden temperature epsilon".split():
            assert getattr(self, name) > 0, f"{name} must be above 0"
        for name in "jitter grey blur warmup".split():
            assert getattr(self, name) <= 1, f"{name} is a share, at most 1"
        for name in "label_passes label_rates scratch_rates head_factors".split():
            pair = getattr(self, name)
            assert len(pair) == 2 and min(pair) > 0, f"{name} {pair}: two numbers above 0"


# ---- The idea: many crops of an image, and codes that use all prototypes equally ----

def multi_crop(images, sizes, counts, scales, generator):
    """(N,C,H,W) float -> list of counts[0] crops (N,C,sizes[0],sizes[0]), counts[1] of sizes[1] ...

    Each crop shows a random box of its image: `scales` holds least and largest share of the area,
    for each size, a box is 3/4 to 4/3 as wide as high; half are mirrored.
    Where the average box is 1.25 times the crop or more, the image is first shrunk, antialiased.
    """
    crops, device = [], images.device
    for size, count, (low, high) in zip(sizes, counts, scales):
        pixels = (torch.arange(size, device=device) + 0.5) / size - 0.5  # from the box's centre
        ratio = images.shape[-1] * ((low + high) / 2) ** 0.5 / size  # average box's side / crop's
        source = images if ratio < 1.25 else F.interpolate(
            images, [round(side / ratio) for side in images.shape[-2:]], mode="bilinear",
            antialias=True)
        for _ in range(count):
            area, aspect, x, y = torch.rand(4, len(images), generator=generator, device=device)
            mirror = torch.rand(len(images), generator=generator, device=device) < 0.5
            area, aspect = low + (high - low) * area, torch.exp((2 * aspect - 1) * math.log(4 / 3))
            width, height = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
            x, y = width / 2 + x * (1 - width), height / 2 + y * (1 - height)  # the box's centre
            width = torch.where(mirror, -width, width)
            columns = 2 * (x[:, None] + width[:, None] * pixels) - 1  # (N, size), -1 to 1
            rows = 2 * (y[:, None] + height[:, None] * pixels) - 1
            grid = torch.stack([columns[:, None, :].expand(-1, size, -1),
                                rows[:, :, None].expand(-1, -1, size)], 3)  # (N, size, size, 2)
            crops.append(F.grid_sample(source, grid, padding_mode="border", align_corners=False))
    return crops


def make_views(images, generator, config):
    """(N,3,H,W) uint8 -> list of sum(crop_counts) crops, augmented, the large ones first."""
    sizes, counts, views = config.crop_sizes, config.crop_counts, []
    scales = zip(config.crop_scales[::2], config.crop_scales[1::2])
    crops = multi_crop(images.float().div_(255), sizes, counts, scales, generator)
    for count in counts:  # crops of one size are augmented together
        batch, crops = torch.cat(crops[:count]), crops[count:]
        batch = distort_colors(batch, config.jitter, config.grey, generator)
        batch = blur(batch, config.blur, generator) if config.blur else batch
        views += normalize(batch).chunk(count)
    return views


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Scores (B,K) -> codes (B,K): each row sums to 1, each prototype gets about B/K (Sec. 3.1).

    Starting from exp(scores / epsilon), each iteration scales the columns to equal sums, so that
    all prototypes are used alike, then the rows to 1; on logarithms, so that nothing overflows.
    """
    log_codes = scores.float() / epsilon
    for _ in range(iterations):
        log_codes = log_codes - log_codes.amax(0)
        log_codes = log_codes - log_codes.exp().sum(0).log()
        log_codes = log_codes.log_softmax(1)
    return log_codes.softmax(1)  # changes nothing, unless there was no iteration


def swapped_prediction_loss(scores, codes, temperature=0.1):
    """Every view predicts the codes of the other views: the mean, over all v != i, of the
    cross-entropy of softmax(scores[v] / temperature) against codes[i] (Eq. 2).

    scores: list of (B,K), one of each view; codes: list of (B,K), one of each of the first views.
    No gradient flows through the codes.
    """
    log_p = [(each / temperature).log_softmax(1) for each in scores]
    losses = [-(code.detach() * log_p[v]).sum(1).mean()
              for i, code in enumerate(codes) for v in range(len(scores)) if v != i]
    return torch.stack(losses).mean()


# ---- Network ----

DIMENSION = 128  # of z (official code)


class ClusteringNetwork(nn.Module):
    """A ResNet (`Encoder`), a projection of its features to unit vectors z (B,D), and what a method
    keeps: prototypes and a queue (swav), the z of so many `images` and centroids (deepcluster)."""

    def __init__(self, config, images=0):
        super().__init__()
        self.encoder = Encoder(config.network, config.width, config.stem)
        self.projection = nn.Sequential(
            nn.Linear(self.encoder.channels, config.hidden), nn.BatchNorm1d(config.hidden),
            nn.ReLU(), nn.Linear(config.hidden, DIMENSION))
        self.prototypes = self.queue = None
        if config.method == "swav":
            self.prototypes = nn.Linear(DIMENSION, config.prototypes, bias=False)
            self.normalize_prototypes()
            if length := config.queue // config.batch_size * config.batch_size:
                self.queue = FeatureQueue(2, length, DIMENSION)
        if config.method == "deepcluster":
            self.register_buffer("memory", torch.zeros(2, images, DIMENSION))
            self.register_buffer("centroids", torch.zeros(HEADS, config.prototypes, DIMENSION))
        self.register_buffer("watched", torch.zeros(2))  # sums that stop_at_collapse keeps

    @torch.no_grad()
    def normalize_prototypes(self):
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def forward(self, views):
        """List of V views (B,3,s,s) -> list of V unit vectors z (B,D)."""
        features = []
        for _, same_size in itertools.groupby(views, lambda view: view.shape):
            crops = torch.cat(list(same_size)).contiguous(memory_format=torch.channels_last)
            features.append(self.encoder(crops))
        z = F.normalize(self.projection(torch.cat(features)).float(), dim=1)
        return z.split(len(views[0]))

    def embed(self, images):  # (B,3,s,s) -> z (B,D)
        return self([images])[0]

    def score(self, z):
        """z (B,D) -> its cosines with the prototypes (B,K)."""
        return F.linear(z, F.normalize(self.prototypes.weight.detach(), dim=1))


# ---- Objective ----

def swav_loss(model, embeddings, config, train_prototypes=True, fill_queue=True):
    """z (B,D) of every view -> loss; scores (B,K) of every view, for the log.

    Prototypes that are not trained yet get no gradient, so that the optimiser leaves them alone.
    fill_queue: z of the large crops go into the queue, which counts once it is full."""
    if train_prototypes:
        model.normalize_prototypes()
    weight = model.prototypes.weight  # (K, D)
    prototypes = weight if train_prototypes else weight.detach()
    scores, codes = [F.linear(z, prototypes) for z in embeddings], []  # (B, K)
    rank, ranks = trainer.rank_and_ranks()
    with torch.no_grad():
        for view in (0, 1):  # of the large crops, together with earlier batches in the queue
            present = trainer.rows_of_all_ranks(scores[view])
            past = F.linear(model.queue.read(view), prototypes) if model.queue else present[:0]
            code = sinkhorn(torch.cat([past, present]), config.epsilon, config.iterations)
            codes.append(code[len(past):].chunk(ranks)[rank])  # of this rank's part of the batch
        if model.queue and fill_queue:
            model.queue.push(torch.stack([trainer.rows_of_all_ranks(z) for z in embeddings[:2]]))
    return swapped_prediction_loss(scores, codes, config.temperature), scores


def make_optimizer(config, model):
    """LARS; run.fit sets the learning rate at every step."""
    return LARS(model.parameters(), config.momentum, config.weight_decay)


# ---- Pre-training ----

def pretrain(run, data, config, name):
    """-> Trained ClusteringNetwork.  run: trainer.Run; config: that of one of the `variants`."""
    split = copy.copy(data.unlabeled)  # with the images' numbers, not their classes, as labels
    split.labels = torch.arange(len(split), device=split.labels.device)
    epoch = len(split) / config.batch_size  # in steps
    steps = trainer.steps_in(config, config.pretext_epochs, split)
    freeze, queue_start = round(config.freeze * epoch), round(config.queue_start * epoch)
    settled = max(freeze, round(config.warmup * steps))  # from this step on collapse is watched for
    model = run.build(ClusteringNetwork, config, len(split))

    def loss(batch, step):
        images, numbers = batch
        views = run.augment(make_views, images, "augment", step, config=config)
        if config.method == "deepcluster":
            recluster(run, model, split, config, step)
        z = model(views)
        with torch.autocast(run.device.type, enabled=False):
            if config.method == "swav":
                value, scores = swav_loss(model, z, config, step >= freeze, step >= queue_start)
            elif config.method == "deepcluster":
                value, scores = deepcluster_loss(model, z, numbers, config.temperature)
            else:
                value, scores = simclr_loss(z, config.temperature), []
        scalars = log_of_step(value, scores)
        if config.patience and step >= settled:
            window = max(WATCHED_STEPS, round(config.patience * epoch))
            stop_at_collapse(model, config, name, scalars, step - settled + 1, window)
        return scalars

    chance = chance_loss(config)
    trained = run.fit(name, model, loss, run.shuffled(split, config.batch_size, "pretext"),
                      steps=steps, optimizer=make_optimizer(config, model), chance=chance,
                      rate=warmed_cosine(config.pretext_rate, config.warmup))
    trained.curves["ln K"] = [[step, round(chance, 4)] for step, _ in trained.curves["loss"]]
    return trained


# ---- Evaluation ----

def variants(config):
    """{name: Config} of everything that is pre-trained; `name` is how its rows begin."""
    large, (low, high) = config.crop_sizes[0], config.crop_scales[:2]
    low *= 0.08 / 0.14  # official code: two crops alone are cut from smaller boxes, too
    pixels = sum(count * size ** 2 for size, count in zip(config.crop_sizes, config.crop_counts))
    batch = max(config.shards, config.batch_size // 4, 2)
    small = {"batch_size": batch, "pretext_rate": config.pretext_rate * batch / config.batch_size}
    ablations = {
        "as-is": {}, "epsilon0.03": {"epsilon": 0.03},
        "epsilon0.5": {"epsilon": 0.5, "patience": 0.0},
        "no-equipartition": {"iterations": 0, "patience": 0.0},
        "prototypes-tenth": {"prototypes": max(2, config.prototypes // 10)},
        "prototypes-tenfold": {"prototypes": 10 * config.prototypes},
        "small-batch": {**small, "queue": 0},
        "small-batch-queue": {**small, "queue": 15 * batch}}
    changes = {
        "swav": {}, "deepcluster": {"method": "deepcluster"}, "simclr": {"method": "simclr"},
        "two-crops": {"crop_sizes": (large,), "crop_counts": (2,), "crop_scales": (low, high),
                      "pretext_epochs": config.pretext_epochs * pixels / (2 * large ** 2)},
        **{f"ablation/{name}": {"pretext_epochs": config.audit_epochs, **change}
           for name, change in ablations.items()}}
    return {name: replace(config, **{"method": "swav", **change})
            for name, change in changes.items()}


def network(run, data, name):
    """-> Trained, whose model has an encoder: a variant, or one of the controls."""
    config = run.config
    if name in variants(config):
        return pretrain(run, data, variants(config)[name], name)
    if name == "checkpoint":
        encoder = load_encoder(run, config.checkpoint, config.stem)
        return trainer.Trained(evaluate.Classifier(encoder, data.classes))
    untrained = trainer.Trained(run.build(ClusteringNetwork, variants(config)["swav"]))
    return untrained if name == "random" else classify(run, data, name, untrained.model.encoder)


def whole_images(images, config):
    """(N,3,S,S) uint8 -> what networks see at test: no crops, test_size pixels a side."""
    images, size = images.float().div_(255), (config.test_size, config.test_size)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return normalize(images).contiguous(memory_format=torch.channels_last)


def features(run, model, encode, config, train, *splits):
    """encode(whole images), (N,D), of each split, after the model, to which `encode` belongs, has
    got batch-norm statistics of whole images of train."""
    def encode_whole(images):
        with run.autocast():
            return encode(whole_images(images, config))

    def encode_share(images):  # each rank takes a part, and batch-norm puts them together
        count = len(images) // run.ranks
        return encode_whole(images[run.rank * count:(run.rank + 1) * count])

    if run.ranks > 1:
        trainer.synchronize_batch_norm(model, run.device)
    evaluate.recalibrate(model, encode_share, train)
    return [evaluate.extract_features(encode_whole, split) for split in splits]


def measures(run, trained, config, rows, train, test):
    """{row: value} of rows <network>/<measure>.  The measures: knn<k> and linear, accuracies on
    the averaged last feature map; loss, at the end of training, and use, the entropy of how often
    each prototype is the nearest, in percent of ln K; spread, the standard deviation of z in
    percent of that of vectors spread evenly over the sphere."""
    model, kinds, values = copy.deepcopy(trained.model), {row.split("/")[-1] for row in rows}, {}
    if kinds - {"loss", "use", "spread"}:
        train_x, test_x = features(run, model.encoder, model.encoder, config, train, train, test)
        probed = train_x, train.labels, test_x, test.labels
        values = {kind: evaluate.knn_accuracy(*probed, k=int(kind[3:]))
                  for kind in kinds & {"knn20", "knn200"}}
        if "linear" in kinds:
            values["linear"] = evaluate.linear_probe(*probed, seed=run.seed)
    if kinds & {"use", "spread"}:
        (z,) = features(run, model, model.embed, config, train, test)
        values["use"] = 100 * float(use_of_prototypes(model.score(z))[0]) / chance_loss(config)
        values["spread"] = 100 * math.sqrt(DIMENSION) * float(z.std(0).mean())
    if "loss" in kinds:
        values["loss"] = 100 * trained.curves["loss"][-1][1] / chance_loss(config)
    return {row: values[row.split("/")[-1]] for row in rows}


def share_of_labels(labels, share, seed):
    """Indices of a share of every class, at least one of each, drawn by the seed."""
    order = evaluate.shuffled_indices(labels, seed)
    members = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([each[:max(1, round(share * len(each)))] for each in members]).sort().values


def labelled_crop(images, generator, size):  # a box of 8 % of the area or more, of each image
    crops = multi_crop(images.float().div_(255), (size,), (1,), [(0.08, 1.0)], generator)
    return normalize(crops[0])


def classify(run, data, row, encoder):
    """-> Trained: a copy of the encoder and a linear layer, on the labels that a row names: all of
    them, or of <network>/percent<number> a share.  Images are augmented by cropping alone."""
    config, train, (name, _, percent) = run.config, data.train, row.partition("/percent")
    epochs, rate, head_factor = config.supervised_epochs, config.supervised_rate, 1.0
    if percent:
        train = train.take(share_of_labels(train.labels, int(percent) / 100, run.seed))
        place = ("1", "10").index(percent)
        epochs, rate = config.label_passes[place], config.scratch_rates[place]
    if percent and name != "supervised":
        rate, head_factor = config.label_rates[place], config.head_factors[place]
    model = evaluate.Classifier(copy.deepcopy(encoder), data.classes).train()
    model.to(run.device, memory_format=torch.channels_last)

    def loss(batch, step):
        crops = run.augment(labelled_crop, batch[0], f"{row}/augment", step,
                            size=config.crop_sizes[0])
        scores = model(crops.contiguous(memory_format=torch.channels_last))
        return {"loss": F.cross_entropy(scores.float(), batch[1])}

    groups = [{"params": model.encoder.parameters()},
              {"params": model.linear.parameters(), "scale": head_factor}]  # run.fit reads "scale"
    optimizer = torch.optim.SGD(groups, rate, config.momentum, weight_decay=config.label_decay,
                                fused=True)
    return run.fit(row, model, loss, run.shuffled(train, config.label_batch, row),
                   steps=trainer.steps_in(config, epochs, train, config.label_batch),
                   chance=math.log(data.classes), optimizer=optimizer,
                   rate=trainer.cosine(rate, config.warmup))


def reproduce(run):
    """Every row of one seed; what several rows share is trained once, then read from its file."""
    config, arms = run.config, variants(run.config)
    data = run.load(config.dataset, config.image_size, config.streamed or None, channels=3)
    for name in dict.fromkeys(["swav", "random", "supervised", *arms, "checkpoint"]):  # each once
        measured = "knn20 knn200 linear loss use spread".split()
        if rows := run.wants(*(f"{name}/{measure}" for measure in measured)):
            trained = network(run, data, name)
            measure = partial(measures, run, trained, arms.get(name, config), rows)
            if name == "swav" and run.seed == run.rank == 0 and not run.plan:
                figures(run, trained.model, data.test)
            run.record(rows, measure, data.train, data.test, after=[trained])
        for row in (name, f"{name}/percent1", f"{name}/percent10"):
            if run.wants(row):
                start = network(run, data, "random" if name == "supervised" else name)
                final = classify(run, data, row, start.model.encoder)
                see = partial(whole_images, config=config)
                measure = partial(evaluate.class_accuracy, run, final.model, see)
                run.record(row, measure, data.test, after=[start, final])


# ---- Collapse: all images in one place ----

WATCHED_STEPS = 200  # at least so many make a verdict, however few images there are


def chance_loss(config):
    """ln K, or for SimCLR that of picking one of all candidates."""
    candidates = 1 + 2 * (config.batch_size - 1)
    return math.log(candidates if config.method == "simclr" else config.prototypes)


@torch.no_grad()
def use_of_prototypes(scores):
    """Scores (N,K) -> entropy in nats, and largest, of the shares that each prototype is nearest to
    (all ranks' scores count)."""
    nearest = trainer.rows_of_all_ranks(scores.argmax(1))
    counts = torch.zeros(scores.shape[1], device=scores.device)
    share = counts.index_add_(0, nearest, torch.ones(len(nearest), device=scores.device))
    share = share / share.sum()
    return -torch.special.xlogy(share, share).sum(), share.max()


def log_of_step(loss, scores):
    """{"loss", "entropy", "largest"} for run.fit.  The loss has the value of all ranks' mean and
    the gradient of this rank's own; scores: (B,K) of each view, or [] without prototypes."""
    mean = trainer.over_ranks(loss.detach().clone()) / trainer.rank_and_ranks()[1]
    scalars = {"loss": loss + (mean - loss.detach())}
    if scores:
        scalars["entropy"], scalars["largest"] = use_of_prototypes(torch.cat(scores[:2]))
    return scalars


@torch.no_grad()
def stop_at_collapse(model, config, name, scalars, steps, window):
    """Raise TrainingFailed where over a window of steps the loss lies within half a percent of
    chance on average, or one prototype takes 90 % of the crops.  steps: how many it has watched."""
    largest = scalars.get("largest", torch.zeros_like(scalars["loss"]))
    model.watched += torch.stack([scalars["loss"].detach(), largest])
    if steps % window:
        return
    (loss, largest), chance = (model.watched / window).tolist(), chance_loss(config)
    model.watched.zero_()
    if abs(loss / chance - 1) < 0.005 or largest > 0.9:
        swav = config.method == "swav"
        advice = (f"epsilon=0.05 (now {config.epsilon:g})" if swav and config.epsilon > 0.05 else
                  f"iterations=3 (now {config.iterations})" if swav and config.iterations < 3 else
                  f"pretext_rate={config.pretext_rate / 4:g}")
        raise trainer.TrainingFailed(
            f"{name} collapsed: over {window} steps the loss was {loss:.3f} (chance {chance:.3f}) "
            f"and one prototype took {100 * largest:.0f} % of the crops; --set {advice}, or --set "
            "patience=0 to go on all the same")


# ---- Figures ----

@torch.no_grad()
def figures(run, model, test):
    """The eight test images nearest to each of 16 prototypes, from the most used to the least."""
    see = partial(whole_images, config=run.config)
    with run.autocast():
        z = [model.eval().embed(see(images)) for images, _ in evaluate.in_order(test)]
    scores = model.score(torch.cat(z))
    used = scores.argmax(1).bincount(minlength=scores.shape[1])
    chosen = used.argsort(descending=True, stable=True)[::max(1, len(used) // 16)][:16]
    nearest = scores[:, chosen].topk(min(8, len(scores)), 0).indices.T  # (16, 8)
    images, _ = next(test.batches([nearest.flatten().cpu()]))
    save_image(images.float() / 255, run.suite / f"{run.paper}_nearest.png", nrow=nearest.shape[1])


# ---- Parts that the method calls ----

LUMA = (0.299, 0.587, 0.114)  # shares of red, green and blue in a grey
RESNETS = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]),
           "resnet50": (Bottleneck, [3, 4, 6, 3])}


class Encoder(ResNet):
    """torchvision's ResNet, its channels times `width`, without its last layer: (N,3,H,W) ->
    (N,channels).  The stem "no-pool" lacks torchvision's max-pooling; "cifar" begins with a 3 x 3
    convolution of stride 1 as well."""

    def __init__(self, network="resnet18", width=1.0, stem="imagenet"):
        self.width = width
        super().__init__(*RESNETS[network])
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(3, self.scaled(64), kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(self.scaled(64))
        self.maxpool = self.maxpool if stem == "imagenet" else nn.Identity()
        self.channels = self.inplanes  # torchvision counts there what the last layer put out
        del self.avgpool, self.fc

    def scaled(self, channels):
        return max(4, round(channels * self.width))

    def _make_layer(self, block, planes, *rest, **options):
        """torchvision's constructor calls this for each of the four layers, 64 channels first."""
        if planes == 64:
            self.inplanes = self.scaled(64)
        return super()._make_layer(block, self.scaled(planes), *rest, **options)

    def maps(self, images):
        """[feature map of layer1, ..., of layer4]"""
        maps = [self.maxpool(self.relu(self.bn1(self.conv1(images))))]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps[1:]

    def forward(self, images):
        return self.maps(images)[-1].float().mean((2, 3))


def distort_colors(images, strength, grey, generator):
    """(N,3,H,W) in 0..1 -> the same, as in SimCLR: four in five images get another brightness,
    contrast, saturation and hue, a share `grey` loses its colours.  All of these map (r, g, b)
    linearly, so one 3 x 3 matrix and an offset an image do."""
    count, device = len(images), images.device
    chosen, lost, *factors = torch.rand(6, count, generator=generator, device=device)
    change = (2 * torch.stack(factors) - 1) * (chosen < 0.8) * strength  # (4, N)
    brightness, contrast, saturation = 1 + 0.8 * change[:3]
    saturation = torch.where(lost < grey, 0, saturation)
    # A turn of the hue is a rotation about the axis of greys; 0.2 of a full turn at most.
    angle = 2 * math.pi * 0.2 * change[3]
    a, b, c = ((1 + 2 * (angle + third * math.pi * 2 / 3).cos()) / 3 for third in (0, 1, -1))
    turn = torch.stack([a, b, c, c, a, b, b, c, a], 1).view(count, 3, 3)
    to_grey = torch.stack([(1 - saturation) * share for share in LUMA], 1)[:, None]  # (N, 1, 3)
    matrix = (brightness * contrast)[:, None, None] * (saturation[:, None, None] * turn + to_grey)
    # Contrast pulls towards the image's mean grey.
    mean = sum(share * channel for share, channel in zip(LUMA, images.mean((2, 3)).unbind(1)))
    offset = ((1 - contrast) * brightness * mean)[:, None, None]
    made = torch.baddbmm(offset, matrix, images.flatten(2))  # (N, 3, H * W)
    return made.clamp_(0, 1).view_as(images)


def blur(images, share, generator):
    """(N,3,S,S) -> the same, a share of them blurred by a Gaussian with a standard deviation of
    0.1 to 2 pixels (official code)."""
    count, reach = len(images), min(6, images.shape[-1] - 1)
    chosen, width = torch.rand(2, count, generator=generator, device=images.device)
    sigma = torch.where(chosen < share, 0.1 + 1.9 * width, 1e-3)
    pixels = torch.arange(-reach, reach + 1, device=images.device)
    weights = torch.exp(-(pixels / sigma[:, None]).square() / 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3N, k)
    planes = F.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[None]  # (1, 3N, h, w)
    planes = F.conv2d(planes, weights[:, None, :, None], groups=3 * count)  # along the columns
    return F.conv2d(planes, weights[:, None, None], groups=3 * count)[0].unflatten(0, (count, 3))


@lru_cache(maxsize=4)
def channel_statistics(device):
    """-> mean (3,1,1) and standard deviation (3,1,1) of ImageNet's channels."""
    return torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]],
                        device=device).view(2, 3, 1, 1).unbind()


def normalize(images):
    """(N,3,H,W) in 0..1 -> each channel minus its mean and over its standard deviation."""
    mean, deviation = channel_statistics(images.device)
    return (images - mean).div_(deviation)


class FeatureQueue(nn.Module):
    """The latest `length` z of each view, newest first."""

    def __init__(self, views, length, dimension):
        super().__init__()
        self.register_buffer("features", torch.zeros(views, length, dimension))
        self.length, self.count = length, 0

    def push(self, z):
        """z (views,B,D) comes in, and the B oldest go."""
        self.features.copy_(torch.cat([z, self.features], 1)[:, :self.length])
        self.count = min(self.count + z.shape[1], self.length)

    def read(self, view):
        """(length,D), or (0,D) before the queue is full."""
        return self.features[view, :self.length if self.count == self.length else 0]

    def get_extra_state(self):  # torch saves it with the buffers
        return torch.tensor(self.count)

    def set_extra_state(self, state):
        self.count = int(state)


class LARS(torch.optim.Optimizer):
    """SGD in which each tensor's gradient, weight decay included, is multiplied by
    trust * |weight| / |gradient| (You et al. 2017); biases and batch-norm too (official code)."""

    def __init__(self, parameters, momentum=0.9, decay=0.0, trust=0.001):
        super().__init__(parameters, {"lr": 0.0})
        self.momentum, self.decay, self.trust = momentum, decay, trust
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients, momenta = zip(*((p.grad, self.state[p]["momentum"]) for p in weights))
            weight_norm = torch.stack(torch._foreach_norm(weights))  # (tensors,)
            gradient_norm = torch.stack(torch._foreach_norm(gradients))
            ratio = self.trust * weight_norm / (gradient_norm + self.decay * weight_norm + 1e-8)
            ratio = torch.where(weight_norm > 0, ratio, 1) * (gradient_norm > 0)
            scaled = torch._foreach_add(gradients, weights, alpha=self.decay)
            torch._foreach_mul_(scaled, ratio.unbind())
            torch._foreach_mul_(momenta, self.momentum)  # in place, all tensors at once
            torch._foreach_add_(momenta, scaled)
            torch._foreach_add_(weights, momenta, alpha=-group["lr"])


def warmed_cosine(rate, warmup, first=1 / 16, last=1 / 1000):
    """From first * rate to rate over the share `warmup`, then to last * rate (official code)."""
    def at(progress):
        if progress < warmup:
            return rate * (first + (1 - first) * progress / warmup)
        fall = (progress - warmup) / max(1 - warmup, 1e-9)
        return rate * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * fall)))
    return at


# ---- Controls: DeepCluster-v2 and SimCLR ----

HEADS = 3  # clusterings of DeepCluster-v2 (official code)


@torch.no_grad()
def spherical_kmeans(vectors, count, iterations, generator):
    """Unit vectors (N,D) -> unit centroids (count,D); one without vectors stays where it is."""
    if len(vectors) < count:
        raise trainer.InputError(f"{count} prototypes for {len(vectors)} images: lower prototypes "
                                 "with --set")
    start = torch.randperm(len(vectors), generator=generator)[:count]
    centroids = vectors[start.to(vectors.device)]
    for _ in range(iterations):
        nearest = torch.cat([(part @ centroids.T).argmax(1) for part in vectors.split(10000)])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
        alive = sums.norm(dim=1, keepdim=True) > 0
        centroids = torch.where(alive, F.normalize(sums, dim=1), centroids)
    return centroids


def recluster(run, model, split, config, step):
    """Cluster the memory anew at the first step of every epoch; at the very first, fill it."""
    if step * config.batch_size // len(split) == (step - 1) * config.batch_size // len(split):
        return
    if step == 0:
        model.memory[:] = features(run, model, model.embed, config, split, split)[0]
        model.train()
        torch.clear_autocast_cache()  # else this step would use the weights that were cast here
    for head in range(HEADS):
        generator = run.stream(f"k-means {head}", step)
        with torch.autocast(run.device.type, enabled=False):
            centroids = spherical_kmeans(model.memory[head % 2], config.prototypes, 10, generator)
        model.centroids[head] = trainer.over_ranks(centroids * (run.rank == 0))  # rank 0's to all


def deepcluster_loss(model, embeddings, numbers, temperature):
    """z (B,D) of every view, numbers (B,) of the images -> loss, scores (B,K) of every view: in
    each of the clusterings, each view has to name the cluster that its image's z was in."""
    losses = []
    for head, centroids in enumerate(model.centroids):
        clusters = (model.memory[head % 2, numbers] @ centroids.T).argmax(1)
        scores = [F.linear(z, centroids) for z in embeddings]
        losses += [F.cross_entropy(each / temperature, clusters) for each in scores]
    with torch.no_grad():
        latest = torch.stack([trainer.rows_of_all_ranks(z) for z in embeddings[:2]])
        model.memory[:, trainer.rows_of_all_ranks(numbers)] = latest
    return torch.stack(losses).mean(), [F.linear(z, model.centroids[0]) for z in embeddings]


def simclr_loss(embeddings, temperature):
    """z (B,D) of every view -> loss: each view has to tell its image's large crops from those of
    all other images (NT-Xent, Chen et al. 2020)."""
    large = [trainer.rows_of_all_ranks(z) for z in embeddings[:2]]  # (B of all ranks, D)
    (rank, ranks), losses = trainer.rank_and_ranks(), []
    own = torch.eye(len(large[0]), dtype=torch.bool, device=large[0].device).chunk(ranks)[rank]
    for v, z in enumerate(embeddings):
        others = [(F.linear(z, each) / temperature).masked_fill(own, -math.inf) for each in large]
        negative = torch.cat(others, 1).logsumexp(1)  # (B,)
        losses += [F.softplus(negative - (z * embeddings[i]).sum(1) / temperature).mean()
                   for i in (0, 1) if i != v]
    return torch.stack(losses).mean()


# ---- Use ----

def load_encoder(run, path, stem):
    """-> Encoder from a checkpoint, of the kind that its weights tell.  They do not tell whether
    the stem pools: with torchvision's or the authors' heads it does, else `stem` decides."""
    state = checkpoints.read_resnet(path)
    headed = "projection_head.0.weight" in state or torch.as_tensor(state.get("fc.weight", 0)).any()
    state = {name: w for name, w in state.items() if name.startswith(("conv1.", "bn1.", "layer"))}
    channels, _, kernel, _ = state["conv1.weight"].shape
    kind = ("resnet50" if "layer1.0.conv3.weight" in state else
            "resnet18" if "layer1.1.conv1.weight" in state else "resnet10")
    if told := headed or (stem == "cifar") != (kernel == 3):
        stem = "cifar" if kernel == 3 else "imagenet"
    encoder = Encoder(kind, channels / 64, stem)
    checkpoints.load_into(encoder, state, path, f"{kind}, the nearest of {', '.join(RESNETS)}")
    run.say(f"{path}: {kind}, width {channels / 64:g}, stem {stem}"
            + " (not told by the weights; another: --set stem=...)" * (not told))
    return encoder.to(run.device, memory_format=torch.channels_last)


def export(run, path):
    """Write the encoder of "swav" as torchvision's state dict, its last layer zero."""
    config = run.config
    if config.width != 1 or config.network == "resnet10" or config.stem == "cifar":
        raise trainer.InputError(
            f"torchvision has no {config.network} of width {config.width:g} with stem "
            f"{config.stem}: --set network=resnet18 --set width=1 --set stem=imagenet")
    data = run.load(config.dataset, config.image_size, config.streamed or None, channels=3)
    encoder = network(run, data, "swav").model.encoder
    head = {"fc.weight": torch.zeros(1000, encoder.channels), "fc.bias": torch.zeros(1000)}
    if run.rank == 0 and not run.plan:
        checkpoints.write(path, {**encoder.state_dict(), **head})
        run.say(f"{path}: {config.network}, stem {config.stem}")


def options(parser):
    parser.add_argument("--export", metavar="FILE", help="write the network for torchvision.models")
    parser.add_argument("--evaluate", metavar="FILE", help="probe a network that is in a file")


def use(given):
    """Turn --evaluate into settings and rows; --export is done in place of reproduce."""
    if given.export and (given.evaluate or given.plan):
        raise trainer.InputError("--export goes neither with --evaluate nor with --plan")
    given.seeds = given.seeds or ("0" if given.export or given.evaluate else None)
    if given.evaluate:
        digest = checkpoints.digest_of(path := Path(given.evaluate).absolute())
        given.overrides += [f"checkpoint={path}", f"checkpoint_sha256={digest}"]
        given.rows = "checkpoint/knn*,checkpoint/linear" if given.rows == "*" else given.rows
    return given.export and partial(
        export, path=checkpoints.require_new(given.export, given.seeds))


def main(arguments=None):
    return launch(__file__, Config, reproduce, arguments, options=options, use=use,
                  rows=lambda config: ["checkpoint/*" if config.checkpoint else "[!c]*"])


if __name__ == "__main__":
    raise SystemExit(main())
