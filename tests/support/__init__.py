"""Test support: isolation, selection, reruns and progress of a run, and fakes and servers shared by suites."""
