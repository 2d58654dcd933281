"""Three papers the idiomatic way, which tests/bench.py measures the project against: a torchvision
transform for each sample, a DataLoader with a worker a core, float32.  Network, loss, batch and
optimiser are the script's own.  Pictures lie decoded in memory, so that no decoding is counted."""
import copy
import os
import sys
import time

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clock(device):
    """Seconds, after all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Pictures(Dataset):
    """Decoded pictures in memory, as torchvision's CIFAR10 keeps them, and a transform."""

    def __init__(self, side, count, transform):
        noise = torch.randint(256, (500, 3, side, side), dtype=torch.uint8)
        self.pictures, self.count, self.transform = list(map(to_pil_image, noise)), count, transform

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.transform(self.pictures[index % len(self.pictures)])


class FourTurns:
    def __init__(self, script, config):
        self.augment = transforms.Compose([
            transforms.RandomCrop(config.crop_size, padding=config.crop_padding),
            transforms.RandomHorizontalFlip()])
        self.finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(
            *([value / 255 for value in each] for each in (config.mean, config.deviation)))])

    def __call__(self, picture):
        picture = self.augment(picture)
        turned = [self.finish(picture.rotate(90 * turns)) for turns in range(4)]
        return torch.stack(turned), torch.arange(4)

    def loss(self, model, images, turns):
        return F.cross_entropy(model(images.flatten(0, 1)), turns.flatten())


class Crops:
    def __init__(self, script, config):
        self.script, self.config, self.crops, strength = script, config, [], config.jitter
        jitter = transforms.ColorJitter(*[0.8 * strength] * 3, 0.2 * strength)
        colors = [transforms.RandomApply([jitter], 0.8), transforms.RandomGrayscale(config.grey)]
        if config.blur:
            blur = transforms.GaussianBlur(13, (0.1, 2))
            colors.append(transforms.RandomApply([blur], config.blur))
        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        scales = zip(config.crop_scales[::2], config.crop_scales[1::2])
        for size, count, scale in zip(config.crop_sizes, config.crop_counts, scales):
            self.crops += count * [transforms.Compose([
                transforms.RandomResizedCrop(size, scale), transforms.RandomHorizontalFlip(),
                *colors, transforms.ToTensor(), normalize])]

    def __call__(self, picture):
        return [crop(picture) for crop in self.crops]

    def loss(self, model, *views):
        model.normalize_prototypes()
        scores, config = [model.prototypes(z) for z in model(views)], self.config
        codes = [self.script.sinkhorn(each.detach(), config.epsilon, config.iterations)
                 for each in scores[:2]]
        return self.script.swapped_prediction_loss(scores, codes, config.temperature)


class Colors:
    def __init__(self, script, config):
        self.script, self.config, self.bins = script, config, script.gamut_bins(config.step)
        self.augment = transforms.Compose([transforms.RandomCrop(config.crop_size),
                                           transforms.RandomHorizontalFlip()])

    def __call__(self, picture):
        lab = self.script.rgb_to_lab(pil_to_tensor(self.augment(picture))[None])[0]
        ab = lab[1:, ::4, ::4].flatten(1).T  # (P, 2)
        distances, nearest = torch.cdist(ab, self.bins).topk(self.config.neighbors, largest=False)
        shares = torch.softmax(-distances.square() / (2 * self.config.sigma ** 2), 1)
        encoded = torch.zeros(len(ab), len(self.bins)).scatter_(1, nearest, shares)
        side = self.config.crop_size // 4
        return lab[:1] - 50, encoded.T.unflatten(1, (side, side)), nearest[:, 0].view(side, side)

    def loss(self, model, lightness, encoded, nearest):
        weights = torch.ones(len(self.bins), device=nearest.device)[nearest]
        entropies = -(model(lightness).log_softmax(1) * encoded).sum(1)
        return (weights * entropies).mean()


VERSIONS = {"gidaris_rotation": FourTurns, "swav": Crops, "zhang_colorization": Colors}


def idiomatic_step(paper, config, device, model, optimizer, ahead):
    """-> a function that gives the seconds of a step on a copy of model and optimizer.

    ahead: the batches that the workers make before they are asked for, two each.
    """
    kind, (model, state) = type(optimizer), copy.deepcopy((model, vars(optimizer)))
    model.to(memory_format=torch.contiguous_format)
    optimizer = kind.__new__(kind)  # copied whole: deepcopy leaves out what torch does not know
    vars(optimizer).update(state)
    transform = VERSIONS[paper](sys.modules[f"papers.{paper}"], config)
    pictures = Pictures(config.image_size, 3 * ahead * config.batch_size, transform)
    loader = DataLoader(pictures, config.batch_size, shuffle=True, num_workers=-(-ahead // 2),
                        drop_last=True, pin_memory=device.type == "cuda")

    def seconds():
        """Of `ahead` steps after as many untimed ones, and with as many still to come."""
        torch.use_deterministic_algorithms(False)
        for number, batch in enumerate(loader):
            loss = transform.loss(model, *(part.to(device, non_blocking=True) for part in batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number == ahead - 1:
                start = clock(device)
            if number == 2 * ahead - 1:
                break
        torch.use_deterministic_algorithms(config.deterministic)
        return (clock(device) - start) / ahead
    return seconds
