"""The command line. `main.py` has the parser; a command imports torch and the rest only when it runs."""
