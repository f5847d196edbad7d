"""``fulgurite owner federate``: a Flower deployment on one machine, with TLS and a key for each party, for a trial."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape

from ....errors import InputError
from ....modules.offsite import Prefix
from ....modules.offsite.certificates import make_certificates
from ....modules.offsite.prefix import carried_over
from ...configs import resolve_config

_APP = Path(__file__).parent / "pyproject.toml"
console = Console()


def federate(
    configs: list[str], start: str, folder: str, *, rounds: int = 3, minimum: int | None = None, timeout: float = 3600.0
) -> None:
    """Average prefixes over parties for some rounds, with Flower's SuperLink and a SuperNode for each party on this machine.

    Every party is a config of ``fit``, a copy of ``offsite/split`` or ``offsite/tune`` with its data, its way to the owner and
    the steps that it takes in a round. The mean of the rounds is the folder's ``prefix``, that of each round is kept beside it.
    Paths in configs are read from where the command is started.

    Args:
        configs: Config file of each party; the file's name is the party's.
        start: Folder of the prefix to begin with; an emulator's is carried over where the configs go through the split.
        folder: Where everything goes.
        rounds: How often the prefixes are averaged.
        minimum: Fewest parties that a round needs; all, where it is not given.
        timeout: Seconds that a round may take.
    """
    if importlib.util.find_spec("flwr") is None:
        raise InputError(
            "Rounds of averaging need Flower, in an environment of its own: pip install -c constraints-federation.txt "
            "'fulgurite[offsite,federation]'."
        )
    files = [Path(resolve_config(config)).resolve() for config in configs]
    names = [file.stem for file in files]
    if not files or len(set(names)) < len(names) or {"owner", "server"} & set(names):
        raise InputError(f"configs={configs}: give one or more files, each with a name of its own, but owner and server.")
    minimum = len(files) if minimum is None else minimum
    if not 1 <= minimum <= len(files) or rounds < 1 or timeout <= 0:
        raise InputError(
            f"minimum={minimum}, rounds={rounds}, timeout={timeout}: legal are 1 to {len(files)}, 1 or more, above 0."
        )
    root = Path(folder).resolve()
    if (root / "prefix").exists():
        raise InputError(f"folder={folder!r} has the prefix of other rounds. Give another folder.")
    beginning = prefix_to_begin_with(Path(start), files, root / "start")
    with ExitStack() as stack:
        deployment = _Deployment(root, stack, len(files))
        for name, file in zip(names, files):
            deployment.add_party(name, file)
        deployment.run(
            {
                "start": str(beginning.resolve()),
                "folder": str(root),
                "rounds": rounds,
                "parties": minimum,
                "nodes": len(configs),
                "timeout": timeout,
            }
        )
    if not (root / "prefix").exists():
        raise InputError(f"The rounds did not come to their end; {root / 'server.log'} says why.")
    console.print(f"The mean of {rounds} rounds is in {escape(str(root / 'prefix'))}.", highlight=False)


def prefix_to_begin_with(start: Path, configs: list[Path], folder: Path) -> Path:
    """Return the folder of the prefix that the first round begins with.

    Args:
        start: Folder of a prefix.
        configs: Of the parties.
        folder: Where an emulator's prefix is written as one of the whole model, for parties that tune it through the split.

    Raises:
        InputError: If the prefix is damaged, or some parties tune through the split and some do not.
    """
    settings = [((yaml.safe_load(file.read_text("utf-8")) or {}).get("model") or {}).get("init_args") or {} for file in configs]
    phases = {one.get("phase", "emulator") for one in settings}
    if len(phases) > 1:
        raise InputError(f"configs: their phases are {sorted(phases)}; the prefixes of a round have to be for one model.")
    prefix, _, whole = Prefix.read(start)
    if phases != {"split"} or whole is None:
        return start
    carried_over(prefix, whole, settings[0].get("layer_map", "kept")).save(folder, whole.model)
    return folder


class _Deployment:
    """A SuperLink, and SuperNodes that are known to it by their keys.

    Args:
        root: Folder for keys, logs and Flower's own files.
        stack: Ends the processes.
        parties: How many will be added.
    """

    def __init__(self, root: Path, stack: ExitStack, parties: int) -> None:
        self.root, self.stack, self.ports = root, stack, _free_ports(1 + parties)
        self.papers, home = root / "papers", root / "flower"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        if not (self.papers / "owner.crt").is_file():
            make_certificates(self.papers, hosts=["localhost", "127.0.0.1"], parties=["server"])
        self.address = f"localhost:{self.ports.pop()}"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "trial"\n\n[superlink.trial]\naddress = "{self.address}"\n'
            f"root-certificates = {json.dumps(str(self.papers / 'owner.crt'))}\n"
        )
        self.environment = {
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_HOME": str(home),
            # Flower starts its own programs by name.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        port = self.address.rpartition(":")[2]
        words = ["--disable-runtime-dependency-installation", "--enable-supernode-auth", f"--port={port}"]
        self._start("server", ["flower-superlink", *self._tls(), *words])
        self._wait(port)

    def _tls(self) -> list[str]:
        certificate, key = self.papers / "owner.crt", self.papers / "owner.key"
        return [f"--ssl-certfile={certificate}", f"--ssl-keyfile={key}", f"--ssl-ca-certfile={certificate}"]

    def _start(self, name: str, words: list[str]) -> subprocess.Popen:
        output = self.stack.enter_context((self.root / f"{name}.log").open("a"))
        process = subprocess.Popen(words, stdout=output, stderr=output, env=self.environment, start_new_session=True)
        self.stack.callback(_end, process)
        return process

    def _wait(self, port: str) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("localhost", int(port))) == 0:
                    return
            time.sleep(0.2)
        raise InputError(f"Flower's SuperLink does not answer; {self.root / 'server.log'} says why.")

    def add_party(self, name: str, config: Path) -> None:
        """Start a party's SuperNode, whose key the SuperLink is told."""
        key = self.papers / f"{name}.key"
        if not key.is_file():
            _make_key(key)
        self._flwr("supernode", "register", f"{key}.pub", "trial")
        own = " ".join(
            f"{name}={json.dumps(str(value))}" for name, value in (("party", name), ("config", config), ("folder", self.root))
        )
        words = [f"--root-certificates={self.papers / 'owner.crt'}", f"--superlink={self.address}", f"--port={self.ports.pop()}"]
        words += [f"--auth-supernode-private-key={key}", f"--node-config={own}"]
        self._start(name, ["flower-supernode", *self._tls(), *words])

    def run(self, settings: dict[str, str | int | float]) -> None:
        """Send the app to the SuperLink, and show what it says until the rounds are over."""
        app = self.root / "app"
        app.mkdir(exist_ok=True)
        shutil.copyfile(_APP, app / "pyproject.toml")
        told = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        self._flwr("run", str(app), "trial", "--stream", f"--run-config={told}")

    def _flwr(self, *words: str) -> None:
        done = subprocess.run(["flwr", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment)
        with open(self.root / "server.log", "a") as output:
            output.write(done.stdout)
        if done.returncode:
            raise InputError(f"flwr {words[0]} failed: {done.stdout.strip()[-500:]}")


def _end(process: subprocess.Popen) -> None:
    """End a process of Flower's and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _make_key(file: Path) -> None:
    """Write an elliptic key, and its public part beside it, in OpenSSH's form."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    mask = os.umask(0o077)
    try:
        file.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()))
    finally:
        os.umask(mask)
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    Path(f"{file}.pub").write_bytes(public + b"\n")
