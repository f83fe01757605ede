"""Placements: one small file a scheme, each a rule from a site to data. Start with `base.py`."""

from . import (
    deepnorm,
    lns,
    mix_ln,
    normformer,
    peri_ln,
    post_ln,
    pre_ln,
    res_post_ln,
    sub_ln,
)
from .base import PLACEMENTS, Placement, Site, list_placements, parse_placement, register

__all__ = [
    "PLACEMENTS",
    "Placement",
    "Site",
    "deepnorm",
    "list_placements",
    "lns",
    "mix_ln",
    "normformer",
    "parse_placement",
    "peri_ln",
    "post_ln",
    "pre_ln",
    "register",
    "res_post_ln",
    "sub_ln",
]
