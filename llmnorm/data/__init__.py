"""Text to token shards, and token shards to batches.

Read `prepare.py` for how a folder is made, `prepared.py` for how it is read, `batches.py` for how
it reaches a model.
"""

from .batches import GlobalBatches
from .options import PrepareOptions
from .order import SampleOrder
from .prepare import prepare
from .prepared import Prepared, Split, open_prepared

__all__ = [
    "GlobalBatches",
    "PrepareOptions",
    "Prepared",
    "SampleOrder",
    "Split",
    "open_prepared",
    "prepare",
]
