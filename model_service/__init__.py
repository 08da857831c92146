"""The model service: one replica of Llama 2 as tensor-parallel shards behind gRPC."""

import os

# OpenMP's threads spin while they wait for each other. On a machine that does other work besides,
# the one they wait for may not be running: with its default, about a millisecond, a step took up to
# fifty times as long. It is read when PyTorch is first imported, so it stands here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
