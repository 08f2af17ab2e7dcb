"""The error for ports that cannot be judged."""


class PortError(ValueError):
    """The two modules cannot be compared; the message says why, and what to do."""


class PortDiffers(AssertionError):
    """The two modules differ; the message is the report."""
