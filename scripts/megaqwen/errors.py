"""The one exception that a user is meant to read."""


class InputError(Exception):
    """Something that the user gave is wrong: what, where, and what to do.

    A stage command prints its message alone, without a traceback, and exits with 2.
    """
