"""A tiny chat model with a real byte-level tokenizer whose pad token is its end token, as SmolLM2's is."""

from __future__ import annotations

from pathlib import Path

import torch

import models

TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a friendly little helper<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "How do I bake bread?",
    "Mix flour, water and salt. Wait, then bake.",
    "I'm sorry, but I can't help with that.",
]


def tokenizer():
    """Byte-level BPE of 320 tokens, trained here."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


def build(out: Path, *, seed: int = 0, loud: float = 4.0, tied: bool = True) -> Path:
    """Save a random two-layer Llama and the tokenizer. ``loud`` scales the matrices, so that answers differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    models.silence()
    chat = tokenizer()
    config = AutoConfig.for_model(
        "llama", vocab_size=len(chat), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(loud)
    model.save_pretrained(out)
    chat.save_pretrained(out)
    return out


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )
