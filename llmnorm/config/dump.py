"""Write a run file that `document.py` reads back equal."""

from typing import Any

import yaml

from llmnorm.config.document import read_scalar


class _Dumper(yaml.SafeDumper):
    """Block style; quotes every text that our reader (YAML 1.2) would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    try:
        plain = read_scalar(value) == value
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def dump_document(value: dict[str, Any]) -> str:
    """Return `value` as YAML text, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
