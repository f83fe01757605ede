"""The modeling code that travels with every checkpoint: flat, on torch and transformers alone.

Start with `modeling_llmnorm.py` (the block is two lines), then `residual.py` and `norms.py`.
"""
