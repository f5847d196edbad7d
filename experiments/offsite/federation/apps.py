"""What Flower runs: a ServerApp that averages each round's prefixes, a ClientApp that is one party's ``fit``.

Needs the extra ``federation``, in an environment of its own (see docs/offsite.md): Flower wants older protobuf and packaging.
"""

import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from ....errors import InputError
from ....modules.offsite import Prefix, PrefixSettings
from ....modules.offsite.averaging import average_prefixes
from ....modules.offsite.prefix import StandsFor

log = logging.getLogger("fulgurite")
server_app = ServerApp()  # an assignment each: Flower looks for them without importing
client_app = ClientApp()


def records_of(prefix: Prefix) -> ArrayRecord:
    """Return a prefix's rows as Flower carries them."""
    return ArrayRecord([rows.detach().numpy() for rows in prefix.rows])


def prefix_of(arrays: ArrayRecord, settings: PrefixSettings) -> Prefix:
    """Return the prefix of some rows.

    Raises:
        InputError: If they are none.
    """
    rows = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays.to_numpy_ndarrays()]
    if not all(one.is_floating_point() for one in rows):
        raise InputError("A party's rows are no floating-point numbers.")
    return Prefix(settings, rows)


class PrefixAveraging(FedAvg):
    """Averages each round's prefixes by the examples that each party used in it, and keeps every round's mean.

    Args:
        start: The prefix that the first round begins with.
        model: Fingerprint of the model that it is for.
        stands_for: Of an emulator's prefix: what the emulator stands for.
        folder: Where ``round-<number>`` is written.
        parties: Fewest parties that a round needs.
        most_examples: Of a party in a round; it would otherwise be the mean by saying a large number.
    """

    def __init__(
        self, start: Prefix, model: str, stands_for: StandsFor | None, folder: Path, parties: int, most_examples: int
    ) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=parties, min_available_nodes=parties)
        self.settings, self.model, self.folder, self.parties = start.settings, model, folder, parties
        self.stands_for, self.most_examples = stands_for, most_examples
        self.shapes = [rows.shape for rows in start.rows]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean of a round, and how many examples it is of.

        Raises:
            InputError: If too few parties have answered in time with a prefix of this kind.
        """
        found: dict[tuple[str, int], tuple[Prefix, int]] = {}  # by name and node: Flower has authenticated the latter alone
        for reply in replies:
            if reply.has_error():
                log.warning("A party failed in round %d: %s", server_round, reply.error.reason)
                continue
            party = "?"
            try:
                told = reply.content["told"]
                party, examples = str(told["party"]), int(told["examples"])
                prefix = prefix_of(reply.content["arrays"], self.settings)
                if [rows.shape for rows in prefix.rows] != self.shapes:
                    raise InputError("Its rows are of another shape.")
                if told["model"] != self.model:
                    raise InputError(f"It is for model {told['model']}, not {self.model}.")
                if examples > self.most_examples:
                    raise InputError(f"It says {examples} examples, above most_examples={self.most_examples}.")
                average_prefixes([prefix], [examples])  # refuses numbers that are not finite, and no examples
            except (InputError, KeyError, TypeError, ValueError, OverflowError) as error:
                log.warning("The prefix of party %s is left out of round %d: %s", party, server_round, error)
                continue
            found[party, reply.metadata.src_node_id] = prefix, examples
        parties = sorted(found)  # in one order, so that sums are the same
        names = ", ".join(name for name, _ in parties)
        if len(found) < self.parties:
            raise InputError(
                f"Round {server_round} has prefixes of {len(found)} parties ({names or 'none'}) in time; "
                f"it needs {self.parties} (parties). Start again with start={str(self.folder / f'round-{server_round - 1}')!r}."
            )
        counts = [found[party][1] for party in parties]
        mean = average_prefixes([found[party][0] for party in parties], counts)
        mean.save(self.folder / f"round-{server_round}", self.model, self.stands_for)
        log.info("Round %d: the mean of %s, %d examples", server_round, names, sum(counts))
        return records_of(mean), MetricRecord({"examples": sum(counts)})


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Do the rounds, as the run's config says; the last mean is ``prefix`` in its folder."""
    told: dict[str, Any] = dict(context.run_config)
    folder = Path(told["folder"])
    start, model, stands_for = Prefix.read(Path(told["start"]))
    start.save(folder / "round-0", model, stands_for)
    settings = start.settings
    config = ConfigRecord(
        {"kind": settings.kind, "length": settings.length, "layers": list(settings.layers or ()), "model": model}
    )
    strategy = PrefixAveraging(start, model, stands_for, folder, int(told["parties"]), int(told["most_examples"]))
    _await_nodes(grid, int(told["nodes"]), float(told["timeout"]))
    result = strategy.start(
        grid,
        records_of(start),
        num_rounds=int(told["rounds"]),
        timeout=float(told["timeout"]),
        train_config=config,
    )
    prefix_of(result.arrays, settings).save(folder / "prefix", model, stands_for)


def _await_nodes(grid: Grid, nodes: int, timeout: float) -> None:
    """Wait for all parties: a round is begun with those that are here, and fewer may be enough to end it."""
    until = time.monotonic() + timeout
    while len(here := list(grid.get_node_ids())) < nodes and time.monotonic() < until:
        time.sleep(0.5)
    log.info("The first round begins with %d of %d parties", len(here), nodes)


@client_app.train()
def tune(message: Message, context: Context) -> Message:
    """Go on with the mean on the party's own rows: its config's ``fit``, one run a round."""
    from ...cli import run

    told, own = message.content["config"], context.node_config
    party, number = str(own["party"]), int(told["server-round"])
    settings = PrefixSettings(told["kind"], int(told["length"]), tuple(told["layers"]))
    folder = Path(str(own["folder"])) / party
    start = folder / "start" / f"round-{number}"
    prefix_of(message.content["arrays"], settings).save(start, told["model"])
    shutil.rmtree(folder / "rounds" / f"round-{number}", ignore_errors=True)  # of a node that was killed in this round
    words = ["fit", "-c", str(own["config"]), f"--model.start={start}", f"--seed_everything={number}"]
    done = run([*words, f"--runs_folder={folder}", "--experiment=rounds", f"--run=round-{number}"])
    module: Any = done.model
    said = {"party": party, "model": module.fingerprint, "examples": done.token_rate.sequences}
    content = RecordDict({"arrays": records_of(module.prefix), "told": ConfigRecord(said)})
    return Message(content=content, reply_to=message)
