"""One build variant of a kernel: chosen for this machine, checked, and imported."""
