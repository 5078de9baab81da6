"""The stack of `tpo up`: its processes, their supervisor and the embedded broker."""
