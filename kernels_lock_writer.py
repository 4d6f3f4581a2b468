"""Where editable installs from before the move look for the writer; to be deleted when these are reinstalled."""

from kernels_plugins.hub.locking.writer import write_metadata as write_metadata
