"""Says in one line why this package's CPU kernels are lacking, and the cost; else nothing.

Run by `make env`, because pip hides why an optional extension was not compiled.
"""

from model_service.model.cpu.kernels import without_kernels


def main() -> None:
    if reason := without_kernels():
        print(
            f"On the CPU, PyTorch's kernels serve, without this package's own ({reason}): slower "
            "for few streams, and answers may depend on other requests. make -B env installs again."
        )


if __name__ == "__main__":
    main()
