"""The supervised stage: masked-diffusion cross-entropy on prompts and worked solutions."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedTokenizerBase, Trainer

from ..policies.blocks import place_in_block
from ..policies.denoiser import Denoiser
from ..policies.layout import Family
from ..policies.tokenizers import completion_ids, prompt_ids
from ..recipes.registry import RecipeError
from ..recipes.tasks import Row, Rows
from ..rollouts.noise import generator
from .distributed import rank, reduce_gradients, world_size
from .optimizers import build_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One task of a mixture: its rows, its share of the batches, and the canvas its completions are padded to.

    It joins after the share `start` of the steps: lookups and tables that take thousands of steps to emerge from long
    problems are learned from short ones in hundreds.
    """

    name: str
    rows: Rows
    weight: float
    canvas: int
    start: float = 0.0


TRIES = 1000  # rows that may be too long in a row
STRIDE = 2**40  # beyond any index of a run: where a generated task has the row that replaces one


class Aligned:
    """Rows whose worked solutions fit `canvas` tokens, end included: length-aligned supervised training (IGPO).

    A longer one is rewritten by `rewrite(row, canvas)`, which returns a text; what is still too long, or has no
    rewriter, is left out for another row of the task. Which one is a function of the index alone.
    """

    def __init__(
        self, rows: Rows, tokens: Callable[[str], int], canvas: int, rewrite: Callable[[Row, int], str] | None = None
    ) -> None:
        self.rows, self.tokens, self.canvas, self.rewrite = rows, tokens, canvas, rewrite
        self.size = rows.size

    def row(self, index: int) -> Row:
        """Return row `index`, or what stands for it; RecipeError where nothing fits."""
        stride = self.size or STRIDE
        for attempt in range(TRIES):
            row = self.rows.row(index + attempt * stride)
            if self.tokens(row["reference"]) > self.canvas and self.rewrite is not None:
                row = {**row, "reference": str(self.rewrite(row, self.canvas))}
            if self.tokens(row["reference"]) <= self.canvas:
                return row
        raise RecipeError(f"sft.long: {TRIES} solutions had more than {self.canvas} tokens; raise tasks[].canvas.")


