"""`chasqui serve`: the command, its messages and its reaction to signals."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import click
import grpc

from chasqui.cli.serve.deployment import DEFAULT_HTTP_PORT, deployment_of
from chasqui.cli.serve.loading_bars import LoadingBars, on_terminal
from chasqui.cli.serve.service_log import as_json, is_below, own_line, readable
from chasqui.cli.serve.service_process import Log
from chasqui.cli.serve.supervisor import Supervisor
from chasqui.errors import SupervisorError
from chasqui.flags import checkpoint_settings, one_line_errors, setting
from client.aio import AsyncClient
from client.errors import ChasquiError
from client.results import Model

# Seconds of waiting for services to end after which a message names them.
PATIENCE = 5.0


@click.command()
@checkpoint_settings
@setting("model_name", help="Model name for clients.  [default: the name of --ckpt_dir]")
@setting("shards", type=click.IntRange(1), default=1, help="Processes that share one model.")
@setting("replicas", type=click.IntRange(1), default=1, help="Copies of the model to run.")
@setting("host", default="127.0.0.1", show_default=True, help="Address the gateway listens on.")
@setting(
    "port",
    type=click.IntRange(0, 65535),
    default=50051,
    show_default=True,
    help="Port the gateway listens on; 0: any free port.",
)
@setting(
    "http_port",
    type=click.IntRange(0, 65535),
    help="Port for OpenAI's API over HTTP; 0: none.  [default: 8080; with --port 0 any free port]",
)
@setting("max_seq_len", type=int, help="Most tokens of prompt and answer.  [default: 512]")
@setting("max_batch_size", type=int, help="Most sequences that run at once.  [default: 8]")
@setting("dtype", help="Type of the weights: auto, float32, bfloat16 or float16.")
@setting("quantize", help="Quantization of the weights: auto, none, int8, int4 or fp8.")
@setting("device", help="Device of the model: auto, cpu or cuda.")
@setting(
    "batch_invariant",
    is_flag=True,
    default=None,
    help="On CUDA, compute each request the same alone and beside others; the CPU always does.",
)
@setting(
    "draft_ckpt_dir",
    type=click.Path(exists=True, path_type=Path),
    help="Weights of a smaller model with the same vocabulary, which guesses tokens ahead where "
    "that is faster.  [default: none]",
)
@setting(
    "safety",
    is_flag=True,
    help="Run a safety service, too, which judges dialogs and answers by its default rules.",
)
@setting(
    "log_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to append the services' logs to.  [default: stderr]",
)
@setting(
    "log_format",
    type=click.Choice(["auto", "text", "json"]),
    default="auto",
    show_default=True,
    help="Format of the logs. auto: text on a terminal, else one JSON object per line. json: the "
    "messages of this command are JSON, too.",
)
@setting(
    "log_level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least severe level that is logged.",
)
@one_line_errors()
def serve(
    *,
    ckpt_dir: Path | None,
    tokenizer_path: Path | None,
    prompt_format: str | None,
    model_name: str | None,
    shards: int,
    replicas: int,
    host: str,
    port: int,
    http_port: int | None,
    safety: bool,
    log_file: Path | None,
    log_format: str,
    log_level: str,
    **model_settings: object,
) -> None:
    """Run all services on this machine until Ctrl-C."""
    checkpoint = deployment_of(ckpt_dir, tokenizer_path)
    deployment = replace(
        checkpoint,
        prompt_format=prompt_format,
        model_name=model_name or checkpoint.model_name,
        shards=shards,
        replicas=replicas,
        host=host,
        port=port,
        http_port=DEFAULT_HTTP_PORT if http_port is None and port else http_port,
        safety=safety,
        debug=log_level == "debug",
        model_settings=model_settings,
    )
    terminal = _Terminal(as_json=log_format == "json")
    with terminal.errors(), _log_to(log_file, log_format, log_level) as log:
        asyncio.run(_serve_until_stopped(Supervisor(deployment, log), terminal))


def summary(model: Model) -> str:
    size = (
        f"{model.parameters / 1e6:.1f}M"
        if model.parameters < 1e9
        else f"{model.parameters / 1e9:.1f}B"
    )
    shards = "1 shard" if model.shards == 1 else f"{model.shards} shards"
    return (
        f"{model.name}: {size} parameters, {model.dtype}, {shards}, "
        f"context of {model.context_length} tokens"
    )


class _Terminal:
    """The messages of the command itself, as text or as JSON lines like the services' logs."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def say(self, text: str, level: str = "info", **values: object) -> None:
        """Prints level info to stdout, other levels to stderr; `values` appear only in JSON."""
        line = as_json("serve", own_line(level, text, **values)) if self._as_json else text
        click.echo(line, err=level != "info")

    def say_at_end(self, text: str, level: str = "info") -> None:
        """The same, but ignores a closed terminal, which must not cut off running answers."""
        with contextlib.suppress(OSError):
            self.say(text, level)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """With JSON, prints an error that ends the command as a JSON line, too."""
        try:
            yield
        except (ChasquiError, SupervisorError) as error:
            if not self._as_json:
                raise
            self.say(str(error), "critical")
            raise SystemExit(1) from None


