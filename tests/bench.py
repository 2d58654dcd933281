"""Speed against the usual ways: ratios measured in one run on this machine (./run_all.sh bench
[smoke|small|full]).

1. A full step of each paper's pre-training (draw, augment, train) against the same step on a batch
prepared beforehand. 2. Rotation the idiomatic way: the same network, batch and steps, per-sample
torchvision transforms in a DataLoader with a
   worker per core, float32.
3. Arithmetic achieved in rotation's step against that of a large matrix product on the same device.
4. A linear probe on 10,000 x 4,096 features.
Images are drawn by the code: speed does not depend on what they show.
"""
import importlib
import os
import sys
import tempfile
import time

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms import functional as image_functional

from replicate import evaluate, launch, records, trainer

ROWS = {  # paper -> a row that rests on its pre-training
    "gidaris_rotation": "rotnet4/rotation-accuracy", "doersch_context": "context/position-accuracy",
    "noroozi_jigsaw": "jigsaw/puzzle-accuracy", "zhang_colorization": "full/auc-raw",
    "swav": "swav/loss",
    "dann": "mnist-mnistm/dann"}


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
        self.augment = transforms.Compose([transforms.RandomCrop(32, padding=4),
                                           transforms.RandomHorizontalFlip()])
        self.finish = transforms.Compose([
            transforms.ToTensor(),
            transforms.Normalize((0.491, 0.482, 0.446), (0.247, 0.243, 0.261))])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.augment(self.images[index])
        return torch.stack([self.finish(image.rotate(90 * turns))
                            for turns in range(4)]), torch.arange(4)


class Measured(BaseException):
    """The first training of a script has been timed."""


def pretraining(paper, scale, device, steps, folder):
    """(seconds of a full step, of one on a prepared batch, the run, its model, its step): `fit` is
    replaced by timed steps."""
    script = importlib.import_module(f"papers.{paper}")
    declared = records.read_declared(script.__file__)
    config, _ = trainer.read_settings(script.Config, declared, scale, 0, ["dataset=embedded"])
    trainer.prepare(config, device)
    run = trainer.Run(script.__file__, config, scale, declared["rows"], device, suite="bench",
                      results=folder, runs=folder,
                      only=[ROWS[paper]])
    augment, drawn, made = run.augment, [], []

    def once(*arguments, **options):
        if not drawn:
            drawn.append(augment(*arguments, **options))
        return drawn[0]

    def fit(purpose, model, loss, batches, *, optimizer, **rest):
        stream = batches(0)

        def step(number, batch=None):
            with run.autocast():
                value = loss(batch or next(stream), number)["loss"]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        batch = next(stream)
        full = timed(step, device, steps)
        run.augment = once
        made.extend([full, timed(lambda number: step(number, batch), device, steps), run, model,
                     lambda: step(steps, batch), optimizer])
        raise Measured

    run.fit = fit
    try:
        script.reproduce(run)
    except Measured:
        return made


def usual_way(model, optimizer, batch_size, device, steps):
    """Seconds of a step of rotation, the idiomatic way."""
    model.to(memory_format=torch.contiguous_format)
    images = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8)
    loader = DataLoader(Rotations(images), batch_size, shuffle=True, num_workers=os.cpu_count()
                        or 1, drop_last=True,
                        pin_memory=device.type == "cuda", persistent_workers=True)
    endless = (batch for _ in range(10 ** 6) for batch in loader)

    def step(number):
        inputs, labels = next(endless)
        scores = model(inputs.flatten(0, 1).to(device))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, labels.flatten().to(device)).backward()
        optimizer.step()
    return timed(step, device, steps)


def say(name, ratio, text):
    print(f"{name:45}{ratio:6.2f}   ({text})", flush=True)


def main(scale, steps):
    device = launch.pick_device("auto")
    print(f"{trainer.device_name(device)}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, scale {scale}, {steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        for paper in ROWS:
            full, prepared, run, model, step, optimizer = pretraining(paper, scale, device, steps,
                                                                      folder)
            say(f"{paper}: full step / prepared", full / prepared, f"{1000 * full:.1f} ms / "
                f"{1000 * prepared:.1f} ms, {run.config.batch_size} images")
            if paper != "gidaris_rotation":
                continue
            with FlopCounterMode(display=False) as counter:
                step()
            usual = usual_way(model, optimizer, run.config.batch_size, device, steps)
            say("  idiomatic step / full step", usual / full, f"{1000 * usual:.1f} ms")
            side = 8192 if device.type == "cuda" else 2048
            kind = torch.bfloat16 if run.config.precision == "bfloat16" else torch.float32
            left = torch.randn(side, side, device=device).to(kind)
            product = 2 * side ** 3 / timed(lambda number: left @ left, device, 10)
            achieved = counter.get_total_flops() / full
            say("  arithmetic of a step / matrix product", achieved / product,
                f"{achieved / 1e12:.3f} / {product / 1e12:.3f} TFLOP/s, {str(kind)[6:]}")
    features, labels = torch.randn(10000, 4096, device=device), torch.arange(10000,
                                                                             device=device) % 10
    start = time.perf_counter()
    evaluate.linear_probe(features, labels, features[:1000], labels[:1000])
    print(f"{'linear probe 10,000 x 4,096':45}{time.perf_counter() - start:6.1f} s")


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "full" if torch.cuda.is_available() else "small"
    main(chosen, 30 if torch.cuda.is_available() else 10)
