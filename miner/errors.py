"""Errors that a user can mend. A command prints them as one line and exits; anything else is a bug."""

import errno


class MinerError(Exception):
    """Bad data, a full disk, a missing file: the message names it and says what to do. Exit code 1."""

    exit_code = 1


class UsageError(MinerError):
    """A flag's value makes no sense. Exit code 2."""

    exit_code = 2


def disk_full(error: OSError, path: object) -> MinerError | None:
    """A one-line error when ``error`` means that nothing more fits on the disk of ``path``, else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return MinerError(f"{path}: disk full ({error.strerror}); make space, then run the same command again")