async def _serve_until_stopped(services: Supervisor, terminal: _Terminal) -> None:
    serving = asyncio.create_task(_serve(services, terminal))
    stopping = False

    def on_signal() -> None:
        # The first signal lets running answers finish; the second one ends everything.
        nonlocal stopping
        if stopping:
            services.kill()
            return
        stopping = True
        serving.cancel()
        terminal.say_at_end(
            f"Stopping: running answers get {services.grace_period:g} s. "
            "Ctrl-C again ends all at once."
        )

    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signals.append(signal.SIGHUP)
    for signum in signals:
        asyncio.get_running_loop().add_signal_handler(signum, on_signal)
    await asyncio.wait({serving})
    await _stop(services, terminal)
    if not serving.cancelled():
        await serving  # raises why a service ended


async def _serve(services: Supervisor, terminal: _Terminal) -> None:
    address = await services.start()
    async with AsyncClient(address) as client:
        try:
            terminal.say(summary(await client.get_model()))
        except ChasquiError as error:
            # With CHASQUI_API_KEYS the gateway requires a key, which this client does not have.
            if error.code is not grpc.StatusCode.UNAUTHENTICATED:
                raise
    terminal.say(
        f"Serving at {address}. Talk: chasqui chat --target {address}. Stop: Ctrl-C.",
        address=address,
    )
    if services.http_address is not None:
        url = f"http://{services.http_address}"
        terminal.say(
            f"Chat page: {url}/. OpenAI's API: {url}/v1", http_address=services.http_address
        )
    await services.watch()


async def _stop(services: Supervisor, terminal: _Terminal) -> None:
    stop = asyncio.create_task(services.stop())
    explained: list[str] = []
    while not stop.done():
        await asyncio.wait({stop}, timeout=PATIENCE)
        if (waiting_for := services.stopping) and waiting_for != explained:
            explained = waiting_for
            terminal.say_at_end(
                f"Waiting for {', '.join(waiting_for)} to end. Ctrl-C again ends all at once.",
                "warning",
            )
    stop.result()
    if services.killed:
        terminal.say_at_end(f"Had to be killed: {', '.join(services.killed)}.", "warning")


def _opened(log_file: Path) -> TextIO:
    try:
        return log_file.open("a", encoding="utf-8")
    except OSError as error:
        raise SupervisorError(f"cannot write to --log_file {log_file}: {error.strerror}") from error


@contextlib.contextmanager
def _log_to(path: Path | None, log_format: str, level: str) -> Iterator[Log]:
    """The function that writes the services' lines to the file or to stderr."""
    with contextlib.ExitStack() as stack:
        stream = sys.stderr if path is None else stack.enter_context(_opened(path))
        # sys.stderr is None if it was closed.
        text = log_format == "text" or (
            log_format == "auto" and stream is not None and stream.isatty()
        )
        bars = LoadingBars() if on_terminal() else None
        if bars is not None:
            stack.callback(bars.close)

        def log(name: str, line: str) -> None:
            if bars is not None and bars.on_line(name, line) and stream is sys.stderr:
                return
            if is_below(level, line):
                return
            shown = f"{name} | {readable(line)}" if text else as_json(name, line)
            if bars is not None and stream is sys.stderr:
                bars.echo(shown)
            else:
                click.echo(shown, file=stream, err=True)

        yield log
