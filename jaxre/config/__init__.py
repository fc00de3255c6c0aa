"""Every setting of a run, typed and checked. One YAML file is one run.

    config = load_config("configs/quickstart.yaml", ["lora.rank=32"])

`settings.py` has the settings, `reading.py` files and overrides, `problems.py` the messages.
"""

from jaxre.config.places import data_root, shipped
from jaxre.config.reading import (
    check_config,
    check_settings,
    load_config,
    load_tree,
    save_config,
)
from jaxre.config.settings import (
    LORA_TARGETS,
    Config,
    Data,
    DatasetLabels,
    Examples,
    Flag,
    Float,
    Int,
    Kernels,
    Label,
    Labels,
    Lora,
    Mesh,
    Mixture,
    Model,
    Predict,
    Prompt,
    Proportion,
    Schemas,
    Settings,
    Source,
    Text,
    Train,
    check_definitions,
    read_definitions,
)
from jaxre.config.yaml_text import parse_yaml

__all__ = [
    "LORA_TARGETS",
    "Config",
    "Data",
    "DatasetLabels",
    "Examples",
    "Flag",
    "Float",
    "Int",
    "Kernels",
    "Label",
    "Labels",
    "Lora",
    "Mesh",
    "Mixture",
    "Model",
    "Predict",
    "Prompt",
    "Proportion",
    "Schemas",
    "Settings",
    "Source",
    "Text",
    "Train",
    "check_config",
    "check_definitions",
    "check_settings",
    "data_root",
    "load_config",
    "load_tree",
    "parse_yaml",
    "read_definitions",
    "save_config",
    "shipped",
]
