"""The one base of every error that the package raises on purpose, and that of its warnings."""


class BeftError(Exception):
    """What was wrong, what was expected and what to do, in a sentence.

    Each room has its own subclass (PrepareError, AdapterError, DataError, ...), which is also a
    ValueError or a RuntimeError; the command line prints any of them as one line.
    """


class BeftWarning(UserWarning):
    """What the user should know but need not act on; the command line prints it as a note."""
