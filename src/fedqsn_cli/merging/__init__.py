"""From updates to the next model, and the end of a job.

results.py      what a merge reports
job_model.py    a dense model that belongs to the job of a key
read_update.py  read an update without trusting it
accumulate.py   the arithmetic, compiled
streaming.py    the pass: one chunk of the model, then the same rows of every update
merge.py        the command merge
restore.py      trained visible part + hidden part -> the whole model
line_search.py  the step or blend with the lowest loss
interpolate.py  a loaded model moved along a line (imports torch)
page.py         the page about what a search tried
"""
