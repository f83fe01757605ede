"""Recipes: what is known of each scheme beside its code. The data is in `placements.py` and
`norms.py`.
"""

from .norms import NORM_RECIPES, OPERATOR_RECIPES, WEIGHT_RECIPES
from .placements import PLACEMENT_RECIPES
from .recipe import Recipe

__all__ = [
    "NORM_RECIPES",
    "OPERATOR_RECIPES",
    "PLACEMENT_RECIPES",
    "WEIGHT_RECIPES",
    "Recipe",
]
