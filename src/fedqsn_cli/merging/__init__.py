"""From updates to the next model, and the end of a job.

results.py        what a merge reports
job_model.py      a dense model that belongs to the job of a key
stored_values.py  where U is in a file, as values or as codes
read_update.py    verify an update, then read its values once
arithmetic.py     the sums and steps, compiled
chunks.py         the pass: one chunk of the model, then the same rows of every update
line_search.py    the step or blend with the lowest loss
interpolate.py    a loaded model moved along a line (imports torch)
restore.py        trained visible part + hidden part -> the whole model
page.py           the page about what a search tried (page.html.j2)
merge.py          the command merge
teachers.py       what models say about texts, and a student's distance from it (imports torch)
consolidate.py    the command consolidate
"""
