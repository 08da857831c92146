"""The driver under the name by which scripts for machines with a GPU import it."""

from bench.engine.driver import Driver, Job, loaded

__all__ = ["Driver", "Job", "loaded"]
