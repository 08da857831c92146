"""The services behind the gateway, taken together. Keeps the gateway's health true: SERVING while
the tokenizer service and at least one replica are ready, so that balancers go elsewhere otherwise.
"""

import asyncio
from collections.abc import Sequence

from gateway.peer import Connect, plaintext
from gateway.pool_options import PoolOptions
from gateway.replicas import ReplicaPool
from gateway.tokenizer import Tokenizer
from serving.server import Health


class Backend:
    """Sessions with all services; create it in the event loop that runs it."""

    def __init__(
        self,
        tokenizer_target: str,
        model_targets: Sequence[str],
        options: PoolOptions,
        connect: Connect = plaintext,
    ) -> None:
        self._changed = asyncio.Event()
        self.tokenizer = Tokenizer(
            tokenizer_target, self._changed.set, connect, options.failover_timeout
        )
        self.replicas = ReplicaPool(model_targets, self._changed.set, options, connect)

    async def run(self, health: Health) -> None:
        """Keeps the sessions and the health; ends when cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.tokenizer.run())
            tasks.create_task(self._run_replicas())
            while True:
                self._changed.clear()
                ready = self.tokenizer.ready and self.replicas.ready_count > 0
                await health.set_serving(ready)
                await self._changed.wait()

    async def _run_replicas(self) -> None:
        vocabulary = await self.tokenizer.loaded()
        await self.replicas.run(self.tokenizer.fingerprint, len(vocabulary))
