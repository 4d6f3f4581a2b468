"""What dispatch decides and calls, for logs, profilers and metrics; quiet until switched on."""
