"""Errors that ragate raises on purpose: one sentence for the user, and the exit code that goes with it."""

EXIT_PASS = 0
EXIT_FAIL = 1
EXIT_INCONCLUSIVE = 2
EXIT_INVALID = 3
EXIT_USAGE = 4
EXIT_INTERRUPTED = 130


class RagateError(Exception):
    """Base of all: its text names the file, line or field and the way out; the CLI prints it and exits."""

    exit_code = EXIT_USAGE


class ConfigError(RagateError):
    """A setting is unknown, malformed or contradicts another."""


class TestSetError(RagateError):
    """A test set cannot be read or is malformed: names file, line and field."""

    __test__ = False  # pytest would collect the name


class TargetError(RagateError):
    """The system under test cannot be reached or is not what its spec says (not: one answer failed)."""


class TargetAnswerError(Exception):
    """The system under test failed on one item: a state of that item, not the end of the run."""


class CatalogError(RagateError):
    """A model is unknown, cannot be fetched or fails its sha256."""


class RunError(RagateError):
    """A run folder or run file cannot be read, written or is in use."""


class BaselineError(RagateError):
    """A baseline is missing or malformed."""

    exit_code = EXIT_INVALID
