"""The weights of a linear layer in the form that `product_kernel.py` reads. Needs no Triton."""

from dataclasses import dataclass

import torch

GROUP = 64  # inputs whose 4-bit codes share a scale and a minimum


@dataclass(frozen=True, slots=True)
class TiledWeight:
    """A weight [outputs, inputs].

    Attributes:
        codes: [outputs, inputs] of the activations' type, int8 or float8_e4m3fn; or, in 4 bits,
            [inputs / GROUP, outputs, GROUP / 2] uint8, where a byte has the code of input i of its
            group in the low half, and that of input i + GROUP / 2 in the high half: so both halves
            of a group are neighbours among the activations.
        scales: [outputs] float32; in 4 bits [inputs / GROUP, 2, outputs] bfloat16: scales, and the
            minima that are added; None for weights without codes.
        outputs: rows of the weight.
        inputs: columns of the weight.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    outputs: int
    inputs: int

    @property
    def in_four_bits(self) -> bool:
        return self.codes.dtype == torch.uint8


def four_bit_codes(codes: torch.Tensor) -> torch.Tensor:
    """`TiledWeight.codes` of codes [outputs, inputs] uint8, 0 to 15."""
    halves = codes.view(len(codes), -1, 2, GROUP // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).transpose(0, 1).contiguous()
