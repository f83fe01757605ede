"""Out of llmnorm, and into it: exact rewriting of a model into the classes others serve.

Read in this order; each group uses those before it.

1. A model as data. `form.py`: a `Form` is a config and float64 tensors, and every form is a model.
2. Folds rewrite a form into an equal one with fewer kinds of slots. `canonical.py`: what a slot
   holds, written plainly; `removed.py`: norms that training removed; `simplify.py`: folds that
   every class wants; `folds.py`: folds that some want.
3. A host (`hosts/`) is a class of transformers: the wiring that it has, and the names of its
   tensors. Begin with `hosts/base.py` and `hosts/llama.py`. `fitting.py` simplifies a form until a
   host holds it; `options.py` has what it advises where none does.
4. Folders. `writing.py`: config, weights, tokenizer; `making.py`: whole or not at all, and with
   our own code; `custom.py`: what that code must be for servers; `card.py`: the model card.
5. Proof. `real_text.py`: what models are compared on; `stranger.py`: the process that knows only
   transformers; `visiting.py` sends it to a folder; `comparison.py`: how far its numbers are from
   ours; `verdict.py`: that in words; `certificate.py`: all of it, as `parity.json`.
6. Commands. `command.py`: `llmnorm export`, with `pushing.py` for the hub; `importing.py`:
   `llmnorm import`, which reads a host's tensors into a model; `convert.py`: `llmnorm convert`, by
   algebra in `exact.py`, by training in `conversion/`.
"""

from .form import Form

__all__ = ["Form"]
