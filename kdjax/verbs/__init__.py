"""What the verbs of the command line do, a file each: `run(**arguments)` returns the exit code (kdjax/cli.py)."""
