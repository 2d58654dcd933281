"""Picture files that are made: a run's figures, and pictures made from picture files."""
import io
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from replicate.files import as_seen, opened, pictures_below, upright
from replicate.launch import tell
from replicate.records import InputError, is_first_rank, tidy, write_atomically

CLEAR = (".png", ".tif", ".tiff", ".webp", ".avif", ".jp2")  # may hold transparency
WRITTEN = (*CLEAR, ".jpg", ".jpeg", ".jpe", ".jfif", ".ppm", ".bmp")


def read(path):
    """Picture file -> (RGB picture as seen, its alpha channel or None, number of frames, of which
    this is the first).  Where there is an alpha channel, the picture is not laid on white, so that
    the two together are the picture."""
    with opened(path) as picture:
        frames = getattr(picture, "n_frames", 1)
        if picture.mode.startswith("I") and picture.has_transparency_data:
            clear = np.asarray(upright(picture)) == picture.info["transparency"]
            return as_seen(picture), Image.fromarray(np.uint8(255) - 255 * np.uint8(clear)), frames
        if not picture.has_transparency_data:
            return as_seen(picture), None, frames
        picture = upright(picture).convert("RGBA")
        return picture.convert("RGB"), picture.getchannel("A"), frames


def encode(picture, alpha, kind):
    """(bytes of an RGB picture with its alpha channel, or None, as a file of a kind such as ".png";
    "", or what to say where the kind holds no transparency: the picture is laid on white then)."""
    kind, buffer, lost = kind.lower(), io.BytesIO(), ""
    if alpha and alpha.getextrema()[0] < 255:
        picture.putalpha(alpha)
        if kind not in CLEAR:
            picture, lost = as_seen(picture), f"; transparency is lost, {kind} holds none"
    quality = {} if kind.startswith(".tif") else {"quality": 95}
    picture.save(buffer, Image.registered_extensions()[kind], **quality)
    return buffer.getbuffer(), lost


def write(path, content):
    """A file that is whole or not there; InputError where the disk does not take it."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): make room or give another "
                         "place") from None


def make_grid(images, **layout):
    """torchvision's make_grid; importing torchvision takes longer than torch, so figures do it."""
    from torchvision import utils

    return utils.make_grid(images, **layout)


def save_image(tensor, path, **layout):
    """torchvision's save_image as a PNG that is whole or not there, from the first rank only;
    InputError where the disk does not take it.  layout: nrow, padding and the like.

    Call it before the row that the figure belongs to is recorded: what is recorded is not done
    again, and so a figure that could not be written would never be.
    """
    buffer = io.BytesIO()
    if is_first_rank():
        from torchvision import utils  # see make_grid

        utils.save_image(tensor, buffer, format="png", **layout)
        write(Path(path), buffer.getbuffer())


def pair(source, target):
    """{file to write: picture to read} for a picture or a folder of pictures and the file or folder
    that they go to.  Kinds that cannot be written become .png; no two get one name.  InputError
    where source and target do not fit."""
    known, many, kind = Image.registered_extensions(), source.is_dir(), target.suffix.lower()
    written = [each for each in WRITTEN if known.get(each) in Image.SAVE]
    if not many and not source.is_file():
        raise InputError(f"no picture or folder {source}")
    if not target.is_dir():
        if many and (target.exists() or kind in (*known, ".heic", ".jxl")):
            raise InputError(f"{source} is a folder: give a folder to write to, not {target}")
        if not many and kind in written:
            return {target: source}
        if not many and kind:
            raise InputError(f"{target} cannot be written; kinds: {' '.join(written)}")
    found, left_out = pictures_below(source) if many else ([source], {})
    own, inner, pairs = source.resolve(), target.resolve(), {}
    for path in map(Path, found):
        if own in inner.parents and inner in path.resolve().parents and many:
            left_out["in the folder to write to"] += 1  # made before, perhaps
            continue
        made = target / path.relative_to(source if many else source.parent)
        while made.suffix.lower() not in written or made in pairs:
            made = made.with_name(made.name + ".png")
        pairs[made] = path
    if many:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
        line = f"{source}: {len(pairs)} pictures" + f"; left out: {reasons}" * bool(reasons)
        if not pairs:
            raise InputError(line)
        print(line, flush=True)
    tidy(*{made.parent for made in pairs})
    return pairs


def refuse_overwriting(pairs):
    """-> (those of the pairs whose file to write is not there yet, exit status): the others are
    named in one line, and the status is 2 where there are any."""
    todo = {made: path for made, path in pairs.items() if not os.path.lexists(made)}
    if len(todo) == len(pairs):
        return todo, 0
    names = " ".join(map(str, [made for made in pairs if made not in todo][:3]))
    tell(f"error: {len(pairs) - len(todo)} of {len(pairs)} would overwrite a file ({names}): "
         "give another place, or remove what was made before")
    return todo, 2


def convert(pairs, change):
    """Write change(picture), both RGB, for each of the pairs {file to write: picture to read} ->
    exit status, 2 where a picture had to be left out.  Transparency is kept where it can be."""
    status = 0
    for number, (made, path) in enumerate(pairs.items(), 1):
        start = time.perf_counter()
        try:
            if len(os.fsencode(made.name)) > 255:
                raise InputError(f"{made.name} is too long for a file's name")
            picture, alpha, frames = read(path)
            content, lost = encode(change(picture), alpha, made.suffix)
            lost += f"; the first of {frames} frames" * (frames > 1)
        except (InputError, OSError, ValueError, RuntimeError, MemoryError) as error:
            reason, status = (str(error) or type(error).__name__).splitlines()[0], 2
            tell(f"error: {path} is left out: {reason}")
            continue
        if os.path.lexists(made):  # since the beginning, or on a disk that ignores case
            status = 2
            tell(f"error: {path} is left out: {made} is there already")
            continue
        write(made, content)
        print(f"{number}/{len(pairs)}  {made}  {picture.width} x {picture.height}  "
              f"{time.perf_counter() - start:.1f} s{lost}", flush=True)
    return status
