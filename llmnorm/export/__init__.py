"""Out of llmnorm, and into it: exact rewriting of a model into the classes others serve.

A model becomes a `Form` (`form.py`): its config and float64 tensors. Folds (`simplify.py`,
`folds.py`) rewrite a form into an equal one with fewer kinds of slots, each still an llmnorm model
that can be built and run. A host (`hosts/`) is a class of transformers: the wiring that it has, and
the names of its tensors. Export simplifies a form until a host holds it; import reads a host's
tensors into a form.
"""

from .form import Form

__all__ = ["Form"]
