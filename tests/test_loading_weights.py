"""Vendor folders onto stock classes: golden logits, every key and byte, shards, dtypes and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unmask.policies import loading as module
from unmask.policies import saving
from unmask.policies.denoiser import Denoiser
from unmask.policies.families import LLADA
from unmask.policies.loading import load_denoiser, new_denoiser, stock_config
from unmask.policies.resolving import resolve_family
from unmask.policies.selfcheck import SelfCheckError, self_check
from unmask.policies.tokenizers import byte_tokenizer

GOLDEN = Path(__file__).parent / "fixtures" / "llada"
TOLERANCE, CONTROL = 1e-4, 0.5

# config.json of GSAI-ML/LLaDA-8B-Instruct (reference/models.md section 1).
LLADA_8B: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "rope_full_precision": True,
    "activation_type": "silu",
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "alibi": False,
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "weight_tying": False,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}


def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


def load(path: Path = GOLDEN, **options: Any) -> Denoiser:
    """Load a folder without tokenizer files."""
    return load_denoiser(str(path), tokenizer=byte_tokenizer(), **options)


def worst(found_BTV: Tensor, expected_BTV: Tensor, where_BT: Tensor | None = None) -> float:
    difference_BTV = (found_BTV - expected_BTV).abs()
    return (difference_BTV if where_BT is None else difference_BTV[where_BT]).max().item()


@torch.no_grad()
@pytest.mark.parametrize("attention", [None, "eager"])
def test_golden_logits(attention: str | None) -> None:
    """Within 1e-4 of the vendor's forward, and with the wrong attention more than 0.5 away."""
    data, denoiser = golden(), load(attention=attention)
    assert denoiser.model.config._attn_implementation == (attention or "sdpa")
    padding_BT = data["padding_mask"].bool()
    assert not padding_BT.all()
    assert worst(denoiser.logits(data["input_ids"]), data["logits"]) <= TOLERANCE
    padded_BTV = denoiser.logits(data["padded_input_ids"], padding_mask_BT=padding_BT)
    assert worst(padded_BTV, data["padded_logits"], padding_BT) <= TOLERANCE
    # Control: padding that is attended, and causal attention.
    assert worst(denoiser.logits(data["padded_input_ids"]), data["padded_logits"], padding_BT) > CONTROL
    denoiser.model.config.is_causal = True
    assert worst(denoiser.logits(data["input_ids"]), data["logits"]) > CONTROL
    # Padded rows bring a mask of their own, which is followed whatever the config says.
    padded_BTV = denoiser.logits(data["padded_input_ids"], padding_mask_BT=padding_BT)
    assert worst(padded_BTV, data["padded_logits"], padding_BT) <= TOLERANCE


@torch.no_grad()
def test_logits_at_positions_are_rows_of_all_logits() -> None:
    data, denoiser = golden(), load()
    padding_BT = data["padding_mask"].bool()
    positions_BT = torch.rand(padding_BT.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    full_BTV = denoiser.logits(data["padded_input_ids"], padding_mask_BT=padding_BT)
    rows_KV = denoiser.logits(data["padded_input_ids"], padding_mask_BT=padding_BT, positions_BT=positions_BT)
    assert rows_KV.shape == (int(positions_BT.sum()), 384)
    torch.testing.assert_close(rows_KV, full_BTV[positions_BT], rtol=0, atol=1e-5)


def test_the_stock_model_is_bidirectional_and_learns_every_row() -> None:
    denoiser = load()
    assert type(denoiser.model) is LlamaForCausalLM
    assert denoiser.model.config.is_causal is False
    assert denoiser.model.config.pad_token_id is None
    assert denoiser.model.get_input_embeddings().padding_idx is None
    assert denoiser.family.mask_token_id == 380
    assert denoiser.family.eos_token_ids == (371,)
    assert not denoiser.model.training
    denoiser.logits(torch.tensor([[371, 371, 5]])).square().sum().backward()
    assert denoiser.model.get_input_embeddings().weight.grad[371].abs().max() > 0, "EOS = pad is trained too"


def test_saving_gives_the_vendors_keys_and_bytes(tmp_path: Path) -> None:
    load().save(tmp_path)
    vendor, saved = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == vendor.keys()
    for key, value in vendor.items():
        assert saved[key].dtype == value.dtype
        assert saved[key].numpy().tobytes() == value.numpy().tobytes(), key
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == json.loads((GOLDEN / "config.json").read_text())
    again = load_denoiser(str(tmp_path), tokenizer=byte_tokenizer())
    assert worst(again.logits(golden()["input_ids"]), golden()["logits"]) <= TOLERANCE


def test_saving_over_the_folder_it_was_loaded_from(tmp_path: Path) -> None:
    """The weights in memory may be mapped from the very file that is written."""
    shutil.copytree(GOLDEN, tmp_path / "model")
    denoiser = load(tmp_path / "model")
    with torch.no_grad():
        denoiser.model.model.norm.weight.add_(1)
    kept = {key: value.clone() for key, value in denoiser.model.state_dict().items()}
    denoiser.save(tmp_path / "model")
    again = load(tmp_path / "model")
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, kept[key]), key
        assert torch.equal(denoiser.model.state_dict()[key], kept[key]), key


