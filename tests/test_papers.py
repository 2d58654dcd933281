"""What every script must hold, whichever its paper."""
import fnmatch
import importlib

import pytest
import yaml

from replicate import report, trainer

PAPERS = sorted(path.stem for path in (trainer.ROOT / "papers").glob("*.yaml"))


ALWAYS = {"moons_epochs", "linear_epochs"}  # the toy, and ImageNet only: as cheap at every scale, or never run


@pytest.mark.parametrize("paper", PAPERS)
def test_every_scale_resolves_to_a_config_and_known_rows(paper):
    script, settings = importlib.import_module(f"papers.{paper}"), trainer.ROOT / "papers" / f"{paper}.yaml"
    blocks = yaml.safe_load(settings.read_text())
    for scale in ("smoke", "small"):  # a default meant for a GPU would take hours
        assert {name for name in vars(trainer.resolve_config(script.Config, settings, scale)) if name.endswith("_epochs")} \
            <= set(blocks[scale]) | ALWAYS
    assert set(trainer.SCALES) <= set(blocks) <= {scale + suffix for scale in trainer.SCALES for suffix in ("", "-embedded")}
    for scale in trainer.SCALES:
        config = trainer.resolve_config(script.Config, settings, scale)
        assert config.seed == 0
        for glob in blocks[scale]["rows"]:
            assert fnmatch.filter(script.PAPER, glob), glob
        if hasattr(script, "settings_of"):
            for variant in script.VARIANTS:
                script.settings_of(config, variant)  # fits, too


@pytest.mark.parametrize("paper", PAPERS)
def test_claims_and_curves_are_literals_that_name_known_rows(paper):
    script = importlib.import_module(f"papers.{paper}")
    literals = report.read_literals(trainer.ROOT / "papers" / f"{paper}.py")  # raises where they do not
    assert literals["PAPER"] == script.PAPER and literals["CLAIMS"] == script.CLAIMS
    assert literals["COMPARABLE"] == getattr(script, "COMPARABLE", report.COMPARABLE_SUITES)


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("override,message", [
    ("batch_size=0", "batch_size must be above 0"), ("shards=0", "shards must be above 0"), ("precision=half", "bfloat16, float32"),
    ("momentum=1.5", "momentum must be below 1"), ("no_such_setting=1", "unknown setting"), ("seed=3", "unknown setting"),
])
def test_settings_that_no_run_can_have_are_named(paper, override, message):
    script = importlib.import_module(f"papers.{paper}")
    with pytest.raises(trainer.InputError, match=message):
        trainer.resolve_config(script.Config, trainer.ROOT / "papers" / f"{paper}.yaml", "smoke", 0, [override])
