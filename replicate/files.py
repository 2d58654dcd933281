"""Picture files as a person sees them, and the folders that hold them."""
import contextlib
import os
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from replicate.records import InputError

KINDS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".tif", ".tiff",
         ".webp", ".gif", ".avif", ".jp2")
SMALLEST = 8  # pixels of the shorter side


# Pillow spreads the few levels of such grey PNGs over 0..255, but not the one that is transparent
SPREAD = {"1": 255, "L;2": 85, "L;4": 17}


def upright(picture):
    """A PIL picture turned as its EXIF orientation says, its transparent level mended."""
    level = picture.info.get("transparency")
    if picture.format == "PNG" and isinstance(level, int) and picture.tile:
        picture.info["transparency"] = level * SPREAD.get(picture.tile[0][3], 1)
    clear = picture.info.get("transparency")
    if picture.format == "BMP" and picture.mode == "RGBA" and not picture.getchannel("A").getbbox():
        picture = picture.convert("RGB")  # a fourth byte that is not in use, and no alpha channel
    elif isinstance(clear, tuple) and any("16B" in str(tile) for tile in picture.tile):
        picture.info["transparency"] = tuple(level >> 8 for level in clear)  # as Pillow the pixels
    return ImageOps.exif_transpose(picture)


def as_seen(picture):
    """PIL picture of any mode -> RGB of 8 bits, as a viewer shows it: turned as its EXIF
    orientation says, transparent parts on white, deeper than 8 bits scaled to 8.

    A deep grey picture does not say how many bits are in use: we take the fewest of 8, 12, 16 and
    32 that hold its brightest pixel; floating point is taken as 0..1 where nothing exceeds 1.
    ValueError for negative numbers, and for those of more than 32 bits, since nobody knows what is
    black and white among them.
    """
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    signed, white_is_zero = 2 in np.atleast_1d(tags.get(339, 1)), tags.get(262) == 0
    picture = upright(picture)
    if signed and np.asarray(picture).astype(np.int8 if picture.mode == "L" else int).min() < 0:
        raise ValueError("it holds negative numbers")
    if picture.mode.startswith("I") or picture.mode == "F":
        levels, clear = np.asarray(picture), picture.info.get("transparency")
        if picture.mode == "I" and tags and not signed:
            levels = levels.view(np.uint32)  # which Pillow reads as signed
        values = levels.astype(np.float64)
        finite = values[np.isfinite(values)]
        values = np.nan_to_num(values, posinf=finite.max(initial=0), neginf=0)
        if values.min() < 0:
            raise ValueError("it holds negative numbers")
        tops = [1.0] * (picture.mode == "F") + [2.0 ** bits - 1 for bits in (8, 12, 16, 32)]
        top = next((top for top in tops if values.max() <= top), None)
        if top is None:
            raise ValueError(f"it holds numbers of up to {values.max():.3g}")
        values = np.where(levels == clear, top, top - values if white_is_zero else values)
        picture = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


@contextlib.contextmanager
def opened(path):
    """An open PIL picture; whatever is wrong with the file becomes one line, an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures and odd metadata
            with Image.open(path) as picture:
                yield picture
    except InputError:
        raise
    except Exception as error:  # rubbish can make Pillow's plugins raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"image {path} cannot be read ({reason}): mend or remove it") from None


def decode(path, size=None):
    """Picture file -> uint8 (3,size,size): as seen, shorter side resized to size (antialiased
    bilinear), centre cropped; (3,H,W) as it is without a size.  InputError where it cannot be."""
    with opened(path) as picture:
        picture = as_seen(picture)
        if min(picture.size) < SMALLEST:
            raise InputError(f"image {path} is {picture.size[0]} x {picture.size[1]} pixels; "
                             f"at least {SMALLEST} are needed: mend or remove it")
        if size and picture.size != (size, size):
            scale = size / min(picture.size)
            width, height = (max(size, round(side * scale)) for side in picture.size)
            left, top = (width - size) // 2, (height - size) // 2
            picture = picture.resize((width, height), Image.BILINEAR)
            picture = picture.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def hidden(name):
    """Whether a file or folder is a system's own, not a user's picture."""
    return name.startswith((".", "@eaDir", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


def pictures_below(folder):
    """(paths of the pictures in a folder and its subfolders, in a fixed order; Counter of why other
    files were left out).  Links are followed, each folder once, so that a loop of links ends."""
    paths, left_out, seen = [], Counter(), set()
    def closed(error):
        left_out["folder that cannot be opened"] += 1

    for place, folders, names in os.walk(folder, onerror=closed, followlinks=True):
        if os.path.realpath(place) in seen:
            left_out["folder seen before (a loop of links)"] += 1
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        left_out["hidden"] += sum(map(hidden, [*folders, *names]))
        folders[:] = [name for name in folders if not hidden(name)]
        for name in names:
            path, kind = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if hidden(name):
                continue
            if kind not in KINDS or kind not in Image.registered_extensions():
                left_out[f"{kind or 'no suffix'} (not read here)"] += 1
            elif not os.path.isfile(path):
                left_out["dangling link" if os.path.islink(path) else "not a file"] += 1
            else:
                paths.append((place, name, path))
    return [path for _, _, path in sorted(paths)], +left_out


def list_classes(folder):
    """(paths, labels, class names) of folder/<class>/...; says what it took and what it left out.

    Classes in the order of their names, which are in Unicode's composed form: some systems write
    letters with accents in two characters.  InputError for a class without a picture.
    """
    try:
        entries = list(os.scandir(folder))
        classes = sorted((unicodedata.normalize("NFC", entry.name), entry.name)
                         for entry in entries if entry.is_dir() and not hidden(entry.name))
    except OSError as error:
        raise InputError(f"no images in {folder}: {error.strerror}") from None
    names = [name for name, _ in classes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{folder} has the class {min(twice)} twice, its letters in Unicode's two "
                         "forms: put its pictures into one folder")
    paths, labels, counts, left_out = [], [], [], Counter()
    left_out["hidden"] = sum(hidden(entry.name) for entry in entries)
    left_out["not in a class's folder"] = len(entries) - len(classes) - left_out["hidden"]
    for label, (name, own) in enumerate(classes):
        found, skipped = pictures_below(os.path.join(folder, own))
        left_out += skipped
        if not found:
            why = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            left = f": left out {why}" if why else ""
            raise InputError(f"no images in {Path(folder) / name}{left}; remove the folder, or put "
                             "pictures there")
        paths += found
        labels += [label] * len(found)
        counts.append(f"{name} {len(found)}")
    if len(counts) > 12:
        counts = [*counts[:10], f"and {len(counts) - 10} classes more"]
    line = f"{folder}: {len(paths)} pictures ({', '.join(counts)})"
    if left_out := +left_out:
        line += "; left out: " + ", ".join(f"{n} {why}" for why, n in sorted(left_out.items()))
    print(line.replace("\n", "\\n"), flush=True)
    return paths, labels, names


def require_apart(places):
    """InputError where links make one picture lie in two places, such as train/cat and test/dog;
    places: (name, path) of every picture."""
    first = {}
    for place, path in places:
        file = os.stat(path)  # its device and number there tell a file, whatever its names
        own = (file.st_dev, file.st_ino) if file.st_ino else os.path.realpath(path)
        if first.setdefault(own, place) != place:
            raise InputError(f"a link makes {path} a picture of both {first[own]} and {place}: "
                             "remove it")
