"""Settings: defaults, files, overrides, and every kind of mistake."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from flm_torchrec.config import Config, add_config_arguments, config_from_arguments, load_config, to_yaml
from flm_torchrec.config.accepts import accepts
from flm_torchrec.config.load import overrides_of, sections
from flm_torchrec.config.presets import PRESETS
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
        ("model.attention_heads=3", "multiple of model.attention_heads"),
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


def test_a_wrong_value_is_told_with_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {batch_size: 0}\n")
    with pytest.raises(ConfigError, match=r"^command line: eval\.ks: "):
        load_config(file, ["train.batch_size=4", "eval.ks=[0]"])
    with pytest.raises(ConfigError, match=rf"^{file}: train\.batch_size: "):
        load_config(file, ["eval.ks=[5]"])


def test_a_preset_is_below_the_file_and_the_file_below_the_options(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {dim: 32}\ntrain: {seed: 3}\n")
    fast = PRESETS["fast"]
    alone = load_config(None, [], "fast")
    assert (alone.model.dim, alone.train.epochs) == (fast["model"]["dim"], fast["train"]["epochs"])
    found = load_config(file, ["train.epochs=1"], "fast")
    assert (found.model.dim, found.model.dropout) == (32, fast["model"]["dropout"])
    assert (found.train.seed, found.train.epochs) == (3, 1)
    assert load_config(file) == load_config(file, [], None) and load_config(None) == load_config(None, [])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_changes_something(name: str) -> None:
    assert load_config(None, [], name) != load_config(None)


def test_a_wrong_preset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no preset 'fats'.*'fast'"):
        load_config(None, [], "fats")
    file = tmp_path / "c.yaml"
    file.write_text("model: 5\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: 'model' must hold fields"):
        load_config(file, [], "fast")


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distributed.timeout=1e12", "distributed.timeout: must be a number above 0 to 2,592,000, not 1000000000000.0"),
        ("distributed.memory_gib=1e300", "distributed.memory_gib: must be a number from 0 to 1e"),
        ("train.dense_lr=1e38", "train.dense_lr: must be a number above 0 to 10000, not 1e"),
        ("finetune.sparse_lr=1e38", "finetune.sparse_lr: must be a number from 0 to 10000"),
        ("train.max_steps=99999999999999999999", "train.max_steps: must be a whole number from 0 to 2,147,483,647"),
        ("model.dim=nan", "model.dim: must be a multiple of 4 from 4 to 65,536, not nan"),
        ("model.dim=50", "model.dim: must be a multiple of 4 from 4 to 65,536, not 50"),
        ("model.block=gru", "model.block: must be one of transformer, hstu, not 'gru'"),
        ("data.stream=maybe", "data.stream: must be true or false, not 'maybe'"),
        ("loss.negatives=some", "loss.negatives: must be a whole number from 0 to 2,147,483,647, or 'all', not 'some'"),
        ("eval.ks=5,x", "eval.ks: must be one or several, separated by commas, each a whole number from 1 to .*'x'"),
        ("eval.baselines=random,best", "each one of popularity, item-kNN, content-kNN, .*random, not 'best'"),
    ],
)
def test_what_a_setting_takes_is_told(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    for section, kind in sections().items():
        for name, hint in get_type_hints(kind, include_extras=True).items():
            for told in accepts(hint).split(", or "):
                if "number" in told or "multiple" in told:
                    assert re.search(r"(number|of \d+) (from|above) \S+ (to|below) \S+", told), (section, name, told)


def test_a_list_may_be_written_with_commas_and_one_value_without() -> None:
    assert load_config(None, ["eval.ks=10"]).eval.ks == (10,)
    assert load_config(None, ["eval.ks=5, 20"]).eval.ks == (5, 20)
    assert load_config(None, ["data.features=title,brand"]).data.features == ("title", "brand")
    assert load_config(None, ["data.features=title"]).data.features == ("title",)
    assert load_config(None, ["data.features=none"]).data.features == "none"


def test_numbers_of_numpy_are_taken() -> None:
    given = {"train": {"epochs": np.int64(3), "dense_lr": np.float32(0.5)}}
    assert overrides_of(given) == ["train.epochs=3", "train.dense_lr=0.5"]
    with pytest.raises(ConfigError, match=r"train.epochs: .* is no setting; give a number or a text"):
        overrides_of({"train": {"epochs": object()}})


def test_a_text_is_taken_as_it_is_written() -> None:
    """YAML would make a number, a truth or a date of these."""
    for path in ("2024", "no", "2024-01-01", "1e3", "null"):
        assert load_config(None, [f"data.path={path}"]).data.path == path
