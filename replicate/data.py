"""Image sets as uint8 tensors on the device; files are streamed when they do not fit.

Order of search for the data root: --data, $REPLICATE_DATA, ./data beside run_all.sh.  A set that is not there is
downloaded by torchvision (its addresses and checksums), decoded once and packed as <root>/packed/<name>.npz with the
keys x_train, y_train, x_test, y_test (images NHWC uint8; STL-10 has x_unlabeled too).  The SHA-256 of what was decoded goes
into every record.
"""
import hashlib
import io
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import datasets

from replicate import embedded

ROOT = Path(__file__).resolve().parents[1]
PROBE_SECONDS = 10        # how long an unreachable download host may cost before we say so
RESIDENT_SHARE = 0.25     # of the device's memory that a set may take to be kept there


class InputError(Exception):
    """Something the user gave is wrong: one line, exit status 2, nothing written."""


class Resident:
    """Images (N,C,H,W) uint8 and labels (N,) int64, both on the device."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def batches(self, order):
        """Yield (images, labels) for each index tensor (B,) in order."""
        for indices in order:
            indices = indices.to(self.images.device)
            yield self.images[indices], self.labels[indices]

    def take(self, indices):
        indices = torch.as_tensor(indices, device=self.images.device)
        return Resident(self.images[indices], self.labels[indices])


class Streamed:
    """The same for image files that do not fit: workers decode, batches arrive on the device as uint8 (B,3,S,S)."""

    def __init__(self, files, labels, size, device):
        self.files, self.labels, self.size, self.device = files, labels, size, device

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        try:
            return decode(self.files[index], self.size), self.labels[index]
        except InputError as error:  # a worker's traceback would be many lines: hand the one line over instead
            return str(error)

    def batches(self, order):
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=(indices.tolist() for indices in order), collate_fn=_collate,
            num_workers=min(os.cpu_count() or 1, 16), pin_memory=self.device.type == "cuda", prefetch_factor=2)
        for batch in loader:
            if isinstance(batch, str):
                raise InputError(batch)
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def take(self, indices):
        indices = torch.as_tensor(indices).tolist()
        return Streamed([self.files[i] for i in indices], self.labels[indices], self.size, self.device)


def _collate(samples):
    for sample in samples:
        if isinstance(sample, str):
            return sample
    images, labels = zip(*samples)
    return torch.stack(images), torch.stack(labels)


@dataclass
class ImageSet:
    """train and test are Resident or Streamed; sha256: the hash of what was decoded.

    unlabeled: what to pre-train on, labels -1; where a set has no such part, it is train.
    class_names: of a folder's classes, in the order of their labels; empty for other sets.
    """
    name: str
    train: Resident | Streamed
    test: Resident | Streamed
    classes: int
    sha256: str = ""
    unlabeled: Resident | Streamed | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self):
        self.unlabeled = self.unlabeled or self.train


def data_root(argument=None):
    """--data, else $REPLICATE_DATA, else data/ beside run_all.sh; made absolute."""
    return Path(argument or os.environ.get("REPLICATE_DATA") or ROOT / "data").expanduser().absolute()


def load(name, root, device, size=None, streamed=None):
    """Load an image set.

    name: cifar10, mnist, usps, svhn, stl10; imagenette, imagenet (folders under the root); embedded, embedded-digits or
    embedded-digits-blended (drawn by the code); folder:DIR with train/<class>/ and test/<class>/ (or val/).
    size: side in pixels for files of any shape (shorter side resized, centre cropped); packed sets have their own.
    streamed: None keeps a folder on the device when it takes less than a quarter of the memory.
    Raises InputError with one line that names the thing and the way out.
    """
    device = torch.device(device)
    root = Path(root)
    if name.startswith("folder:") or name in ("imagenette", "imagenet"):
        return _load_folder(name, root, device, size, streamed)
    if name.startswith("embedded"):
        arrays = _draw(name, size)
    elif name in PACKED:
        arrays = _read_packed(name, root)
    else:
        raise InputError(f"unknown data set '{name}'; known: {', '.join(PACKED)}, imagenette, imagenet, "
                         f"{', '.join(DRAWN)}, folder:DIR")
    return _resident(name, arrays, device)


def _resident(name, arrays, device, class_names=()):
    """ImageSet of arrays in the order of KEYS, images NHWC."""
    x_train, y_train, x_test, y_test, *x_unlabeled = arrays

    def split(x, y):
        images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(device)
        return Resident(images, torch.from_numpy(y.astype(np.int64)).to(device))

    return ImageSet(name, split(x_train, y_train), split(x_test, y_test), int(y_train.max()) + 1, digest_of(arrays),
                    *(split(x, np.full(len(x), -1)) for x in x_unlabeled), class_names=class_names)


# Packed sets: torchvision downloads and decodes, we keep one file
TRAIN, SPLIT = ({"train": True}, {"train": False}), ({"split": "train"}, {"split": "test"})
PACKED = {  # name -> (classes, image shape (H,W,C), torchvision's class, its arguments for train and test)
    "cifar10": (10, (32, 32, 3), datasets.CIFAR10, TRAIN), "mnist": (10, (28, 28, 1), datasets.MNIST, TRAIN),
    "usps": (10, (16, 16, 1), datasets.USPS, TRAIN), "svhn": (10, (32, 32, 3), datasets.SVHN, SPLIT),
    "stl10": (10, (96, 96, 3), datasets.STL10, (*SPLIT, {"split": "unlabeled"})),
}
KEYS = ("x_train", "y_train", "x_test", "y_test", "x_unlabeled")


def _keys(name):
    return KEYS if len(PACKED[name][3]) == 3 else KEYS[:4]


def _torchvision(name, root, download):
    """The arrays of _keys(name), NHWC uint8 and uint8, from a torchvision data set with PIL images."""
    arrays = []
    for part in (PACKED[name][2](str(root), download=download, **arguments) for arguments in PACKED[name][3]):
        images = np.stack([np.asarray(image) for image, _ in part])
        labels = torch.as_tensor(part.targets if hasattr(part, "targets") else part.labels).numpy()
        arrays += [images if images.ndim == 4 else images[..., None], labels.astype(np.uint8)]
    return arrays[:len(_keys(name))]


RAW = {"cifar10": "cifar-10-batches-py", "mnist": "MNIST/raw", "usps": "usps.bz2", "svhn": "train_32x32.mat",
       "stl10": "stl10_binary"}
ADDRESS = {"cifar10": datasets.CIFAR10.url, "mnist": datasets.MNIST.mirrors[0],
           "usps": datasets.USPS.split_list["train"][0], "svhn": datasets.SVHN.split_list["train"][0],
           "stl10": datasets.STL10.url, "imagenette": datasets.Imagenette._ARCHIVES["full"][0]}


def _check_arrays(arrays, classes, shape):
    for x in arrays[::2]:
        if x.dtype != np.uint8 or x.shape[1:] != shape or len(x) == 0:
            raise ValueError(f"images {x.dtype} {x.shape}; expected uint8 (N, {shape})")
    for x, y in (arrays[:2], arrays[2:4]):
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(f"labels {y.dtype} {y.shape}; expected whole numbers ({len(x)},)")
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(f"labels {y.min()}..{y.max()}; expected 0..{classes - 1}")


def _read_packed(name, root):
    return _packed(root / "packed" / f"{name}.npz", _keys(name), *PACKED[name][:2], lambda: _from_torchvision(name, root))


def _packed(path, keys, classes, shape, make):
    """The arrays of a packed file; one that is damaged is set aside, one that is not there is made."""
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = [archive[key] for key in keys]
            _check_arrays(arrays, classes, shape)
            return [array.astype(np.uint8) for array in arrays]
        except Exception as error:  # rubbish can make numpy raise nearly anything
            aside = path.with_suffix(".npz.damaged")
            print(f"warning: {path} is damaged ({error}); set aside as {aside.name} and made anew", flush=True)
            try:
                path.replace(aside)
            except OSError:
                raise InputError(f"{path} is damaged and cannot be moved away: delete it") from None
    arrays = make()
    _check_arrays(arrays, classes, shape)
    arrays = [array.astype(np.uint8) for array in arrays]  # so that labels of any type hash alike
    buffer = io.BytesIO()
    np.savez(buffer, **dict(zip(keys, arrays)))
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        print(f"warning: {path} could not be written ({error.strerror}); decoding again next time", flush=True)
    return arrays


def _from_torchvision(name, root):
    try:
        return _torchvision(name, root, download=False)
    except (RuntimeError, FileNotFoundError):  # "Dataset not found or corrupted"; USPS just opens its file
        pass
    except ImportError as error:
        raise _needs_package(name, root, error) from None
    if not (root / RAW[name]).exists() and not reachable(ADDRESS[name]):  # raw archives are unpacked without a network
        raise InputError(f"no data set '{name}' in {root} and its host cannot be reached: give the folder that holds "
                         "it with --data DIR, or run on drawn images with --data embedded")
    print(f"unpacking or downloading {name} in {root}", flush=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PROBE_SECONDS)
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _torchvision(name, root, download=True)
    except ImportError as error:
        raise _needs_package(name, root, error) from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"downloading '{name}' to {root} failed ({str(error).splitlines()[0]}): repeat, give the "
                         "folder that holds it with --data DIR, or use --data embedded") from None
    finally:
        socket.setdefaulttimeout(timeout)


def _needs_package(name, root, error):
    return InputError(f"data set '{name}': torchvision needs the package {error.name} to unpack it, which is not one of ours: "
                      f"install it once, or make {root / 'packed' / name}.npz elsewhere")


def reachable(address):
    """True if the address's host takes a connection within PROBE_SECONDS, name look-up included.  Asked once a host."""
    host = urlsplit(address).hostname
    if host not in _reachable:
        def connect():
            try:
                socket.create_connection((host, 443), timeout=PROBE_SECONDS).close()
                _reachable[host] = True
            except OSError:
                pass
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(PROBE_SECONDS)
        _reachable.setdefault(host, False)
    return _reachable[host]


