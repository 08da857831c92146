"""The process group of a replica: one process per shard, or a single one.

`model_service.launcher` starts the ranks of one machine, torchrun those of several; a process that
neither has started makes a group of its own. Nothing on these sockets is authenticated, so if all
ranks are on one machine, their sockets listen on loopback.
"""

import atexit
import contextlib
import io
import os
import socket
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from model_service.launcher import STORE_VARIABLE, is_rank
from serving.errors import StartError

LOOPBACK = "127.0.0.1"


def initialize(device_type: str) -> torch.device:
    """Joins the group, and makes fairscale's tensor-parallel groups over all of it.

    Args:
        device_type: "cpu" or "cuda".

    Returns:
        The device of this rank.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise StartError(
                f"{local_world_size()} shards on this machine, but it has "
                f"{torch.cuda.device_count()} CUDA devices: start one shard per device"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        # Plans travel on the CPU (gloo) whatever the device of the weights.
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        if on_one_machine():
            _stay_on_loopback()
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        dist.init_process_group(backend, store=_store(rank), rank=rank, world_size=world_size)
        # Else gloo's threads outlive the interpreter, and may abort the process at its end.
        atexit.register(dist.destroy_process_group)
    if not fairscale_groups.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            fairscale_groups.initialize_model_parallel(dist.get_world_size())
        if device_type == "cuda" and dist.get_world_size() > 1:
            # NCCL makes a communicator when its group is first used: so here, before memory is
            # measured and graphs are recorded. Binding the device in init_process_group would do
            # that, too, but also for the default group and fairscale's groups of one rank each,
            # which are not used on the device.
            dist.all_reduce(
                torch.zeros(1, device="cuda"), group=fairscale_groups.get_model_parallel_group()
            )
    return torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")


def on_one_machine() -> bool:
    """Whether all ranks are on this machine, as far as their starter says."""
    return not is_rank() or os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE")


def _stay_on_loopback() -> None:
    """Binds the sockets of gloo and NCCL, which else listen at the address of the host's name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == LOOPBACK for each in addresses):
            os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
            return
    raise StartError(f"no network interface has the address {LOOPBACK}, where the shards meet")


def _store(rank: int) -> Store:
    """The store in which the ranks exchange their addresses."""
    if not is_rank():
        return HashStore()
    world_size = int(os.environ["WORLD_SIZE"])
    if path := os.environ.get(STORE_VARIABLE):
        return FileStore(path, world_size)
    if not on_one_machine():
        store: Store = next(rendezvous("env://"))[0]
        return store
    # torchrun's store outlives a restart, with the addresses of the ranks that died. Each machine
    # counts its own restarts, so this works on one machine only.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(attempt, _store_on_loopback(rank, world_size))


def _store_on_loopback(rank: int, world_size: int) -> Store:
    """The store at torchrun's port. Where torchrun leaves it to rank 0, it listens on loopback."""
    port = int(os.environ["MASTER_PORT"])
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    listener = socket.create_server((LOOPBACK, port)).detach() if is_server else None
    return TCPStore(
        LOOPBACK,
        port,
        world_size,
        is_master=is_server,
        timeout=default_pg_timeout,
        master_listen_fd=listener,
    )


class ShardLostError(StartError):
    """Another shard of this replica does not answer."""


class Shards:
    """The processes of a loaded replica, as each of them sees the others."""

    def __init__(self, timeout: float) -> None:
        """Waits until every rank is here; from then on, one that keeps the others waiting for
        longer than `timeout` seconds makes their collectives raise RuntimeError.

        Loading has no such bound, as the disks of the ranks may differ; gloo's is 30 minutes.
        """
        self._pids = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        self._pids[dist.get_rank()] = os.getpid()
        dist.all_reduce(self._pids)
        for group in (None, fairscale_groups.get_model_parallel_group()):
            _set_pg_timeout(timedelta(seconds=timeout), group)

    def failure(self, error: Exception) -> Exception:
        """The cause of a step's error: a ShardLostError that names the lost shards, or `error`."""
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            return ShardLostError(self._describe_loss(error))
        return error

    def _describe_loss(self, error: Exception) -> str:
        if local_world_size() < len(self._pids):
            return f"lost a shard: {error}"  # no look at the processes of other machines
        # A process that is being killed closes its connections a moment before it is gone.
        others = [int(pid) for pid in self._pids if pid != os.getpid()]
        psutil.wait_procs([psutil.Process(pid) for pid in others if psutil.pid_exists(pid)], 1.0)
        states = {rank: _state(int(pid)) for rank, pid in enumerate(self._pids)}
        lost = [
            f"rank {rank} (pid {self._pids[rank]}) {state}"
            for rank, state in states.items()
            if state is not None
        ]
        return f"lost a shard: {', '.join(lost) or error}"


def _state(pid: int) -> str | None:
    """Why a process of this machine does not answer, if that can be seen."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "is gone"
    return {psutil.STATUS_ZOMBIE: "is gone", psutil.STATUS_STOPPED: "is stopped"}.get(status)


def first_on_machine() -> bool:
    """Whether this is the lowest rank on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def local_world_size() -> int:
    """Shards on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def min_over_ranks(value: int) -> int:
    """The minimum of all ranks' values; every rank must call it."""
    lowest = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest)


def use_threads(threads: int | None) -> None:
    """Sets the threads of this rank: as given, or its share of the cores that it may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, (cores or 1) // local_world_size()))
