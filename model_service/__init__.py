"""The model service: one replica of Llama 2 as tensor-parallel shards behind gRPC."""

import os

# PyTorch and OpenMP read these once, when PyTorch is first imported: so they stand here.
# OpenMP's threads spin while they wait for each other. On a machine that does other work besides,
# the one they wait for may not be running: with the default, about a millisecond, a step took up to
# fifty times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A step reads all weights. In pages of 4 kB, looking up where they are takes a fifth of its time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
