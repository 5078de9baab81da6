"""Parts of the test runner: isolation from the machine, reruns, progress and the order of tests."""
