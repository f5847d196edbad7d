"""An owner's papers, emulator and service, as real files and a real process."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from lightning.pytorch import Trainer

from fulgurite.callbacks import ExportPretrained
from fulgurite.datamodules import TextDataModule
from fulgurite.modules import EmulatorDistillation
from fulgurite.modules.offsite import EmulatorSpec
from fulgurite.modules.offsite.certificates import make_certificates
from fulgurite.modules.offsite.client import OwnerClient
from tests.conftest import prose

PARTIES = [f"p{number}" for number in range(8)]


def command(*words):
    return [sys.executable, "-c", "from fulgurite.experiments.main import main; main()", *map(str, words)]


class OwnerProcess:
    """``fulgurite owner serve`` on a port that stays the same over restarts."""

    def __init__(self, folder):
        self.folder, self.port = folder, 0
        self.start()

    def start(self):
        announced = self.folder / "address.json"
        announced.unlink(missing_ok=True)
        papers = {
            name: self.folder / file
            for name, file in (("certificate", "owner.crt"), ("key", "owner.key"), ("tokens", "tokens.json"))
        }
        words = ["owner", "serve", "--model=random:tiny", f"--emulator={self.folder / 'emulator'}", "--weights=float32"]
        words += [*(f"--{name}={file}" for name, file in papers.items()), f"--announce={announced}", "--most_message_bytes=65536"]
        with open(self.folder / "owner.log", "a") as log:
            self.process = subprocess.Popen(command(*words, f"--address=localhost:{self.port}"), stdout=log, stderr=log)
        while not announced.is_file():
            assert self.process.poll() is None, (self.folder / "owner.log").read_text()
            time.sleep(0.05)
        self.port = int(json.loads(announced.read_text())["address"].rpartition(":")[2])

    def kill(self):
        self.process.kill()
        self.process.wait()

    def memory(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def client(self, party="p0", **settings):
        token = (self.folder / f"{party}.token").read_text().strip()
        return OwnerClient(f"localhost:{self.port}", token=token, certificate=self.folder / "owner.crt", **settings)


def make_owner(found, cut):
    """Write the owner's papers, and an emulator of random:tiny that has ``cut`` layers to the bit."""
    make_certificates(found, hosts=["localhost"], parties=PARTIES)
    text = found / "text.txt"
    text.write_text(prose(400))
    module = EmulatorDistillation("random:tiny", emulator=EmulatorSpec([0, 1, 3], identical=cut))
    export = ExportPretrained(str(found / "emulator"), dtype=None)
    trainer = Trainer(max_steps=0, accelerator="cpu", logger=False, callbacks=[export], enable_checkpointing=False)
    trainer.fit(module, TextDataModule(str(text), block_size=64))
    return found
