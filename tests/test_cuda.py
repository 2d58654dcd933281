"""What only a GPU can show; skipped without one."""
import importlib

import pytest
import torch

from replicate import records, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PAPERS = sorted(path.stem for path in (records.ROOT / "papers").glob("*.yaml"))


def weights(folder):
    """{checkpoint's name: state of its model} of all runs in a folder."""
    return {path.stem: torch.load(path, map_location="cpu", weights_only=True)["model"]
            for path in folder.rglob("*.pt")}


@pytest.mark.parametrize("paper", PAPERS)
def test_training_on_a_gpu_is_deterministic_and_resumes_bit_for_bit(paper, tmp_path, monkeypatch):
    """The smoke scale twice, the second time stopped once: deterministic kernels exist for every
    operation of every step."""
    script, made = importlib.import_module(f"papers.{paper}"), {}
    for name in ("whole", "stopped"):
        options = ["--scale", "smoke", "--device", "cuda", "--results", str(tmp_path / name),
                   "--runs", str(tmp_path / f"{name}-runs")]
        if name == "stopped":
            agreed, calls = trainer.Run.stop_agreed, []

            def stop(run, step, last):
                calls.append(step)
                return len(calls) == 3 or agreed(run, step, last)

            monkeypatch.setattr(trainer.Run, "stop_agreed", stop)
            assert script.main(options) == 130
        assert script.main(options) == 0
        records, warnings = records.read(tmp_path / name / "smoke" / f"{paper}.jsonl")
        assert not warnings and records and all(record["status"] == "ok"
                                                and record["device"] != "CPU" for record in records)
        made[name] = {record["row"]: record["value"]
                      for record in records}, weights(tmp_path / f"{name}-runs")
    (rows, states), (again, other) = made["whole"], made["stopped"]
    assert rows == again
    assert states.keys() == other.keys()
    for phase in states:
        for key, value in states[phase].items():
            assert not torch.is_tensor(value) or torch.equal(value,
                                                             other[phase][key]), f"{phase}: {key}"
