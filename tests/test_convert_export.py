"""From an autoregressive checkpoint to a denoiser, and from a run to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from unmask.policies.convert import convert
from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import CheckpointError
from unmask.policies.loading import load_denoiser
from unmask.policies.templates import TEMPLATES
from unmask.policies.tokenizers import byte_symbols, byte_tokenizer, prompt_ids
from unmask.recipes.registry import SLOTS
from unmask.rl import export as exporting
from unmask.rl import run
from unmask.rl.cli import app
from unmask.rl.export import export
from unmask.rl.runfolder import RunError
from unmask.rl.sft import SftBatches, Source

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(params=["llama", "qwen3"])
def autoregressive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model without a mask token whose embedding has exactly its tokens, tied as small models' are."""
    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None
    common: dict[str, Any] = {**SIZES, "vocab_size": 261, "num_key_value_heads": 1, "tie_word_embeddings": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**common))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=16))
    model.save_pretrained(tmp_path / "ar")
    tokenizer.save_pretrained(tmp_path / "ar")
    return tmp_path / "ar"


@torch.no_grad()
def test_a_converted_model_is_the_old_one_that_looks_both_ways(autoregressive: Path, tmp_path: Path) -> None:
    denoiser = convert(str(autoregressive), tmp_path / "full")
    old = type(denoiser.model).from_pretrained(autoregressive)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    bidirectional = old(ids, is_causal=False).logits
    assert torch.allclose(denoiser.logits(ids)[..., :261], bidirectional, atol=1e-5)
    assert not torch.allclose(denoiser.logits(ids)[..., :261], old(ids).logits, atol=1e-2)
    assert denoiser.family.mask_token_id == denoiser.tokenizer.mask_token_id
    weights = denoiser.model.get_input_embeddings().weight
    assert weights.shape[0] >= denoiser.family.mask_token_id + 1
    # Blocks of one token are the autoregressive model; with the shift kept, its very predictions.
    blocks = convert(str(autoregressive), tmp_path / "b", attention="block_causal", block_length=1, logit_shift=1)
    assert torch.allclose(blocks.logits(ids)[:, 1:, :261], old(ids).logits[:, :-1], atol=1e-5)
    assert load_denoiser(str(tmp_path / "b")).family == blocks.family


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: Any) -> None:
    """Write a Llama with the byte vocabulary as llama.cpp's tools do, queries and keys in its order."""
    gguf, config = pytest.importorskip("gguf"), model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|other|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*byte_symbols(), "th", *control])
    writer.add_token_types([1] * 257 + [3] * len(control))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(259)
    writer.add_chat_template(TEMPLATES["chatml"].jinja)
    for name, value in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, columns = value.shape
            value = value.view(rows // 16, 2, 8, columns).transpose(1, 2).reshape(rows, columns)
        name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        for theirs, own in GGUF_NAMES.items():
            name = name.replace("model.layers.", "blk.").replace(theirs, own)
        if name != "lm_head.weight":
            writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("autoregressive", ["llama"], indirect=True)
@torch.no_grad()
def test_a_gguf_file_is_converted_as_its_folder_is(autoregressive: Path, tmp_path: Path) -> None:
    old = LlamaForCausalLM.from_pretrained(autoregressive)
    write_gguf(tmp_path / "small.gguf", old)
    denoiser = convert(str(tmp_path / "small.gguf"), tmp_path / "d")
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = convert(str(autoregressive), tmp_path / "e").logits(ids)[..., :261]
    assert torch.allclose(denoiser.logits(ids)[..., :261], wanted, atol=1e-5)
    family, text = denoiser.family, "plain text, naïve"
    assert (family.mask_token_id, family.eos_token_ids, family.turn_end_id) == (261, (259,), 259)
    assert denoiser.tokenizer(text)["input_ids"] == list(text.encode())
    assert denoiser.tokenizer("oath")["input_ids"] == [*b"oa", 256]
    assert prompt_ids(denoiser.tokenizer, "hi")[:1] == [258], "the turn's marker is one token"


@torch.no_grad()
def loss_on_fixed_batches(denoiser: Denoiser) -> float:
    """Return the nats a token on batches that training does not see."""
    source = Source(
        "arithmetic", SLOTS["task"].build({"name": "arithmetic", "operations": [1, 2]})("heldout", seed=0), 1, 32
    )
    data = SftBatches([source], denoiser.tokenizer, denoiser.family, batch=16, steps=4, seed=7)
    total = 0.0
    for index in range(len(data)):
        item = data[index]
        logits_KV = denoiser.train_logits(
            item["input_ids"], item["clean_ids"], padding_mask_BT=item["padding_mask"], positions_BT=item["scored"]
        )
        nll_K = -logits_KV.log_softmax(-1).gather(-1, item["target"][:, None])[:, 0]
        total += (nll_K * item["weight"]).sum().item() / len(data)
    return total


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_a_converted_model_is_trained(autoregressive: Path, tmp_path: Path, attention: str) -> None:
    options = {"attention": attention, "block_length": 4 if attention == "block_causal" else None}
    before = loss_on_fixed_batches(convert(str(autoregressive), tmp_path / "d", **options))
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"kind: sft\nname: conv\nmodel: {{path: '{tmp_path / 'd'}'}}\n"
        "tasks: [{task: {name: arithmetic, operations: [1, 2]}, canvas: 32}]\n"
        "sft: {batch: 8, mask: late, half_life: 0.3}\noptim: {lr: 3.0e-3, steps: 30}\n"
        f"evaluation: {{problems: 4}}\nrun: {{directory: '{tmp_path}', save_every: 0}}\n"
    )
    result = CliRunner().invoke(app, ["sft", str(recipe)], catch_exceptions=False)
    assert result.exit_code == 0
    trained = load_denoiser(str(tmp_path / "conv" / "model"))
    assert trained.family.attention == attention
    after = loss_on_fixed_batches(trained)
    assert before > 5.4, "log 262 = 5.57 where nothing has been learned"
    assert after < 0.6 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "causal"}, "attention 'causal' is neither full nor block_causal"),
        ({"attention": "block_causal"}, "--block-length goes with --attention block_causal"),
        ({"block_length": 4}, "--block-length goes with --attention block_causal"),
        ({"attention": "block_causal", "block_length": 0}, "block length 0 must be at least 1"),
        ({"logit_shift": 2}, "logit shift 2 is neither 0"),
    ],
)
def test_contradictory_conversions(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert("nowhere", tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="holds no safetensors; pickle weights are not read"):
        convert(str(tmp_path / "gpt"), tmp_path / "d")
    (tmp_path / "gpt" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model_type 'gpt2' is not among llama, qwen2, qwen3"):
        convert(str(tmp_path / "gpt"), tmp_path / "d")
    with pytest.raises(CheckpointError, match="there is no file"):
        convert(str(tmp_path / "model.gguf"), tmp_path / "d")
    for path in ("nowhere", "./nowhere", "/nowhere/at/all"):  # none can be a hub id, so that the hub is not asked
        with pytest.raises(CheckpointError, match=f"convert: there is no folder '{path}'"):
            convert(path, tmp_path / "d")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(str(tmp_path / "gpt"), tmp_path / "gpt")


def test_an_autoregressive_folder_is_not_taken_for_a_denoiser(autoregressive: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an autoregressive model; `unmask convert` makes a denoiser of it"):
        load_denoiser(str(autoregressive))


@pytest.mark.parametrize("layout", ["vendor", "stock"])
def test_an_adapter_is_merged_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.chdir(tmp_path)
    shortrun.save_model(tmp_path / "model")
    run.train(shortrun.recipe(tmp_path / "model", "name=r", "model.lora.rank=2", "optim.steps=2", "optim.lr=0.05"))

    def damaged(path: str, **options: Any) -> Any:
        again = load_denoiser(path, **options)
        with torch.no_grad():
            again.model.model.norm.weight.mul_(1.5)
        return again

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "load_denoiser", damaged)
        with pytest.raises(RunError, match="gives other logits when read again"):
            export("runs/r", tmp_path / "out", layout=layout)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "runs", "short.yaml"}, "nothing is left"
    report = export("runs/r", tmp_path / "out", layout=layout)
    assert report["merged_minus_adapter"] <= 1e-5 * report["scale"] < report["adapter_minus_base"]
    assert report["written_minus_merged"] == 0.0
    assert load_denoiser(str(tmp_path / "out")).family.name == ("llada" if layout == "vendor" else "stock")
    with pytest.raises(RunError, match="is not empty; name a new folder"):
        export("runs/r", tmp_path / "out")
