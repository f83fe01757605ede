"""Training: from a run file to a run directory.

Read `loop.py` first, then `objective.py` and `engines/plain.py`; `checkpoint.py` and `pieces.py`
say how a run survives being killed.
"""
