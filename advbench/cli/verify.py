"""``advbench verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advbench.cli.parser import Parser
from advbench.errors import UserError

EPILOG = """examples:
  advbench verify outputs/eval/RUN
  advbench verify outputs/eval/RUN model=my_model.py:build weights=my.pt
  advbench verify --images adv.pt run=outputs/train/RUN
  advbench verify --images adv.npz model=my_model.py:build weights=my.pt data=cifar10 threat=linf_8
"""


def main(arguments: list[str]) -> int:
    """Re-score adversarial images; returns 0 if the claim stands, and 1 if it does not."""
    import argparse

    parser = Parser(
        "advbench verify",
        description="Re-score the adversarial images of an evaluation, or of a file, and say what "
        "they prove. Exit code 0: the claim stands; 1: it does not; 2: it can't be checked.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="RUN or KEY=VALUE", help=argparse.SUPPRESS)
    parser.add_argument(
        "--images", metavar="FILE", help="adversarial images that were made elsewhere"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(arguments)
    runs = [word for word in options.words if "=" not in word or Path(word).is_dir()]
    settings = [word for word in options.words if word not in runs]
    if len(runs) != (options.images is None):
        raise UserError("give the directory of one evaluation, or --images FILE model=... data=...")

    from advbench import config
    from advbench.experiments.verify import verify_images, verify_run

    cfg = _composed(settings)
    plugins = config.load_plugins(cfg.plugins)
    named = {word.partition("=")[0].lstrip("+").partition(".")[0] for word in settings}
    checked = (
        verify_run(Path(runs[0]), cfg, plugins, named)
        if runs
        else verify_images(Path(options.images), cfg, plugins)
    )
    if options.json:
        print(json.dumps(checked.to_json(), indent=2))
    else:
        print("\n".join(checked.lines()))
    return 0 if checked.stands else 1


def _composed(settings: list[str]) -> Any:
    """The config of ``eval`` with these settings."""
    from hydra import compose, initialize_config_module

    from advbench import config
    from advbench.cli.searchpath import own_first

    config.register()
    own_first([])
    with initialize_config_module("advbench.configs", version_base="1.3"):
        return compose("eval", overrides=settings)
