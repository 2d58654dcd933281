"""Image sets: what is read, what is refused, and that streaming and residence give equal pixels."""
import hashlib
import shutil
import socket

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image

from papers import gidaris_rotation as rotation
from replicate import data
from replicate.data import InputError


@pytest.fixture
def no_network(monkeypatch):
    """No host can be reached."""
    def refuse(*arguments, **options):
        raise OSError("unreachable")
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_packed_file_is_used_as_it_is(tmp_path, write_packed):
    arrays = write_packed(tmp_path)
    loaded = data.load("cifar10", tmp_path, "cpu")
    assert loaded.train.images.shape == (40, 3, 32, 32) and loaded.train.images.dtype == torch.uint8
    assert np.array_equal(loaded.test.images.permute(0, 2, 3, 1).numpy(), arrays["x_test"])
    assert loaded.train.labels.tolist() == arrays["y_train"].tolist() and loaded.classes == 10
    keys = ("x_train", "y_train", "x_test", "y_test")
    # Labels of type int64 hash alike.
    digest = hashlib.sha256(b"".join(arrays[key].astype(np.uint8).tobytes() for key in keys))
    assert arrays["y_train"].dtype == np.int64 and loaded.sha256 == digest.hexdigest()


def test_cifar10_is_the_published_one():
    """Sizes and class counts of the whole set, where it is at hand."""
    root = data.data_root()
    if not (root / "packed" / "cifar10.npz").exists():
        pytest.skip("no CIFAR-10 on this machine")
    loaded = data.load("cifar10", root, "cpu")
    assert len(loaded.train) == 50000 and len(loaded.test) == 10000
    assert loaded.train.labels.bincount().tolist() == [5000] * 10
    assert loaded.test.labels.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("damage", ["cut", "shape", "type", "labels", "key", "rubbish"])
def test_a_damaged_packed_file_is_set_aside_and_named(tmp_path, capsys, no_network, damage,
                                                      write_packed):
    arrays = write_packed(tmp_path)
    path = tmp_path / "packed" / "cifar10.npz"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:len(content) // 2])
    elif damage == "rubbish":
        path.write_bytes(b"x" * 1000)
    else:
        change = {"shape": {"x_train": arrays["x_train"][:, :16]},
                  "type": {"x_test": arrays["x_test"].astype(np.float32)},
                  "labels": {"y_test": arrays["y_test"] + 9}, "key": {}}[damage]
        arrays.update(change)
        if damage == "key":
            del arrays["y_train"]
        np.savez(path, **arrays)
    with pytest.raises(InputError, match="--data DIR.*--scale demo") as caught:
        data.load("cifar10", tmp_path, "cpu")
    assert len(str(caught.value).splitlines()) == 1 and str(tmp_path) in str(caught.value)
    assert "is damaged" in capsys.readouterr().out
    assert not path.exists() and path.with_suffix(".npz.damaged").exists()


def test_raw_mnist_is_decoded_packed_and_read_again(tmp_path):
    root = data.data_root()
    if not (root / "MNIST" / "raw").exists():
        pytest.skip("no MNIST on this machine")
    shutil.copytree(root / "MNIST", tmp_path / "MNIST")
    first = data.load("mnist", tmp_path, "cpu")
    assert (tmp_path / "packed" / "mnist.npz").exists()
    again = data.load("mnist", tmp_path, "cpu")
    assert first.sha256 == again.sha256 and first.train.images.shape == (60000, 1, 28, 28)
    assert (first.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
            and torch.equal(first.test.images, again.test.images))


# Folders
def test_a_folder_is_decoded_resized_and_cropped(tmp_path):
    write_folder(tmp_path / "set")
    loaded = data.load(f"folder:{tmp_path / 'set'}", tmp_path, "cpu", size=24)
    assert (loaded.train.images.shape == (12, 3, 24, 24)
            and loaded.test.images.shape == (8, 3, 24, 24))
    assert loaded.classes == 2 and loaded.train.labels.tolist() == [0] * 6 + [1] * 6
    exact = data.load(f"folder:{tmp_path / 'set'}", tmp_path, "cpu", size=36)
    image = np.asarray(Image.open(tmp_path / "set" / "train" / "cat" / "0.png"))
    # It is cropped, not resampled.
    assert np.array_equal(exact.train.images[0].permute(1, 2, 0).numpy(), image[:, 2:38])


