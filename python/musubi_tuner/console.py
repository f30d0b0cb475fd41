"""What a command shows: the one place that configures logging, asked by the command line and never at import.

Records of our packages from INFO, of all others from WARNING, go to stderr as plain lines; they keep clear of a tqdm
bar that is being drawn. Of several processes only rank 0 speaks; the others let errors through, with their rank.
"""

import logging
import os
import sys

_OURS = ("musubi_tuner", "musubi_kernels")


def rank() -> int:
    """Number of this process among those of the launch (environment `RANK`), 0 when launched alone."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdigit() else 0


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes a line; through tqdm, where a bar may be open, so that neither breaks the other."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # as it is now: a caller may have replaced it since the handler was made
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None:
            super().emit(record)
            return
        try:
            tqdm.write(self.format(record), file=self.stream)
        except (OSError, ValueError):
            self.handleError(record)


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{_rank_prefix()}{level}{text}"


def _rank_prefix() -> str:
    return f"[rank {rank()}] " if rank() else ""


def configure(verbose: bool = False) -> None:
    """Set up logging of this process. A second call changes nothing but the level."""
    root = logging.getLogger()
    if not any(isinstance(h, _Handler) for h in root.handlers):
        handler = _Handler(sys.stderr)
        handler.setFormatter(_Format("%(message)s"))
        handler.setLevel(logging.ERROR if rank() else logging.NOTSET)
        root.addHandler(handler)
        logging.captureWarnings(True)
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


def fault(prog: str, message: str) -> None:
    """Tell a user's fault on stderr, from rank 0 alone (every process meets the same one)."""
    if rank() == 0:
        sys.stderr.write(f"{prog}: error: {message}\n")
        sys.stderr.flush()


def show(text: str) -> None:
    """Print text that the user asked for (help, resolved options) on stdout, from rank 0 alone."""
    if rank() == 0:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
