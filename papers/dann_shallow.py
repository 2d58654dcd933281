"""Domain-Adversarial Training of Neural Networks (DANN): Algorithm 1, the shallow network
Yaroslav Ganin, Evgeniya Ustinova, Hana Ajakan, Pascal Germain, Hugo Larochelle, Francois
Laviolette, Mario Marchand, Victor Lempitsky.  JMLR 17(59), 2016, arXiv 1505.07818.
The deep networks of the same paper are in dann.py.

Claim: on Amazon reviews of four kinds of goods, a network whose hidden layer cannot tell two kinds
apart carries sentiment from one to the other better than an ordinary network and an SVM do.

Method: one hidden layer of sigmoids feeds a softmax that names the class and a logistic unit that
names the domain.  Algorithm 1 takes the source examples one by one, with a target example drawn at
random beside each, and makes one step of stochastic gradient descent: the softmax descends its
loss, the domain unit ascends the likelihood of the domains, times lambda, and the hidden layer
descends both.  lambda is chosen without a target label, by reverse validation: the trained network
labels the target, a second one learns from those labels to classify the source, and what it gets
wrong on a tenth of the source that neither was trained on is the risk of lambda.

The hidden layer's weights change by multiples of the examples only: W = W0 + sum_i a_i x_i^T.  So
only inner products of examples are needed, and all networks that share them learn side by side.
That changes the order of additions, and nothing else.

Deviations from the paper
 1. 50 hidden units for all pairs (paper: 50 or 100, by reverse validation as well).
 2. Early stopping as in the official code [1]: at most 200 epochs, and no more than 1.5 times as
    many as the best network took; but 30 in any case, which is ours.
 3. The SVM has the squared hinge loss; its penalty is chosen by reverse validation, too.
 4. mSDA is fitted to the 4,000 training reviews of a pair.
 5. The moons are drawn anew for each of moons_draws networks, and their accuracies averaged.
[1] https://github.com/GRAAL-Research/domain_adversarial_neural_network

Run:  python -m papers.dann_shallow --scale full    (the paper's protocol; a CPU will do)
Result, demo: moons/dann 84.2 +- 0.9 against moons/source-only 82.3 (n = 3)
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from replicate import data as image_data
from replicate import trainer
from replicate.launch import launch


@dataclass
class Config:
    seed: int
    dataset: Literal["amazon", "embedded"] = "amazon"   # Sec. 5.1.3; embedded: drawn reviews
    hidden: int = 50                # Sec. 5.1.3: 50 or 100
    rate: float = 0.001             # Sec. 5.1.3
    msda_rate: float = 0.0001       # Sec. 5.1.4
    strengths: tuple[float, ...] = tuple(10 ** (step / 4 - 2) for step in range(9))  # Sec. 5.1.3
    epochs: int = 200               # official code [1]: at most
    patience: int = 30              # ours: no network stops before this epoch
    layers: int = 5                 # Sec. 5.1.4: of mSDA
    corruption: float = 0.5         # Sec. 5.1.4: share of the words that mSDA blanks
    penalties: tuple[float, ...] = tuple(10.0 ** power for power in range(-5, 1))   # of the SVM
    moons_draws: int = 75           # ours
    moons_points: int = 300         # official code [1]: of each domain
    moons_hidden: int = 15          # Sec. 5.1.1
    moons_epochs: int = 500         # official code [1]
    moons_rate: float = 0.05        # official code [1]
    moons_strength: float = 6.0     # official code [1]
    deterministic: bool = True      # ours

    def __post_init__(self):
        for name in ("hidden", "epochs", "moons_draws", "moons_hidden"):
            assert getattr(self, name) > 0, f"{name} must be above 0"
        assert self.strengths and min(self.strengths) > 0, "strengths: at least one above 0"
        assert self.penalties and min(self.penalties) > 0, "penalties: at least one above 0"
        assert self.corruption < 1, f"corruption {self.corruption}: a share below 1"
        assert self.moons_points >= 20, "moons_points: at least 20"


# ---- The idea ----

# Algorithm 1, for many networks at once.  Sizes used below: P pairs of domains, M networks of
# each, N training examples of a pair, H hidden units, C classes.  `kernel` (P,N,N) holds the
# inner products of the examples of each pair.

def first_networks(projected, networks, classes, generator):
    """{name: tensor} of P x M untrained networks.

    projected: (P,N,H), the examples times W0.  All other weights are zero but those of the softmax,
    which are drawn as W0 is (official code [1]).
    """
    pairs, _, hidden = projected.shape
    inputs = projected[:, :, None].repeat(1, 1, networks, 1)
    first = nn.init.xavier_uniform_(torch.empty(hidden, classes), generator=generator)
    return {"inputs": inputs,                       # (P,N,M,H): W x of every example
            "a": torch.zeros_like(inputs),          # (P,N,M,H): W is W0 + sum_i a_i x_i^T
            "b": inputs.new_zeros(pairs, networks, hidden),     # of the hidden layer
            "V": first.to(projected).repeat(pairs, networks, 1, 1),  # (P,M,H,C): of the softmax
            "c": inputs.new_zeros(pairs, networks, classes),
            "u": inputs.new_zeros(pairs, networks, hidden),     # of the domain unit
            "d": inputs.new_zeros(pairs, networks)}


def class_scores(nets, examples):
    """Scores (P,n,M,C) before the softmax, of the training examples with these numbers (n,)."""
    hidden = torch.sigmoid(nets["inputs"][:, examples] + nets["b"][:, None])
    return torch.einsum("pnmh,pmhc->pnmc", hidden, nets["V"]) + nets["c"][:, None]


def train_on_block(nets, kernel, source, targets, labels, strengths, rate):
    """Algorithm 1 for each example of a block, one after the other; changes the networks in place.

    source: (n,) numbers of examples; targets: (P,n), the target example that goes with each;
    labels: (P,n,M,C), one-hot.  Within the block only its own 2 n examples' inputs are kept up to
    date; those of all others follow at the end, which makes one large product of many small ones.
    """
    count, pair = len(source), torch.arange(len(kernel), device=kernel.device)[:, None]
    block = torch.cat([source.expand_as(targets), targets], 1)  # (P,2n)
    products = kernel[pair, block]  # (P,2n,N)
    among = products.gather(2, block[:, None].expand(-1, 2 * count, -1))  # (P,2n,2n)
    inputs = nets["inputs"][pair, block]
    changes = torch.zeros_like(inputs)
    b, V, c, u, d = (nets[name] for name in "bVcud")
    from_source = torch.tensor([1.0, 0.0], device=kernel.device)[:, None]
    for i in range(count):
        both = slice(i, None, count)  # i and i + n: the source example and its target example
        hidden = torch.sigmoid(inputs[:, both] + b[:, None])  # (P,2,M,H)
        scores = torch.einsum("pmh,pmhc->pmc", hidden[:, 0], V) + c
        error = scores.softmax(2) - labels[:, i]  # (P,M,C): gradient of the label loss
        domain = torch.sigmoid((hidden * u[:, None]).sum(3) + d[:, None])  # P(source): (P,2,M)
        surprise = strengths * (from_source - domain)  # lambda times the log-likelihood's gradient
        back = surprise[..., None] * u[:, None]  # to be descended: the reversed gradient
        back[:, 0] += torch.einsum("pmc,pmhc->pmh", error, V)
        back *= hidden * (1 - hidden)
        V -= rate * hidden[:, 0, :, :, None] * error[:, :, None]
        c -= rate * error
        u += rate * (surprise[..., None] * hidden).sum(1)
        d += rate * surprise.sum(1)
        b -= rate * back.sum(1)
        changes[:, both] = -rate * back
        inputs += torch.einsum("pni,pimh->pnmh", among[:, :, both], changes[:, both])
    nets["a"].index_put_((pair, block), changes, accumulate=True)
    nets["inputs"] += torch.einsum("pin,pimh->pnmh", products, changes)


# ---- mSDA: marginalised stacked denoising autoencoders (Chen et al. 2012) ----

def denoising_layer(examples, corruption):
    """(N,D) -> weights (D,D+1) that best restore inputs of which a share is blanked, averaged over
    all ways to blank them.  The last column is for a constant 1, which is never blanked."""
    ones = torch.cat([examples, torch.ones_like(examples[:, :1])], 1)
    kept = torch.full_like(ones[0], 1 - corruption)
    kept[-1] = 1
    scatter = ones.T @ ones
    between = scatter * kept[:, None] * kept  # of two blanked inputs
    between.diagonal().copy_(scatter.diagonal() * kept)
    between.diagonal().add_(1e-5)
    across = scatter[:-1] * kept  # of the clean input and a blanked one
    return torch.cholesky_solve(across.T, torch.linalg.cholesky(between)).T


def stacked_layers(train, others, layers, corruption):
    """Yield (train (N,D), others (K,D)), first as they are, then after each layer of mSDA."""
    yield train, others
    for _ in range(layers):
        weights = denoising_layer(train, corruption)
        train, others = (torch.tanh(x @ weights[:, :-1].T + weights[:, -1])
                         for x in (train, others))
        yield train, others


# ---- Pre-training ----

def train(nets, kernel, source, target, held_out, labels, strengths, rate, epochs, patience, draw):
    """-> the networks as they were when they made the fewest errors on held_out.

    source, target, held_out: (n,), (m,), (k,) numbers of examples; labels: (P,N,M), of source and
    held_out; draw(epoch, pair): generator of the target examples.  Where two epochs are equally
    good, the later counts; each network stops by itself (official code [1]).  held_out None: to
    the last epoch.
    """
    classes = nets["c"].shape[2]
    one_hot = nn.functional.one_hot(labels, classes).to(kernel.dtype)
    best = {name: tensor.clone() for name, tensor in nets.items()}
    fewest = torch.full(nets["d"].shape, math.inf, device=kernel.device)  # (P,M)
    until = torch.full_like(fewest, patience)
    going = torch.ones_like(fewest, dtype=torch.bool)
    for epoch in range(epochs):
        drawn = torch.stack([torch.randint(len(target), (len(source),), generator=draw(epoch, pair))
                             for pair in range(len(kernel))]).to(kernel.device)
        for part, others in zip(source.split(BLOCK), target[drawn].split(BLOCK, 1)):
            train_on_block(nets, kernel, part, others, one_hot[:, part], strengths, rate)
        if held_out is None:
            continue
        guesses = class_scores(nets, held_out).argmax(3)
        errors = (guesses != labels[:, held_out]).float().mean(1)
        better = going & (errors <= fewest)
        fewest = torch.where(better, errors, fewest)
        for name, tensor in nets.items():
            chosen = better[:, None] if name in ("inputs", "a") else better
            chosen = chosen.view(*chosen.shape, *[1] * (tensor.dim() - chosen.dim()))
            best[name] = torch.where(chosen, tensor, best[name])
        until = torch.where(better, until.clamp_min(1.5 * epoch), until)
        going &= better | (epoch <= until)
        if not going.any():
            break
    chosen = nets if held_out is None else best
    if not all(tensor.isfinite().all() for tensor in chosen.values()):
        raise trainer.TrainingFailed(f"weights are not finite after epoch {epoch + 1}/{epochs}: "
                                     "lower the rate or the strength with --set")
    return chosen


BLOCK = 25  # examples; changes the speed and no result


# ---- Evaluation ----

class Products(NamedTuple):
    """What is needed of a pair of domains; its N training examples are source, then target."""
    kernel: torch.Tensor        # (N,N)
    across: torch.Tensor        # (K,N): of the K target test examples with them
    projected: torch.Tensor     # (N,H): times the first weights of the hidden layer
    tested: torch.Tensor        # (K,H): likewise, of the test examples
    labels: torch.Tensor        # (N,): 0 or 1; all 0 for the target
    test_labels: torch.Tensor   # (K,)


class Epochs:
    """Epochs in the form of a split, since that is what run.record can shorten for a plan."""

    def __init__(self, epochs, examples):
        self.epochs, self.examples = epochs, examples

    def __len__(self):
        return self.epochs * self.examples

    def take(self, examples):
        return Epochs(max(1, len(examples) // self.examples), self.examples)


def test_scores(nets, products, pair, network):
    """Scores (K,C) before the softmax, of the target test examples of a pair, by one network."""
    inputs = products.tested + products.across @ nets["a"][pair, :, network]
    hidden = torch.sigmoid(inputs + nets["b"][pair, network])
    return hidden @ nets["V"][pair, network] + nets["c"][pair, network]


def percent(answers, labels):
    return 100 * float((answers == labels).double().mean())


def choose_strength(nets, kernel, labels, parts, strengths, rate, epochs, config, draw):
    """-> numbers (P,) of the networks of lowest reverse risk; the first (lambda 0) is left out.

    The reverse network starts from the forward one's weights; the target is its source, so that the
    domain unit's weights change their sign.  parts: as `measure_pairs` cuts them.
    """
    source, held_out, target, target_held_out = parts
    guessed = labels.clone()
    for part in (target, target_held_out):
        guessed[:, part] = class_scores(nets, part).argmax(3)
    start = {name: (-1 if name in "ud" else 1) * tensor for name, tensor in nets.items()}
    back = train(start, kernel, target, source, target_held_out, guessed, strengths, rate,
                 epochs.epochs, config.patience, draw)
    wrong = class_scores(back, held_out).argmax(3) != labels[:, held_out]
    return 1 + wrong.double().mean(1)[:, 1:].argmin(1)


def measure_pairs(run, kind, pairs, epochs):
    """{row: value} of one kind of features, raw or msda.  pairs: {"B-D": Products, ...}"""
    config, names, all_products = run.config, list(pairs), list(pairs.values())
    kernel = torch.stack([products.kernel for products in all_products])
    half = kernel.shape[1] // 2
    cut = half - half // 10
    parts = [torch.arange(start, end, device=kernel.device) for start, end in
             ((0, cut), (cut, half), (half, half + cut), (half + cut, 2 * half))]
    strengths = torch.tensor([0.0, *config.strengths], device=kernel.device)
    labels = torch.stack([products.labels for products in all_products])
    labels = labels[..., None].repeat(1, 1, len(strengths))  # (P,N,M)
    rate = config.rate if kind == "raw" else config.msda_rate
    nets = first_networks(torch.stack([products.projected for products in all_products]),
                          len(strengths), 2, run.stream(f"{kind}/softmax"))

    def draw(part, epoch, pair):
        return run.stream(f"{kind}/{names[pair]}/{part}", epoch)
    source, held_out, target, _ = parts
    nets = train(nets, kernel, source, target, held_out, labels, strengths, rate, epochs.epochs,
                 config.patience, partial(draw, "forward"))
    chosen = choose_strength(nets, kernel, labels, parts, strengths, rate, epochs, config,
                             partial(draw, "reverse"))
    values, distances = {}, {"input": [], "nn": [], "dann": []}
    for number, (name, products) in enumerate(pairs.items()):
        order = run.stream(f"{kind}/{name}/a-distance")
        for method, network in (("nn", 0), ("dann", chosen[number])):
            scores = test_scores(nets, products, number, network)
            values[f"{kind}/{name}/{method}"] = percent(scores.argmax(1), products.test_labels)
            hidden = nets["inputs"][number, :, network] + nets["b"][number, network]
            hidden = torch.sigmoid(hidden).double()
            distances[method].append(svm_a_distance(hidden @ hidden.T + 1, config.penalties,
                                                    order))
        exact = products.kernel.double() + 1  # an input that is always 1 stands for the bias
        distances["input"].append(svm_a_distance(exact, config.penalties, order))
        signs = 2.0 * products.labels.double() - 1
        coefficients = choose_svm(exact, signs, source, target, held_out, config.penalties)
        scores = (products.across.double()[:, source] + 1) @ coefficients
        values[f"{kind}/{name}/svm"] = percent((scores >= 0).long(), products.test_labels)
        strength = float(strengths[chosen[number]])
        run.say(f"seed {run.seed}  {kind}/{name}: lambda {strength:.3g} by reverse validation")
    for method in ("dann", "nn", "svm"):
        each = [values[f"{kind}/{name}/{method}"] for name in names]
        values[f"{kind}/mean/{method}"] = sum(each) / len(each)
    return values | {f"{kind}/{method}/a-distance": sum(each) / len(each)
                     for method, each in distances.items()}


def reproduce(run):
    """Every row of one seed; all pairs are trained side by side, whichever of them are wanted."""
    config = run.config
    for kind in ("raw", "msda"):
        if run.wants(f"{kind}/*"):
            domains = load_reviews(run)
            rows = run.wants(f"{kind}/*")
            pairs = all_products(run, kind, domains)
            run.record(rows, partial(measure_pairs, run, kind, pairs),
                       Epochs(config.epochs, len(next(iter(domains.values())).train)))
    run.sha256 = {}  # the moons are no data set
    if rows := run.wants("moons/*"):
        run.record(rows, partial(measure_moons, run),
                   Epochs(config.moons_epochs, config.moons_points))


# ---- The support vector machine ----

def fit_svm(kernel, signs, penalty, start=None, steps=50):
    """Kernel (n,n) and signs (n,), 1 or -1 -> coefficients (n,); kernel @ coefficients are scores.
    By Newton's method (Chapelle 2007) this minimises |w|^2 / 2 + penalty * sum of max(0, 1 - sign *
    score)^2.
    start: coefficients for another penalty, from which fewer steps lead here."""
    coefficients = torch.zeros_like(signs) if start is None else start
    inside = signs * (kernel @ coefficients) < 1  # the margin: these alone count
    for _ in range(steps):
        chosen = inside.nonzero().flatten()
        system = kernel[chosen][:, chosen]
        system.diagonal().add_(0.5 / penalty)
        factor = torch.linalg.cholesky(system)
        coefficients = torch.zeros_like(signs)
        coefficients[chosen] = torch.cholesky_solve(signs[chosen, None], factor).squeeze(1)
        before, inside = inside, signs * (kernel @ coefficients) < 1
        if torch.equal(before, inside) or not inside.any():
            break
    return coefficients


def signs_of(scores):
    return torch.where(scores >= 0, 1.0, -1.0).to(scores.dtype)


def choose_svm(kernel, signs, source, target, held_out, penalties):
    """Coefficients (n,) for the examples `source`, with the penalty of the lowest reverse risk."""
    fits, risks, fit, back = [], [], None, None
    for penalty in penalties:
        fits.append(fit := fit_svm(kernel[source][:, source], signs[source], penalty, fit))
        own = signs_of(kernel[target][:, source] @ fit)
        back = fit_svm(kernel[target][:, target], own, penalty, back)
        answers = signs_of(kernel[held_out][:, target] @ back)
        risks.append(float((answers != signs[held_out]).double().mean()))
    return fits[risks.index(min(risks))]


def svm_a_distance(kernel, penalties, generator):
    """2 (1 - 2 error) of an SVM that tells the first half of the examples, of one domain, from the
    second, fitted on half of both and tested on the others; the penalty is chosen on a tenth of
    what it is fitted on (official code [1]: on the test half)."""
    count = len(kernel) // 2
    signs = signs_of(torch.arange(2 * count) - count + 0.5).to(kernel)
    parts = torch.randperm(count, generator=generator)
    half, tenth = count // 2, max(1, count // 20)
    first, held, test = parts[:half - tenth], parts[half - tenth:half], parts[half:]
    first, held, test = (torch.cat([part, part + count]) for part in (first, held, test))

    def errors(fitted, tested, penalties):
        found, coefficients = [], None
        for penalty in penalties:
            coefficients = fit_svm(kernel[fitted][:, fitted], signs[fitted], penalty, coefficients)
            answers = signs_of(kernel[tested][:, fitted] @ coefficients)
            found.append(float((answers != signs[tested]).double().mean()))
        return found
    tried = errors(first, held, penalties)
    error, = errors(torch.cat([first, held]), test, [penalties[tried.index(min(tried))]])
    return 2 * (1 - 2 * min(error, 1 - error))


# ---- Reviews ----

DOMAINS = {"B": "books", "D": "dvd", "E": "electronics", "K": "kitchen"}
WORDS = 5000  # counts of so many words and pairs of words


class Reviews(NamedTuple):
    train: torch.Tensor         # (N,D): counts
    labels: torch.Tensor        # (N,): 1 for a good review, else 0
    test: torch.Tensor          # (K,D)
    test_labels: torch.Tensor   # (K,)


def read_svmlight(path):
    """A file of lines "label index:count ..." -> counts (N,5000), labels (N,), 0 or 1.

    InputError where the file is missing or of another form.
    """
    try:
        lines = path.read_text().splitlines()
        counts, labels = torch.zeros(len(lines), WORDS), torch.zeros(len(lines), dtype=torch.int64)
        for number, line in enumerate(lines):
            label, *entries = line.split()
            labels[number] = {"1": 1, "-1": 0}[label]
            for entry in entries:
                column, count = entry.split(":")
                counts[number, int(column)] = float(count)
    except FileNotFoundError:
        raise trainer.InputError(f"no file {path}: the Amazon reviews of {path.parent.name}/ are "
                                 "those that the paper's authors publish with their code") from None
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise trainer.InputError(f"{path} line {number + 1} is not of the form '1 3:2 17:1', a "
                                 f"label 1 or -1 and counts ({error})") from None
    return counts, labels


def load_reviews(run):
    """{letter: Reviews} of the four domains."""
    if run.config.dataset == "embedded":
        domains = {letter: draw_reviews(run.stream(f"reviews/{letter}"), number)
                   for number, letter in enumerate(DOMAINS)}
    else:
        folder = image_data.data_root(run.data_folder) / "amazon"
        domains = {letter: Reviews(*read_svmlight(folder / f"{name}_train.svmlight"),
                                   *read_svmlight(folder / f"{name}_test.svmlight"))
                   for letter, name in DOMAINS.items()}
    run.sha256["amazon"] = image_data.digest_of(
        tensor.numpy() for reviews in domains.values() for tensor in reviews)
    if len({reviews.train.shape for reviews in domains.values()}) > 1:
        raise trainer.InputError("the four domains must have equally many training reviews")
    return {letter: Reviews(*(tensor.to(run.device) for tensor in reviews))
            for letter, reviews in domains.items()}


def draw_reviews(generator, number, count=200, words=120):
    """Made-up Reviews of a domain: of its words some are good or bad everywhere, some only here."""
    labels = torch.arange(2 * count) % 2
    sentiment = torch.zeros(words)
    sentiment[:20] = torch.tensor([1.0, -1.0]).repeat(10)
    own = slice(20 + 20 * number, 40 + 20 * number)
    sentiment[own] = torch.tensor([1.0, -1.0]).repeat(10)
    frequency = torch.full((words,), 0.3)
    frequency[own] = 1.0
    rates = frequency * torch.exp(0.5 * sentiment * (2 * labels[:, None] - 1))
    counts = torch.poisson(rates, generator)
    return Reviews(counts[:count], labels[:count], counts[count:], labels[count:])


def all_products(run, kind, domains):
    """{"B-D": Products, ...} of all ordered pairs of domains."""
    config, words = run.config, next(iter(domains.values())).train.shape[1]
    layers = config.layers if kind == "msda" else 0
    first = nn.init.xavier_uniform_(torch.empty(words * (layers + 1), config.hidden),
                                    generator=run.stream(f"{kind}/hidden"))
    pairs = {}
    for number, (one, source) in enumerate(domains.items()):
        for other, target in list(domains.items())[number + 1:]:
            train, tests = torch.cat([source.train, target.train]), [source.test, target.test]
            kernel = across = projected = tested = 0
            features = stacked_layers(train, torch.cat(tests), layers, config.corruption)
            for (x, others), weights in zip(features, first.to(train).split(words)):
                kernel = kernel + x @ x.T
                across = across + others @ x.T
                projected, tested = projected + x @ weights, tested + others @ weights
            turned = torch.arange(len(train), device=train.device).roll(len(target.train))
            sizes, nothing = list(map(len, tests)), torch.zeros_like(target.labels)
            forth = Products(kernel, across[sizes[0]:], projected, tested[sizes[0]:],
                             torch.cat([source.labels, nothing]), target.test_labels)
            back = Products(kernel[turned][:, turned], across[:sizes[0]][:, turned],
                            projected[turned], tested[:sizes[0]],
                            torch.cat([target.labels, nothing]), source.test_labels)
            pairs |= {f"{one}-{other}": forth, f"{other}-{one}": back}
    return dict(sorted(pairs.items()))


# ---- The toy: two moons, and the same two turned (Sec. 5.1.1, official code [1]) ----

def two_moons(count, degrees, generator, device="cpu"):
    """-> points (count,2), labels (count,): two half circles of radius 2 that reach into one
    another, with noise, turned about their centre."""
    labels = torch.arange(count) % 2
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    noise = 0.05 * torch.randn(count, 2, generator=generator)
    points = torch.where(labels[:, None] == 0, upper, -upper) + noise
    turn = math.radians(degrees)
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return (2 * points @ rotation.T).to(device), labels.to(device)


def measure_moons(run, epochs):
    """{row: accuracy on 1,000 turned points}, the mean over all draws; trained to the last step."""
    config, count = run.config, run.config.moons_points
    kernels, projections, labels, tests = [], [], [], []
    for number in range(config.moons_draws):
        source, target, test = (
            two_moons(size, turn, run.stream(f"moons/{part}", number), run.device)
            for part, size, turn in (("source", count, 0), ("target", count, 35),
                                     ("test", 1000, 35)))
        points = torch.cat([source[0], target[0]])
        first = nn.init.xavier_uniform_(torch.empty(2, config.moons_hidden),
                                        generator=run.stream("moons/hidden", number)).to(points)
        kernels.append(points @ points.T)
        projections.append(points @ first)
        labels.append(torch.cat([source[1], torch.zeros_like(target[1])]))
        tests.append(Products(None, test[0] @ points.T, None, test[0] @ first, None, test[1]))
    kernel, order = torch.stack(kernels), torch.arange(2 * count, device=run.device)
    strengths = torch.tensor([0.0, config.moons_strength], device=run.device)
    nets = first_networks(torch.stack(projections), 2, 2, run.stream("moons/softmax"))
    nets = train(nets, kernel, order[:count], order[count:], None,
                 torch.stack(labels)[..., None].repeat(1, 1, 2), strengths, config.moons_rate,
                 epochs.epochs, config.patience,
                 lambda epoch, pair: run.stream(f"moons/{pair}/drawn", epoch))
    accuracies = [[percent(test_scores(nets, test, number, network).argmax(1), test.test_labels)
                   for number, test in enumerate(tests)] for network in range(2)]
    return {row: sum(each) / len(each)
            for row, each in zip(("moons/source-only", "moons/dann"), accuracies)}


def main(arguments=None):
    return launch(__file__, Config, reproduce, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
