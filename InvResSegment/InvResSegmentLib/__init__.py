"""The panel behind the module InvResSegment: one file for each noun, the backend only as a child process."""
