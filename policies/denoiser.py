"""Denoiser: a stock transformers model that gives aligned logits at chosen positions, whatever its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlamaModel, PreTrainedTokenizerBase

from .blocks import BlockCache, additive, block_ids, block_mask, doubled_mask, hide_padding, positions
from .layout import CheckpointError, Family
from .store import Store

# What a forward calls the keys and values it is given: renamed in all models by transformers 5.24.
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


@dataclass
class Denoiser:
    """A bidirectional or block-causal model with its family, tokenizer and the config it was published with.

    `model` is a stock causal or masked language model or a `PeftModel` around one; everything else of unmask sees only
    the methods below, whose rows are aligned: row i scores the token at position i.
    """

    model: Any
    family: Family
    tokenizer: PreTrainedTokenizerBase
    vendor_config: dict[str, Any] = field(default_factory=dict)
    root: Any = None  # FSDP's root module, which calls a function in its forward, where the weights are whole
    output: Any = None  # stands in for the output matrix: with an identity, logits are the hidden states it reads

    @property
    def base(self) -> Any:
        """The stock model, with adapter layers in place when there are any."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def new_cache(self) -> BlockCache | None:
        """Return an empty exact cache, or None: with full attention every token changes the keys of all others."""
        return None if self.family.attention == "full" else BlockCache(self.base.config.num_hidden_layers)

    def hidden(
        self,
        input_ids_BT: Tensor,
        *,
        padding_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: BlockCache | None = None,
        commit: bool | int = False,
        store: Store | None = None,
        attention_BTT: Tensor | None = None,
    ) -> Tensor:
        """Return the trunk's last hidden states `[B, T, D]`, aligned; arguments as `logits`.

        A `store` takes the keys and values of whole rows on the way; it changes nothing. With a mask of the caller's,
        `attention_BTT` (true where a query may attend), rows are the raw model's: where the family shifts logits, that
        of column i - 1 scores the token at i.
        """
        if attention_BTT is not None:
            return self._trunk(input_ids_BT, self._attention(attention_BTT[:, None]), position_ids_BT)
        if self.family.attention == "full":
            if cache is not None or commit:
                raise CheckpointError(f"cache: family '{self.family.name}' attends to the whole canvas; none is exact.")
            # Without padding the mask stays None, the only form in which SDPA may use its flash kernel.
            mask = None if padding_mask_BT is None else hide_padding(self.base.config, padding_mask_BT, self._attention)
            return self._aligned(self._trunk(input_ids_BT, mask, position_ids_BT, store))
        if commit and cache is None:
            raise CheckpointError("commit: there is no cache to commit to; pass cache=denoiser.new_cache().")
        start_B = None if cache is None else cache.next_B
        position_BT = position_ids_BT
        if position_BT is None:
            position_BT = positions(input_ids_BT.shape, padding_mask_BT, start_B, input_ids_BT.device)
        block_BT = block_ids(self.family, position_BT, padding_mask_BT, 0 if cache is None else len(cache))
        if cache is None:
            mask = block_mask(block_BT, block_BT)
            return self._aligned(self._trunk(input_ids_BT, self._attention(mask), position_BT, store))
        return self._cached(input_ids_BT, block_BT, position_BT, cache, commit, padding_mask_BT is not None)

    def columns(self, input_ids_BC: Tensor, position_ids_BC: Tensor, mask_B1CK: Tensor, store: Store) -> Tensor:
        """Return the trunk's last hidden states `[B, C, D]` of some columns among the K places of a `store`.

        `mask_B1CK` is true where a column may attend. Rows are the raw model's: where the family shifts logits, that of
        column i - 1 scores the token at i.
        """
        return self._trunk(input_ids_BC, self._attention(mask_B1CK), position_ids_BC, store)

    def logits(
        self,
        input_ids_BT: Tensor,
        *,
        padding_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: BlockCache | None = None,
        commit: bool | int = False,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Return fp32 logits whose row i scores the token *at* position i.

        Shapes: `[B, T, V]`, or `[K, V]` for the K true entries of `positions_BT` in row-major order; the rows are
        selected before the LM head, so no B x T x V tensor exists then. `padding_mask_BT` is true on tokens. Behind a
        `cache` only the new tokens are given; `commit` stores all of them, or the first `commit` columns, which must be
        finished blocks: `[clean block k | masked block k+1]` with commit=block_length does both in one forward. Rows of
        position 0 mean nothing where logits are shifted (nothing precedes it). Raises CheckpointError for a cache or a
        commit that the family cannot have.
        """

        def scored() -> Tensor:
            hidden = self.hidden(
                input_ids_BT,
                padding_mask_BT=padding_mask_BT,
                position_ids_BT=position_ids_BT,
                cache=cache,
                commit=commit,
            )
            return self.head(hidden if positions_BT is None else hidden[positions_BT])

        return self._inside(scored)

    def train_logits(
        self,
        noisy_BT: Tensor,
        clean_BT: Tensor,
        *,
        padding_mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of x_t, every block of it behind the clean blocks of x_0, in one pass over [x_t ; x_0].

        Shapes as `logits`. With full attention this is `logits(x_t)`.
        """
        if self.family.attention == "full":
            return self.logits(noisy_BT, padding_mask_BT=padding_mask_BT, positions_BT=positions_BT)

        def scored() -> Tensor:
            noisy = self._doubled(noisy_BT, clean_BT, padding_mask_BT)
            return self.head(noisy if positions_BT is None else noisy[positions_BT])

        return self._inside(scored)

    def _inside(self, forward: Callable[[], Tensor]) -> Tensor:
        """Return `forward()`, run inside the root's forward where weights are sharded and it does not run already."""
        return forward() if self.root is None or self.root.running else self.root(forward)

    def _doubled(self, noisy_BT: Tensor, clean_BT: Tensor, padding_mask_BT: Tensor | None) -> Tensor:
        """Return the aligned hidden states of x_t in [x_t ; x_0]."""
        position_BT = positions(noisy_BT.shape, padding_mask_BT, None, noisy_BT.device)
        block_BT = block_ids(self.family, position_BT, padding_mask_BT)
        both = self._trunk(
            torch.cat([noisy_BT, clean_BT], dim=1), self._attention(doubled_mask(block_BT)), position_BT.repeat(1, 2)
        )
        noisy, clean = both.chunk(2, dim=1)
        if not self.family.logit_shift:
            return noisy
        # A block's first token is predicted by the last token of the clean block before it.
        first_BT = block_BT != block_BT.roll(1, dims=1)
        return torch.where(first_BT[..., None], clean.roll(1, dims=1), noisy.roll(1, dims=1))

    def head(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits of aligned hidden states `[..., D]`."""
        # ModernBERT has a dense layer and a norm before its output matrix.
        before = getattr(self.base, "head", None)
        matrix = self.base.get_output_embeddings() if self.output is None else self.output
        return self._inside(lambda: matrix(hidden if before is None else before(hidden)).float())

    def save(self, directory: str | Path, *, layout: str = "vendor") -> None:
        """Write config, weights and tokenizer in the vendor's or the stock class's layout (adapters merged before)."""
        from .saving import save_denoiser

        save_denoiser(self, directory, layout=layout)

    def _trunk(
        self, input_ids_BT: Tensor, mask: Tensor | None, position_BT: Tensor | None, kept: Cache | None = None
    ) -> Tensor:
        if not len(input_ids_BT):
            # Ranks that share weights take part in every forward, and models want a row.
            return self._trunk(input_ids_BT.new_zeros(1, input_ids_BT.shape[1]), None, None)[:0]
        # Whether keys are kept is the config's use_cache, which loading switches off; encoders know no such argument.
        trunk, cached = self.base.base_model, {} if kept is None else {CACHE: kept}
        inputs = {"input_ids": input_ids_BT, "attention_mask": mask, **cached}
        return self._inside(lambda: trunk(position_ids=position_BT, **inputs).last_hidden_state)

    def _attention(self, mask: Tensor) -> Tensor:
        eager = self.base.config._attn_implementation == "eager"
        return additive(mask, next(self.model.parameters()).dtype) if eager else mask

    def _cached(
        self,
        input_ids_BT: Tensor,
        block_BT: Tensor,
        position_BT: Tensor,
        cache: BlockCache,
        commit: bool | int,
        padded: bool,
    ) -> Tensor:
        """Run the trunk behind `cache`, storing the first `commit` columns."""
        width, length = input_ids_BT.shape[1], self.family.block_length or 1
        columns = width if commit is True else int(commit)
        if columns > width:
            raise CheckpointError(f"commit: {columns} columns of {width} cannot be stored.")
        cache.padded |= padded
        cache.keep(columns)
        mask = None
        # One block that nothing pads sees everything: without a mask SDPA may use its flash kernel.
        if cache.padded or width > length or len(cache) % length:
            key_BK = block_BT if cache.block_BK is None else torch.cat([cache.block_BK, block_BT], dim=1)
            mask = self._attention(block_mask(block_BT, key_BK))
        before = cache.last_B1D
        raw = self._trunk(input_ids_BT, mask, position_BT, cache.keys)
        if columns:
            cache.store(block_BT, position_BT, raw, columns)
        return self._aligned(raw, before)

    def _aligned(self, hidden_BTD: Tensor, before_B1D: Tensor | None = None) -> Tensor:
        """Move hidden states right by the family's shift; `before` are those of the last cached token."""
        if not self.family.logit_shift:
            return hidden_BTD
        first = hidden_BTD[:, :1] if before_B1D is None else before_B1D
        return torch.cat([first, hidden_BTD[:, :-1]], dim=1)
