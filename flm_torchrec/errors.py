"""Errors that a user can mend: one line each, shown by the command line without a traceback."""


class FlmError(Exception):
    """Base of all errors raised at the edge: names the file, row or field, what is wrong and how to mend it."""

    exit_code = 2


class ConfigError(FlmError):
    """A config file or a command-line override is wrong."""


class DataError(FlmError):
    """An input file or a prepared data set is wrong."""


class RunError(FlmError):
    """A run folder, checkpoint or export is missing, incomplete or does not fit."""


class Interrupted(FlmError):
    """Asked to stop (SIGTERM, Ctrl-C), and all is saved: start it again to go on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
