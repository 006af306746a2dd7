"""`unmask export`: a run's policy as one model folder, merged in float32 and verified against the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..policies.adapters import merged
from ..policies.denoiser import Denoiser
from ..policies.loading import load_denoiser
from ..policies.saving import whole_folder
from ..recipes.loading import load_recipe
from ..rollouts.noise import generator
from .runfolder import RunError, write_json
from .targets import open_target

TOLERANCE = 1e-5  # of the logits' scale, in float32
PROBE = (2, 64)


def export(target: str, to: Path, *, layout: str = "vendor", dtype: str | None = None) -> dict[str, Any]:
    """Write the policy of a run to the new folder `to` and return what was verified.

    The base is loaded in float32 whatever the run trained in (4-bit bases in full), the adapter merged into it, and the
    merged logits must equal those with the adapter on, and differ from the base's; the folder, read again, must give
    them bit for bit. Raises RunError otherwise, with nothing written, and when `to` holds files already.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise RunError(f"export: dtype '{dtype}' is neither float32 nor bfloat16.")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"export: '{to}' is not empty; name a new folder.")
    folder = Path(target).expanduser()
    stored = load_recipe(folder.parent if folder.name.startswith("checkpoint-") else folder).model.dtype
    _, denoiser = open_target(target, ["model.dtype=float32", "model.quantization=null"])
    ids = probe(denoiser)
    report: dict[str, Any] = {"run": target, "to": str(to), "layout": layout, "dtype": dtype or stored}
    if isinstance(denoiser.model, PeftModel):
        with torch.no_grad():
            adapted = denoiser.logits(ids)
            with denoiser.model.disable_adapter():
                base = denoiser.logits(ids)
            denoiser = merged(denoiser)
            report |= compare(denoiser.logits(ids), adapted, base)
    # Parameters only: buffers such as RoPE's frequencies stay in float32.
    for parameter in denoiser.model.parameters():
        parameter.data = parameter.data.to(getattr(torch, report["dtype"]))
    denoiser.model.config.dtype = getattr(torch, report["dtype"])
    family = denoiser.family.name if layout == "vendor" else None
    with whole_folder(to) as unfinished, torch.no_grad():
        denoiser.save(unfinished, layout=layout)
        again = load_denoiser(str(unfinished), dtype=report["dtype"], family=family, tokenizer=denoiser.tokenizer)
        apart = report["written_minus_merged"] = (again.logits(ids) - denoiser.logits(ids)).abs().max().item()
        if not apart == 0.0:
            raise RunError(f"export: what was written gives other logits when read again (by {apart:.2g}); try again.")
        write_json(unfinished / "export.json", report)
    _show(report)
    return report


def _show(report: dict[str, Any]) -> None:
    table = Table("check", "largest difference of logits", title=f"{report['run']} -> {report['to']}")
    rows = {
        "merged, adapter on": "merged_minus_adapter",
        "adapter on, base": "adapter_minus_base",
        "read again, merged": "written_minus_merged",
    }
    for title, key in rows.items():
        if key in report:
            table.add_row(title, f"{report[key]:.2g}")
    console = Console()
    console.print(table)
    console.print(f"next: unmask sample {report['to']}", soft_wrap=True)


def probe(denoiser: Denoiser) -> Tensor:
    """Return random token ids to compare models on."""
    length = denoiser.family.block_length or 1
    shape = (PROBE[0], max(PROBE[1] // length, 2) * length)
    return torch.randint(0, denoiser.family.vocab_size, shape, generator=generator(0, "export-probe", 0)).to(
        denoiser.device
    )


def compare(found: Tensor, adapted: Tensor, base: Tensor) -> dict[str, float]:
    """Return the largest differences of merged logits; RunError unless they are the adapter's and not the base's."""
    scale = max(1.0, adapted.abs().max().item())
    merged_by = (found - adapted).abs().max().item()
    adapter_by = (adapted - base).abs().max().item()
    if merged_by > TOLERANCE * scale:
        raise RunError(f"export: merging moved the logits by {merged_by:.2g} (scale {scale:.2g}); nothing was written.")
    if adapter_by <= TOLERANCE * scale:
        raise RunError("export: the adapter changes no logit: it is untrained, or its weights were not found.")
    return {"merged_minus_adapter": merged_by, "adapter_minus_base": adapter_by, "scale": scale}
