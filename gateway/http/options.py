"""The options of the HTTP port."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpOptions:
    port: int  # 0: any free one
    origins: tuple[str, ...] = ()  # whose pages may call it; "*" stands for all
