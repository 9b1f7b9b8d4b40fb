"""Set up a fresh machine: a virtual environment with everything in it. Needs Python 3.11 or newer, nothing else.

    python3 -m pipelines.setup

Makes .venv, fills it with uv from the ordinary package index, and picks faiss-gpu or faiss-cpu (they share one
module name, so never both) by whether an NVIDIA driver answers. Safe to run again: what is there stays.
"""

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"


def nvidia_driver_answers() -> bool:
    """Whether `nvidia-smi` lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def installer() -> list[str]:
    """The uv to install with: the machine's own, else one put into the environment by pip."""
    if shutil.which("uv"):
        return ["uv"]
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], check=True)
    return [str(PYTHON), "-m", "uv"]


def main() -> None:
    """Make the environment and fill it."""
    argparse.ArgumentParser(
        prog="python3 -m pipelines.setup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - the very question here
        sys.exit(f"error: Python {sys.version.split()[0]} is too old; outlier-miner needs 3.11 or newer")
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    faiss = "gpu" if nvidia_driver_answers() else "cpu"
    print(f"installing outlier-miner with faiss-{faiss} into {ENVIRONMENT}", flush=True)
    install, other = installer(), {"gpu": "cpu", "cpu": "gpu"}[faiss]
    remove = [*install, "pip", "uninstall", "--quiet", "--python", str(PYTHON), f"faiss-{other}"]
    subprocess.run(remove, capture_output=True, check=False)  # a driver may have come or gone since the last time
    command = [
        *install,
        "pip",
        "install",
        "--quiet",
        "--compile-bytecode",  # else each of a run's many processes compiles torch and Ray anew where Python may not
        "--python",
        str(PYTHON),
        "--editable",
        f"{ROOT}[dev,{faiss}]",
    ]
    if subprocess.run(command, check=False).returncode:
        sys.exit("error: the installation failed (see above); check the network and run the same command again")


if __name__ == "__main__":
    main()