_reachable = {}


def available(name, root):
    """Where the set comes from: "disk", "download", or None when neither is possible."""
    root = Path(root)
    if name.startswith("embedded"):
        return "disk"
    if name.startswith("folder:") or name in ("imagenette", "imagenet"):
        if _folder(name, root):
            return "disk"
    elif name in RAW:
        if (root / "packed" / f"{name}.npz").exists() or (root / RAW[name]).exists():
            return "disk"
    return "download" if name in ADDRESS and reachable(ADDRESS[name]) else None


DRAWN = {"embedded": lambda count, seed, size: embedded.embedded_objects(count, seed, size or 32),
         "embedded-digits": lambda count, seed, size: embedded.embedded_digits(count, seed),
         "embedded-digits-blended": lambda count, seed, size: embedded.embedded_digits(count, seed, blended=True)}


def _draw(name, size):
    """The drawn sets, 10,000 train and 2,000 test images: as hard as their docstring says, the same on every machine."""
    if name not in DRAWN:
        raise InputError(f"unknown data set '{name}'; drawn sets are {', '.join(DRAWN)}")
    return [array for count, seed in ((10000, 0), (2000, 1)) for images, labels in (DRAWN[name](count, seed, size),)
            for array in (images.permute(0, 2, 3, 1).numpy(), labels.numpy().astype(np.uint8))]


