"""The two ordinary ways for a command to end early: an error that the user can fix, and a request to stop."""

import signal
import sys


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong and what to do. The exit code is 2."""

    def __str__(self):
        """The message without control characters, which text from a file might contain."""
        return "".join(c if c.isprintable() else " " for c in super().__str__())


class Stopped(KeyboardInterrupt):
    """The command stopped on request and everything is saved: the program exits with 0.

    It is a KeyboardInterrupt, so that code that catches ordinary exceptions does not catch it.
    """


class StopFlag:
    """Context manager that turns SIGINT and SIGTERM into a flag: loops finish their step, save, and return.

    A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.requested = False

    def __bool__(self):
        return self.requested

    def check(self) -> None:
        """For work without steps: raise Stopped if a stop was requested."""
        if self.requested:
            raise Stopped

    def __enter__(self):
        def handle(signum, frame):
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            print("\nstopping after this step ...", file=sys.stderr)

        self.previous_handlers = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for signum, handler in self.previous_handlers.items():
            signal.signal(signum, handler)
