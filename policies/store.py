"""Keys and values of whole sequences, of which a forward recomputes some columns: what every cache policy works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

ALIGNED = 8  # masked attention kernels read keys in steps of eight


@dataclass
class _Target:
    """Which rows and columns the next forward computes; every layer looks here."""

    rows: int
    room: int
    row_R: Tensor
    column_RC: Tensor | None = None
    every_row: bool = True


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, `[rows, room, heads, width]`; an update writes some columns and returns all."""

    is_sliding = False

    def __init__(self, target: _Target) -> None:
        super().__init__()
        self.target = target

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for every column: zeros, for what is hidden still meets a weight of 0."""
        shape = (self.target.rows, self.target.room)
        self.keys, self.values = (x.new_zeros(*shape, x.shape[1], x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the forward attends to, each `[R, heads, columns, width]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, table: Tensor, fresh: Tensor) -> Tensor:
        row_R, column_RC = self.target.row_R, self.target.column_RC
        if column_RC is None:
            # Whole rows: what is computed is all there is to see, as without a cache.
            table[row_R, : fresh.shape[2]] = fresh.transpose(1, 2)
            return fresh
        table[row_R[:, None], column_RC] = fresh.transpose(1, 2)
        return (table if self.target.every_row else table.index_select(0, row_R)).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys, offset) of a forward over whole rows; one over columns brings its own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: the columns of a forward stand among those that are stored, not behind them."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of places."""
        return self.target.room


class Store(Cache):
    """Keys (rotated) and values of `columns` columns of `rows` rows, in every layer of a model.

    `expect` says what the next forward computes. One over whole rows sees what it computes; one over some columns sees
    all `room` places and needs a mask that hides what does not count: columns never computed, and from `dummy` on the
    places that hold no column. Rows with fewer columns than others repeat `dummy`.
    """

    def __init__(self, layers: int, rows: int, columns: int, device: torch.device) -> None:
        room = -(-(columns + 1) // ALIGNED) * ALIGNED
        self.target = _Target(rows, room, torch.arange(rows, device=device))
        self.dummy = columns
        super().__init__(layers=[_Layer(self.target) for _ in range(layers)])

    @property
    def room(self) -> int:
        """The number of places a row has."""
        return self.target.room

    def expect(self, row_R: Tensor, column_RC: Tensor | None, *, every_row: bool) -> None:
        """Set the rows and columns of the next forward; no columns: whole rows. `every_row`: `row_R` is 0, 1, 2, ..."""
        self.target.row_R, self.target.column_RC, self.target.every_row = row_R, column_RC, every_row

    def select(self, row_A: Tensor) -> None:
        """Keep the rows `row_A` (indices; one may come several times), in that order."""
        self.target.rows = len(row_A)
        for layer in self.layers:
            if isinstance(layer, _Layer) and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[row_A], layer.values[row_A]