def test_streamed_and_resident_give_the_same_batches(tmp_path):
    write_folder(tmp_path / "set", counts=(20, 4))
    order = [torch.tensor([3, 1, 39]), torch.tensor([0, 20, 21]), torch.tensor([5])]
    batches = [[(x.clone(), y) for x, y in data.load(
        f"folder:{tmp_path / 'set'}", tmp_path, "cpu", 24, streamed).train.batches(iter(order))]
        for streamed in (False, True)]
    assert len(batches[0]) == len(batches[1]) == 3
    for (x, y), (streamed_x, streamed_y) in zip(*batches):
        assert torch.equal(x, streamed_x) and torch.equal(y, streamed_y)
    streamed = data.load(f"folder:{tmp_path / 'set'}", tmp_path, "cpu", 24,
                         True).train.take([2, 30])
    assert len(streamed) == 2 and streamed.labels.tolist() == [0, 1]


def test_imagenette_is_found_under_any_size_and_decoded_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "IMAGENETTE", ((12, 8),))
    write_folder(tmp_path / "imagenette2-128", classes=("n01", "n02"), parts=("train", "val"))
    loaded = data.load("imagenette", tmp_path, "cpu", size=32)
    assert (len(loaded.train) == 12 and len(loaded.test) == 8
            and data.on_disk(tmp_path) == ["imagenette"])
    assert loaded.class_names == ("n01", "n02") and loaded.train.images.shape == (12, 3, 32, 32)
    packed = tmp_path / "packed" / "imagenette2-128-at-32.npz"
    decode, calls = data.decode, []
    monkeypatch.setattr(data, "decode", lambda *arguments: calls.append(1) or decode(*arguments))
    again = data.load("imagenette", tmp_path, "cpu", size=32)
    assert (not calls and torch.equal(again.train.images, loaded.train.images)
            and again.sha256 == loaded.sha256)
    packed.write_bytes(packed.read_bytes()[:1000])
    mended = data.load("imagenette", tmp_path, "cpu", size=32)
    assert (len(calls) == 20 and mended.sha256 == loaded.sha256
            and "is damaged" in capsys.readouterr().out)
    assert data.load("imagenette", tmp_path, "cpu", size=24).train.images.shape == (
        12, 3, 24, 24)  # a file of its own


def test_usps_without_its_file_is_downloaded_or_named(tmp_path, no_network):
    """torchvision's USPS opens its file without looking."""
    with pytest.raises(InputError, match="no data set 'usps'"):
        data.load("usps", tmp_path, "cpu")


def test_an_unlabelled_part_is_for_pre_training(tmp_path, write_packed):
    write_packed(tmp_path, "stl10", shape=(96, 96, 3))
    loaded = data.load("stl10", tmp_path, "cpu")
    assert (len(loaded.unlabeled) == 30 and loaded.unlabeled.labels.tolist() == [-1] * 30
            and len(loaded.train) == 40)
    write_packed(tmp_path, "cifar10")
    plain = data.load("cifar10", tmp_path, "cpu")
    assert plain.unlabeled is plain.train


BROKEN = [("truncated", "cannot be read"), ("text", "cannot be read"), ("tiny", "is 4 x 4 pixels")]


def test_labels_of_one_class_are_no_set(tmp_path, no_network, capsys, write_packed):
    arrays = write_packed(tmp_path)  # as the first pictures of a sorted set would be
    np.savez(tmp_path / "packed" / "cifar10.npz", **{**arrays, "y_train": np.zeros(40, np.uint8)})
    with pytest.raises(InputError):
        data.load("cifar10", tmp_path, "cpu")
    assert "labels 0..0; expected 0..9" in capsys.readouterr().out
    np.savez(tmp_path / "packed" / "cifar10.npz", **{**arrays, "y_train": np.arange(40) % 3})
    with pytest.raises(InputError):
        data.load("cifar10", tmp_path, "cpu")
    assert "labels [3, 4, 5, 6, 7, 8, 9] are in test, not in train" in capsys.readouterr().out


