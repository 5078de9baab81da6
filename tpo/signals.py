"""What asks a process for its end."""

import signal


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, Ctrl-C and a terminal that closes, which `nohup` ignores: it stays ignored then."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
