"""What a model with spans still finds in a long text, how close it stays to the dense one, and what it costs to run."""

import itertools
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ...datamodules import SelfGeneratedCalibration
from ...datamodules.documents import read_documents
from ...datamodules.self_generated.prompts import PromptForm, retrieval
from ...datamodules.self_generated.texts import Filler, pieces
from ...errors import InputError
from ...modules.precision import Dtype, compute_device
from ...modules.pretrained import CACHE, head_weight, load_model, load_tokenizer
from ...modules.span_attention.rules import SpanPlan, SpanRule, full_layers
from ...modules.spans import Budget, CandidateRules, Influence, SpanCache, SpanProfiler, apply_plan, plan_of, remove_plan
from ...modules.spans.ablation import ablate, compare_with_ablation
from ...modules.spans.fidelity import Fidelity, answer_states, fidelity
from ...modules.spans.influence import FORMS, influences
from ...modules.spans.measurements import Answered, answered
from ...modules.spans.solver import pareto_plans

_SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_KEYS = 4  # of the prompts with several


def passkeys(
    *,
    seed: int,
    model: str,
    documents: str,
    counts: dict[str, dict[str, int]],
    window: float = 0.0,
    weights: Dtype = "bfloat16",
) -> dict[str, Any]:
    """Ask for keys hidden in texts: in real documents, in one paragraph said again and again, and among other keys.

    A key is right where greedy decoding would write all of its digits.

    Args:
        seed: Of the prompts.
        model: Source of the model; one with a plan of spans sees them.
        documents: Source of the real documents.
        counts: Prompts by kind (``documents``, ``far``: documents too, ``sentences``, ``keys``) and length in tokens; their
            depths are spread evenly.
        window: Instead of the model's spans, give all heads one window of this share of each length (StreamingLLM); 0 does not.
        weights: Type of the weights in memory.

    Returns:
        ``metrics``: share of right keys by kind and length, and for each kind the mean over the lengths; ``curves``: by depth.
    """
    tokenizer, loaded = load_tokenizer(model), _loaded(model, weights)
    form = PromptForm(tokenizer)
    metrics: dict[str, float] = {}
    curves: dict[str, list[list[float]]] = {}
    for kind, by_length in counts.items():
        for length, count in ((int(length), count) for length, count in by_length.items()):
            if window:
                apply_plan(loaded, _window(loaded, window, length))
            generator = random.Random(f"{seed} {kind} {length}")
            filler = Filler(_texts(kind, documents, generator), tokenizer, "documents")
            right = []
            for number in track(range(count), description=f"{kind}, {length} tokens"):
                depth = (number + 0.5) / count
                prompt = retrieval(form, filler, length, generator, depth=depth, keys=_KEYS if kind == "keys" else 1)
                wanted = form.answer_ids(prompt.text, prompt.answer or "", end=False)
                right.append([depth, float(_would_write(loaded, form.ids(prompt.text), wanted))])
            metrics[f"{kind}_{length}"] = statistics.fmean(value for _, value in right)
            curves[f"{kind}_{length}"] = right
        metrics[kind] = statistics.fmean(metrics[f"{kind}_{length}"] for length in by_length)
    return {"metrics": metrics, "curves": curves}


def _window(model: PreTrainedModel, share: float, length: int) -> SpanPlan:
    """Return the plan with one fixed window for all heads, with which a share of the cache is kept at a length."""
    plan = plan_of(model.config)
    sink = CandidateRules().sink if plan is None else plan.sink
    return SpanPlan.same(SpanRule(max(1, round(share * length) - sink)), model.config, sink=sink)


def _texts(kind: str, documents: str, generator: random.Random) -> Iterator[str]:
    if kind == "sentences":
        return itertools.repeat(_SENTENCES)
    found = [text for text in pieces(read_documents(documents)) if len(text) > 300]
    if not found:
        raise InputError(f"documents={documents!r} has no text of more than 300 characters. Give longer ones.")
    # Where the documents are few, they come again in another order.
    return (text for _ in itertools.count() for text in generator.sample(found, len(found)))


@torch.no_grad()
def _would_write(model: PreTrainedModel, ids: list[int], answer: list[int]) -> bool:
    states = answer_states(model, Answered(torch.tensor([*ids, *answer]), len(ids), 0))
    return (states @ head_weight(model).T).argmax(dim=-1).tolist() == answer


def _loaded(source: str, weights: Dtype) -> PreTrainedModel:
    return load_model(source, weights).to(compute_device())  # type: ignore[arg-type]


def closeness(
    *,
    seed: int,
    model: str,
    source: str,
    documents: str,
    text: str,
    length: int,
    examples: int,
    text_tokens: int,
    window: float = 0.0,
) -> dict[str, float]:
    """Compare a model with the dense one: on held-out answers of the dense model, and on running text.

    Args:
        seed: Of the prompts.
        model: Source of the model with spans.
        source: Of the dense model, which answers.
        documents: Source of the documents that it is asked about.
        text: Source of running text.
        length: Tokens of the prompts.
        examples: Prompts of each kind.
        text_tokens: Tokens of running text, in pieces of this length.
        window: See ``passkeys``.

    Returns:
        ``answer_kl``, ``answer_loss``, ``answer_loss_dense``, ``answer_agreement``, and the same for ``text``, losses in nats a
        token; ``cache``, the share of the cache that the plan keeps at this length.
    """
    data = SelfGeneratedCalibration(
        documents,
        lengths=[length],
        examples=examples,
        val_examples=0,
        answers_from=source,
        tokenizer=source,
        seed=seed + 1000,  # no prompt of a calibration set of the same seed
        show=0,
    )
    data.prepare_data()
    assert data.train_set is not None
    loaded = _loaded(model, "float32")
    plan = _window(loaded, window, length) if window else plan_of(loaded.config)
    assert plan is not None
    remove_plan(loaded)
    (own,) = fidelity(loaded, [plan], answered(data.train_set))
    tokenizer = load_tokenizer(source)
    whole = "\n".join(itertools.islice(read_documents(text), 2000))
    ids = torch.tensor(tokenizer(whole, add_special_tokens=False, verbose=False).input_ids[:text_tokens])
    (running,) = fidelity(loaded, [plan], [Answered(piece, 1, 0) for piece in ids.split(length) if len(piece) == length])
    return {**_named("answer", own), **_named("text", running), "cache": plan.density(length)}


def _named(name: str, found: Fidelity) -> dict[str, float]:
    return {
        f"{name}_kl": found.kl,
        f"{name}_loss": found.loss,
        f"{name}_loss_dense": found.dense_loss,
        f"{name}_agreement": found.agreement,
    }


def ranking(
    *, seed: int, source: str, documents: str, lengths: list[int], examples: int, form: str, rows: str, loss: str
) -> dict[str, float]:
    """Compare the influence of heads with their ablation, each on prompts of its own.

    Args:
        seed: Of the prompts.
        source: Of the model.
        documents: Source of the documents.
        lengths: Tokens of the prompts that heads are profiled on; they are ablated on the shortest.
        examples: Prompts of each kind at each length.
        form: See ``Influence``.
        rows: See ``Influence``.
        loss: See ``Influence``.

    Returns:
        ``rank_correlation`` (Spearman's) and ``worst_ten_in_first_twenty``.
    """
    chosen = Influence(form=form, rows=rows, loss=loss)  # type: ignore[arg-type]
    loaded, candidates = _loaded(source, "float32"), CandidateRules()
    sets = []
    for part, levels in enumerate((lengths, [min(lengths)])):
        data = SelfGeneratedCalibration(
            documents,
            lengths=levels,
            examples=examples,
            val_examples=0,
            answers_from=source,
            tokenizer=source,
            seed=seed + 1000 * part,
            show=0,
        )
        data.prepare_data()
        assert data.train_set is not None
        sets.append(answered(data.train_set))
    short = candidates.shortest
    profile = SpanProfiler(candidates, loss=chosen.loss).profile(loaded, sets[0])
    ours = profile.mean(chosen.form, chosen.rows)[:, :, profile.rules.index(short)]
    changes = ablate(loaded, sets[1], short, sink=candidates.sink, loss="margin")
    own = full_layers(loaded.config)
    return compare_with_ablation(ours[own], changes.mean(axis=0)[own])


def profiling(*, seed: int, source: str, length: int, texts: int, density: float) -> dict[str, float]:
    """Time the profile of texts and the planning behind it.

    Args:
        seed: Of the texts' random tokens, on which time does not depend.
        source: Of the model.
        length: Tokens of a text.
        texts: How many are profiled.
        density: Share of the cache that is planned for.

    Returns:
        ``length``; ``profile_seconds``, the median of a text; ``plan_seconds``, for all plans of the front.
    """
    loaded, candidates = _loaded(source, "float32"), CandidateRules()
    generator = torch.Generator().manual_seed(seed)
    rules, seconds, found = candidates.rules(), [], {}
    for number in track(range(texts), description=f"Profiling {length} tokens"):
        ids = torch.randint(0, int(loaded.config.vocab_size), (length,), generator=generator)
        begin = _now()
        values = influences(loaded, ids, length - 32, rules, sink=candidates.sink)
        seconds.append(_now() - begin)
        # Each text stands for a length level, so that there is a front to plan.
        found[length - number] = values[1, FORMS.index("net")].clip(min=0)
    begin = time.perf_counter()
    pareto_plans(found, rules, Budget(density, tuple(found), candidates), loaded.config)
    planned = time.perf_counter() - begin
    return {"length": float(length), "profile_seconds": statistics.median(seconds), "plan_seconds": planned}


