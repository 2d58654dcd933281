"""The embedded sets: functions of their arguments to the byte, balanced, drawn at any size, and
fast."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from replicate import embedded
from replicate.embedded import embedded_digits, embedded_objects

DRAWERS = {
    "objects": embedded_objects,
    "digits": embedded_digits,
    "blended": lambda count, seed, **options: embedded_digits(count, seed, blended=True, **options),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations on many threads crawl while something else runs on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=DRAWERS, name="draw")
def drawer(request):
    return DRAWERS[request.param]


def same(first, second):
    return all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("name, channels, size", [("objects", 3, 32), ("digits", 1, 28),
                                                  ("blended", 3, 28)])
def test_shapes_and_types(name, channels, size):
    images, labels = DRAWERS[name](300, 0)
    assert images.shape == (300, channels, size, size) and images.dtype == torch.uint8
    assert labels.shape == (300,) and labels.dtype == torch.int64
    assert images.float().std() > 20  # neither blank nor saturated


def test_same_arguments_same_bytes_and_the_global_generator_is_left_alone(draw):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = draw(300, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert same(first, draw(300, 3))


def test_seed_matters(draw):
    first, second = draw(40, 0), draw(40, 1)
    assert not torch.equal(first[1], second[1])
    assert (first[0] != second[0]).flatten(1).any(1).all()
    flat = torch.cat([first[0], second[0]]).flatten(1)
    assert len(flat.unique(dim=0)) == 80


def test_bytes_do_not_depend_on_threads(draw):
    one = draw(300, 0, size=48)
    torch.set_num_threads(2)
    assert same(one, draw(300, 0, size=48))


def test_bytes_do_not_depend_on_the_vector_unit():
    program = ("import hashlib, torch; from replicate.embedded import *; "
               "digest = hashlib.sha256()\n"
               "for images, _ in (embedded_objects(100, 0), embedded_digits(100, 0, True)):\n"
               "    digest.update(images.numpy().tobytes())\n"
               "print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())")
    root = Path(__file__).resolve().parent.parent

    def digest(**variables):
        done = subprocess.run([sys.executable, "-c", program], cwd=root,
                              env={"PYTHONPATH": str(root), **variables},
                              capture_output=True, text=True, check=True)
        return done.stdout.split()[-1]

    assert digest() == digest(ATEN_CPU_CAPABILITY="default")


@pytest.mark.parametrize("count", [1, 9, 10, 257, 1003])
def test_labels_are_balanced_up_to_one(draw, count):
    _, labels = draw(count, 0, size=16)
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10 and counts.sum() == count and counts.max() - counts.min() <= 1


def test_labels_are_shuffled(draw):
    _, labels = draw(100, 0, size=16)
    assert not torch.equal(labels, labels.sort().values) and not torch.equal(labels,
                                                                             torch.arange(100) % 10)


@pytest.mark.parametrize("name", ["objects", "digits"])
def test_every_two_classes_differ_in_their_mean_image(name):
    images, labels = DRAWERS[name](2000, 0)
    means = torch.stack([images[labels == label].float().mean(0).flatten() for label in range(10)])
    # Halves of one class differ by chance alone: classes must differ by clearly more.
    halves = torch.stack([images[labels == label][::2].float().mean(0).flatten()
                          for label in range(10)])
    chance = (halves - means).pow(2).mean(1).sqrt().mean()
    apart = torch.pdist(means) / means.shape[1] ** 0.5
    assert apart.min() > 1.5 * chance


def test_objects_have_an_upright_orientation():
    """A class's mean image is not its own mirror image top to bottom: there is something for
    rotation to find."""
    images, labels = embedded_objects(2000, 0)
    for label in range(10):
        members = images[labels == label].float()
        mean, half = members.mean(0), members[::2].mean(0)
        assert (mean - mean.flip(1)).pow(2).mean() > 2 * (mean - half).pow(2).mean()


@pytest.mark.parametrize("name", DRAWERS)
@pytest.mark.parametrize("size", [16, 96, 128])
def test_another_size_draws_the_same_scene(name, size):
    usual, labels = DRAWERS[name](60, 0, size=32)
    other, other_labels = DRAWERS[name](60, 0, size=size)
    assert other.shape[-2:] == (size, size) and torch.equal(labels, other_labels)
    pool = torch.nn.functional.adaptive_avg_pool2d
    coarse, other_coarse = pool(usual.float(), 8), pool(other.float(), 8)
    assert ((coarse - other_coarse).abs().mean()
            < 0.25 * (coarse - other_coarse.roll(1, 0)).abs().mean())


def test_blending_is_the_absolute_difference_and_does_not_wrap():
    digits = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    for level in (0, 1, 100, 254, 255):
        patches = torch.full((1, 3, 16, 16), level, dtype=torch.uint8)
        expected = [[abs(level - digit) for digit in range(256)]] * 3
        assert embedded._blend(digits, patches).flatten(2)[0].tolist() == expected


def test_blended_digits_are_the_plain_ones_and_their_strokes_stay_visible():
    plain, labels = embedded_digits(400, 2)
    blended, blended_labels = embedded_digits(400, 2, blended=True)
    assert torch.equal(labels, blended_labels)
    inside = (plain == 255).float()
    around = (torch.nn.functional.max_pool2d(plain.float(), 5, 1, 2) > 0).float() * (plain == 0)
    stroke, neighbors = ((blended.float() * mask).sum((2, 3)) / mask.sum((2, 3))
                         for mask in (inside, around))
    assert (stroke - neighbors).abs().mean() > 40
    # A full stroke shows 255 - patch; with wrap-around it would show patch + 1, and this would not
    # hold.
    assert (stroke + neighbors - 255).abs().mean() < 20


def test_blended_texture_shows_where_there_is_no_stroke():
    plain, _ = embedded_digits(100, 4)
    blended, _ = embedded_digits(100, 4, blended=True)
    texture = torch.Generator().manual_seed(2 * 4 + 1)
    patches = embedded._to_bytes(embedded._draw_background(100, 28, texture))
    assert torch.equal(blended.int(), (patches.int() - plain.int()).abs())


@pytest.mark.parametrize("arguments, named", [
    (dict(count=0, seed=0), "count.* 0"), (dict(count=-3, seed=0), "count.* -3"),
    (dict(count=2.5, seed=0), "count.* 2.5"),
    (dict(count=True, seed=0), "count.* True"), (dict(count=5, seed=-1), "seed.* -1"),
    (dict(count=5, seed=2**31), "seed.* 2147483648"), (dict(count=5, seed="a"), "seed.* 'a'"),
    (dict(count=5, seed=0, size=15), "size.* 15"), (dict(count=5, seed=0, size=129), "size.* 129"),
    (dict(count=5, seed=0, size=None), "size.* None"),
])
def test_bad_arguments_are_named(draw, arguments, named):
    with pytest.raises(ValueError, match=named):
        draw(**arguments)


def test_ten_thousand_objects_in_seconds():
    start = time.process_time()  # processor time: another program on the machine must not fail this
    embedded_objects(10_000, 0)
    assert time.process_time() - start < 15
