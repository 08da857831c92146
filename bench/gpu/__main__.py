"""python -m bench.gpu: the engine's benchmark in the sizes of a GPU, and a first run on a new one.

`first`, `check`, `host` and `compile` are commands of their own; anything else is passed to
`bench.engine --device cuda`.
"""

import sys

from bench.engine.__main__ import main
from bench.gpu import check, first, kernels


def run(arguments: list[str]) -> None:
    """Raises SystemExit with the status of the command."""
    match arguments:
        case ["first", *rest]:
            first.main(rest)
        case ["check", *rest]:
            check.main(rest)
        case ["compile", *rest]:
            kernels.main(rest)
        case ["host", *rest]:
            main(["--cases", "host", *rest], default_device="cuda")
        case _:
            main(arguments, default_device="cuda")


if __name__ == "__main__":
    run(sys.argv[1:])
