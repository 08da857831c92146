"""One of several ranks: joins the group, then writes into a file at which addresses it listens."""

import json
import sys
from pathlib import Path

import psutil
import torch.distributed as dist

from model_service.loading import distributed


def listening(process: psutil.Process) -> list[str]:
    connections = process.net_connections("inet")
    return [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]


distributed.initialize("cpu")
this = psutil.Process()
addresses = {"ranks": listening(this), "starter": listening(this.parents()[0])}
Path(f"{sys.argv[1]}-{dist.get_rank()}.json").write_text(json.dumps(addresses))
dist.barrier()
