"""A Hub on this machine, for tests: real sockets, the real client, and faults on demand."""
