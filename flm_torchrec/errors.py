"""Errors that a user can mend. The command line prints each as one line, without a traceback."""

from flm_torchrec.safe_text import visible


class FlmError(Exception):
    """Base of all errors of input. The message names file, row or field, what is wrong, and how to mend it."""

    exit_code = 2

    def __str__(self) -> str:
        """The message on one line, whatever the names in it."""
        return visible(super().__str__())


class ConfigError(FlmError):
    """A config file or a command-line override is wrong."""


class DataError(FlmError):
    """An input file or a prepared data set is wrong."""


class RunError(FlmError):
    """A run folder, checkpoint or export is missing, incomplete or does not fit."""


class InstallError(FlmError, ImportError):
    """Packages are missing or do not fit each other; the message has the command that mends it."""


class Interrupted(FlmError):
    """Training stopped on request (SIGTERM, Ctrl-C) and saved its state: start the command again to resume."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