# Folders of image files
def _folder(name, root):
    """The folder with train/ in it, or None."""
    if name.startswith("folder:"):
        candidates = [Path(name[len("folder:"):]).expanduser()]
    else:
        candidates = sorted(root.glob("imagenette2*")) if name == "imagenette" else [root / name]
    return next((path for path in candidates if (path / "train").is_dir()), None)


def decode(path, size=None):
    """Image file -> uint8 (3,size,size): RGB, shorter side resized to size (antialiased bilinear), centre cropped; (3,H,W)
    as it is without a size."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if min(image.size) < 8:
                raise InputError(f"image {path} is {image.size[0]} x {image.size[1]} pixels; at least 8 are needed")
            if size and image.size != (size, size):
                scale = size / min(image.size)
                width, height = (max(size, round(side * scale)) for side in image.size)
                left, top = (width - size) // 2, (height - size) // 2
                image = image.resize((width, height), Image.BILINEAR).crop((left, top, left + size, top + size))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"image {path} cannot be read ({str(error).splitlines()[0]}): mend or remove it") from None


def _load_folder(name, root, device, size, streamed):
    folder = _folder(name, root)
    if folder is None and name == "imagenette" and reachable(ADDRESS[name]):
        print(f"downloading imagenette to {root}", flush=True)
        try:
            root.mkdir(parents=True, exist_ok=True)
            datasets.Imagenette(str(root), split="train", size="full", download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"downloading imagenette to {root} failed ({str(error).splitlines()[0]}): repeat, or give "
                             "the folder that holds it with --data DIR") from None
        folder = _folder(name, root)
    if folder is None:
        where = name[len("folder:"):] if name.startswith("folder:") else root
        raise InputError(f"no folder with train/<class>/ images for '{name}' in {where}: give it with --data DIR or "
                         "--set dataset=folder:DIR, or use --data embedded")
    test = folder / "test" if (folder / "test").is_dir() else folder / "val"
    listings = []
    for part in (folder / "train", test):
        try:
            listings.append(datasets.ImageFolder(str(part)))
        except (FileNotFoundError, OSError) as error:
            raise InputError(f"no images in {part}: {str(error).splitlines()[0]}") from None
    train, test = listings
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(f"train and test in {folder} have different classes: {', '.join(odd[:5])}")
    if len(train.classes) < 2:
        raise InputError(f"only one class in {folder / 'train'} ({train.classes[0]}): at least two are needed")
    size = size or 128
    memory = (torch.cuda.mem_get_info(device)[1] if device.type == "cuda"
              else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if streamed is None:
        streamed = (len(train) + len(test)) * 3 * size * size > RESIDENT_SHARE * memory
    labels = [torch.tensor([label for _, label in listing.samples]) for listing in (train, test)]
    names = tuple(train.classes)
    if streamed:  # reading a million files to hash them would take hours: names, sizes and labels stand for them
        digest = hashlib.sha256(f"size {size}".encode())
        for path, _ in (*train.samples, *test.samples):
            digest.update(f"{Path(path).relative_to(folder)} {os.path.getsize(path)}\n".encode())
        splits = [Streamed([path for path, _ in listing.samples], part, size, device)
                  for listing, part in zip((train, test), labels)]
        return ImageSet(name, *splits, len(names), digest.hexdigest(), class_names=names)

    def decode_all():
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            return [array for listing, part in zip((train, test), labels) for array in (
                np.stack(list(pool.map(lambda sample: decode(sample[0], size).permute(1, 2, 0).numpy(), listing.samples))),
                part.numpy())]

    if name == "imagenette":  # published, so the same for ever; a user's own folder may change
        arrays = _packed(root / "packed" / f"{folder.name}-at-{size}.npz", KEYS[:4], len(names), (size, size, 3), decode_all)
    else:
        arrays = decode_all()
    return _resident(name, arrays, device, names)


def digest_of(arrays):
    """SHA-256 of the bytes of numpy arrays, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def write_atomically(path, content):
    """Write bytes under a temporary name, fsync, rename: the file is whole or not there.  Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
