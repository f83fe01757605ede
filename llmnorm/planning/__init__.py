"""What a run will need, found without building it: `llmnorm validate`.

Read `command.py` first; `trace.py` finds the memory, `training/engines/memory.py` says what each
engine makes of it.
"""
