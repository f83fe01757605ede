"""Golden vectors: numbers recorded from the papers' own code, and how our model reproduces them.

Start with `cases.py` (what a folder holds), then `stack.py` (how a case is run); `adapters/` holds
one file per family of reference code: its case as our config, its weights as our state dict.
"""
