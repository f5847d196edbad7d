"""The owner's service and its parties as real processes: killed, restarted, pestered, loaded."""

import json
import signal
import subprocess
import threading
import time

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.offsite import EmulatorManifest, Prefix, PrefixSettings
from fulgurite.modules.offsite.frames import FrameError
from fulgurite.modules.tiny import tiny_model
from tests.conftest import prose

from .owners import PARTIES, OwnerProcess, command, make_owner

pytestmark = pytest.mark.slow
CUT, LENGTH, HIDDEN = 1, 3, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_owner(tmp_path_factory.mktemp("owner"), CUT)


@pytest.fixture
def owner(folder):
    found = OwnerProcess(folder)
    yield found
    found.kill()


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Is {n} even?", "response": "ny"[n % 2 == 0]}) + "\n" for n in range(64)))
    return path


def fit(owner, folder, rows_file, party, run, *more):
    words = ["fit", "-c", "offsite/split", f"--model.source={owner.folder / 'emulator'}", "--model.candidates=[y,n]"]
    words += [f"--model.owner.address=localhost:{owner.port}", f"--model.owner.token={owner.folder / party}.token"]
    words += [f"--model.owner.certificate={owner.folder / 'owner.crt'}", f"--data.train={rows_file}", "--data.batch_size=2"]
    words += [
        "--trainer.max_steps=60",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_epochs=20",
        "--trainer.logger=false",
    ]
    words += ["--model.weights=float32", f"--runs_folder={folder}", "--experiment=x", f"--run={run}", *more]
    log = open(folder / f"{run}.log", "w")  # noqa: SIM115
    return subprocess.Popen(command(*words), stdout=log, stderr=log)


def prefix(folder, run, model):
    return Prefix.load(folder / "x" / run / "prefix", model)


def ended(process, log):
    assert process.wait(300) == 0, log.read_text()[-2000:]


def test_three_parties_and_every_process_killed_in_turn(folder, owner, rows_file, tmp_path):
    model = EmulatorManifest.load(folder / "emulator").model
    calm = fit(owner, tmp_path, rows_file, "p0", "calm")
    ended(calm, tmp_path / "calm.log")
    parties = [fit(owner, tmp_path, rows_file, party, party) for party in PARTIES[:3]]
    while not list((tmp_path / "x" / "p0").glob("checkpoints/*.ckpt")):
        assert parties[0].poll() is None, (tmp_path / "p0.log").read_text()[-2000:]
        time.sleep(0.05)
    for _ in range(2):
        owner.kill()
        began = time.monotonic()
        owner.start()
        owner.client(patience=10).health()
        assert time.monotonic() - began < 60  # nearly all of it starts Python on a busy machine
        time.sleep(0.5)
    parties[1].kill()
    parties[1].wait()
    last = ["--ckpt_path=last"] if list((tmp_path / "x" / "p1").glob("checkpoints/*.ckpt")) else []
    parties[1] = fit(owner, tmp_path, rows_file, "p1", "p1" if last else "p1-anew", *last)
    for party, process in zip(PARTIES, parties):
        ended(process, tmp_path / f"{party}.log")
    wanted = prefix(tmp_path, "calm", model)
    for run in ("p0", "p1" if last else "p1-anew", "p2"):
        found = prefix(tmp_path, run, model)
        assert all(torch.equal(one, other) for one, other in zip(found.rows, wanted.rows, strict=True)), run


def test_an_owner_that_was_away_for_long_is_found_when_it_is_back(owner):
    client = owner.client(patience=300)
    client.health()
    owner.kill()
    answered = []
    asking = threading.Thread(target=lambda: (client.health(), answered.append(time.monotonic())))
    asking.start()
    time.sleep(30)
    owner.start()
    back = time.monotonic()
    asking.join()
    assert answered[0] - back < 10


def test_a_party_that_vanishes_holds_up_nobody(owner):
    gone, here = owner.client("p1"), owner.client("p2")
    rows = rows_for()
    for client in (gone, here):
        client.begin(0, LENGTH, rows)
        client.forward(0, 0, torch.randn(1, 4, HIDDEN))
    gone.close()  # between forward and backward
    began = time.monotonic()
    here.backward(0, 0, torch.randn(1, 4, HIDDEN))
    here.collect(0)
    assert time.monotonic() - began < 5


def rows_for():
    own = Prefix.random(tiny_model(), PrefixSettings(length=LENGTH)).within(CUT, 99)
    return Prefix(own.settings, [rows.detach() for rows in own.rows])


def test_messages_that_are_none_leave_the_owner_up_and_its_memory_bounded(owner):
    client = owner.client(patience=2)
    client.begin(0, LENGTH, rows_for())
    wanted = client.forward(0, 0, states := torch.randn(1, 4, HIDDEN))
    generator = torch.Generator().manual_seed(0)
    memory = []
    for number in range(600):
        size = int(torch.randint(1, 4000, (), generator=generator))
        noise = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).numpy().tobytes()
        with pytest.raises(FrameError, match="The owner refuses forward"):
            client._ask("forward", noise)
        with pytest.raises(FrameError, match="not finite"):
            client.forward(0, 1, torch.full((1, 64, HIDDEN), torch.nan))
        with pytest.raises(InputError, match="resource_exhausted"):
            client.forward(0, 1, torch.zeros(1, 1000, HIDDEN))
        with pytest.raises(InputError, match="was another batch"):
            client.forward(0, 0, states + 1)
        assert torch.equal(client.forward(0, 0, states), wanted)  # replayed
        if number in (200, 599):
            memory.append(owner.memory())
    assert memory[1] < 1.05 * memory[0]


def test_eight_parties_and_many_steps(owner):
    """No error, and no memory that grows."""
    rows, errors, memory, counts = rows_for(), [], {}, [0] * len(PARTIES)

    def work(number):
        try:
            client, states = owner.client(PARTIES[number]), torch.randn(2, 8, HIDDEN)
            for step in range(2000):
                client.begin(step, LENGTH, rows)
                found = client.forward(step, 0, states)
                client.backward(step, 0, torch.ones_like(found))
                assert len(client.collect(step)) == 3
                counts[number] = step + 1
        except Exception as error:  # a thread's error would be lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(PARTIES))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not errors:
        if 200 not in memory and min(counts) >= 200:
            memory[200] = owner.memory()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    memory[2000] = owner.memory()
    assert not errors, errors
    assert counts == [2000] * len(PARTIES)
    assert memory[2000] < 1.05 * memory[200], memory


def test_the_service_ends_when_it_is_told(owner):
    owner.process.send_signal(signal.SIGTERM)
    assert owner.process.wait(20) == 0


def test_the_demo_is_an_owner_and_two_parties_and_goes_on(rows_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(prose(2000))
    words = ["owner", "demo", "--model=random:tiny", f"--text={text}", f"--task={rows_file}", "--candidates=[y,n]", "--layers=3"]
    words += [
        "--cut=1",
        "--rows=40",
        "--val_rows=10",
        "--emulator_steps=2",
        "--tune_steps=3",
        "--split_steps=2",
        f"--folder={tmp_path}/demo",
    ]
    for _ in range(2):  # the second time, only the figures are made again
        done = subprocess.run(command(*words), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads((tmp_path / "demo" / "summary.json").read_text())["accuracy"]
        assert set(found) == {"no prefix", "both parties' mean", "prefix of north", "prefix of south"}
        assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert "fulgurite fit -c offsite/tune" not in done.stdout
