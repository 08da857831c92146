"""The error of `chasqui serve`, which the command shows without a traceback."""


class SupervisorError(Exception):
    """The services cannot start, or one of them ended by itself."""
