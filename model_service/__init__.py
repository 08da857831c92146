"""The model service: one replica of Llama 2 as tensor-parallel shards behind gRPC."""
