"""What `tpo up` runs: the processes, their supervisor and the embedded broker."""
