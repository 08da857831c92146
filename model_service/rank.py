"""One rank of a replica, from loading to its end.

Rank 0 is the leader and serves gRPC. The others run its steps until it releases them.
"""

import asyncio
import os
import signal
import threading
from concurrent.futures import Future

from llama.model_files import ModelFileError, tokenizer_fingerprint
from model_service.loading import distributed
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import choose_device
from model_service.loading.replica import Replica
from model_service.server import model_service
from model_service.settings import ModelSettings
from serving.errors import StartError
from serving.server import serve
from serving.telemetry.logs import exit_with_error


def run(settings: ModelSettings) -> None:
    try:
        _check_shards(settings.shards)
        replica = load(replica_options(settings))
        shards = distributed.Shards(settings.shard_timeout)
        if not replica.is_leader:
            follow(replica, shards)
            return
        asyncio.run(lead(settings, replica, shards))
        try:
            replica.runner.release_followers()
        except RuntimeError as error:
            raise shards.failure(error) from error
    except distributed.ShardLostError as error:
        exit_with_error(str(error))
    except StartError as error:
        # All ranks find the same fault; once on each machine is enough.
        if not distributed.first_on_machine():
            raise SystemExit(1) from None
        exit_with_error(str(error))


def replica_options(settings: ModelSettings) -> ReplicaOptions:
    names = ReplicaOptions.__dataclass_fields__
    return ReplicaOptions(**{name: getattr(settings, name) for name in names})


def load(options: ReplicaOptions) -> Replica:
    """`load_replica`; on the CPU in a thread that ends with it.

    OpenMP's threads belong to the thread that first computed with them, and live as long. Those of
    the main thread would count as running beside the engine's, which then sleep at every product
    where they should spin: a third of the rate.
    """
    if choose_device(options.device) == "cuda":  # whose current device is each thread's own
        return load_replica(options)
    loaded: Future[Replica] = Future()

    def run() -> None:
        try:
            loaded.set_result(load_replica(options))
        except BaseException as error:  # the main thread raises all of them
            loaded.set_exception(error)

    thread = threading.Thread(target=run, name="loading", daemon=True)
    thread.start()
    thread.join()
    return loaded.result()


async def lead(settings: ModelSettings, replica: Replica, shards: distributed.Shards) -> None:
    path = settings.tokenizer_path
    try:
        fingerprint = "" if path is None else tokenizer_fingerprint(path)
    except ModelFileError as error:
        raise StartError(str(error)) from error
    await serve(settings, model_service(replica, fingerprint, shards))


def follow(replica: Replica, shards: distributed.Shards) -> None:
    # torchrun passes SIGTERM to every rank, but the leader still has sequences to finish.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.SIG_IGN)
    try:
        replica.runner.follow()
    except RuntimeError as error:  # what torch.distributed raises when another rank is gone
        raise shards.failure(error) from error


def _check_shards(shards: int | None) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if shards not in (None, ranks):
        raise StartError(
            f"--shards (or CHASQUI_SHARDS) is {shards}, but torchrun has started {ranks} "
            f"process{'es' * (ranks > 1)}: leave --shards out, or torchrun"
        )
