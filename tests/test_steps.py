"""A training step does not grow unseen, and never makes the device and the processor wait for one
another: the operations of every script's main training are counted, and none of them may wait."""
import collections
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from replicate import trainer

# Operations after which the processor waits for the device, or whose result's size it must know:
# .item(), torch.tensor([...]), images[mask].
WAITING = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "_unique2", "equal",
           "index by a mask"}

# training: operations of one step at scale smoke, forward, backward and optimizer.  Who needs more
# of them writes the number here, and knows why.
LIMITS = {
    ("gidaris_rotation", "rotnet4/conv"): 290,
    ("doersch_context", "context/position-accuracy"): 280,
    ("noroozi_jigsaw", "jigsaw/puzzle-accuracy"): 260,
    ("zhang_colorization", "full/auc-raw"): 310,
    ("swav", "swav/knn20"): 1030,
    ("dann", "mnist-mnistm/dann"): 200,
}


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in ("index", "index_put_") and any(
                each is not None and each.dtype == torch.bool for each in arguments[1]):
            name = "index by a mask"
        self.counts[name] += 1
        return function(*arguments, **(options or {}))


class Counted(BaseException):
    """Ends a run when its step has been counted; no one else catches it."""


def operations_of_a_step(paper, row, monkeypatch, tmp_path):
    """{operation: how often} of the fourth step of the first training that a row needs."""
    script, counter, fit = importlib.import_module(f"papers.{paper}"), Counter(), trainer.Run.fit

    def fourth(batches):
        def watched(first_step):
            for number, batch in zip(range(5), batches(first_step)):
                if number == 4:
                    counter.__exit__(None, None, None)
                    raise Counted
                if number == 3:
                    counter.__enter__()
                yield batch
        return watched

    def watch(run, name, model, loss, batches, **options):
        return fit(run, name, model, loss, fourth(batches), **{**options, "steps": 10, "keep": ()})

    monkeypatch.setattr(trainer.Run, "fit", watch)
    with pytest.raises(Counted):
        script.main(["--scale", "smoke", "--rows", row, "--device", "cpu", "--results",
                     str(tmp_path / "results"), "--runs", str(tmp_path / "runs")])
    return counter.counts


def test_the_counter_sees_what_waits():
    x = torch.arange(4.0)
    wait = {
        "_local_scalar_dense": lambda: x.sum().item(), "lift_fresh": lambda: torch.tensor([1, 2]),
        "nonzero": x.nonzero, "masked_select": lambda: x.masked_select(x > 1),
        "index by a mask": lambda: x[x > 1], "_unique2": x.unique,
        "equal": lambda: torch.equal(x, x.clone())}
    for name, function in wait.items():
        with Counter() as counter:
            function()
        assert WAITING & counter.counts.keys() == {name}
    assert wait.keys() == WAITING


@pytest.mark.parametrize("paper,row", LIMITS)
def test_a_step_does_not_wait_and_does_not_grow(paper, row, monkeypatch, tmp_path):
    counts = operations_of_a_step(paper, row, monkeypatch, tmp_path)
    assert not WAITING & counts.keys(), counts
    assert 0.5 * LIMITS[paper, row] < sum(counts.values()) <= LIMITS[paper, row], counts
