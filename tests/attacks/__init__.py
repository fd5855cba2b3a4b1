"""Files of strangers: every one of them ends a command with one line and exit code 2, at once, and writes nothing."""
