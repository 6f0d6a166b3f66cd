"""Settings: typed, checked, from YAML and the command line."""

from flm_torchrec.config.load import (
    add_config_arguments,
    add_data_path,
    add_overrides,
    config_from_arguments,
    first_problem,
    from_dict,
    given_folders,
    given_options,
    given_overrides,
    load_config,
    overrides_of,
    sections,
    to_yaml,
)
from flm_torchrec.config.schema import Config

__all__ = [
    "Config",
    "add_config_arguments",
    "add_data_path",
    "add_overrides",
    "config_from_arguments",
    "first_problem",
    "from_dict",
    "given_folders",
    "given_options",
    "given_overrides",
    "load_config",
    "overrides_of",
    "sections",
    "to_yaml",
]
