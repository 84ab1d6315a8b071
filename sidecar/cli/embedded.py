"""The sidecar that `exec -c` brings: a process of its own, for one command, which never outlives `exec`."""

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.cli import shim

if TYPE_CHECKING:  # it takes a third of a second to import, for -c alone
    from sidecar.config.schema import Settings

_PR_SET_DUMPABLE = 4
_SPARE_SECONDS = 5.0
"""For what a sidecar does at its end beside draining and revoking."""


class Configuration:
    """The file that -c names. `exec` reads it too: it says what must be kept from the command, and how long an end may take."""

    def __init__(self, path: str) -> None:
        """Raises `sidecar.errors.ConfigError`."""
        self.path = path
        settings: Settings = importlib.import_module("sidecar.config.load").load(Path(path))
        self._secret = {issuer.secret_env for issuer in settings.issuers if issuer.kind == "static"}
        waits = 2 * settings.credentials.revoke_deadline  # a close and the drain each wait for the issuer
        self.end_seconds = settings.limits.drain_seconds + waits + _SPARE_SECONDS

    def without_secrets(self, variables: Mapping[str, str]) -> dict[str, str]:
        """`variables` without those that hold a static secret, for the command: it sees no credential.

        A command of the same uid cannot read them in our memory or /proc/PID/environ either (prctl(2) PR_SET_DUMPABLE; its own
        exec undoes that for the command). What the shell before us was started with is not ours to hide.
        """
        if self._secret & variables.keys():
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        return {name: value for name, value in variables.items() if name not in self._secret}


class Embedded:
    """It has a process group of its own, so that what a terminal sends is the command's alone, and SIGTERM when we die."""

    def __init__(self, configuration: Configuration, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._seconds = configuration.end_seconds
        words = [sys.executable, *_isolation(), "-m", "sidecar", "run", "-c", configuration.path]
        self._process = subprocess.Popen(
            shim.words([*words, "--embedded-in", str(run_dir)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,
        )

    @property
    def runs(self) -> bool:
        """False when it ended by itself."""
        return self._process.poll() is None

    def end(self) -> str:
        """Lets it drain, and waits for its end. What is wrong after that, or nothing."""
        self._process.terminate()
        try:
            status = self._process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"the embedded sidecar did not end within {self._seconds:g} s and was killed; tokens live to their expiry"
        if status == 1:
            return "not everything was revoked; `not_revoked` above says where, and it lives to its own expiry"
        return ""


def _isolation() -> list[str]:
    """It imports from where `exec` itself does, less the working directory: that is the agent's, and anything may lie in it.

    Not defended: PYTHONPATH and the like in the environment that `exec` was started with. They had their say in `exec` before
    this line could run, with the same uid and the same secrets at hand; who must be safe from them starts Python with -E or
    -I, and then the sidecar is started so too. `python -m sidecar` by hand in a hostile directory is likewise lost before;
    the console script `spanlock` is not: its own directory comes first on its path, not the working directory.
    """
    flags = ["-P"]
    if sys.flags.ignore_environment:
        flags.append("-E")
    if sys.flags.no_user_site:
        flags.append("-s")
    return flags
