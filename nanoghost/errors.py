"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """One clear line that names the thing and the remedy; `cli.py` prints it and exits with 2."""

    def __str__(self):
        """What it quotes from somebody's file can neither break the line nor steer the terminal."""
        return "".join(c if c.isprintable() else " " for c in super().__str__())
