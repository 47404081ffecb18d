"""A lock in a shared folder that a killed process does not leave behind."""

import contextlib
import os
import socket
import time
import uuid
from typing import Iterator, Optional

__all__ = ["FileLock", "Holder"]

# Seconds for which a lock may stay the same before it is taken for one of a dead process, where
# that cannot be looked up. What is done under these locks takes milliseconds.
GRACE = 30.0


class Holder:
    """The process behind the text of a lock: host, process namespace, number, start, nonce."""

    def __init__(self, text: str):
        self.text = text
        parts = text.split("|")
        self.host, self.namespace, pid, self.start = (parts + [""] * 4)[:4]
        self.pid = int(pid) if pid.isdigit() else 0

    @classmethod
    def here(cls) -> "Holder":
        pid = os.getpid()
        fields = (socket.gethostname(), _namespace(), pid, _stat(pid)[1], uuid.uuid4().hex[:12])
        return cls("|".join(map(str, fields)))

    @property
    def is_local(self) -> bool:
        """Whether this process can see if it lives."""
        return (self.host, self.namespace) == (socket.gethostname(), _namespace())

    @property
    def is_dead(self) -> bool:
        """True if it certainly is."""
        if not self.is_local:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, start = _stat(self.pid)
        # its number may belong to another process by now
        return state == "Z" or (bool(start and self.start) and start != self.start)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int):
    """State and time of start of a process, where /proc tells them."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


class FileLock:
    """Mutual exclusion of processes, also of several machines that share a file system.

    A symbolic link, whose making is atomic on network file systems, too; its text names the holder.
    The lock of a process that is dead is broken: at once by processes of the same machine, by
    others when it has been the same for ``grace`` seconds.

    Has the methods of the locks of Optuna's journal. Theirs is broken by age alone, and by several
    waiting processes at the same time.
    """

    def __init__(self, path: str, grace: Optional[float] = GRACE):
        """
        Args:
            path: absolute, so that it means the same everywhere; its folder exists.
            grace: seconds; None: the lock of another machine is never broken.
        """
        self.path, self.grace = os.path.abspath(path), grace
        self._mine = ""

    def acquire(self) -> bool:
        """Wait until the lock is ours."""
        seen, since, pause = "", time.monotonic(), 0.001
        while not self.try_acquire():
            holder = self.holder()
            text = holder.text if holder else ""
            if text != seen:
                seen, since = text, time.monotonic()
            if holder and self.grace is not None and time.monotonic() - since > self.grace:
                self.break_lock(holder)
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return True

    def try_acquire(self) -> bool:
        """Take the lock if it is free or its holder is known to be dead."""
        for _ in range(2):
            mine = Holder.here().text
            try:
                os.symlink(mine, self.path)
            except FileExistsError:
                holder = self.holder()
                if holder and not holder.is_dead:
                    return False
                if holder:
                    self.break_lock(holder)
            else:
                self._mine = mine
                return True
        return False

    def release(self) -> None:
        """Give it back; nothing if somebody has broken it."""
        holder = self.holder()
        if holder and holder.text == self._mine:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self._mine = ""

    def holder(self) -> Optional[Holder]:
        try:
            return Holder(os.readlink(self.path))
        except OSError:
            return None

    def break_lock(self, holder: Holder) -> None:
        """Remove the lock if it still is that of ``holder``."""
        # one process at a time, or the second one would remove the lock that the first then takes
        breaking = self.path + ".breaking"
        try:
            os.symlink(Holder.here().text, breaking)
        except FileExistsError:
            self._forget_breaking(breaking)
            return
        try:
            current = self.holder()
            if current and current.text == holder.text:
                os.unlink(self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(breaking)

    @staticmethod
    def _forget_breaking(breaking: str) -> None:
        with contextlib.suppress(OSError):
            killed = Holder(os.readlink(breaking)).is_dead
            if killed or time.time() - os.lstat(breaking).st_mtime > 2 * GRACE:
                os.unlink(breaking)

    def __enter__(self) -> "FileLock":
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()


@contextlib.contextmanager
def held(lock: FileLock, message: str) -> Iterator[None]:
    """The block has the lock, or there is an error.

    Raises:
        ValueError: somebody else has it; ``message`` with the holder in place of {holder}.
    """
    if not lock.try_acquire():
        raise ValueError(message.format(holder=lock.holder() or "another process"))
    try:
        yield
    finally:
        lock.release()
