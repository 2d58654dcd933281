import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

# tiny networks: threads that wait for one another cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


TALLY = pytest.StashKey()  # {kind of fault: {what it got: how often}}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="try hundreds of faults, not a few")


def pytest_terminal_summary(terminalreporter, config):
    """The table of the faults tried, for results/NOTES.md."""
    if tried := config.stash.get(TALLY, None):
        terminalreporter.write_line("\n| kind of fault | tried | what each got |\n|---|---|---|")
        for kind, outcomes in tried.items():
            got = "; ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            terminalreporter.write_line(f"| {kind} | {sum(outcomes.values())} | {got} |")


def pytest_collection_modifyitems(items):
    """TESTS_PART=1/4: the second quarter of the tests, for processes that share them."""
    part, count = map(int, os.environ.get("TESTS_PART", "0/1").split("/"))
    items[:] = items[part::count]


def write_folder(root, classes=("cat", "dog"), counts=(6, 4), size=(40, 36),
                 parts=("train", "test"), suffix="png", level=0):
    """Noise, brighter from class to class, as image files (width, height) in root/<part>/<class>/;
    returns root."""
    random = np.random.default_rng(1)
    for part, count in zip(parts, counts):
        for index, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                image = random.integers(0, 64, (size[1], size[0], 3),
                                        dtype=np.uint8) + np.uint8(level + 100 * index % 192)
                Image.fromarray(image).save(root / part / name / f"{number}.{suffix}")
    return root


@pytest.fixture(scope="session")
def seventh(tmp_path_factory):
    """The paper of README's recipe as a module, with its YAML beside it in a papers/ of its own."""
    folder = tmp_path_factory.mktemp("recipe") / "papers"
    folder.mkdir()
    recipe = (ROOT / "README.md").read_text().partition("## Adding a paper")[2]
    for kind, suffix in (("python", "py"), ("yaml", "yaml")):
        text = recipe.partition(f"```{kind}\n")[2].partition("```")[0]
        (folder / f"mirrored.{suffix}").write_text(text)
    spec = importlib.util.spec_from_file_location("mirrored", folder / "mirrored.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mirrored"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(seventh):
    """script(*arguments, **environment): that paper as a user runs it; returns the finished
    process."""
    def run(*arguments, **environment):
        return subprocess.run([sys.executable, seventh.__file__, *arguments], text=True,
                              capture_output=True, timeout=300,
                              env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    return run


@pytest.fixture
def tiny(tmp_path, write_packed):
    """Options for a run of that paper of a second, on 640 images of noise packed as CIFAR-10."""
    write_packed(tmp_path / "data", train=640, test=100)
    return ["--scale", "smoke", "--data", str(tmp_path / "data"), "--set", "dataset=cifar10",
            "--set", "width=4", "--set", "pretext_epochs=1"]


@pytest.fixture
def records_of():
    """records_of(folder): all its records, without what may differ between two runs of the same
    thing."""
    def read(folder):
        timed = ("seconds", "trainings", "peak_memory_mb", "started", "commit", "dirty")
        return [{key: value for key, value in json.loads(line).items() if key not in timed}
                for path in sorted(Path(folder).rglob("*.jsonl"))
                for line in path.read_text().splitlines()]
    return read


@pytest.fixture(scope="session")
def smooth_noise():
    """smooth_noise(reach): (900,3,124,124) uint8, grey noise whose pixels go together up to `reach`
    pixels apart."""
    def make(reach):
        side = 124 + reach
        noise = torch.randn(900, 1, side, side, generator=torch.Generator().manual_seed(2))
        smooth = torch.nn.functional.avg_pool2d(noise, reach + 1, 1) * (reach + 1)  # deviation 1
        return (128 + 40 * smooth).clamp(0, 255).byte().expand(-1, 3, -1, -1).contiguous()
    return make


@pytest.fixture
def two_ranks():
    """two_ranks(paper, *options): the script under torchrun with two processes on the CPU; fails
    unless it ends well.

    paper: one of papers/, or the path of a script elsewhere."""
    def run(paper, *options):
        target = [paper] if str(paper).endswith(".py") else ["-m", f"papers.{paper}"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *launcher, *target, *options, "--device", "cpu"],
                              cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def one_and_two_ranks(tmp_path, two_ranks):
    """run(script, *options): {phase: (its weights after a run on one rank, on two)}."""
    def run(script, *options):
        assert script.main([*options, "--results", str(tmp_path / "one"), "--runs",
                            str(tmp_path / "r1"), "--device", "cpu"]) == 0
        two_ranks(Path(script.__file__).stem, *options, "--results", str(tmp_path / "two"),
                  "--runs", str(tmp_path / "r2"))
        one, two = ({path.stem: torch.load(path, weights_only=True)["model"]
                     for path in (tmp_path / runs).rglob("*.pt")}
                    for runs in ("r1", "r2"))
        assert one.keys() == two.keys()
        return {phase: (weights, two[phase]) for phase, weights in one.items()}
    return run


@pytest.fixture
def folders(tmp_path):
    """Options that keep a run's results and checkpoints inside the test's own folder."""
    return ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]


@pytest.fixture
def write_packed():
    """write(root, name, train, test, shape): packed noise under root; returns its arrays."""
    def write(root, name="cifar10", train=40, test=20, shape=(32, 32, 3)):
        (root / "packed").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (train + test, *shape), dtype=np.uint8)
        arrays = {"x_train": noise[:train], "y_train": np.arange(train) % 10,
                  "x_test": noise[train:],
                  "y_test": np.arange(test) % 10}
        if name == "stl10":
            arrays["x_unlabeled"] = noise[::2]
        np.savez(root / "packed" / f"{name}.npz", **arrays)
        return arrays
    return write


NOT_DETERMINISTIC_ON_CUDA = ("AdaptiveAvgPool", "AdaptiveMaxPool", "Upsample", "GridSampler",
                             "ReflectionPad",
                             "ReplicationPad", "NllLoss2D", "Cumsum", "Bincount", "Median",
                             "Kthvalue", "MaxPool3D",
                             "FractionalMaxPool", "MaxUnpool", "EmbeddingBag", "CtcLoss",
                             "PutBackward")


class Graphs(list):
    """The names of all operations in the autograd graph of each loss that went backward."""

    def offenders(self):
        """Those that have no deterministic CUDA kernel."""
        return {name for names in self for name in names for bad in NOT_DETERMINISTIC_ON_CUDA
                if bad.lower() in name.lower()}


@pytest.fixture
def graphs(monkeypatch):
    """Fills while training: so a machine without a GPU guards the GPU path of every real step of a
    script."""
    graphs, backward = Graphs(), torch.Tensor.backward

    def walk(loss, *rest):
        nodes, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting += [parent for parent, _ in node.next_functions]
        graphs.append({node.name() for node in nodes})
        return backward(loss, *rest)

    monkeypatch.setattr(torch.Tensor, "backward", walk)
    return graphs
