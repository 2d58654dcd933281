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


def as_seen(picture):
    """PIL picture of any mode -> RGB of 8 bits, as a viewer shows it: turned as its EXIF
    orientation says, transparent parts on white, deeper than 8 bits scaled to 8.

    A deep grey picture does not say how many bits are in use: we take the fewest of 8, 12, 16 and
    32 that hold its brightest pixel; floating point is taken as 0..1 where nothing exceeds 1.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        levels = np.nan_to_num(np.asarray(picture).astype(np.float64)).clip(0)
        tops = [1.0] * (picture.mode == "F") + [2.0 ** bits - 1 for bits in (8, 12, 16, 32)]
        top = next((top for top in tops if levels.max() <= top), levels.max())
        picture = Image.fromarray((levels * (255 / top)).round().astype(np.uint8))
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
                left_out["dangling link"] += 1
            else:
                paths.append((place, name, path))
    return [path for _, _, path in sorted(paths)], +left_out


def list_classes(folder):
    """(paths, labels, class names) of folder/<class>/...; says what it took and what it left out.

    Classes in the order of their names, which are in Unicode's composed form: some systems write
    letters with accents in two characters.  InputError for a class without a picture.
    """
    try:
        classes = sorted((unicodedata.normalize("NFC", entry.name), entry.name)
                         for entry in os.scandir(folder)
                         if entry.is_dir() and not hidden(entry.name))
    except OSError as error:
        raise InputError(f"no images in {folder}: {error.strerror}") from None
    paths, labels, counts, left_out = [], [], [], Counter()
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
    if left_out:
        line += "; left out: " + ", ".join(f"{n} {why}" for why, n in sorted(left_out.items()))
    print(line, flush=True)
    return paths, labels, [name for name, _ in classes]