def shard(folder: Path, parts: int = 2) -> None:
    """Split a folder's weights among `parts` files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(parts):
        name = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        chunk = {key: state[key] for key in sorted(state)[i::parts]}
        save_file(chunk, folder / name)
        weight_map.update(dict.fromkeys(chunk, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_load_and_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(GOLDEN, tmp_path / "sharded")
    shard(tmp_path / "sharded")
    denoiser, data = load(tmp_path / "sharded"), golden()
    assert worst(denoiser.logits(data["input_ids"]), data["logits"]) <= TOLERANCE
    monkeypatch.setattr(saving, "SHARD_BYTES", 250_000)
    denoiser.save(tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert files == [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    vendor = load_file(GOLDEN / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in vendor.values())
    for name in files:
        part = load_file(tmp_path / "again" / name)
        assert all(index["weight_map"][key] == name for key in part)
    assert index["weight_map"].keys() == vendor.keys()
    again = load(tmp_path / "again")
    assert worst(again.logits(data["input_ids"]), data["logits"]) <= TOLERANCE
    # One file replaces them all: what is left of the shards would be read instead of it.
    monkeypatch.setattr(saving, "SHARD_BYTES", 5 << 30)
    with torch.no_grad():
        again.model.model.norm.weight.add_(1)
    again.save(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(load(tmp_path / "again").model.model.norm.weight, again.model.model.norm.weight)


def test_bfloat16_is_a_choice_at_loading(tmp_path: Path) -> None:
    """Weights in bf16, RoPE's frequencies in fp32 and those of the fp32 model; the self-check refuses `.to`."""
    full, half = load(), load(dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    frequencies = half.model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    expected = 500000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(frequencies.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(frequencies, full.model.model.rotary_emb.inv_freq)
    logits_BTV = half.logits(golden()["input_ids"])
    assert logits_BTV.dtype == torch.float32
    error_BTV = logits_BTV - golden()["logits"]
    assert error_BTV.square().mean().sqrt() < 0.05 * golden()["logits"].std(), "of the size of bf16's rounding"
    half.save(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    full.model.to(torch.bfloat16)
    with pytest.raises(SelfCheckError, match=r"RoPE's inv_freq is torch.bfloat16; load with dtype="):
        self_check(full)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_exist_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is built without storage, and its parameters are the tensors that were read, not copies of them.

    But for those that lie in the mapped file where products would depend on the address: of the file, and so no memory.
    """
    read: dict[str, Tensor] = {}
    made: list[set[str]] = []

    def reading(*arguments: Any) -> dict[str, Tensor]:
        read.update(original(*arguments))
        return dict(read)

    class Watched(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            made.append({parameter.device.type for parameter in self.parameters()})

    original = module.read_state
    monkeypatch.setattr(module, "read_state", reading)
    monkeypatch.setitem(module.CLASSES, "llama", (LlamaConfig, Watched))
    denoiser = load(dtype=dtype)
    assert made == [{"meta"}]
    state = denoiser.model.state_dict()
    assert len(state) == len(read) == 30
    for name, tensor in read.items():
        assert state[name].data_ptr() % 64 == 0, name
        assert (state[name].data_ptr() == tensor.data_ptr()) == (tensor.data_ptr() % 64 == 0), name
        assert state[name].dtype == getattr(torch, dtype)
    assert all(buffer.device.type == "cpu" for buffer in denoiser.model.buffers())


def llada_8b_shapes() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of LLaDA-8B's 291 tensors, written out from models.md section 1."""
    width, mlp, rows = 4096, 12288, 126464
    block = {
        "attn_norm": (width,),
        "q_proj": (width, width),
        "k_proj": (width, width),
        "v_proj": (width, width),
        "attn_out": (width, width),
        "ff_norm": (width,),
        "ff_proj": (mlp, width),
        "up_proj": (mlp, width),
        "ff_out": (width, mlp),
    }
    shapes = {f"model.transformer.blocks.{n}.{k}.weight": s for n in range(32) for k, s in block.items()}
    return {
        **shapes,
        "model.transformer.wte.weight": (rows, width),
        "model.transformer.ln_f.weight": (width,),
        "model.transformer.ff_out.weight": (rows, width),
    }


def test_llada_8b_is_fully_consumed() -> None:
    shapes = llada_8b_shapes()
    assert len(shapes) == 291
    with torch.device("meta"):
        model = LlamaForCausalLM(stock_config(LLADA, LLADA_8B, None))
    stock = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    mapped = {LLADA.to_stock(name): shape for name, shape in shapes.items()}
    assert mapped == stock
    assert {LLADA.to_vendor(name) for name in stock} == shapes.keys()
    assert sum(value.numel() for value in model.state_dict().values()) * 2 == 16_031_162_368
    # The activated branch is the gate; the head shares its leaf with the blocks' down projection.
    assert LLADA.to_stock("model.transformer.blocks.31.ff_proj.weight") == "model.layers.31.mlp.gate_proj.weight"
    assert LLADA.to_stock("model.transformer.blocks.3.ff_out.weight") == "model.layers.3.mlp.down_proj.weight"
    assert LLADA.to_stock("model.transformer.ff_out.weight") == "lm_head.weight"
    family = resolve_family(LLADA_8B, LLADA, None)
    assert (family.mask_token_id, family.eos_token_ids) == (126336, (126081, 126348))
    assert model.config.rope_parameters["rope_theta"] == 500000.0
    assert (model.config.is_causal, model.config.pad_token_id) == (False, None)


def test_tied_embeddings_are_read_and_written_once(tmp_path: Path) -> None:
    denoiser = new_denoiser(hidden_size=16, layers=1, heads=2, mlp=32)
    denoiser.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "weight_tying": True}))
    state = load_file(tmp_path / "a" / "model.safetensors")
    del state["model.transformer.ff_out.weight"]
    save_file(state, tmp_path / "a" / "model.safetensors")
    tied = load_denoiser(str(tmp_path / "a"))
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight
    tied.save(tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == state.keys()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_denoiser(str(tmp_path / "b")).logits(ids), tied.logits(ids))


def test_an_mlp_width_of_null_is_the_ratio_times_the_width() -> None:
    config = stock_config(LLADA, {**LLADA_8B, "mlp_hidden_size": None}, None)
    assert config.intermediate_size == 4 * 4096


@pytest.mark.parametrize("mask_token_id", [258, 379])
def test_a_mask_id_given_by_hand_is_saved(tmp_path: Path, mask_token_id: int) -> None:
    denoiser = load(mask_token_id=mask_token_id)
    assert denoiser.family.mask_token_id == mask_token_id
    denoiser.save(tmp_path)
    assert load(tmp_path).family.mask_token_id == mask_token_id
