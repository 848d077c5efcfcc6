"""Errors that a user can cause. Entry points print them without a traceback and exit with code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend. The text names the thing, the value, what is allowed, and the remedy."""
