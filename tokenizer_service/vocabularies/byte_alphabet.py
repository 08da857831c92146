"""The characters that stand for bytes in the pieces of byte-level byte-pair encoding.

Every byte has a printable one, as GPT-2 defines it (`bytes_to_unicode` in its encoder.py): the
printable characters of Latin-1 stand for themselves, other bytes for U+0100 and those behind it.
"""

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHARACTERS = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + index): byte for index, byte in enumerate(_OTHERS)
}


def piece_bytes(piece: str) -> bytes:
    """The bytes that a piece stands for.

    A piece with another character is a token that was added as text, and stands for that.
    """
    try:
        return bytes(CHARACTERS[character] for character in piece)
    except KeyError:
        return piece.encode()
