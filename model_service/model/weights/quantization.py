"""The formats of weights in 8 or 4 bits: their arithmetic, and their tensors in a checkpoint file.

Quantizing dequantized weights gives the same codes again. So a quantized checkpoint can be read as
plain numbers, and a network that quantizes them holds exactly the codes of the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch

from model_service.model.config import Quantization
from model_service.model.weight_sizes import GROUP_SIZE as GROUP_SIZE  # noqa: PLC0414

FP8 = torch.float8_e4m3fn
_INT4_MAX = 15
_FP8_MAX = torch.finfo(FP8).max  # 448

Move = Callable[[torch.Tensor], torch.Tensor]  # from the file to the device


@dataclass(frozen=True, slots=True)
class _ScaledWeight:
    """weight = codes × scales, one scale per output.

    Attributes:
        codes: [outputs, inputs], 8 bits each.
        scales: [outputs] float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def from_file(cls, name: str, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The parameter `name` as `stored` gave it."""
        return cls(tensors[name], tensors[f"{name}.scales"])

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that a file holds for the parameter `name`."""
        return {name: self.codes, f"{name}.scales": self.scales}

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def moved(self, move: Move) -> Self:
        """The same weight, each of its tensors moved by `move`."""
        return type(self)(move(self.codes), move(self.scales))

    def narrow(self, dimension: int, start: int, length: int) -> torch.Tensor:
        """Like Tensor.narrow, dequantized to float32."""
        part = self.codes.narrow(dimension, start, length).float()
        scales = self.scales.narrow(0, start, length) if dimension == 0 else self.scales
        return part * scales.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Int8Weight(_ScaledWeight):
    """Codes are int8, -127 to 127."""

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Self:
        """Symmetric: the largest weight of each output becomes ±127."""
        wide = weight.float()
        scales = wide.abs().amax(dim=1) / 127
        divisors = torch.where(scales > 0, scales, 1.0)
        return cls((wide / divisors.unsqueeze(1)).round_().to(torch.int8), scales)


@dataclass(frozen=True, slots=True)
class Fp8Weight(_ScaledWeight):
    """Codes are float8_e4m3fn, -448 to 448: 4 bits of exponent and 3 of mantissa.

    The format of Micikevicius et al., FP8 Formats for Deep Learning (2022), without infinities.
    """

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Self:
        """Symmetric: the largest weight of each output becomes ±448."""
        return cls(*fp8_rows(weight))


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """weight = codes × scales + minima, with one scale and minimum per GROUP_SIZE inputs.

    Scales and minima are numbers of bfloat16, so a kernel can hold them in 16 bits: 4.5 bits a
    weight in all.

    Attributes:
        codes: [outputs, inputs / 2] uint8, each two codes of 0 to 15: the even input's low.
        scales: [outputs, inputs / GROUP_SIZE] float32.
        minima: [outputs, inputs / GROUP_SIZE] float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Self:
        """Asymmetric: the smallest weight of each group becomes 0, the largest 15.

        The codes are chosen for the rounded scale and minimum, so these cost no accuracy.
        """
        groups = weight.float().view(len(weight), -1, GROUP_SIZE)
        minima, maxima = groups.aminmax(dim=2)
        minima = minima.bfloat16().float()
        scales = ((maxima - minima) / _INT4_MAX).bfloat16().float()
        divisors = torch.where(scales > 0, scales, 1.0)
        codes = ((groups - minima.unsqueeze(2)) / divisors.unsqueeze(2)).round_()
        codes = codes.clamp_(0, _INT4_MAX).to(torch.uint8).flatten(1)
        return cls(codes[:, ::2] | codes[:, 1::2] << 4, scales, minima)

    @classmethod
    def from_file(cls, name: str, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The parameter `name` as `stored` gave it."""
        return cls(tensors[name], tensors[f"{name}.scales"], tensors[f"{name}.minima"])

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that a file holds for the parameter `name`."""
        return {name: self.codes, f"{name}.scales": self.scales, f"{name}.minima": self.minima}

    @property
    def shape(self) -> torch.Size:
        outputs, pairs = self.codes.shape
        return torch.Size((outputs, 2 * pairs))

    def unpacked_codes(self) -> torch.Tensor:
        """[outputs, inputs] uint8."""
        return torch.stack((self.codes & _INT4_MAX, self.codes >> 4), dim=-1).flatten(1)

    def moved(self, move: Move) -> Self:
        """The same weight, each of its tensors moved by `move`."""
        return type(self)(move(self.codes), move(self.scales), move(self.minima))

    def narrow(self, dimension: int, start: int, length: int) -> torch.Tensor:
        """Like Tensor.narrow, dequantized to float32."""
        if dimension == 0:
            parts = (self.codes, self.scales, self.minima)
            return Int4Weight(*(part.narrow(0, start, length) for part in parts)).dequantize()
        return self.dequantize().narrow(1, start, length)

    def dequantize(self) -> torch.Tensor:
        """[outputs, inputs] float32."""
        groups = self.unpacked_codes().float().view(len(self.codes), -1, GROUP_SIZE)
        return (groups * self.scales.unsqueeze(2) + self.minima.unsqueeze(2)).flatten(1)


def fp8_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [rows, columns] as e4m3 codes and one float32 scale per row [rows].

    The largest value of a row becomes ±448, so nothing overflows; a row of zeros has the scale 0. A
    row that holds NaN or an infinity becomes NaN.
    """
    wide = matrix.float()
    scales = wide.abs().amax(dim=1) / _FP8_MAX
    divisors = torch.where(scales == 0, 1.0, scales)
    return (wide / divisors.unsqueeze(1)).to(FP8), scales


QuantizedWeight = Int8Weight | Int4Weight | Fp8Weight

FORMATS: Mapping[Quantization, type[QuantizedWeight]] = {
    "int8": Int8Weight,
    "int4": Int4Weight,
    "fp8": Fp8Weight,
}
