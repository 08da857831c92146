"""Keys learn nothing of each other from the prefix cache, unless they share a scope."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from client import Client
from tests.e2e.processes import ServiceProcess

PROMPT = "A text that no other test sends, and that fills more than a block of the cache by itself"


def entry(name: str, more: str = "") -> str:
    digest = hashlib.sha256(f"key of {name}".encode()).hexdigest()
    return f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\n{more}\n'


def test_a_prompt_is_found_by_the_keys_of_its_scope_alone(
    gateway_beside: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(entry("ada") + entry("ben") + entry("eve", 'cache_scope = "ada"'))
    address = gateway_beside(api_keys=keys).address

    def cached(name: str) -> int:
        with Client(address, api_key=f"key of {name}") as client:
            usage = client.complete(PROMPT, max_gen_len=1, temperature=0).usage
        assert usage.cached_prompt_tokens in {0, usage.prompt_tokens - 1}
        return usage.cached_prompt_tokens

    assert not cached("ada")
    assert cached("ada")
    assert not cached("ben")
    assert cached("eve")