@torch.no_grad()
def speed(
    *, seed: int, model: str, batch: int, context: int, tokens: int, rounds: int, weights: Dtype = "float32"
) -> dict[str, float]:
    """Read a context and write tokens behind it, with the spans of a model and dense, in turns.

    Dense is measured twice: as ``transformers`` does it (its ``DynamicCache``, which is copied at every step), and by the spans'
    own runtime with heads that all keep everything. Spans are compared with the faster one.

    Args:
        seed: Of the context's tokens.
        model: Source of a model with a plan of spans.
        batch: Texts at once.
        context: Tokens before the first that is written.
        tokens: Tokens that are written a turn.
        rounds: Turns that are counted, behind one that is not.
        weights: Type of the weights in memory.

    Returns:
        For ``spans``, ``dense`` and ``whole`` (dense by the spans' runtime): ``prefill_seconds``, ``tokens_per_second`` of
        decoding, ``cache_bytes``, and ``read_bytes``, what a step has to read of weights and cache; ``planned_bytes``, the plan's
        for the layers with spans; and how many times faster the spans are (medians of neighbours).
    """
    loaded = _loaded(model, weights)
    plan = plan_of(loaded.config)
    assert plan is not None
    ids = torch.randint(0, int(loaded.config.vocab_size), (batch, context), generator=torch.Generator().manual_seed(seed))
    weights_bytes = sum(part.nbytes for part in loaded.parameters())
    plans = {"spans": plan, "dense": None, "whole": SpanPlan.same(SpanRule(0, 1.0), loaded.config, sink=plan.sink)}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    for _ in track(range(rounds + 1), description=f"batch {batch}, {context} tokens"):
        for name, applied in plans.items():
            remove_plan(loaded)
            if applied is not None:
                apply_plan(loaded, applied)
            cache = DynamicCache(config=loaded.config) if applied is None else SpanCache(applied, loaded.config)
            figures[name].append(read_and_write(loaded, ids, tokens, cache))
    found: dict[str, float] = {}
    for name, turns in figures.items():
        for key in turns[0]:
            found[f"{name}_{key}"] = statistics.median(turn[key] for turn in turns[1:])
        found[f"{name}_read_bytes"] = weights_bytes + found[f"{name}_cache_bytes"]

    def times_faster(key: str, sign: int) -> float:
        own = figures["spans"][1:]
        return min(
            statistics.median((ours[key] / other[key]) ** sign for ours, other in zip(own, figures[name][1:]))
            for name in ("dense", "whole")
        )

    found["decode_speedup"] = times_faster("tokens_per_second", 1)
    found["prefill_speedup"] = times_faster("prefill_seconds", -1)
    found["roofline_speedup"] = found["dense_read_bytes"] / found["spans_read_bytes"]
    kept = sum(rule.kept(context + tokens, plan.sink) for rules in plan.rules if rules is not None for rule in rules)
    config = loaded.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found["planned_bytes"] = float(2 * kept * size * batch * next(loaded.parameters()).element_size())
    return found


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def read_and_write(model: PreTrainedModel, ids: Tensor, tokens: int, cache: Any) -> dict[str, float]:
    """Read contexts, and write tokens behind them greedily.

    Args:
        model: A causal language model.
        ids: Token ids of the contexts [batch, tokens].
        tokens: That are written.
        cache: An empty ``SpanCache``, or a cache of ``transformers``.

    Returns:
        ``prefill_seconds``; ``tokens_per_second`` of writing, by the median token; ``cache_bytes`` in the end.
    """
    begin, caching = _now(), {CACHE: cache, "use_cache": True}
    logits = model(input_ids=ids.to(model.device), logits_to_keep=1, **caching).logits
    read = _now()
    times = []
    for _ in range(tokens):
        start = _now()
        logits = model(input_ids=logits[:, -1:].argmax(dim=-1), **caching).logits
        times.append(_now() - start)
    if isinstance(cache, SpanCache):
        held = cache.nbytes()
    else:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {
        "prefill_seconds": read - begin,
        "tokens_per_second": len(ids) / statistics.median(times),
        "cache_bytes": float(held),
    }
