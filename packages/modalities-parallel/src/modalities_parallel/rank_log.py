"""What a rank prints: into its log file, and for one of them also on the terminal."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

DRAIN_SECONDS = 5.0


class RankLog:
    """The log of one rank: standard output and standard error in the order they come; a restarted run appends.

    Args:
        path: of the file.
        on_terminal: whether the rank's output is also shown, on the stream it was written to.
    """

    def __init__(self, path: Path, on_terminal: bool) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._copying: list[threading.Thread] = []
        # Straight into the file where nobody watches: no copy, and no line lost if we are killed.
        self.stdout: int | IO[bytes] = subprocess.PIPE if on_terminal else self._file
        self.stderr: int | IO[bytes] = subprocess.PIPE if on_terminal else subprocess.STDOUT

    def follow(self, process: subprocess.Popen[bytes], rank: int, ranks: int) -> None:
        """Write the head of this start, and copy what ``process`` prints from now on."""
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        head = f"--- {now}: rank {rank} of {ranks}, process {process.pid} on {platform.node()}\n"
        self._file.write(head.encode())
        for stream, shown in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if stream is not None:
                thread = threading.Thread(target=self._copy, args=(stream, shown.buffer), daemon=True)
                thread.start()
                self._copying.append(thread)

    def close(self) -> None:
        """Wait for the last of the output; a process the rank left behind may still hold its end, so not for ever."""
        for thread in self._copying:
            thread.join(DRAIN_SECONDS)
        if not any(thread.is_alive() for thread in self._copying):
            self._file.close()

    def _copy(self, stream: IO[bytes], shown: IO[bytes]) -> None:
        begun = b""
        while content := stream.read1(1 << 16):  # pyrefly: ignore[missing-attribute]  # a pipe is buffered
            # Whole lines, or what a progress bar ends with \r: the other stream may be in the middle of one.
            begun += content
            end = 1 + max(begun.rfind(b"\n"), begun.rfind(b"\r"))
            self._file.write(begun[:end])
            begun = begun[end:]
            try:
                shown.write(content)
                shown.flush()
            except (OSError, ValueError):
                # Whoever watched has left (a pager, a closed terminal): the log goes on.
                continue
        self._file.write(begun)
        stream.close()
