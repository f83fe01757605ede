"""Measure a model: exact perplexity, lm-eval tasks, samples, and tables that compare runs.

Read `perplexity.py` first.
"""

from llmnorm.evaluation.perplexity import Perplexity, score_documents

__all__ = ["Perplexity", "score_documents"]
