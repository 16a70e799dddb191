"""Lock that allows one writer per run directory.

The lock file `.writer.json` in the run directory identifies the writer. It is held with flock, which the kernel
releases however the process terminates. On file systems where flock does not work across nodes, a heartbeat is used
instead: the writer touches the file every `BEAT` seconds.
"""

import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.errors import UserError
from train.run_dir.disk import disk_error
from train.run_dir.state import is_requeue_of, job

FILE = ".writer.json"
BEAT = 20.0  # seconds between heartbeats
SILENT = 600.0  # seconds without a heartbeat after which a writer on a different node is considered dead
WAIT = 10.0  # seconds to wait for child processes of a killed writer to release the lock


class RunLock:
    """Writer lock of a run directory, acquired by rank 0 before the first stage that has work to do."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / FILE
        self.descriptor: int | None = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Acquire the lock and start the heartbeat thread. Does nothing if this object already holds the lock.

        Raises:
            UserError: another process holds the lock; the message names it, its start time and possible fixes.
            DiskError: the run directory cannot be written to.
        """
        if self.descriptor is not None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            deadline = time.monotonic() + WAIT
            while (held := self._open()) is False and not self._lives(self._owner()) and time.monotonic() < deadline:
                time.sleep(0.2)
            self._refuse_living(self._owner(), held)
            self._write()
        except OSError as error:
            self.release()
            raise error if isinstance(error, UserError) else disk_error(error, self.file) from error
        except UserError:
            self.release(keep=True)
            raise
        self._ended = threading.Event()  # a refused attempt has set the previous event
        os.register_at_fork(after_in_child=self._close)  # otherwise forked workers would keep the lock
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self, keep: bool = False) -> None:
        """Stop the heartbeat and release the lock.

        Args:
            keep: leave the lock file in place, because it belongs to another process.
        """
        self._ended.set()
        if self.descriptor is not None and not keep and self._is_ours():
            with suppress(OSError):
                self.file.unlink()
        self._close()

    def refuse_other_jobs(self) -> None:
        """Check that no other SLURM job holds the lock.

        Called on ranks other than 0, which would otherwise wait for a rank 0 that has been refused the lock.

        Raises:
            UserError: a process of another SLURM job holds the lock.
        """
        owner, here = self._owner(), job()
        if owner and here and owner.get("job") and owner["job"]["id"] != here["id"] and self._silence() < SILENT:
            raise self._refusal(owner, elsewhere=True)

    def _open(self) -> bool | None:
        """Open the file and try to lock it. Return whether this succeeded, or None if locks are not supported."""
        while True:
            self._close()
            self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                return None
            if self._is_ours():
                return True  # otherwise the previous owner deleted the file just before it was locked: retry

    def _is_ours(self) -> bool:
        try:
            here, there = os.fstat(self.descriptor or 0), self.file.stat()
        except OSError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def _owner(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _refuse_living(self, owner: dict[str, Any], held: bool | None) -> None:
        if is_requeue_of(owner.get("job")):
            return  # SLURM has terminated the earlier process before starting this one
        if held is False:
            raise self._refusal(owner, elsewhere=owner.get("host") != _host())
        if not owner or (_same_system(owner) and (held or self._is_dead(owner))):
            return
        if _same_system(owner) or self._silence() < SILENT:
            raise self._refusal(owner, elsewhere=not _same_system(owner))

    def _refusal(self, owner: dict[str, Any], elsewhere: bool) -> UserError:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"
        since, slurm = owner.get("since", "an unknown time"), owner.get("job")
        part = f" (SLURM job {slurm['id']})" if slurm else ""
        text = f"{self.file.parent}: in use by another process: {who}{part}, since {since}. "
        text += "Wait for it to finish, stop it, or choose a different name=..."
        if elsewhere:
            text += (
                f" Its last heartbeat was {self._silence():.0f} s ago. If that node is down, rerun the command "
                f"{SILENT / 60:.0f} minutes after the last heartbeat, or delete {self.file} and rerun it immediately."
            )
        return UserError(text)

    def _silence(self) -> float:
        """Return the seconds since the owner's last heartbeat by the file system's clock, or 0 if unknown."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.file.parent, prefix=".clock-") as clock:
                now = os.stat(clock.name).st_mtime
            return max(0.0, now - self.file.stat().st_mtime)
        except OSError:
            return 0.0

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        """Return whether the owner ran on this host and has terminated."""
        return _same_system(owner) and _started(owner["pid"]) != owner.get("started")

    def _lives(self, owner: dict[str, Any]) -> bool:
        """Return whether the owner is known and not dead, so that waiting for the lock is pointless.

        Waiting helps if the owner has just terminated or has not yet written its identity to the file.
        """
        return bool(owner) and not self._is_dead(owner)

    def _write(self) -> None:
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        who = {"host": _host(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}
        content = json.dumps(who | {"since": since, "job": job()}).encode()
        descriptor = self.descriptor or 0
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                if self.file.exists() and not self._is_ours():
                    print(f"error: another process has taken over {self.file}; stopping.", file=sys.stderr, flush=True)
                    os._exit(1)
                os.utime(self.file)

    def _close(self) -> None:
        if self.descriptor is not None:
            with suppress(OSError):
                os.close(self.descriptor)
            self.descriptor = None


def _host() -> str:
    return socket.gethostname()


def _boot() -> str:
    """Return the boot ID of this host, or "" if unknown. Processes from an earlier boot no longer exist."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _same_system(owner: dict[str, Any]) -> bool:
    return owner.get("host") == _host()


def _started(pid: int) -> str | None:
    """Return the boot ID and start time of a process (clock ticks since boot), or None if it is not running.

    The pair distinguishes a process from a later one with the same PID. A zombie counts as not running.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else f"{_boot()}/{fields[19]}"
