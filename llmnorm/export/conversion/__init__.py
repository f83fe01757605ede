"""Give a trained model other norms than it was trained with, and train it on.

`rewire.py` says which slots change, `fit.py` starts each new operation where it is nearest to what
the old one computes, `command.py` is `llmnorm convert`, `schedule.py` the order in which norms are
removed. The training that follows is the ordinary trainer: `model.start` and `distill.teacher`.
"""
