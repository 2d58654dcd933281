"""Speed against the usual ways: ratios measured in one run on this machine (./run_all.sh bench [smoke|small|full]).

1. A full training step (draw, crop, flip, turn, normalise, train) against the same step on a batch prepared beforehand; for
   rotation, and the same for the other papers' pre-training.
2. The same network, batch and number of steps the idiomatic way: per-sample torchvision transforms in a DataLoader with a
   worker per core, float32.
3. Arithmetic achieved in the step against that of a large matrix product on the same device.
4. A linear probe on 10,000 x 4,096 features.
Images are random bytes of CIFAR-10's shape: speed does not depend on what they show.
"""
import os
import sys
import tempfile
import time

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms import functional as image_functional

from papers import doersch_context, noroozi_jigsaw, swav, zhang_colorization
from papers import gidaris_rotation as rotation
from replicate import evaluate, trainer
from replicate.data import ImageSet, Resident


def timed(function, device, repeats):
    """Median seconds of repeats calls after two to warm up, the device's work included."""
    seconds = []
    for number in range(repeats + 2):
        start = time.perf_counter()
        function(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[repeats // 2]


class Rotations(Dataset):
    """One image in its four turns, cropped, flipped and normalised by per-sample transforms."""

    def __init__(self, images):
        self.images = [image_functional.to_pil_image(image) for image in images]
        self.augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
        self.finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.491, 0.482, 0.446),
                                                                                      (0.247, 0.243, 0.261))])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.augment(self.images[index])
        return torch.stack([self.finish(image.rotate(90 * turns)) for turns in range(4)]), torch.arange(4)


PRETRAIN = {  # paper's module -> its pre-training
    doersch_context: lambda run, data: doersch_context.pretrain(run, data, run.config, 1, "bench"),
    noroozi_jigsaw: lambda run, data: noroozi_jigsaw.pretrain(run, data, run.config, 1, "bench"),
    zhang_colorization: lambda run, data: zhang_colorization.pretrain(
        run, data, run.config, zhang_colorization.make_palette(run, data.train), "bench"),
    swav: lambda run, data: swav.pretrain(run, data, run.config, "bench"),
}


def drawing(paper, scale, device, steps):
    """Print what drawing the batch adds to a step of a paper's pre-training: `fit` is replaced by a few timed steps."""
    config = trainer.resolve_config(paper.Config, trainer.ROOT / "papers" / f"{paper.__name__.split('.')[-1]}.yaml", scale)
    side = config.image_size
    images = torch.randint(0, 256, (4 * config.batch_size, 3, side, side), dtype=torch.uint8, device=device)
    split = Resident(images, torch.arange(len(images), device=device) % 10)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer.Run(paper.__file__, config, scale, device, suite="bench", results=folder, runs=folder)
        draw, drawn = run.augment, []

        def once(*arguments):
            if not drawn:
                drawn.append(draw(*arguments))
            return drawn[0]

        def fit(purpose, model, objective, batches, *, optimizer, **rest):
            batch = next(batches(0))

            def step(number):
                with run.autocast():
                    loss = objective(batch, number)["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            full = timed(step, device, steps)
            run.augment = once
            prepared = timed(step, device, steps)
            name = f"{run.paper}: full step / prepared"
            print(f"{name:45}{full / prepared:6.2f}   ({1000 * full:.1f} ms / {1000 * prepared:.1f} ms, {config.batch_size} images)")
            run.history[purpose] = {"loss": []}
            return 0.0

        run.fit = fit
        PRETRAIN[paper](run, ImageSet("bench", split, split, 10))


def main(scale, steps):
    device = trainer.pick_device("auto")
    config = trainer.resolve_config(rotation.Config, trainer.ROOT / "papers" / "gidaris_rotation.yaml", scale)
    print(f"{trainer.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, scale {scale}: "
          f"width {config.width}, {config.batch_size} images a step in 4 turns, {steps} steps")
    trainer._prepare(config, device)
    images = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer.Run(rotation.__file__, config, scale, device, suite="bench", results=folder, runs=folder)
        model = rotation.build(run, "rotnet4")
        optimizer = rotation.optimizer_of(config, model.parameters())
        split = Resident(images.to(device), torch.zeros(5000, dtype=torch.int64, device=device))
        batches = run.shuffled(split, config.batch_size, "bench")(0)

        def train(rotated, labels, autocast=run.autocast):
            with autocast():
                loss = rotation.rotation_loss(model(rotated), labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def prepare(step):
            batch = run.augment(rotation.random_crop(config), next(batches)[0], "bench", step)
            rotated, labels = rotation.rotate(batch, rotation.QUARTER_TURNS)
            return rotation.normalize(rotated, config.mean, config.deviation), labels

        ready = prepare(0)
        prepared = timed(lambda step: train(*ready), device, steps)
        full = timed(lambda step: train(*prepare(step)), device, steps)
        with FlopCounterMode(display=False) as counter:
            train(*ready)
        operations = counter.get_total_flops()

        side = 8192 if device.type == "cuda" else 2048
        kind = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        left = torch.randn(side, side, device=device).to(kind)
        product = 2 * side ** 3 / timed(lambda step: left @ left, device, 10)

        model.to(memory_format=torch.contiguous_format)
        workers = os.cpu_count() or 1
        loader = DataLoader(Rotations(images), config.batch_size, shuffle=True, num_workers=workers, drop_last=True,
                            pin_memory=device.type == "cuda", persistent_workers=True)
        endless = (batch for _ in range(10 ** 6) for batch in loader)

        def idiomatic(step):
            inputs, labels = next(endless)
            train(inputs.flatten(0, 1).to(device), labels.flatten().to(device), lambda: torch.autocast(device.type, enabled=False))

        usual = timed(idiomatic, device, steps)
    features, labels = torch.randn(10000, 4096, device=device), torch.arange(10000, device=device) % 10
    start = time.perf_counter()
    evaluate.linear_probe(features, labels, features[:1000], labels[:1000])
    probe = time.perf_counter() - start
    print(f"full step / prepared step         {full / prepared:6.2f}   ({1000 * full:.1f} ms / {1000 * prepared:.1f} ms)")
    print(f"idiomatic step / full step        {usual / full:6.2f}   ({1000 * usual:.1f} ms, {workers} workers)")
    print(f"step's arithmetic / matrix product{operations / full / product:6.2f}   "
          f"({operations / full / 1e12:.3f} / {product / 1e12:.3f} TFLOP/s, {str(kind)[6:]})")
    print(f"linear probe 10,000 x 4,096       {probe:6.1f} s")
    for paper in PRETRAIN:
        drawing(paper, scale, device, steps)


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "full" if torch.cuda.is_available() else "small"
    main(chosen, 30 if torch.cuda.is_available() else 10)
