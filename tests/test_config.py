"""Settings: defaults, files, overrides, and every kind of mistake."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from flm_torchrec.config import Config, add_config_arguments, config_from_arguments, load_config, to_yaml
from flm_torchrec.errors import ConfigError
from tests.conftest import ROOT


def test_a_config_written_and_read_is_the_same(tmp_path: Path) -> None:
    config = load_config(None, ["train.batch_size=7", "loss.negatives=all", "eval.ks=[3,9]"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert (config.train.batch_size, config.loss.negatives, config.eval.ks) == (7, "all", (3, 9))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_are_valid(file: Path) -> None:
    assert load_config(file) != Config()


def test_an_option_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {batch_size: 5, dense_lr: 1e-4}\n")
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    args = parser.parse_args(["--config", str(tmp_path / "c.yaml"), "--train.batch_size", "9"])
    config = config_from_arguments(args)
    assert (config.train.batch_size, config.train.dense_lr) == (9, 1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.seed=1", "did you mean 'train'"),
        ("train.batchsize=1", "did you mean 'batch_size'"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.batch_size=many", "train.batch_size"),
        ("model.dim=63", "multiple of model.attention_heads"),
        ("model.fusion=gate", "model.fusion"),
        ("loss.negatives=-1", "loss.negatives"),
        ("train.dense_lr=.inf", "train.dense_lr"),
        ("eval.ks=[]", "eval.ks"),
        ("train.seed", "section.field=value"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


def test_all_losses_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="the weights of all heads are 0; set one of"):
        load_config(None, ["loss.content=0", "loss.collaborative=0", "loss.sequential=0"])


@pytest.mark.parametrize("text", ["train: 5", "- a", "train: {seed: [", "nothing: {}"])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")
