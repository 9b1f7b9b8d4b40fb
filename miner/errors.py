"""Errors that a user can mend. A command prints them as one line and exits; anything else is a bug."""

import errno

LONGEST = 1500  # characters of a message


class MinerError(Exception):
    """Bad data, a full disk, a missing file: the message names it and says what to do. Exit code 1.

    The message is one printable line, whatever names and values of untrusted files went into it.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        if not line.isprintable():
            line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 400]} ... {line[-395:]}")


class UsageError(MinerError):
    """A flag's value makes no sense. Exit code 2."""

    exit_code = 2


class StoreError(MinerError):
    """An object store that does not answer, or refuses: says nothing about what lies there."""


def disk_full(error: OSError, path: object) -> MinerError | None:
    """A one-line error when ``error`` means that nothing more fits on the disk of ``path``, else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return MinerError(f"{path}: disk full ({error.strerror}); make space, then run the same command again")
