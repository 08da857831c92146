"""Generates `llama/v1/` from `protos/`; with --check reports differences instead.

Run it with `make proto`: constraints.txt pins the versions of the generators, because others
generate other code.
"""

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = Path("llama", "v1")


def generate(target: Path) -> list[Path]:
    """Writes the generated modules and stubs below `target`; returns their paths relative to it."""
    well_known_types = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(PROTOS.glob("llama/v1/*.proto"))
    # Beside this interpreter: .venv need not be on the PATH.
    scripts = Path(sys.executable).parent
    status = protoc.main(
        [
            "protoc",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--proto_path={PROTOS}",
            f"--proto_path={well_known_types}",
            f"--python_out={target}",
            f"--grpc_python_out={target}",
            f"--mypy_out=quiet:{target}",
            f"--mypy_grpc_out=quiet:{target}",
            *map(str, sources),
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    return sorted(path.relative_to(target) for path in (target / GENERATED).iterdir())


def stale_files() -> list[Path]:
    """Generated files that are missing, outdated, or without a source in `protos/`."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        expected = generate(fresh)
        present = {
            path.relative_to(ROOT) for path in (ROOT / GENERATED).glob("*_pb2*") if path.is_file()
        }
        changed = [
            path
            for path in expected
            if path not in present or not filecmp.cmp(fresh / path, ROOT / path, shallow=False)
        ]
        return sorted({*changed, *(present - set(expected))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="only report files that differ, and fail if there are any",
    )
    if not parser.parse_args().check:
        generate(ROOT)
        return
    stale = stale_files()
    if stale:
        sys.exit("stale, run `make proto`:\n" + "\n".join(f"  {path}" for path in stale))


if __name__ == "__main__":
    main()
