"""Steps and texts through a split over real connections, for ``benchmark offsite/network``."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import DynamicCache

from ...files import write_json
from ...modules.offsite import OwnerAccess, Prefix, PrefixSettings, behind_prefix, plugged_in
from ...modules.offsite.certificates import make_certificates
from ...modules.offsite.remote import OwnersLayers, split_model
from ...modules.precision import Dtype
from ...modules.pretrained import CACHE, load_model
from ...modules.student import decoder_layers
from ..netlab import NetLab, needs_links
from ..threads import threads_each

_OWNER = "10.77.0.1"


@needs_links("rate")
def through(
    *,
    seed: int,
    source: str,
    weights: Dtype,
    cut: int,
    length: int,
    rows: int,
    tokens: int,
    rounds: int,
    written: int,
    rate: str | None = None,
) -> dict[str, float]:
    """Return the time and bytes of a training step and of a written token, split and unsplit.

    Args:
        seed: Of prefix and tokens.
        source: The whole model; the party's layers are its own, too.
        weights: Type of the model's weights at both.
        cut: The owner's first layer.
        length: Of the prefix.
        rows: Of a batch.
        tokens: Of each row.
        rounds: How often each step is timed, in turns.
        written: Tokens of the text.
        rate: Of the party's and the owner's link, such as ``20mbit``; None is the loopback device.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        make_certificates(root, hosts=["localhost", _OWNER], parties=["one"])
        papers = [f"--certificate={root / 'owner.crt'}", f"--key={root / 'owner.key'}", f"--tokens={root / 'tokens.json'}"]
        serve = [
            "owner",
            "serve",
            f"--model={source}",
            f"--weights={weights}",
            f"--cut={cut}",
            *papers,
            f"--announce={root / 'address.json'}",
        ]
        main = [sys.executable, "-c", "from fulgurite.experiments.main import main; main()", *serve]
        settings = {name: value for name, value in locals().items() if name in through.__annotations__}
        write_json(root / "settings.json", settings)
        party = [sys.executable, "-m", "fulgurite.experiments.offsite.network", str(root)]
        if rate is None:
            shared = {**os.environ, **threads_each(2)}
            owner: Any = subprocess.Popen([*main, "--address=localhost:0"], stdout=subprocess.DEVNULL, env=shared)
            stack.callback(owner.wait)
            stack.callback(owner.kill)
            _wait(root / "address.json", owner)
            subprocess.run(party, check=True, env=shared)
        else:
            lab = stack.enter_context(NetLab(2, rate))
            owner = lab.start(0, [*main, f"--address={_OWNER}:7421"], log=root / "owner.log")
            _wait(root / "address.json", owner)
            done = lab.start(1, party, log=root / "party.log")
            if done.wait():
                raise RuntimeError((root / "party.log").read_text())
        return json.loads((root / "found.json").read_text())


def _wait(file: Path, process: subprocess.Popen) -> None:
    while not file.is_file():
        if process.poll() is not None:
            raise RuntimeError("The owner's process ended at once.")
        time.sleep(0.05)


def _party(root: Path) -> dict[str, float]:
    """The party's process: it has the whole model to compare with, which a real one has not."""
    told = json.loads((root / "settings.json").read_text())
    address = json.loads((root / "address.json").read_text())["address"]
    client = OwnerAccess(address, str(root / "one.token"), str(root / "owner.crt")).client()
    cut, length = told["cut"], told["length"]
    whole, own = (load_model(told["source"], told["weights"]).requires_grad_(False) for _ in range(2))
    layers = len(decoder_layers(whole))
    prefix = Prefix.random(whole, PrefixSettings(length=length), seed=told["seed"])
    owners = OwnersLayers(client, layers - cut, length, prefix.within(cut, layers))
    split = split_model(own, cut, owners)
    generator = torch.Generator().manual_seed(told["seed"])
    ids = torch.randint(10, int(whole.config.vocab_size), (told["rows"], told["tokens"]), generator=generator)
    batch = behind_prefix({"input_ids": ids}, length)["input_ids"]
    positions = torch.arange(batch.shape[1]).expand(len(batch), -1)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=1e-4)

    def step(model: Any) -> float:
        begin = time.perf_counter()
        states = model.base_model(input_ids=batch, position_ids=positions, use_cache=False).last_hidden_state[:, length:]
        logits = model.lm_head(states[:, -8:])  # the loss of an answer, as in a task
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -8:].flatten()).backward()
        owners.steps.collect()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    def write() -> list[tuple[float, float]]:
        """Write a text with both, each token in turns; return the seconds of every pair but the first, which reads the prompt."""
        models, ids, at, found = (split, whole), [batch[:1, : length + 32]] * 2, 0, []
        caches = [DynamicCache(config=model.config) for model in models]
        for number in range(told["written"] + 1):
            seconds, positions = [0.0, 0.0], torch.arange(at, at + ids[0].shape[1])[None]
            for one in (0, 1) if number % 2 else (1, 0):
                begin = time.perf_counter()
                settings = {"position_ids": positions, CACHE: caches[one], "use_cache": True}
                ids[one] = models[one](ids[one], logits_to_keep=1, **settings).logits[:, -1].argmax(-1)[None]
                seconds[one] = time.perf_counter() - begin
            at += positions.shape[1]
            found.append((seconds[0], seconds[1]))
        return found[1:]

    steps: list[tuple[float, float]] = []
    tokens: list[tuple[float, float]] = []
    sent = received = 0
    with plugged_in(whole, prefix), plugged_in(split, prefix.within(0, cut)):
        for turn in track(range(told["rounds"] + 1), description="Steps and texts"):
            before = client.sent_bytes, client.received_bytes
            split_seconds = step(split)
            sent, received = client.sent_bytes - before[0], client.received_bytes - before[1]
            whole_seconds = step(whole)
            with torch.no_grad():
                pairs = write()
            if turn:  # the first is not counted
                steps.append((split_seconds, whole_seconds))
                tokens += pairs
    rows_bytes = sum(rows.nbytes for rows in prefix.within(cut, layers).rows)
    states_bytes = ids.numel() * int(whole.config.hidden_size) * whole.dtype.itemsize
    needed = 4 * states_bytes + 2 * rows_bytes  # there and back: states, gradients, rows
    return {
        "step_seconds": statistics.median(one for one, _ in steps),
        "whole_step_seconds": statistics.median(two for _, two in steps),
        "times_as_long": statistics.median(one / two for one, two in steps),
        "sent_bytes": float(sent),
        "received_bytes": float(received),
        "states_bytes": float(4 * states_bytes),
        "rows_bytes": float(2 * rows_bytes),
        "bytes_share": (sent + received) / needed,
        "token_ms": 1000 * statistics.median(one for one, _ in tokens),
        "token_ms_more": 1000 * statistics.median(one - two for one, two in tokens),
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[1]) / "found.json", _party(Path(sys.argv[1])))
