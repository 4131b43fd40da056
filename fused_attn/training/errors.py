"""What can be wrong with a user's files, as exceptions whose message names the place."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line for the user: it names the file, the line where there is one, what
    is wrong and, where it is not obvious, what to do. A command prints it without a traceback.
    """


class DataError(InputError):
    """A text file cannot be used: unreadable, malformed, or not parallel to its partner."""


class CheckpointError(InputError):
    """A checkpoint cannot be written or read, or belongs to another model or other data."""


class MissingLibraryError(InputError, ImportError):
    """An optional library is not installed; the message says how to get it."""


def missing_library(library: str, purpose: str, extra: str) -> MissingLibraryError:
    """Return the error for an absent optional library, with the command that installs it."""
    return MissingLibraryError(
        f"{purpose} needs {library}, which is not installed: pip install 'fused_attn[{extra}]'"
    )
