"""Recipes: what is known of each scheme beside its code. The data is in `placements.py` and
`norms.py`.
"""

from .norms import NORMS, OPERATORS, WEIGHTS
from .placements import PLACEMENTS
from .recipe import Recipe

__all__ = ["NORMS", "OPERATORS", "PLACEMENTS", "WEIGHTS", "Recipe"]
