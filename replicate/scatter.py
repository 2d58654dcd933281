"""Features as points of a plane, and pictures of such points.  Nothing here changes a number."""
import math

import torch


def tsne(features, start, generator, perplexity=30.0, iterations=500):
    """float64 features (N,D) -> points (N,2): exact t-distributed stochastic neighbour embedding
    (van der Maaten and Hinton 2008) from a start (N,2), such as the two principal components."""
    count = len(features)
    distances = torch.cdist(features, features).square().fill_diagonal_(math.inf)
    low, high = distances.new_zeros(count, 1), distances.new_full((count, 1), math.inf)
    precision = 1 / distances.sort(1).values[:, :int(perplexity)].mean(1, keepdim=True)
    for _ in range(50):  # bisection for the precision that gives the perplexity
        p = torch.softmax(-distances * precision, 1)
        entropy = -(p * p.clamp_min(1e-300).log()).sum(1, keepdim=True)
        low = torch.where(entropy > math.log(perplexity), precision, low)
        high = torch.where(entropy > math.log(perplexity), high, precision)
        precision = torch.where(high.isinf(), 2 * precision, (low + high) / 2)
    p = ((p + p.T) / (2 * count)).clamp_min(1e-12)
    noise = torch.randn(start.shape, generator=generator, dtype=start.dtype)
    y, velocity = 1e-4 * (start / start.std(0) + 1e-2 * noise), 0.0
    for step in range(iterations):
        exaggeration, momentum = (12, 0.5) if step < 100 else (1, 0.8)
        weights = (1 / (1 + torch.cdist(y, y).square())).fill_diagonal_(0)
        pull = (exaggeration * p - weights / weights.sum()) * weights
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        velocity = momentum * velocity - count / 12 * gradient
        y = y + velocity
    return y


def draw(points, colors, side=360):
    """(N,2) points and (N,3) colours in 0..1 -> picture (3,side,side) of 3 x 3 dots on white."""
    low, high = points.min(0).values, points.max(0).values
    x, y = ((points - low) / (high - low).clamp_min(1e-12) * (side - 9) + 3).long().T
    picture = torch.ones(3, side, side)
    for down in range(3):
        for right in range(3):
            picture[:, y + down, x + right] = colors.T
    return picture
