"""Asks one question and prints the answer while it is generated.

python examples/python/chat.py "What do llamas eat?" [host:port]

docs/clients/python.md describes the client. stubs.py does the same with the generated stubs alone.
"""

import sys

from chasqui import DEFAULT_TARGET, Client, Delta, Message


def main(question: str = "What do llamas eat?", target: str = DEFAULT_TARGET) -> None:
    dialog: list[Message] = [{"role": "user", "content": question}]
    with Client(target) as client:
        for event in client.chat_stream(dialog, temperature=0):
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
