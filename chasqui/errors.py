"""The error of `chasqui serve`, which is shown without a traceback."""


class SupervisorError(Exception):
    """The services cannot start, or one of them ended unexpectedly."""
