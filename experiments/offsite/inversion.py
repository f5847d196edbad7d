"""How much of a party's text can its owner read from what it gets? Attacks on states, and on gradients."""

import torch
from rich.progress import track
from torch import Tensor, nn

from ...datamodules import TextDataModule
from ...modules.linear_loss import linear_loss
from ...modules.offsite import ModelPart, Prefix, PrefixSettings, behind_prefix, plugged_in, without_virtual
from ...modules.offsite.split import with_noise
from ...modules.precision import compute_device
from ...modules.pretrained import head_weight, load_model

_LENGTH = 16  # of the prefixes
_BLOCK = 128  # tokens of a text


class Inverter(nn.Module):
    """From states to embeddings of the tokens: a layer of attention over all of a text's states, and a perceptron.

    Args:
        size: Hidden size.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        heads = next(number for number in (8, 4, 3, 2, 1) if size % number == 0)
        self.norm = nn.LayerNorm(size)
        self.mix = nn.TransformerEncoderLayer(size, heads, 2 * size, dropout=0.0, batch_first=True, norm_first=True)
        self.last = nn.Linear(size, size)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, states: Tensor) -> Tensor:
        """Return what is compared with embeddings [texts, tokens, hidden size] of states of that shape."""
        states = self.norm(states)
        return self.scale * self.last(self.mix(states) + states)


def inversion(
    *,
    seed: int,
    source: str,
    cut: int,
    noise: float,
    public: str,
    private: str,
    public_tokens: int,
    private_tokens: int,
    passes: int = 2,
) -> dict[str, float]:
    """Return how many tokens of a private text an attack recovers from the states behind a party's layers.

    The attacker knows the party's layers, which are its own, and the embedding; it does not know the party's prefix, and trains
    with one of its own on public text. It sees all states of a text at once.

    Args:
        seed: Of everything.
        source: The model.
        cut: Number of the party's layers.
        noise: See ``OffsitePrefixTuning``.
        public: Text to train the attack on; see ``TextDataModule``.
        private: Text to attack.
        public_tokens: Of the former.
        private_tokens: Of the latter.
        passes: Over the public text.
    """
    torch.manual_seed(seed)
    model = load_model(source, "float32").requires_grad_(False).to(compute_device())  # type: ignore[arg-type]
    weight = nn.functional.normalize(head_weight(model), dim=1)  # what a token's embedding points at is what tells it
    prefixes = [Prefix.random(model, PrefixSettings(length=_LENGTH), seed=1000 * seed + number) for number in range(2)]
    part = ModelPart(model, 0, cut)
    found = []
    for text, tokens, prefix in ((public, public_tokens, prefixes[0]), (private, private_tokens, prefixes[1])):
        ids = _blocks(text, tokens, source)
        found.append((ids, _sent(part, prefix.within(0, cut), ids, noise)))
    (ids, states), (hidden, seen) = found
    inverter = Inverter(states.shape[-1]).to(model.device)
    rate, batch = 1e-3, 2
    optimizer = torch.optim.AdamW(inverter.parameters(), lr=rate)
    orders = [torch.randperm(len(ids)).split(batch) for _ in range(passes)]
    steps = [rows for order in orders for rows in order]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(steps))
    for rows in track(steps, description="Training the attack"):
        guess = inverter(states[rows]).flatten(0, 1)
        linear_loss(guess, weight, ids[rows].flatten()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        right = [
            linear_loss(inverter(one).flatten(0, 1), weight, own.flatten()).correct
            for own, one in zip(hidden.split(8), seen.split(8))
        ]
    return {"recovered": float(torch.cat(right).float().mean())}


def guess(*, seed: int, source: str, public: str, private: str, public_tokens: int, private_tokens: int) -> dict[str, float]:
    """Return how many tokens of a private text are the commonest one of the public text: what is recovered from nothing.

    Args:
        seed: Not used: nothing is drawn.
        source: The model.
        public: See ``inversion``.
        private: See ``inversion``.
        public_tokens: Of the former.
        private_tokens: Of the latter.
    """
    known, hidden = _blocks(public, public_tokens, source), _blocks(private, private_tokens, source)
    return {"recovered": float((hidden == known.flatten().mode().values).float().mean())}


def labels(*, seed: int, source: str, private: str, private_tokens: int) -> dict[str, float]:
    """Return how many labels an owner reads from the gradients that come back where the party keeps the head (``head: party``).

    The owner has the final norm and the head, too, and knows the states that it gave: of each label it can compute the gradient
    that would come. The true one has the direction of one of them.

    Args:
        seed: Not used: nothing is drawn.
        source: The model.
        private: Text whose blocks' last tokens are the labels; see ``TextDataModule``.
        private_tokens: Of it.
    """
    model = load_model(source, "float32").requires_grad_(False).to(compute_device())  # type: ignore[arg-type]
    weight = head_weight(model)
    ids = _blocks(private, private_tokens, source)
    whole = ModelPart(model, 0, int(model.config.num_hidden_layers))
    right = []
    for rows in track(ids.split(8), description="Reading gradients"):
        positions = torch.arange(rows.shape[1] - 1, device=rows.device).expand(len(rows), -1)
        with torch.no_grad():
            states = whole(rows[:, :-1], position_ids=positions)[:, -1]
        given = states.requires_grad_()
        torch.nn.functional.cross_entropy(whole.logits(given), rows[:, -1]).backward()
        assert given.grad is not None
        for state, gradient, label in zip(given.detach(), given.grad, rows[:, -1]):
            jacobian = torch.func.jacrev(whole.norm)(state)  # type: ignore[arg-type]  # [hidden size, hidden size]
            expected = whole.logits(state).softmax(-1) @ weight
            would_come = nn.functional.normalize((expected - weight) @ jacobian, dim=1)
            right.append(int((would_come @ gradient).argmax()) == int(label))
    return {"recovered": sum(right) / len(right)}


def _blocks(text: str, tokens: int, source: str) -> Tensor:
    data = TextDataModule(text, tokenizer=source, block_size=_BLOCK, batch_size=1, train_tokens=tokens, val_fraction=0, seed=0)
    data.prepare_data()
    data.setup()
    return data.calibration_batch(tokens)["input_ids"].to(compute_device())


@torch.no_grad()
def _sent(part: ModelPart, prefix: Prefix, ids: Tensor, noise: float) -> Tensor:
    """Return the states that an owner gets of some texts [texts, tokens, hidden size]."""
    found = []
    with plugged_in(part.body, prefix):
        for rows in track(ids.split(8), description="Reading"):
            behind = behind_prefix({"input_ids": rows}, _LENGTH)["input_ids"]
            positions = torch.arange(behind.shape[1], device=behind.device).expand(len(behind), -1)
            found.append(with_noise(without_virtual(part(behind, position_ids=positions), _LENGTH), noise))
    return torch.cat(found)
