"""What can go wrong, and the exit code that says so.

SrtError            1    the user can fix it: one or two sentences, no traceback
├─ UsageError       2    the command line itself is wrong
├─ TooManyFailures  3    the run finished, but no row is usable, or more failed than allowed
├─ BudgetReached    4    a cap on cost, tokens or requests was reached
├─ QuotaError       5    the endpoint says: no credit, or wrong credentials
├─ Interrupted      130  Ctrl-C, SIGTERM or a closed terminal
└─ Ended            any  another process of this run failed, and has said why

Anything that is not an SrtError is our bug and keeps its traceback. A model's bad reply is not
an error at all: it is data with a status (`records.Status`).
"""


class SrtError(Exception):
    """Something the user can fix; the message says where, what, and what to do next."""

    exit_code = 1


class UsageError(SrtError):
    """The command line contradicts itself or names something unknown."""

    exit_code = 2


class TooManyFailures(SrtError):
    """The run finished, but no row is usable, or more failed than the user allows."""

    exit_code = 3


class BudgetReached(SrtError):
    """A hard cap was reached; the run can go on with a higher one."""

    exit_code = 4


class QuotaError(SrtError):
    """The endpoint refuses to serve this account: no quota, or wrong credentials."""

    exit_code = 5


class Interrupted(SrtError):
    """The user stopped the run; what is complete has been written."""

    exit_code = 130


class Ended(SrtError):
    """Another process of this run failed and has said why; this one only takes over its code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run ended")
        self.exit_code = exit_code
