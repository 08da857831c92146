"""A report on the files of a model, from their headers alone. Imports no PyTorch."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama.model_files import ModelFileError, chat_template, embedding_fits, find_tokenizer
from llama.prompt_format.recognition import PromptFormatError, recognised
from model_service.loading.host_memory import WORKING_MEMORY, readable_size
from model_service.model.config import ModelConfig
from model_service.offline.inspection.memory_needs import Device, Need, devices, needs
from model_service.offline.inspection.vocabulary_size import vocabulary_size
from model_service.offline.stored_model import StoredModel, read_stored_model

DEFAULT_CONTEXT = 512  # of --max_seq_len


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """The tokenizer of a model.

    Attributes:
        path: its file.
        form: the name of its format.
        tokens: how many it has.
        prompt_format: the name of the format that its chat template asks for.
    """

    path: Path
    form: str
    tokens: int
    prompt_format: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model as far as it is known without reading its weights.

    Attributes:
        model: its files and shape.
        tokenizer: None if it has none of its own.
        problems: sentences that say what does not fit, and the remedy.
        memory: what it needs on each device of this machine.
    """

    model: StoredModel
    tokenizer: TokenizerReport | None
    problems: tuple[str, ...]
    memory: tuple[tuple[Device, tuple[Need, ...]], ...]


def inspect(path: Path, tokenizer_path: Path | None = None) -> Inspection:
    """Inspects the model at `path`, with the tokenizer at `tokenizer_path` or beside the model.

    Raises:
        CheckpointError: the model cannot be served; the message names the file and the fix.
    """
    model = read_stored_model(path)
    tokenizer, problems = _tokenizer(model, tokenizer_path)
    memory = tuple(
        (device, tuple(needs(model.config, device, DEFAULT_CONTEXT))) for device in devices()
    )
    return Inspection(model, tokenizer, problems, memory)


def _tokenizer(
    model: StoredModel, given: Path | None
) -> tuple[TokenizerReport | None, tuple[str, ...]]:
    """The tokenizer, and what is wrong with it."""
    path = given or model.path
    try:
        found = find_tokenizer(path)
        tokens = vocabulary_size(path)
        template = chat_template(path)
    except ModelFileError as error:
        return None, (str(error),)
    problems: list[str] = []
    prompt_format = ""
    try:
        prompt_format = recognised(template).name
    except PromptFormatError as error:
        problems.append(f"{found.path}: {error}")
    size = model.config.vocab_size
    if not embedding_fits(size, tokens):
        problems.append(
            f"{found.path}: has {tokens:,} tokens, and the model's embedding has {size:,} rows. To "
            "fix: name the tokenizer that came with this model (--tokenizer_path)."
        )
    report = TokenizerReport(found.path, found.form.value, tokens, prompt_format)
    return report, tuple(problems)


def as_document(found: Inspection) -> dict[str, Any]:
    """The report for programs: plain values, sizes in bytes."""
    config = found.model.config
    return {
        "path": str(found.model.path),
        "format": found.model.form,
        "parameters": config.parameters,
        "config": asdict(config) | {"n_kv_heads": config.kv_heads},
        "files": [{"path": str(file.path), "bytes": file.size} for file in found.model.files],
        "types": {
            name: {"tensors": count, "bytes": size}
            for name, (count, size) in _types(found.model).items()
        },
        "trained_context_length": config.trained_context_length,
        "tokenizer": _tokenizer_document(found.tokenizer),
        "shards": config.shard_counts(),
        "working_memory": WORKING_MEMORY,
        "memory": [
            asdict(device) | {"needs": [asdict(need) for need in needed]}
            for device, needed in found.memory
        ],
        "problems": list(found.problems),
    }


def _tokenizer_document(report: TokenizerReport | None) -> dict[str, Any] | None:
    return None if report is None else asdict(report) | {"path": str(report.path)}


def as_text(found: Inspection) -> str:
    """The report for people."""
    model, config = found.model, found.model.config
    rows = {
        "format": f"{model.form}, {_files(model)}",
        "parameters": f"{config.parameters:,}",
        "shape": _shape(config),
        "types": "; ".join(
            f"{name} ({count} tensors, {readable_size(size)})"
            for name, (count, size) in _types(model).items()
        ),
        "context": f"trained on {config.trained_context_length:,} tokens"
        if config.trained_context_length
        else "the files do not say how many tokens it was trained on",
        "tokenizer": _tokenizer_line(found.tokenizer),
        "shards": ", ".join(map(str, config.shard_counts())),
    }
    lines = [f"{model.path}", *(f"  {name:11} {text}" for name, text in rows.items())]
    for device, needed in found.memory:
        lines.append(f"  memory      {readable_size(device.free)} free on {device.name}")
        lines += [f"    {need.precision:9} {_need(need)}" for need in needed]
    lines += [f"wrong: {problem}" for problem in found.problems]
    return "\n".join(lines)


def _files(model: StoredModel) -> str:
    count = len(model.files)
    return f"{count} file{'s' * (count > 1)}, {readable_size(model.size)}"


def _shape(config: ModelConfig) -> str:
    rope = f", rope_theta {config.rope_theta:g}" + (
        f" scaled by {config.rope_scaling.kind} {config.rope_scaling.factor:g}"
        if config.rope_scaling
        else ""
    )
    return (
        f"{config.n_layers} layers, dim {config.dim}, hidden_dim {config.hidden_dim}, "
        f"{config.n_heads} heads of {config.head_dim} ({config.kv_heads} of keys and values), "
        f"vocabulary {config.vocab_size:,}{rope}"
    )


def _types(model: StoredModel) -> dict[str, tuple[int, int]]:
    """The number of tensors of each type, and their bytes, the largest share first."""
    found: dict[str, list[int]] = defaultdict(list)
    for file in model.files:
        for tensor in file.tensors:
            found[tensor.dtype].append(tensor.size)
    totals = {name: (len(sizes), sum(sizes)) for name, sizes in found.items()}
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def _tokenizer_line(report: TokenizerReport | None) -> str:
    if report is None:
        return "none beside the weights: name it with --tokenizer_path"
    return (
        f"{report.path.name} ({report.form}, {report.tokens:,} tokens), "
        f"prompt format {report.prompt_format or 'unknown'}"
    )


def _need(need: Need) -> str:
    total = need.weights + need.cache + WORKING_MEMORY
    verdict = "fits" if need.fits else "does not fit"
    return (
        f"{verdict}: {readable_size(total)} = weights {readable_size(need.weights)}, "
        f"{need.context} tokens in the cache {readable_size(need.cache)}, steps "
        f"{readable_size(WORKING_MEMORY)}"
    )
