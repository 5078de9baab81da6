"""The commands of `tpo`, one file each."""
