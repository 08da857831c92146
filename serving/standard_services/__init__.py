"""The services that gRPC defines for every server: health and reflection."""
