"""Text to token shards, and token shards to batches.

Read `prepare.py` for how a folder is made, `prepared.py` for how it is read, `batches.py` for how
it reaches a model.
"""

from .batches import GlobalBatches
from .interleaving import Interleaving
from .mixture import Mixture, open_mixture
from .options import PrepareOptions
from .order import SampleOrder
from .prepare import prepare
from .prepared import Prepared, Split, open_prepared

__all__ = [
    "GlobalBatches",
    "Interleaving",
    "Mixture",
    "PrepareOptions",
    "Prepared",
    "SampleOrder",
    "Split",
    "open_mixture",
    "open_prepared",
    "prepare",
]
