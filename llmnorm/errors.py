"""The errors a user may meet. Each is one line: what was seen, what was expected, what to do.

Scripts and the command line print the message alone and exit with `exit_code`
(see `llmnorm.cli.run_main`); `modeling/`, which travels with checkpoints, raises `ValueError`.
"""


class LlmNormError(Exception):
    """Base of every error that llmnorm raises for a user's mistake or a broken machine."""

    exit_code = 1
    settled = False
    """Whether this rank speaks for all ranks of a run, so that none needs to go first."""


class ConfigError(LlmNormError, ValueError):
    """A configuration that cannot mean what its author wanted."""

    exit_code = 2


class SelfTestError(ConfigError):
    """A built model breaks a promise of its scheme; see `llmnorm.selftest`."""


class EnvironmentProblem(LlmNormError, RuntimeError):  # noqa: N818 (DESIGN's name)
    """The machine, the launcher or an optional package cannot do what the run asks for."""

    exit_code = 3


class DataError(LlmNormError, ValueError):
    """A data file that is missing, damaged, foreign or does not fit the run."""

    exit_code = 4


class CheckpointError(LlmNormError, RuntimeError):
    """A checkpoint that is missing, damaged or belongs to another run."""

    exit_code = 5


class ParityError(LlmNormError):
    """An exported or imported model that does not compute what its source does."""