def corrupt(
    canvas_BL: Tensor,
    *,
    rng: torch.Generator,
    mask: str = "exact",
    half_life: float = 0.1,
    place_BL: Tensor | None = None,
    span: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (masked_BL, weight_BL): which tokens are hidden, and 1/t on those.

    `bernoulli`: t ~ U(0,1) a row, every token hidden with probability t (LLaDA, Nie et al. 2025, eq. 3). `exact`: k ~
    U{1..L} a row, exactly k hidden, weight L/k: the same expectation with far less variance. `late`: exactly k, drawn
    one after another with odds 2^((1 - k/L) i / (half_life n)) for place i of n, as decoding leaves late tokens open
    longest (Efficient-DLM, Fu et al. 2025): i is `place_BL` in a block of `span` tokens, or the canvas is one block.
    Levels are stratified over the batch in all.
    """
    rows, length = canvas_BL.shape
    level_B = (torch.rand((), generator=rng) + torch.arange(rows) / rows) % 1.0
    noise_BL = torch.rand(rows, length, generator=rng)
    if mask in ("exact", "late"):
        count_B = 1 + (level_B * length).floor().clamp(max=length - 1)
        order_BL = noise_BL
        if mask == "late":
            # The k smallest of Exp(1) / w are k draws without replacement at odds w (Efraimidis and Spirakis 2006).
            growth_B = math.log(2.0) / (half_life * (span or length)) * (1.0 - count_B / length)
            place_BL = torch.arange(length).expand(rows, -1) if place_BL is None else place_BL
            order_BL = (-noise_BL.clamp(min=1e-30).log()).log() - growth_B[:, None] * place_BL
        masked_BL = order_BL.argsort(dim=1).argsort(dim=1) < count_B[:, None]
        weight_B = length / count_B
    else:
        level_B = level_B.clamp(min=1e-3)
        masked_BL = noise_BL < level_B[:, None]
        weight_B = 1.0 / level_B
    return masked_BL, weight_B[:, None] * masked_BL


class SftBatches(Dataset):
    """Batch `index` of a mixture, the same in every process and after a resume: one task a batch, corrupted already."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        family: Family,
        *,
        batch: int,
        steps: int,
        seed: int,
        mask: str = "exact",
        half_life: float = 0.1,
        full_canvas: float = 0.3,
    ) -> None:
        self.sources, self.tokenizer, self.family = list(sources), tokenizer, family
        self.batch, self.steps, self.seed, self.full_canvas = batch, steps, seed, full_canvas
        self.mask, self.half_life = mask, half_life

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random.Random(f"sft/{self.seed}/{index}")
        joined = [source for source in self.sources if source.start * self.steps <= index]
        source = rng.choices(joined, [s.weight for s in joined])[0]
        rows = [source.rows.row(index * self.batch + offset) for offset in range(self.batch)]
        # Short canvases are cheaper, full ones teach where EOS padding goes; the model must know both.
        canvas = source.canvas if rng.random() < self.full_canvas else None
        return self.collate(rows, canvas, index)

    def collate(self, rows: Sequence[dict[str, Any]], canvas: int | None, index: int) -> dict[str, Tensor]:
        """Return left-padded prompts and EOS-padded completions of `rows`, with `index`'s corruption."""
        prompts = [prompt_ids(self.tokenizer, row["prompt"]) for row in rows]
        replies = [completion_ids(self.tokenizer, row["reference"], self.family.end_id) for row in rows]
        # Families that count blocks from a padded prompt get prompts of whole blocks.
        multiple = self.family.prompt_multiple
        width = -(-max(map(len, prompts)) // multiple) * multiple
        length = max(map(len, replies))
        if canvas is not None and length > canvas:
            raise ValueError(
                f"sft: a completion has {length} tokens, the canvas {canvas}; raise tasks[].canvas, or set sft.long."
            )
        length = canvas or length
        eos = self.family.eos_token_ids[0]
        pairs = zip(prompts, replies, strict=True)
        ids = torch.tensor([[eos] * (width - len(p)) + p + r + [eos] * (length - len(r)) for p, r in pairs])
        padding_mask = torch.arange(width + length) >= torch.tensor([[width - len(p)] for p in prompts])
        target_BL = ids[:, width:]
        rng = generator(self.seed, "sft-mask", index)
        # Blocks are decoded one after the other: what is late is late in its block.
        place_BT = place_in_block(self.family, padding_mask)
        masked_BL, weight_BL = corrupt(
            target_BL,
            rng=rng,
            mask=self.mask,
            half_life=self.half_life,
            place_BL=None if place_BT is None else place_BT[:, width:],
            span=self.family.block_length,
        )
        scored_BT = torch.zeros_like(padding_mask)
        scored_BT[:, width:] = masked_BL
        return {
            "input_ids": ids.masked_fill(scored_BT, self.family.mask_token_id),
            "clean_ids": ids,
            "padding_mask": padding_mask,
            "scored": scored_BT,
            "target": target_BL[masked_BL],
            # Mean over rows of (1/L) sum 1/t CE, an upper bound of the negative log-likelihood a token.
            "weight": weight_BL[masked_BL] / (len(rows) * length),
        }


def only_item(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Unwrap the DataLoader's list: a dataset item is a whole batch already."""
    (item,) = items
    return item


class SftTrainer(Trainer):
    """transformers.Trainer with the masked-diffusion loss and our optimizers; everything else is the Trainer's."""

    def __init__(self, denoiser: Denoiser, *, optim: dict[str, Any], autocast: bool = False, **kwargs: Any) -> None:
        super().__init__(model=denoiser.model, data_collator=only_item, **kwargs)
        self.denoiser, self.optim, self.autocast = denoiser, optim, autocast
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader:
        """Return this rank's batches in their order, which a curriculum needs (Trainer would shuffle them)."""
        batches: Any = self.train_dataset
        mine = Subset(batches, range(rank(), len(batches), world_size()))
        return DataLoader(mine, batch_size=1, collate_fn=only_item)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the recipe's optimizer once."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.denoiser.model.named_parameters(), **self.optim)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the batch's weighted cross-entropy on hidden tokens, in nats a token."""
        # The Trainer's own bf16 wraps model.forward, which the denoiser does not call.
        with torch.autocast(self.denoiser.device.type, torch.bfloat16, enabled=self.autocast):
            # Block-causal families see the clean blocks before each noisy one; for the others this is one plain pass.
            logits_KV = self.denoiser.train_logits(
                inputs["input_ids"],
                inputs["clean_ids"],
                padding_mask_BT=inputs["padding_mask"],
                positions_BT=inputs["scored"],
            )
        loss = (F.cross_entropy(logits_KV, inputs["target"], reduction="none") * inputs["weight"]).sum()
        return (loss, logits_KV) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Compute one batch's gradient and average it over ranks."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        reduce_gradients(self.denoiser.model.parameters(), average=True)
        return loss
