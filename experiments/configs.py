"""The packaged configs: finding them by name, listing and copying them. Imports nothing heavy."""

import shutil
import sys
from pathlib import Path

from ..errors import InputError, nearest

ROOT = Path(__file__).parent


def data_folder(name: str | None) -> Path:
    """Return the folder of data sets that was named, else ``shared/data`` beside the checkout."""
    return Path(name).resolve() if name else ROOT.parent.parent / "shared" / "data"


def packaged_configs() -> dict[str, Path]:
    """Return the packaged configs of ``fit``, ``validate``, ``test`` and ``predict`` by name (``distillation/student``)."""
    return {name: path for name, path in _packaged().items() if not path.stem.startswith("sweep")}


def packaged_sweeps() -> dict[str, Path]:
    """Return the packaged configs of ``sweep`` by name (``distillation/sweep``)."""
    return {name: path for name, path in _packaged().items() if path.stem.startswith("sweep")}


def _packaged() -> dict[str, Path]:
    paths = [path for path in sorted(ROOT.glob("*/*.yaml")) if not path.stem.startswith("benchmark")]
    return {str(path.relative_to(ROOT).with_suffix("")): path for path in paths}


def resolve_config(name: str) -> str:
    """Return the path of a config given as a file or by the name of a packaged one.

    Raises:
        InputError: If there is neither; the message has the nearest names.
    """
    if Path(name).is_file():
        return name
    configs = _packaged()
    if name in configs:
        return str(configs[name])
    raise InputError(f"-c {name!r} is neither a file nor a packaged config.{nearest(name, configs)}")


def summary(path: Path) -> str:
    """Return a config's first comment line."""
    first = path.read_text("utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def main(arguments: list[str]) -> None:
    """List the packaged configs, or copy one to edit: ``configs [--copy NAME FOLDER]``."""
    if not arguments:
        configs = _packaged()
        width = max(map(len, configs))
        for name, path in configs.items():
            print(f"{name:{width}}  {summary(path)}")
        return
    if arguments[0] in ("-h", "--help"):
        print("usage: fulgurite configs [--copy NAME FOLDER]\n\nLists the packaged configs, or copies one to edit.")
        return
    if len(arguments) != 3 or arguments[0] != "--copy":
        raise InputError(f"configs {' '.join(arguments)}: legal are 'configs' and 'configs --copy NAME FOLDER'.")
    source, folder = Path(resolve_config(arguments[1])), Path(arguments[2])
    target = folder / source.name
    if target.exists():
        raise InputError(f"{target} exists and is left as it is. Give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(f"Copied to {target}. Use it with: fulgurite fit -c {target}", file=sys.stderr)
