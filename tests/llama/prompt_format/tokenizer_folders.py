"""Small tokenizers as Hugging Face folders hold them, with the control tokens of all formats."""

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

DEMO_MODEL = Path(__file__).parents[3] / "demo" / "checkpoint" / "tokenizer.model"
CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
)
TEXTS = ("What do llamas eat?", "system user assistant", "Grass.\n\n", "Today Date: 26 Jul 2024")


def byte_level_folder(folder: Path, chat_template: str = "") -> Path:
    """Byte-level BPE, as in Llama 3 and SmolLM2, which puts no BOS in front of a text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(each, special=True) for each in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return _save(folder, tokenizer, config, chat_template)


def llama_folder(
    folder: Path,
    chat_template: str = "",
    *,
    marks: tuple[str, ...] = (),
    legacy: bool = True,
    model_file: Path = DEMO_MODEL,
) -> Path:
    """Llama 2's kind of tokenizer.json, from a SentencePiece model.

    `marks` are further control tokens, such as those of Mistral 0.3. Legacy is a space in front of
    each text between control tokens, and not only of one at the beginning.
    """
    model = SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.IdToPiece(token_id) for token_id in range(model.vocab_size())]
    scores = {piece: model.GetScore(token_id) for token_id, piece in enumerate(pieces)}
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = [
        ((left, right), scores[left + right])
        for piece in pieces
        for left, right in ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if left in vocabulary and right in vocabulary
    ]
    merges.sort(key=lambda merge: -merge[1])
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            [pair for pair, _ in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *marks])
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _save(folder, tokenizer, config, chat_template)


def _save(folder: Path, tokenizer: Tokenizer, config: dict[str, str], chat_template: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if chat_template:
        config = {**config, "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
