"""Messages that the gateway's tests send."""

from llama.v1.chat_pb2 import ROLE_USER, Dialog, Message
from llama.v1.sampling_pb2 import TokenIds


def dialog(content: str = "What do llamas eat?") -> Dialog:
    return Dialog(messages=[Message(role=ROLE_USER, content=content)])


def ids_of(*ids: int) -> TokenIds:
    return TokenIds(ids=ids)
