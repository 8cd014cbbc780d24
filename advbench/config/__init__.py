"""Configs: their schema, the shipped options, the nodes of a run, and objects made out of them."""

from advbench.config.instantiate import (
    build,
    build_defense,
    build_recipe,
    checked,
    import_file,
    load_plugins,
    target_of,
)
from advbench.config.keys import roles_of
from advbench.config.library import options, shipped
from advbench.config.nodes import inherit, plain, read, spelled_out
from advbench.config.schema import GROUPS, INSIDE, SCHEMAS, EvalConfig, TrainConfig, register

__all__ = [
    "GROUPS",
    "INSIDE",
    "SCHEMAS",
    "EvalConfig",
    "TrainConfig",
    "build",
    "build_defense",
    "build_recipe",
    "checked",
    "import_file",
    "inherit",
    "load_plugins",
    "options",
    "plain",
    "read",
    "register",
    "roles_of",
    "shipped",
    "spelled_out",
    "target_of",
]
