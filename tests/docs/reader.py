"""Executes the blocks of a page, one after the other, in one terminal.

The text is executed as it is, except for `OTHERWISE` and for port numbers that begin with 50: each
is replaced by a free port, because tests run side by side. Programs that use a default port get it
from the variables of `Reader._environment`.
"""

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Set
from pathlib import Path

from tests.docs.loaders import LOADERS
from tests.docs.markdown import ROOT, Block
from tests.docs.terminal import Result, Server, Terminal, is_serving, says_serving

# The things that a block may need and a test does not have, as the mark `needs=…`. With
# DOCS_HAVE=npm,docker in the environment such blocks are run, too.
NEEDS = {
    "cluster": "a Kubernetes cluster, or services on several machines",
    "docker": "Docker's daemon",
    "gpu": "a GPU of NVIDIA's",
    "jq": "the program jq",
    "minutes": "more time than a test has",
    "network": "packages from PyPI",
    "npm": "packages from npm's registry",
}
HAVE = set(os.environ.get("DOCS_HAVE", "").split(",")) | ({"jq"} if shutil.which("jq") else set())

MARKS = {
    "console": {"needs"},
    # Lines to put in and to take out of a file.
    "diff": {"file"},
    "js": {"needs"},
    # A program, or with `file` the contents of a new file.
    "python": {"file", "needs"},
    "sh": {"needs", "serves", "tls"},
    # The output of the block before, in which `figures` may differ; a text that a test of its own
    # compares; a picture.
    "text": {"checked-by", "figures", "needs", "output", "picture"},
    **{language: set(kinds) for language, kinds in LOADERS.items()},
}

# Parts of blocks, and their replacements.
OTHERWISE = {
    "0.0.0.0": "127.0.0.1",
    "chat.example.org": "localhost",
    "--requests 200 --warmup 32": "--requests 16 --warmup 2",
}
HTTP_PORT = 8080
PORT = re.compile(rf"\b(?:50\d{{3}}|{HTTP_PORT})\b")
# How programs are run, and the suffix of their files.
INTERPRETERS = {
    "js": ("npm install --silent @grpc/grpc-js @grpc/proto-loader && node", "cjs"),
    "python": ("python", "py"),
}
FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:e-\d+)?")
# Names of Meta's weights, for which the demonstration checkpoint stands in.
STAND_INS = ("llama-2-7b-chat", "llama-2-13b-chat", "LlamaGuard-7b")
# On this page the environment is not activated yet: the page says how.
FIRST_PAGE = "README.md"


