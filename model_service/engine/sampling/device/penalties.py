"""Penalties and biases on the device, with the token counts of each sequence that has any.

A sequence has a slot from its first draw to its end. Sampled tokens are counted on the device, so
no step has to know its predecessor's tokens on the host, or to upload them.
"""

import numpy as np
import torch

from model_service.engine.sampling.columns import PenaltyColumns
from model_service.engine.sequence import Sequence
from model_service.model.cuda.pinned_transfer import upload

_LARGEST = torch.finfo(torch.float32).max
_FIRST_SLOTS = 8


class PenaltyTables:
    """One row of the vocabulary's size per slot."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._slots: dict[Sequence, int] = {}
        self._free: list[int] = []
        self._present = torch.empty(0, vocab, dtype=torch.bool, device=device)  # prompt or answer
        self._counts = torch.empty(0, vocab, device=device)  # in the answer
        self._biases = torch.empty(0, vocab, device=device)

    def slot(self, sequence: Sequence) -> int:
        """The slot of `sequence`; at the first call, none of its tokens may be pending."""
        if (slot := self._slots.get(sequence)) is None:
            if not self._free:
                self._enlarge()
            slot = self._slots[sequence] = self._free.pop()
            self._fill(slot, sequence)
        return slot

    def forget(self, sequence: Sequence) -> None:
        """Frees the slot of a sequence that has ended, if it has one."""
        if (slot := self._slots.pop(sequence, None)) is not None:
            self._free.append(slot)

    def apply(
        self, logits: torch.Tensor, slots: torch.Tensor, columns: PenaltyColumns[torch.Tensor]
    ) -> torch.Tensor:
        """The changed logits, as `host_penalties.apply_penalties` makes them.

        Args:
            logits: [rows, vocab] float32.
            slots: [rows].
            columns: the rows' parameters.
        """
        counts = self._counts[slots]
        divided, multiplied = logits / columns.repetition, logits * columns.repetition
        repeated = torch.where(logits > 0, divided, multiplied).clamp_(-_LARGEST, _LARGEST)
        adjusted = torch.where(self._present[slots], repeated, logits)
        adjusted -= columns.frequency * counts
        adjusted -= columns.presence * (counts > 0)
        adjusted += self._biases[slots]
        return adjusted

    def record(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Adds the tokens [rows] that were sampled for these slots [rows], all different."""
        # Not `[...] = True`: a number from the host might be waited for.
        self._present.index_put_((slots, tokens), torch.ones_like(tokens, dtype=torch.bool))
        self._counts.index_put_((slots, tokens), self._counts[slots, tokens] + 1.0)

    def _fill(self, slot: int, sequence: Sequence) -> None:
        request = sequence.request
        bias = request.sampling.logit_bias
        answer = sequence.tokens[request.answer_start :]
        tokens, answered, stops, biased, values = upload(
            self._device,
            np.array(sequence.tokens, dtype=np.int64),
            np.array(answer, dtype=np.int64),
            np.array([*request.stop_ids], dtype=np.int64),
            np.array([*bias], dtype=np.int64),
            np.array([*bias.values()], dtype=np.float32),
        )
        present, counts, biases = self._present[slot], self._counts[slot], self._biases[slot]
        # Stop ids are exempt from penalties; one that is drawn later ends the sequence.
        present.zero_().index_fill_(0, tokens, True).index_fill_(0, stops, False)
        counts.zero_().index_add_(0, answered, torch.ones_like(answered, dtype=torch.float32))
        counts.index_fill_(0, stops, 0.0)
        biases.zero_().index_copy_(0, biased, values)

    def _enlarge(self) -> None:
        """Doubles the slots."""
        before = len(self._counts)
        added = max(before, _FIRST_SLOTS)
        self._free += range(before, before + added)
        self._present, self._counts, self._biases = (
            torch.cat((table, table.new_empty(added, self._vocab)))
            for table in (self._present, self._counts, self._biases)
        )
