"""Health and reflection, as gRPC defines them."""
