"""Numbers in error texts: a value that breaks a rule must not look like a valid one."""

import ctypes


def format_float32(value: float) -> str:
    """The shortest decimal that only this 32-bit float rounds to."""
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if ctypes.c_float(float(text)).value == value:
            return repr(float(text)).removesuffix(".0")
    return repr(value)  # NaN


def format_apart(one: float, other: float) -> tuple[str, str]:
    """Both numbers with one decimal, or with the fewest that make them differ."""
    for decimals in range(1, 16):
        texts = f"{one:.{decimals}f}", f"{other:.{decimals}f}"
        if texts[0] != texts[1]:
            return texts
    return repr(one), repr(other)
