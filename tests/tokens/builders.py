"""A small vocabulary, tokenizer and checkpoint, as the demo has them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from momaserve.models.config import ImageConfig, ModelConfig
from momaserve.models.image_tokenizer import ImageAutoencoder, ImageTokenizerConfig
from momaserve.tokens.grammar import GrammarSpec
from momaserve.tokens.text import TextTokenizer

SPECIALS = ["<|bos|>", "<|pad|>", "<|eos|>", "<|begin_image|>", "<|end_image|>", "<|sep|>"]
BOS, PAD, EOS, BEGIN, END, SEP = range(6)
TEXT_SIZE = 400
NUM_CODES = 16
NUM_TOKENS = 4
FIRST = TEXT_SIZE
VOCAB_SIZE = FIRST + NUM_CODES
SENTENCES = [
    "A cat sat on the mat, and the dog sat on the cat.",
    "Wie schön! Ein Käse für 3 € auf dem Tisch.",
    "Emoji: 😀😀😀 🎉🎉 👩‍👩‍👧 and 漢字漢字漢字かな.",
] * 4

TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- message.content }}{{ eos_token }}
    {%- elif message.role == 'user' %}
        {{- message.content }}<|sep|>
    {%- else %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
{%- endfor %}
"""

SPEC = GrammarSpec(
    vocab_size=VOCAB_SIZE,
    bos=BOS,
    pad=PAD,
    eos=EOS,
    image_first=FIRST,
    image_num_codes=NUM_CODES,
    tokens_per_image=NUM_TOKENS,
    begin_image=BEGIN,
    end_image=END,
)
TEXT_SPEC = GrammarSpec(vocab_size=TEXT_SIZE, bos=BOS, pad=PAD, eos=EOS)
IMAGE_CONFIG = ImageConfig(
    first_token_id=FIRST,
    num_codes=NUM_CODES,
    tokens_per_image=NUM_TOKENS,
    grid=(2, 2),
    begin_token_id=BEGIN,
    end_token_id=END,
)


@cache
def tokenizer_definition() -> str:
    """JSON of a byte-level BPE tokenizer trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() <= TEXT_SIZE
    definition: str = tokenizer.to_str()
    return definition


def definition() -> dict[str, Any]:
    """A fresh copy of the tokenizer's definition."""
    parsed: dict[str, Any] = json.loads(tokenizer_definition())
    return parsed


@cache
def tokenizer() -> TextTokenizer:
    return TextTokenizer(definition(), control_ids={BOS, PAD, EOS, BEGIN, END})


def codec_model() -> ImageAutoencoder:
    """An untrained autoencoder: 8 x 8 pixels, 2 x 2 codes out of 16."""
    torch.manual_seed(0)
    config = ImageTokenizerConfig(
        image_size=8,
        levels=(4, 4),
        encoder_channels=(4, 8),
        decoder_channels=(4, 8),
        blocks_per_stage=1,
    )
    return ImageAutoencoder(config)


def model_config(**changes: object) -> ModelConfig:
    data: dict[str, Any] = {
        "model_type": "moma",
        "format_version": 1,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "norm_order": "post",
        "rms_norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "image": {
            "first_token_id": FIRST,
            "num_codes": NUM_CODES,
            "tokens_per_image": NUM_TOKENS,
            "grid": [2, 2],
            "begin_token_id": BEGIN,
            "end_token_id": END,
        },
        "expert_groups": [
            {
                "name": "all",
                "modalities": ["text", "image"],
                "num_experts": 1,
                "intermediate_size": 8,
            }
        ],
        "depth_routing": None,
    }
    return ModelConfig.from_dict(data | changes)


def write_codec(directory: Path) -> None:
    model = codec_model()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file(dict(model.state_dict()), directory / "model.safetensors")


def write_checkpoint(directory: Path) -> None:
    """The files that `Processor.load` reads."""
    (directory / "tokenizer.json").write_text(tokenizer_definition())
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    write_codec(directory / "image_tokenizer")
