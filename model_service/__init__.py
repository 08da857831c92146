"""The model service: one replica of Llama 2 as tensor-parallel shards behind gRPC."""

import os

# PyTorch and OpenMP read these once, when PyTorch is first imported: so they stand here.
# OpenMP's threads spin while they wait for each other. Too short for the gaps between two products,
# and each has to be woken, which costs a third of the rate on a machine of its own; too long, and
# on a machine that does other work besides they wait for one that is not running: with the default
# a step then takes up to fifty times as long. bench/RESULTS.md has the numbers.
os.environ.setdefault("GOMP_SPINCOUNT", "12000")
# A step reads all weights. In pages of 4 kB, looking up where they are takes a fifth of its time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
