"""Write a stock Llama folder as a GGUF file, with PyPI's `gguf` alone: an example to copy.

    python tests/tools/write_gguf.py LLAMA_FOLDER model.gguf

Weights stay as they are, in float32. llama.cpp turns query and key by pairs of neighbouring rows
where transformers turns halves, hence the reordering. The tokenizer must be byte-level BPE.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.vocab import BpeVocab
from transformers import AutoTokenizer, LlamaForCausalLM

ARCH = gguf.MODEL_ARCH.LLAMA


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * head_dim, hidden): the two halves of each head one by one."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, file: Path) -> None:
    """Convert a LlamaForCausalLM folder without biases or RoPE scaling."""
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(ARCH, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.float().state_dict().items():
        if name not in tied:
            weight, part = tensor.numpy(), name.split(".")[-2]
            weight = interleaved(weight, heads[part]) if part in heads else weight
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    texts, _, kinds = zip(*BpeVocab(folder).all_tokens(), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # how ByteLevel cuts text by default
    writer.add_token_list(texts)
    control, special = gguf.TokenType.CONTROL, set(tokenizer.all_special_tokens)
    writer.add_token_types([control if t in special else kinds[i] for i, t in enumerate(texts)])
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
