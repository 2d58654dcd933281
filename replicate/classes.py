"""What the labels of an image set stand for, so that two sets give a class the same label."""
import torch

from replicate.records import InputError

DIGITS = dict(zip("zero one two three four five six seven eight nine".split(), "0123456789"))
CLASSES = dict.fromkeys(  # of the sets that are no folders, in the order of their labels
    "mnist mnist-m usps svhn embedded-digits embedded-digits-blended".split(), "0123456789") | {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "stl10": "airplane bird automobile cat deer dog horse monkey ship truck".split()}


def class_names(data):
    """The names of an ImageSet's classes in the order of their labels; digits as numerals."""
    unnamed = [f"{data.name}'s class {label}" for label in range(data.classes)]
    found = data.class_names or CLASSES.get(data.name, unnamed)
    return [DIGITS.get(name.lower(), name) for name in found[:data.classes]]


def match_classes(source, target):
    """Give the target the source's label of each class; InputError where class names differ."""
    ours, theirs = class_names(source), class_names(target)
    if sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
        only = [", ".join(sorted({*one} - {*other})[:5]) or "none"
                for one, other in ((ours, theirs), (theirs, ours))]
        raise InputError(
            f"source and target have different classes: only in the source {only[0]}; only in the "
            f"target {only[1]}; each class needs a name of its own, the same in both")
    order = torch.tensor([ours.index(name) for name in theirs]).to(target.train.labels.device)
    for split in (target.train, target.test):
        split.labels = order[split.labels]