class Reader:
    """Works in a folder that looks like the repository after `make env`."""

    def __init__(self, page: list[Block], folder: Path, ports: Mapping[int, int]) -> None:
        self._page = page
        self._folder = folder
        served = {int(block.marks["serves"]) for block in page if "serves" in block.marks}
        if served:
            served.add(HTTP_PORT)  # the same servers open it
        self._ports = {port: there for port, there in ports.items() if port not in served}
        self._server: Server | None = None
        self._last: Result | None = None  # of the block before, if it could be run
        lay_out(
            folder, {Path(block.marks["file"]).parts[0] for block in page if "file" in block.marks}
        )
        activated = page[0].page != FIRST_PAGE
        self._terminal = Terminal(folder, self._environment(activated))

    def read(self) -> None:
        """Executes the blocks; fails if one fails or prints something else than the page says."""
        for block in self._page:
            self._do(block)

    def close(self) -> None:
        """Ends the processes that still run."""
        try:
            if self._terminal.alive:
                self._interrupt()
        finally:
            self._terminal.close()

    def _do(self, block: Block) -> None:
        if block.marks.get("needs", "") not in HAVE | {""}:
            self._last = None
            return
        if "file" in block.marks:
            self._edit(block)
        elif block.language in LOADERS:
            [kind] = block.marks
            LOADERS[block.language][kind](block.text)
        elif block.language == "text":
            self._compare(block)
        elif block.language == "console":
            self._follow(block)
        elif "serves" in block.marks:
            self._serve(block)
        else:
            self._run(block, self._command(block))

    def _edit(self, block: Block) -> None:
        """Writes a new file, or changes one, in the page's own copy of the sources."""
        path = self._folder / block.marks["file"]
        assert path.exists() == (block.language == "diff"), f"{block}: {path.name}"
        text = block.text
        if block.language == "diff":
            source = path.read_text("utf-8")
            before = "".join(line[1:] for line in text.splitlines(True) if line[0] in " -")
            after = "".join(line[1:] for line in text.splitlines(True) if line[0] in " +")
            assert source.count(before) == 1, f"{block}: not once in {path.name}:\n{before}"
            text = source.replace(before, after)
        path.write_text(text, "utf-8")

    def _serve(self, block: Block) -> None:
        """Starts servers in a further terminal, after Ctrl-C in the last such one."""
        self._interrupt()
        port = self._port(int(block.marks["serves"]))
        # Health behind TLS cannot be asked for without its certificates.
        ready = says_serving if "tls" in block.marks else is_serving
        self._server = self._terminal.serve(self._here(block.text), port, ready)

    def _interrupt(self) -> None:
        """Ctrl-C, after which the server must end with status 0."""
        if self._server is not None:
            server, self._server = self._server, None
            status = self._terminal.interrupt(server)
            assert status == 0, f"status {status}\n{server.log.read_text(errors='replace')}"

    def _command(self, block: Block) -> str:
        """The shell command that runs a block, also one in another language."""
        if block.language == "sh":
            return self._here(block.text)
        interpreter, suffix = INTERPRETERS[block.language]
        program = self._folder / f"block-{block.line}.{suffix}"
        program.write_text(self._here(block.text))
        return f"{interpreter} {program}"

    def _run(self, block: Block, command: str) -> Result:
        self._last = self._terminal.run(command)
        assert self._last.status == 0, f"{block}\n{command}\n{self._last}"
        return self._last

    def _follow(self, block: Block) -> None:
        """A console's lines: commands behind `$ `, each before what it prints."""
        for step in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, expected = step.partition("\n")
            result = self._run(block, self._here(command))
            assert_alike(result.output, self._here(expected), block)

    def _compare(self, block: Block) -> None:
        if "output" in block.marks and self._last is not None:
            figures = "figures" in block.marks
            assert_alike(self._last.output, self._here(block.text), block, figures=figures)

    def _here(self, text: str) -> str:
        for said, done in OTHERWISE.items():
            text = text.replace(said, done)
        return PORT.sub(lambda match: str(self._port(int(match[0]))), text)

    def _port(self, number: int) -> int:
        if number not in self._ports:
            self._ports[number] = unused_port()
        return self._ports[number]

    def _environment(self, activated: bool) -> dict[str, str]:
        bin_folder = str(Path(sys.executable).parent)
        path = [each for each in os.environ["PATH"].split(":") if each != bin_folder]
        here = f"127.0.0.1:{self._port(50051)}"
        return os.environ | {
            "PATH": ":".join([str(self._folder / ".venv" / "bin")] * activated + path),
            "HOME": str(self._folder / "home"),
            "PYTHONPATH": str(self._folder),
            "CHASQUI_PORT": str(self._port(50051)),
            "CHASQUI_HTTP_PORT": str(self._port(HTTP_PORT)),
            "CHASQUI_TARGET": here,
            "CHASQUI_TOKENIZER_TARGET": f"127.0.0.1:{self._port(50052)}",
            "CHASQUI_MODEL_TARGETS": f"127.0.0.1:{self._port(50053)}",
            "PET_MASTER_PORT": str(unused_port()),  # torchrun's
        }


def lay_out(folder: Path, edited: Set[str] = frozenset()) -> None:
    """Makes the folder look like the repository in which `make env` has been run.

    The `edited` folders are copies, all others are links.
    """
    for path in ROOT.iterdir():
        if path.name in edited:
            shutil.copytree(path, folder / path.name)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "home").mkdir()
    environment = folder / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        (environment / path.name).symlink_to(path)
    # Never the linked file: make compares its age with that of pyproject.toml.
    installed = environment / ".installed"
    installed.unlink(missing_ok=True)
    installed.touch()
    checkpoint = ROOT / "demo" / "checkpoint"
    for name in STAND_INS:
        (folder / name).symlink_to(checkpoint)
    (folder / "tokenizer.model").symlink_to(checkpoint / "tokenizer.model")


def assert_alike(actual: str, expected: str, block: Block, *, figures: bool = False) -> None:
    """Compares line by line; `…` stands for anything, any space or figure for any other."""
    if figures:
        actual, expected = without_figures(actual), without_figures(expected)
    lines = [re.escape(" ".join(line.split())) for line in expected.strip().splitlines()]
    pattern = "\n".join(lines).replace("…", ".*")
    shown = "\n".join(" ".join(line.split()) for line in actual.strip().splitlines())
    assert re.fullmatch(pattern, shown), f"{block}\nexpected\n{expected}\nand not\n{actual}"


def without_figures(text: str) -> str:
    """The same text with a 0 for every number."""
    return FIGURE.sub("0", text)


def unused_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])
