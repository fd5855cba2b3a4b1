"""The shell commands: options in, one call, what people see.

app.py           finds the command and runs it
options.py       the options that commands share
help_text.py      help as plain text
failures.py      from an exception to one line and an exit code
interrupts.py    signals end a run cleanly
tables.py        parts of what commands print
mask.py, quantize.py, export_proxy.py, client_train.py, merge.py, inspect.py, evaluate.py, audit.py   a command each
"""
