import subprocess
import sys
import time

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments import netlab
from fulgurite.experiments.netlab import NetLab, check_rate, remove_left_overs, what_is_missing

needs_network = pytest.mark.skipif(what_is_missing() is not None, reason=f"no network can be made here: {what_is_missing()}")

RECEIVE = """
import socket
server = socket.create_server(("10.77.0.2", 5000))
connection, _ = server.accept()
total = 0
while data := connection.recv(1 << 16):
    total += len(data)
connection.sendall(str(total).encode())
"""
SEND = """
import socket, sys, time
for _ in range(100):
    try:
        connection = socket.create_connection(("10.77.0.2", 5000), timeout=30)
        break
    except OSError:
        time.sleep(0.1)
begin = time.perf_counter()
connection.sendall(bytes(int(sys.argv[1])))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(100).decode() == sys.argv[1]
print(time.perf_counter() - begin)
"""


def send(lab, size, tmp_path, during=lambda: None):
    """Return how long so many bytes take from rank 0 to rank 1."""
    receiver = lab.start(1, [sys.executable, "-c", RECEIVE])
    sender = lab.start(0, [sys.executable, "-c", SEND, str(size)], log=tmp_path / "sent")
    during()
    assert sender.wait(60) == receiver.wait(60) == 0
    return float((tmp_path / "sent").read_text())


@needs_network
def test_links_have_their_rate_and_change_it_while_they_run(tmp_path):
    with NetLab(2, "20mbit") as lab:
        slow = send(lab, 1_000_000, tmp_path)
        assert 1_000_000 < lab.sent_bytes(0) < 1_200_000
        assert lab.sent_bytes(1) < 100_000
        assert 0.3 < slow < 1.0  # 0.4 seconds, less what goes at once
        lab.set_rate("200mbit")
        assert send(lab, 1_000_000, tmp_path) < slow / 2


@needs_network
def test_a_cut_link_only_slows(tmp_path):
    def cut():
        time.sleep(1)
        lab.cut(1)
        time.sleep(3)
        lab.restore(1)

    with NetLab(2, "10mbit") as lab:
        assert send(lab, 4_000_000, tmp_path, during=cut) > 5  # 3.2 seconds without the cut


@needs_network
def test_nothing_is_left_behind_even_by_a_killed_lab(tmp_path):
    code = (
        "import time; from fulgurite.experiments.netlab import NetLab\n"
        "with NetLab(2) as lab: print('made', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    process.kill()
    process.wait()
    assert any(name.startswith(f"fg{process.pid}-") for name in netlab._spaces())
    remove_left_overs()
    assert not any(name.startswith(f"fg{process.pid}-") for name in netlab._spaces())
    with NetLab(3) as lab:
        runs = lab.start(0, ["sleep", "60"])
    assert runs.poll() is not None
    assert not any(name.startswith(lab.name) for name in netlab._spaces())


@needs_network
def test_the_network_can_be_changed_on_a_schedule():
    seen = []

    def fail(lab, turn):
        raise OSError("no tc")

    with NetLab(2) as lab, pytest.raises(OSError, match="no tc"), lab.changing(fail, 0.01):
        time.sleep(0.1)
    with NetLab(2) as lab, lab.changing(lambda lab, turn: seen.append(turn), 0.05):
        time.sleep(0.4)
    assert len(seen) >= 3
    count = len(seen)
    time.sleep(0.2)
    assert len(seen) == count


def test_without_root_or_tools_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(netlab.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: f"/bin/{tool}")
    with pytest.raises(InputError, match="need root"):
        NetLab(2)
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: None)
    with pytest.raises(InputError, match="ip is missing .package iproute2"):
        NetLab(2)


@pytest.mark.parametrize("rate", ["100", "fast", "10mb", "-1mbit"])
def test_rates_are_checked(rate):
    with pytest.raises(InputError, match="is no rate of a link"):
        check_rate(rate)
