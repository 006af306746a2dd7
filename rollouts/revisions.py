"""What a step does to the canvas: commits, what is taken back, edits, and changes of length, all written down."""

from __future__ import annotations

from torch import Tensor

from .choices import Scored
from .lengths import resize
from .sampler import Sampler
from .state import Record, State


def commit(
    record: Record, sampler: Sampler, state: State, scored: Scored, alive_A: Tensor, revisable_A: Tensor
) -> dict[str, Tensor]:
    """Write a step's outcome to the record and return the parts' memory for the next one.

    Tokens are taken back, edited and moved in the rows `revisable_A` alone, and never those of the prompt or of the
    start's fixed text, whatever a part says. What is drawn and dropped in one step was on no canvas: it is no action.
    """
    table, chosen_AL = state.statistics, scored.chosen_AL
    assert table is not None
    retract_AL = edited_AL = None
    if sampler.remasking is not None:
        taken_AL = sampler.revise(state, chosen_AL, scored.score_AL) & revisable_A[:, None]
        chosen_AL, retract_AL = chosen_AL & ~taken_AL, taken_AL & state.stood_AL
    if sampler.editing is not None:
        edited_AL = sampler.edit(state) & state.stood_AL & revisable_A[:, None] & (table.best != state.canvas_AL)
        retract_AL = edited_AL if retract_AL is None else retract_AL | edited_AL
    if retract_AL is not None:
        record.retract(alive_A, retract_AL, state.step_A, state.mask_token_id)
    record.write(alive_A, chosen_AL, table.token, table.logprob, scored.score_AL, scored.rank_AL, state.step_A)
    if edited_AL is not None:
        record.overwrite(alive_A, edited_AL, table.best, table.confidence, state.step_A)
    if sampler.length is None:
        return state.memory
    return resize(record, alive_A, sampler.resized(state), revisable_A, state)
