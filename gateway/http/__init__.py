"""OpenAI's API over HTTP, in front of the same pipeline as the gRPC servicer."""
