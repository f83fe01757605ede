"""The command lines of evaluation: one file each, with `add_arguments(parser)` and `run(args)`.

JSON goes to stdout alone; everything else that a library prints goes to stderr.
"""
