"""Fixtures that the tests of the client share."""

import asyncio
from collections.abc import Callable

import pytest

from client import AsyncClient, Client, Model

GetModel = Callable[[str], Model]


@pytest.fixture(params=["sync", "asyncio"])
def get_model(request: pytest.FixtureRequest) -> GetModel:
    """`get_model` of either client."""

    def with_sync(target: str) -> Model:
        with Client(target) as client:
            return client.get_model(timeout=10)

    async def with_asyncio(target: str) -> Model:
        async with AsyncClient(target) as client:
            return await client.get_model(timeout=10)

    return (
        with_sync if request.param == "sync" else lambda target: asyncio.run(with_asyncio(target))
    )
