"""Prefixes: learned rows before a text, in layers of a model whose weights stay frozen.

A text is read behind ``length`` virtual positions. ``prompts`` are what enters a layer there (deep prompts, P-tuning v2,
arXiv 2110.07602); ``key_values`` are what its key and value projections say there, before rotation (prefix tuning, arXiv
2101.00190). Both are put in place by hooks within the layer, so gradient checkpointing, any attention function, caches and
``generate`` work as without them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InputError
from ...files import atomic_folder, write_json
from ..pretrained import CACHE
from ..student import decoder_layers

Kind = Literal["prompts", "key_values"]
LayerMap = Literal["kept", "copy", "interpolate"]
_VERSION = 1
_PLACEHOLDER = 0  # id of the virtual positions; its embedding is replaced or never read


@dataclass(frozen=True)
class PrefixSettings:
    """What a prefix is.

    Args:
        kind: ``prompts`` are learnt as what enters the layers, ``key_values`` as keys and values of their heads.
        length: Virtual positions before the text.
        layers: Layers that have rows; None for all. Below the first of them, the virtual positions hold the embedding of one
            fixed token.

    Raises:
        InputError: If a value is out of range.
    """

    kind: Kind = "prompts"
    length: int = 16
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"prefix.kind={self.kind!r} is unknown. Legal: {', '.join(get_args(Kind))}.")
        if self.length < 1:
            raise InputError(f"prefix.length={self.length} leaves nothing to learn. Legal: 1 or more.")
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise InputError(
                f"prefix.layers={list(self.layers)}: legal are rising indices of layers, each once, or null for all."
            )


@dataclass(frozen=True)
class StandsFor:
    """What an emulator's layers are in the model that it stands for.

    Args:
        model: Fingerprint of that model.
        layers: Of that model.
        layer_map: For each of the emulator's layers the layer of that model, rising.
    """

    model: str
    layers: int
    layer_map: tuple[int, ...]


class Prefix(nn.Module):
    """The rows of a prefix, by layer.

    Args:
        settings: What it is; layers as they are counted in the model that it is plugged into.
        rows: For each of its layers, in order: prompts [length, hidden size], or key and value rows
            [2, length, key/value heads * head size]; float32.

    Raises:
        InputError: If rows and settings do not fit.
    """

    def __init__(self, settings: PrefixSettings, rows: Sequence[Tensor]) -> None:
        super().__init__()
        if settings.layers is None or len(settings.layers) != len(rows):
            raise InputError(f"prefix.layers={settings.layers} names other layers than the {len(rows)} that have rows.")
        shapes = {tuple(one.shape) for one in rows}
        wanted = (settings.length,) if settings.kind == "prompts" else (2, settings.length)
        if len(shapes) != 1 or next(iter(shapes))[:-1] != wanted:
            raise InputError(f"rows of the shapes {sorted(shapes)} are no {settings.kind} of length {settings.length}.")
        self.settings = settings
        self.rows = nn.ParameterList(one.detach().float().clone() for one in rows)

    @classmethod
    def random(cls, model: PreTrainedModel, settings: PrefixSettings, *, seed: int = 0) -> "Prefix":
        """Return a prefix that starts at a random text.

        Args:
            model: That it is for.
            settings: What it is.
            seed: Of the text's tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        vocabulary = int(model.config.get_text_config().vocab_size)
        ids = torch.randint(0, vocabulary, (settings.length,), generator=generator, device="cpu")
        return cls.of_text(model, settings, ids)

    @classmethod
    @torch.no_grad()
    def of_text(cls, model: PreTrainedModel, settings: PrefixSettings, ids: Tensor) -> "Prefix":
        """Return the prefix that says what a text says at its place: with it, the model goes on as behind the text.

        Args:
            model: That it is for.
            settings: What it is.
            ids: Of the text [at least length]; the first ``length`` are taken.

        Raises:
            InputError: If the text is shorter, or the model has no such layers.
        """
        if len(ids) < settings.length:
            raise InputError(
                f"A prefix of length {settings.length} cannot start at a text of {len(ids)} tokens. Give a longer text, or a "
                "smaller prefix.length."
            )
        layers = decoder_layers(model)
        chosen = tuple(range(len(layers))) if settings.layers is None else settings.layers
        _check_layers(chosen, len(layers))
        found: list[list[Tensor]] = [[] for _ in chosen]

        def keep(place: int, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | None = None) -> None:
            given = (args[0] if args else kwargs["hidden_states"]) if output is None else output
            found[place].append(given[0].float())

        handles = []
        for place, layer in enumerate(chosen):
            if settings.kind == "prompts":
                handles.append(layers[layer].register_forward_pre_hook(partial(keep, place), with_kwargs=True))
            else:
                for projection in _projections(layers[layer]):
                    handles.append(projection.register_forward_hook(partial(keep, place), with_kwargs=True))
        try:
            model.base_model(input_ids=ids[None, : settings.length].to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        rows = [own[0] if settings.kind == "prompts" else torch.stack(own) for own in found]
        return cls(PrefixSettings(settings.kind, settings.length, chosen), rows)

    def of(self, layer: int) -> Tensor | None:
        """Return the rows of a layer, None where it has none."""
        assert self.settings.layers is not None
        return self.rows[self.settings.layers.index(layer)] if layer in self.settings.layers else None

    def within(self, start: int, stop: int) -> "Prefix":
        """Return the rows of some neighbouring layers, counted from ``start``; they stay the same parameters.

        Args:
            start: The first of the layers.
            stop: The one behind the last.
        """
        own = [(layer, place) for place, layer in enumerate(self.settings.layers or ()) if start <= layer < stop]
        found = Prefix.__new__(Prefix)
        nn.Module.__init__(found)
        found.settings = replace(self.settings, layers=tuple(layer - start for layer, _ in own) or None)
        found.rows = nn.ParameterList(self.rows[place] for _, place in own)
        return found

    def save(self, folder: Path, model: str, stands_for: StandsFor | None = None) -> None:
        """Write the rows and a manifest; what stood there is replaced when the new one is complete.

        Args:
            folder: To write to.
            model: Fingerprint of the model that it is for.
            stands_for: Of an emulator's prefix: what the emulator stands for, so that the prefix can be carried over.
        """
        data = save({str(number): one.detach().cpu().contiguous() for number, one in enumerate(self.rows)})
        manifest = {
            "format": "fulgurite-prefix",
            "version": _VERSION,
            "settings": asdict(self.settings),
            "model": model,
            "stands_for": None if stands_for is None else asdict(stands_for),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        with atomic_folder(Path(folder)) as new:
            (new / "prefix.safetensors").write_bytes(data)
            write_json(new / "prefix.json", manifest)

    @classmethod
    def load(cls, folder: Path, model: str, how: LayerMap = "kept") -> "Prefix":
        """Read a prefix; one of an emulator is carried over to the model that the emulator stands for.

        Args:
            folder: Where it was written.
            model: Fingerprint of the model that it shall be plugged into.
            how: See ``carried_over``.

        Raises:
            InputError: If it is missing, damaged, or of another model.
        """
        found, whose, whole = cls.read(folder)
        if whose == model:
            return found
        if whole and whole.model == model:
            return carried_over(found, whole, how)
        of = f"{whose}, an emulator of {whole.model}" if whole else whose
        raise InputError(
            f"prefix={str(folder)!r} is of another model ({of}) than the one at hand ({model}). Load the model that it was made "
            "for; behind an owner's layers, generate takes it with --split."
        )

    @classmethod
    def read(cls, folder: Path) -> "tuple[Prefix, str, StandsFor | None]":
        """Read a prefix of whatever model.

        Args:
            folder: Where it was written.

        Returns:
            The prefix, the fingerprint of the model that it is for, and what that stands for if it is an emulator.

        Raises:
            InputError: If it is missing or damaged.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "prefix.json").read_text("utf-8"))
            data = (folder / "prefix.safetensors").read_bytes()
            if manifest["format"] != "fulgurite-prefix" or manifest["version"] != _VERSION:
                raise InputError(
                    f"prefix={str(folder)!r} is of version {manifest['version']!r}; this fulgurite reads {_VERSION}."
                )
            if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
                raise ValueError("the rows are not those of the manifest")
            tensors = load(data)
            settings = manifest["settings"]
            found = cls(
                PrefixSettings(settings["kind"], settings["length"], tuple(settings["layers"])),
                [tensors[str(number)] for number in range(len(tensors))],
            )
            whose, told = manifest["model"], manifest["stands_for"]
            whole = None if told is None else StandsFor(told["model"], told["layers"], tuple(told["layer_map"]))
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"prefix={str(folder)!r} is no prefix: it has no {Path(error.filename).name}.") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"prefix={str(folder)!r} is damaged: {error}.") from error
        return found, whose, whole


def carried_over(prefix: Prefix, whole: StandsFor, how: LayerMap = "kept") -> Prefix:
    """Return an emulator's prefix as one of the model that the emulator stands for.

    Args:
        prefix: Of the emulator.
        whole: What the emulator's layers are in that model.
        how: ``kept`` gives rows to the layers that the emulator has, ``copy`` to each other one those of the nearest before it,
            ``interpolate`` the mean of its neighbours by distance.

    Raises:
        InputError: If the map is none, or the prefix has layers that it does not name.
    """
    own, layers, layer_map = prefix.settings.layers or (), whole.layers, list(whole.layer_map)
    if how not in get_args(LayerMap):
        raise InputError(f"layer_map={how!r} is unknown. Legal: {', '.join(get_args(LayerMap))}.")
    if sorted(set(layer_map)) != layer_map or not all(0 <= layer < layers for layer in layer_map):
        raise InputError(f"stands_for: {layer_map} are no rising indices from 0 to {layers - 1}, each once.")
    if own and own[-1] >= len(layer_map):
        raise InputError(f"The prefix has rows for layer {own[-1]}, but the emulator has {len(layer_map)} layers.")
    known = {layer_map[layer]: prefix.rows[place].detach() for place, layer in enumerate(own)}
    if how != "kept":
        places = sorted(known)
        for layer in range(places[0], layers):
            if layer in known:
                continue
            before = max(place for place in places if place < layer)
            behind = min((place for place in places if place > layer), default=before)
            share = 0.0 if how == "copy" or behind == before else (layer - before) / (behind - before)
            known[layer] = torch.lerp(known[before], known[behind], share)
    chosen = tuple(sorted(known))
    return Prefix(PrefixSettings(prefix.settings.kind, prefix.settings.length, chosen), [known[layer] for layer in chosen])


@contextmanager
def plugged_in(model: PreTrainedModel, prefix: Prefix) -> Iterator[None]:
    """Let a model read texts behind a prefix: within the block, give it ``behind_prefix`` of every batch.

    Args:
        model: The model; its weights are not touched.
        prefix: Its rows may be trained meanwhile.

    Raises:
        InputError: If the prefix does not fit the model.
    """
    layers = decoder_layers(model)
    chosen = prefix.settings.layers or ()
    _check_layers(chosen, len(layers))
    handles = []
    try:
        for layer, rows in zip(chosen, prefix.rows):
            if prefix.settings.kind == "prompts":
                _check_width(rows, int(model.config.get_text_config().hidden_size))
                handles.append(layers[layer].register_forward_pre_hook(partial(_enter, layer, rows), with_kwargs=True))
                continue
            begins = [False]  # whether the layer is reading the begin of a text
            handles.append(layers[layer].register_forward_pre_hook(partial(_notice, layer, begins), with_kwargs=True))
            for part, projection in enumerate(_projections(layers[layer])):
                _check_width(rows, projection.out_features)
                handles.append(projection.register_forward_hook(partial(_say, begins, rows, part)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def behind_prefix(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return a batch with virtual positions before every text, for a model with a prefix.

    Args:
        batch: ``input_ids`` [batch, tokens]; ``attention_mask``, ``position_ids`` and ``labels`` of that shape, if there.
        length: Of the prefix.
    """
    ids = batch["input_ids"]
    found = dict(batch)

    def before(name: str, values: Tensor) -> None:
        found[name] = torch.cat([values.expand(len(ids), length).to(batch[name]), batch[name]], dim=1)

    before("input_ids", torch.full((1, 1), _PLACEHOLDER))
    for name, value in (("attention_mask", 1), ("labels", -100)):
        if name in batch:
            before(name, torch.full((1, 1), value))
    if "position_ids" in batch:
        found["position_ids"] = batch["position_ids"] + length
        before_text = torch.arange(length, device=ids.device).expand(len(ids), -1)
        found["position_ids"] = torch.cat([before_text, found["position_ids"]], dim=1)
    return found


def _check_layers(chosen: Sequence[int], layers: int) -> None:
    if chosen and not 0 <= chosen[0] <= chosen[-1] < layers:
        raise InputError(f"prefix.layers={list(chosen)}: the model has {layers}. Legal: 0 to {layers - 1}.")


def _check_width(rows: Tensor, width: int) -> None:
    if rows.shape[-1] != width:
        raise InputError(f"The prefix has rows of {rows.shape[-1]} numbers, the model takes {width}: it is of another model.")


def _projections(layer: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Return what writes a layer's keys and its values."""
    try:
        return layer.get_submodule("self_attn.k_proj"), layer.get_submodule("self_attn.v_proj")  # type: ignore[return-value]
    except AttributeError as error:
        raise InputError(
            f"prefix.kind='key_values': {type(layer).__name__} has no self_attn.k_proj and v_proj. Legal for it: prompts."
        ) from error


def _begins(layer: int, kwargs: dict[str, Any]) -> bool:
    """Return whether a layer reads the first tokens of a text, not ones behind a cache."""
    cache = kwargs.get(CACHE)
    return cache is None or cache.get_seq_length(layer) == 0


def _behind_rows(rows: Tensor, states: Tensor) -> Tensor:
    """Return states [batch, positions, ...] with rows at the first positions."""
    return torch.cat([rows.to(states).expand(len(states), -1, -1), states[:, len(rows) :]], dim=1)


def _enter(layer: int, rows: Tensor, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    if not _begins(layer, kwargs):
        return None
    if args:
        return (_behind_rows(rows, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _behind_rows(rows, kwargs["hidden_states"])}


def _notice(layer: int, begins: list[bool], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    begins[0] = _begins(layer, kwargs)


def _say(begins: list[bool], rows: Tensor, part: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    return _behind_rows(rows[part], output) if begins[0] else None
