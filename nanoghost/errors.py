"""The ordinary ways for a command to end early: an error that the user can fix, and a request to stop."""

import os
import select
import signal
import sys
import threading
import time

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong and what to do. The exit code is 2."""

    def __str__(self):
        """The message without control characters, which text from a file might contain."""
        return "".join(c if c.isprintable() else " " for c in super().__str__())


class Stopped(KeyboardInterrupt):
    """The command stopped on request and everything is saved: the program exits with 0.

    It is a KeyboardInterrupt, so that code that catches ordinary exceptions does not catch it.
    """


class StopSignals:
    """Context manager in which SIGINT raises KeyboardInterrupt and SIGTERM SystemExit, with the exit codes 130 and 143.

    Python runs a signal handler only between two of its own instructions. If the main thread is in native code (a
    tokenizer learns, other processes do not answer), a thread ends the process SECONDS later, as `kill -9` would:
    files are written under temporary names, so none is incomplete.
    """

    SECONDS = 1.5

    def __enter__(self):
        self.handled = 0  # number of signals that the main thread has handled
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.previous_handlers = {signum: signal.signal(signum, self.handle) for signum in STOP_SIGNALS}
        # Python's handler in C writes the number of each signal into the pipe at once, whatever the main thread does.
        self.previous_pipe = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        threading.Thread(target=self.exit_if_unhandled, daemon=True).start()
        return self

    def __exit__(self, exception_type, *exception):
        signal.set_wakeup_fd(self.previous_pipe)
        interrupted = exception_type is not None and issubclass(exception_type, KeyboardInterrupt)
        for signum, handler in self.previous_handlers.items():
            # The process ends now: a second Ctrl-C ends it at once, and raises nothing while Python shuts down.
            signal.signal(signum, signal.SIG_DFL if interrupted else handler)
        os.close(self.write_end)  # ends the thread

    def handle(self, signum, frame):
        self.handled += 1
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        print("\nnanoghost: stopped", file=sys.stderr)
        sys.exit(128 + signum)

    def exit_if_unhandled(self) -> None:
        previously_handled = 0
        while True:
            select.select([self.read_end], [], [])
            is_ours = signal.getsignal(signal.SIGINT) == self.handle  # not that of a StopFlag or of a server
            time.sleep(self.SECONDS)
            handled = self.handled
            signals = os.read(self.read_end, 4096)  # also those that were repeated in the meantime
            if not signals:
                os.close(self.read_end)
                return
            stop_signals = [signum for signum in signals if signum in STOP_SIGNALS]
            if stop_signals and is_ours and handled == previously_handled:
                print("\nnanoghost: stopped", file=sys.stderr, flush=True)
                os._exit(128 + stop_signals[0])
            previously_handled = handled


def leave_signals_to_parent() -> None:
    """For a fork of this process: Ctrl-C goes to the whole group, and the parent ends its children; SIGTERM ends it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopFlag:
    """Context manager that can turn the first SIGINT or SIGTERM into a flag, for loops that finish their step and save.

    Until `wait_for` is called, and from the second signal on, a signal ends the command at once.
    """

    def __init__(self):
        self.requested = False
        self.work = ""  # what the first signal waits for
        self.previous_handlers = {}

    def __bool__(self):
        return self.requested

    def check(self) -> None:
        """Raise Stopped if a stop was requested."""
        if self.requested:
            raise Stopped

    def wait_for(self, work: str) -> None:
        """From now on the first signal sets the flag, and says that the command stops after `work`."""
        self.work = work
        if not self.previous_handlers:
            self.previous_handlers = {signum: signal.signal(signum, self.handle) for signum in STOP_SIGNALS}

    def handle(self, signum, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(f"\nstopping after {self.work} (repeat to stop at once) ...", file=sys.stderr)

    def stop_at_once(self) -> None:
        """From now on a signal ends the command at once."""
        for signum, handler in self.previous_handlers.items():
            signal.signal(signum, handler)
        self.previous_handlers = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop_at_once()
