"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """One clear line that names the thing and the remedy; `cli.py` prints it and exits with 2."""
