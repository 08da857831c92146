"""A plugin of pytest, with which this package's kernels look as if they had not been compiled."""

from model_service.model.cpu import library

library._MODULE = "model_service.model.cpu._not_compiled"
