"""Numbers in messages: one that breaks a rule never reads as one that keeps it."""

import ctypes


def format_float32(value: float) -> str:
    """The shortest decimal that reads as this 32-bit float and as no other."""
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if ctypes.c_float(float(text)).value == value:
            return repr(float(text)).removesuffix(".0")
    return repr(value)  # NaN


def format_apart(one: float, other: float) -> tuple[str, str]:
    """Both numbers with one decimal, or as few more as tell them apart."""
    for decimals in range(1, 16):
        texts = f"{one:.{decimals}f}", f"{other:.{decimals}f}"
        if texts[0] != texts[1]:
            return texts
    return repr(one), repr(other)
