"""Checkpoints of other projects, read without running any code they hold, and files for them."""
import argparse
import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from replicate import outputs
from replicate.launch import require_finite, require_whole, tell
from replicate.records import InputError
from replicate.terminal import require_writable

CHILDREN = {"0": "conv1", "1": "bn1",  # of nn.Sequential(*resnet.children()); 2, 3: no weights
            "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def digest_of(path):
    """SHA-256 of a file; InputError where there is none, or a damaged one."""
    require_whole(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_saved(path):
    """Whether a file begins, and where it is a zip file ends, as those that torch.save writes."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def tensors_in(state, prefix=""):
    """{dotted name: tensor} of all tensors in nested dicts and lists."""
    found = {}
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    for key, value in state.items() if isinstance(state, dict) else ():
        if torch.is_tensor(value):
            found[f"{prefix}{key}"] = value
        found |= tensors_in(value, f"{prefix}{key}.")
    return found


def read_tensors(path):
    """{dotted name: tensor} of a file that torch.save has written; InputError where it is none, or
    where it holds more than tensors, numbers, text and settings."""
    require_whole(path)
    if not is_saved(path):
        raise InputError(f"{path} is cut short, or no file that torch.save has written: copy or "
                         "download it again, or load it as is meant and torch.save its state dict")
    harmless = [argparse.Namespace, np._core.multiarray.scalar, np.dtype, type(np.dtype("f8"))]
    try:
        with (torch.serialization.safe_globals(harmless),
              warnings.catch_warnings(action="ignore")):  # about kinds that are refused below
            state = tensors_in(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # rubbish can make torch.load raise nearly anything
        raise InputError(f"{path} is damaged, or holds more than can be read safely "
                         f"({type(error).__name__}): copy it again, unpack it, or torch.save its "
                         "state dict alone and give that") from None
    odd = [f"{name} is {w.layout}, {w.dtype}, {w.device}" for name, w in state.items()
           if w.is_complex() or w.is_quantized or w.is_meta or w.layout != torch.strided
           or name.endswith("weight") and not w.is_floating_point()]
    if odd:
        raise InputError(f"{path}: {odd[0]}: save real numbers as plain tensors")
    return state


def read_resnet(path):
    """{torchvision's name: tensor} of a ResNet, heads included, however its layers are nested or
    numbered in the file, the least nested of several, which is said; InputError where it holds
    none."""
    state = read_tensors(path)
    found = sorted((name for name, w in state.items() if name.endswith(("conv1.weight", "0.weight"))
                    and w.dim() == 4 and w.shape[1] == 3), key=len)
    if not found:
        raise InputError(f"{path} holds no conv1.weight for images of 3 channels: not a ResNet "
                         "that can be read here")
    prefix, *others = (name.removesuffix("conv1.weight").removesuffix("0.weight") for name in found)
    if others:
        tell(f"note: {path} holds several networks: {prefix or 'the first'} is taken, "
             f"{' '.join(others)} not")
    state = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
    if "conv1.weight" in state:
        return state
    parts = {name: name.partition(".") for name in state}
    return {f"{CHILDREN.get(parts[name][0], '')}.{parts[name][2]}": w for name, w in state.items()}


def load_into(module, state, path, kind):
    """Load {name: tensor} of a file into a module; InputError, which names the file and the kind
    of network it was taken for, where they do not fit or hold NaN."""
    require_finite(path, state)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"{path} does not fit {kind}: {reason} ...") from None


def require_new(path, seeds="0"):
    """-> Path of a file to be written; InputError where it is there already or cannot be made, or
    seeds ask for several, which is better known before a training than after it."""
    path = Path(path)
    if "," in seeds:
        raise InputError(f"{path} holds one network: give one seed with --seeds")
    if path.exists():
        raise InputError(f"{path} is there already: give another name")
    require_writable(path.parent, "--export FILE")
    return path


def write(path, state):
    """Save {name: tensor} for the CPU, in a new file that is whole or not there."""
    require_new(path)
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, buffer)
    outputs.write(Path(path), buffer.getbuffer())
