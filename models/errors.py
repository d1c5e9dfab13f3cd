"""Errors that a user's input can cause in this package; their text is one line for the user."""


class CheckpointError(ValueError):
    """Weights that cannot be fetched, read or fitted to the model."""


class InputSizeError(ValueError):
    """An input that a model's patches do not tile."""


class UnknownModelError(ValueError):
    """A model name that stands for no model."""
