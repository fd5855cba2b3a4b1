"""The shell commands: options in, one call, what people see.

app.py           finds the command and runs it
command.py       from a function and its options classes to a typer command
views.py         the options that decide what is printed
help_text.py     help as plain text
exit_codes.py    from an exception to one line and an exit code
interrupts.py    signals end a run cleanly
tables.py        parts of what commands print
mask.py, quantize.py, export_proxy.py, client_train.py, merge.py, consolidate.py, inspect.py,
evaluate.py, audit.py, keygen.py, verify.py, seal.py, unseal.py, courier_init.py, courier_join.py,
courier_approve.py, courier_serve.py, courier_stop.py, courier_status.py, courier_pack.py, courier_send.py
                 a command each
commit_hooks.py  checks of files before a commit
"""
