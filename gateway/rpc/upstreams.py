"""All services behind the gateway, and the health that follows from them: SERVING while the
tokenizer service, at least one replica and, unless it may be skipped, the safety classifier are
ready, so that load balancers avoid a gateway that cannot answer.
"""

import asyncio
from collections.abc import Sequence

from gateway.generation.safety.classifier import SafetyClient
from gateway.generation.safety.options import SafetyOptions
from gateway.replicas.options import PoolOptions
from gateway.replicas.pool import ReplicaPool
from gateway.text.tokenizer import TokenizerClient
from gateway.upstream.connect import Connect, plaintext
from llama.prompt_format.recognition import FormatName
from serving.server import Health


class Backend:
    """Sessions with all services; create it in the event loop that runs it."""

    def __init__(
        self,
        tokenizer_target: str,
        model_targets: Sequence[str],
        options: PoolOptions,
        connect: Connect = plaintext,
        *,
        safety: SafetyOptions | None = None,
        prompt_format: FormatName = "auto",
    ) -> None:
        self._changed = asyncio.Event()
        self.tokenizer = TokenizerClient(
            tokenizer_target, self._changed.set, connect, options.failover_timeout, prompt_format
        )
        self.replicas = ReplicaPool(model_targets, self._changed.set, options, connect)
        self.classifier = (
            None if safety is None else SafetyClient(safety, self._changed.set, connect)
        )

    async def run(self, health: Health) -> None:
        """Keeps the sessions, and the health up to date, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.tokenizer.run())
            tasks.create_task(self._run_replicas())
            if self.classifier is not None:
                tasks.create_task(self.classifier.run())
            while True:
                self._changed.clear()
                await health.set_serving(self.ready)
                await self._changed.wait()

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        can_judge = self.classifier is None or self.classifier.ready
        return self.tokenizer.ready and self.replicas.ready_count > 0 and can_judge

    async def _run_replicas(self) -> None:
        vocabulary = await self.tokenizer.loaded()
        await self.replicas.run(self.tokenizer.fingerprint, len(vocabulary))