def test_a_set_that_is_not_whole_is_said_to_be_so(tmp_path, capsys, write_packed):
    write_packed(tmp_path)
    (tmp_path / "packed" / "cifar10.npz").rename(tmp_path / "packed" / "svhn.npz")
    data.load("svhn", tmp_path, "cpu")
    assert ("is not the whole set: 40 and 20 images where it has 73257 and 26032"
            in capsys.readouterr().out)


def test_a_packed_file_that_may_not_be_read_is_not_called_damaged(tmp_path, write_packed,
                                                                  monkeypatch):
    write_packed(tmp_path)

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(PermissionError):
        data.load("cifar10", tmp_path, "cpu")
    assert (tmp_path / "packed" / "cifar10.npz").exists()


@pytest.mark.parametrize("case,message,streamed", [
    ("missing", "no folder with train/<class>/ images", False), ("empty", "no images in", False),
    ("one class", "only one class", False),
    ("linked", "a picture of both train/cat and test/cat", False),
    ("other classes", "have different classes: dog, fox", False),
    *((case, message, streamed) for case, message in BROKEN for streamed in (False, True)),
])
def test_bad_folders_get_one_line(tmp_path, capsys, folders, case, message, streamed):
    root = tmp_path / "set"
    if case == "empty":
        for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
            (root / name).mkdir(parents=True)
    elif case == "linked":
        write_folder(root, parts=("train",))
        (root / "test").symlink_to("train")
    elif case == "one class":
        write_folder(root, classes=("cat",))
    elif case == "other classes":
        write_folder(root, parts=("train",))
        write_folder(root, classes=("cat", "fox"), parts=("test",))
    elif case != "missing":
        write_folder(root)
        victim = root / "train" / "cat" / "3.png"
        if case == "truncated":
            victim.write_bytes(victim.read_bytes()[:200])
        elif case == "text":
            victim.write_text("not an image")
        else:
            Image.new("RGB", (4, 4)).save(victim)
    status = rotation.main(["--scale", "smoke", "--set", f"dataset=folder:{root}",
                            "--set", f"streamed={str(streamed).lower()}",
                            "--set", "pretext_epochs=4", "--set", "batch_size=4",
                            "--rows", "rotnet4/rotation-accuracy", *folders])
    error = capsys.readouterr().err.strip()
    assert status == 2 and message in error and len(error.splitlines()) == 1, error
    assert not list((tmp_path / "results").rglob("*.jsonl"))


def test_own_images_run_from_a_folder_with_spaces(tmp_path, folders):
    """Users bring their own: odd-shaped images go through pre-training and a probe into a table."""
    root = write_folder(tmp_path / "my own pictures", classes=("a b", "c"), counts=(20, 6),
                        size=(50, 64), suffix="jpg")
    assert rotation.main(["--scale", "smoke", "--set", f"dataset=folder:{root}",
                          "--set", "pretext_epochs=2", "--set", "conv_epochs=2",
                          "--set", "head_batch_size=8", "--set", "batch_size=8",
                          "--rows", "rotnet4/conv", *folders]) == 0
    (table,) = (tmp_path / "results").glob("smoke*/gidaris_rotation.md")
    assert "rotnet4/conv" in table.read_text()


def test_paper_scale_runs_on_a_stand_in_for_imagenet(tmp_path, folders):
    """AlexNet, random-sized crops, the streaming path: all rows, on two dozen drawn photographs."""
    write_folder(tmp_path / "imagenet", classes=("n1", "n2", "n3"), counts=(8, 3), size=(90, 70),
                 parts=("train", "val"))
    arguments = ["--scale", "paper", "--data", str(tmp_path), "--seeds", "0", "--device", "cpu",
                 *folders]
    for key, value in dict(width=0.03, batch_size=8, head_batch_size=8, pretext_epochs=0.7,
                           linear_epochs=0.7, nonlinear_epochs=0.7, precision="float32").items():
        arguments += ["--set", f"{key}={value}"]
    assert rotation.main(arguments) == 0
    records = [line for path in (tmp_path / "results").rglob("*.jsonl")
               for line in path.read_text().splitlines()]
    assert len(records) == 15 and all('"status": "ok"' in line for line in records)


