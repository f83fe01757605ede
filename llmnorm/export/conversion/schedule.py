"""The order in which norms are removed from a trained model, and the steps between removals.

First those before mlps, from the first layer to the last, then those of attention, then the final
norm, and at last position 0 loses its own constant. The published runs also part the query-key
paths of an attention norm from its value path, and end-of-text tokens; here a norm is removed for
all that read it, and end-of-text is a token like any other, unless it stands at position 0.

Source: arXiv:2507.02559; the steps are those of its smallest model, GPT-2 small: 300 in all, mlps
from 20, attention from 44 (two steps a layer for queries and keys, three for values), the final
norm at 104, position 0 at 116.
"""

import math

from llmnorm.errors import ConfigError
from llmnorm.export.conversion.rewire import kind_of

_TOTAL = 300
_MLP, _ATTENTION, _FINAL, _UNIFORM = 20, 44, 104, 116

FEWEST_STEPS = 10


def removal_steps(sites: list[str], steps: int) -> tuple[dict[str, int], int]:
    """Return the step at which each site loses its norm, and that of position 0.

    Args:
        sites: names of the norms' modules, in the order of the layers.
        steps: of the whole training, into which the published schedule is stretched.

    Raises:
        ConfigError: if there are too few steps.
    """
    if steps < FEWEST_STEPS:
        raise ConfigError(f"--steps {steps} is too few to remove norms in; give {FEWEST_STEPS}")
    found: dict[str, int] = {}
    for kind, begin, end in (
        ("mlp", _MLP, _ATTENTION),
        ("attn", _ATTENTION, _FINAL),
        ("final", _FINAL, _FINAL),
    ):
        group = [site for site in sites if kind_of(site) == kind]
        for index, site in enumerate(group):
            at = begin + (end - begin) * index / len(group)
            found[site] = max(1, math.ceil(at * steps / _TOTAL))
    return found, math.ceil(_UNIFORM * steps / _TOTAL)
