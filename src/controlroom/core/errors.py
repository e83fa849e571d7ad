"""The errors a user can meet. Each says what was given, what was expected, and what to do."""

from __future__ import annotations


class ControlRoomError(Exception):
    """Base of every error raised for a reason the user can act on.

    The message is one paragraph: what was given, what was expected, what to do. The command line prints it on one line
    and exits with code 2; the server answers 4xx with it.
    """


class InputError(ControlRoomError):
    """A picture, pose, prompt, number or file that cannot be used as given."""


class ModelError(ControlRoomError):
    """A checkpoint that is missing a part, has unexpected keys, or does not fit the base it is used with."""


class ConflictError(ControlRoomError):
    """Two controls whose claims cannot both hold; raised before the first step and names both."""


class OutputError(ControlRoomError):
    """A result that could not be written (full disk, missing permission); nothing half-written is left behind."""
