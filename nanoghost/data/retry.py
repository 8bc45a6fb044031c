"""Repeat requests to a remote store after a transient failure."""

import sys
import time
from collections.abc import Callable

from nanoghost.errors import UserError

MAX_REQUESTS = 6
FIRST_PAUSE = 1.0
"""Seconds before the second request; the pause doubles each time: 1, 2, 4, 8 and 16 seconds."""

CLIENT_ERRORS = (
    ("aiohttp", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
"""The clients of the stores have no common base class for their errors."""


def request_errors() -> tuple[type[Exception], ...]:
    """What a failed request can raise: OSError (timeouts included) and the errors of the clients that are imported."""
    errors: list[type[Exception]] = [OSError]
    for module, name in CLIENT_ERRORS:
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def retry(request: Callable, description: str):
    """The result of `request()`, sent up to MAX_REQUESTS times. UserError if all fail or the file is missing."""
    for number in range(MAX_REQUESTS):
        try:
            return request()
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"cannot read {description}: {error}") from None
        except request_errors() as error:
            if number == MAX_REQUESTS - 1:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(f"cannot read {description}, tried {MAX_REQUESTS} times: {reason}") from error
            time.sleep(FIRST_PAUSE * 2**number)
