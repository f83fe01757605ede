"""Run as a script in a fresh process: load saved models while llmnorm cannot be imported.

    python -P stranger.py FOLDER ANSWER THREADS PACKAGE...

Each folder in FOLDER is a model that brings its own code, beside it are its inputs and logits.
ANSWER receives, as JSON, whether each model's logits are equal.
"""

import json
import sys
from pathlib import Path
from typing import Any

_CLASS = "modeling_llmnorm.LlmNormForCausalLM"


class Missing:
    """An import finder to which some packages are not there."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse the packages; leave everything else to the next finder."""
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(name)


def main(folder: str, answer: str, threads: str, *packages: str) -> None:
    """Load what is in the folder and write the answer."""
    sys.meta_path.insert(0, Missing(list(packages)))
    import torch
    from safetensors.torch import load_file
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    torch.set_num_threads(int(threads))
    equal = {}

    @torch.no_grad()
    def load(place: Path, beside: Path) -> Any:
        model_class: Any = get_class_from_dynamic_module(_CLASS, str(place))
        model = model_class.from_pretrained(place).eval()
        expected = load_file(beside)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        equal[place.name] = torch.equal(model(expected["ids"]).logits, expected["logits"])
        return model

    for place in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        beside = place.with_name(f"{place.name}.safetensors")
        model = load(place, beside)
    again = Path(answer).with_name("saved again")
    model.save_pretrained(again)
    load(again, beside)
    Path(answer).write_text(json.dumps(equal), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
