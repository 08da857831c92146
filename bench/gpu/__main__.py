"""python -m bench.gpu: the same as python -m bench.engine --device cuda."""

import sys

from bench.engine.__main__ import main

if __name__ == "__main__":
    # Scripts for machines with a GPU pass a flag of the time when there were plots.
    main([each for each in sys.argv[1:] if each != "--no-plots"], default_device="cuda")
