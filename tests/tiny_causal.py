"""Random causal language models of a few thousand weights, with heads and tokenizers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import SPECIAL, WORDS, save_model

VOCABULARY = len(SPECIAL + WORDS)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def llama_config(**more: Any) -> transformers.PreTrainedConfig:
    """Of weights so large that what becomes of them is seen in the logits."""
    return transformers.LlamaConfig(**SIZES, initializer_range=0.3, **more)


def save_causal(folder: Path, config: transformers.PreTrainedConfig, special: bool = False) -> Path:
    """Save a random model with its head, and a tokenizer of whole words."""
    save_model(folder, config, special)
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
