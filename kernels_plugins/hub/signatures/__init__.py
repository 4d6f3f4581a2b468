"""Signatures of builds: who is to sign, and who did. Read `verification.py` first."""
