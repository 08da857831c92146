"""The name of the compiled library. Imports no PyTorch."""

MODULE = "model_service.model.cpu._kernels"
