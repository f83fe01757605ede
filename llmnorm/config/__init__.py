"""The run file: strict YAML and command-line overrides, checked into a `RunConfig`.

Read `models.py` first (every key), then `load.py` (how file and command line become one).
"""

from llmnorm.config.arguments import add_run_file, split_overrides
from llmnorm.config.load import load_run_config
from llmnorm.config.models import FaultsSection, RunConfig

__all__ = ["FaultsSection", "RunConfig", "add_run_file", "load_run_config", "split_overrides"]
