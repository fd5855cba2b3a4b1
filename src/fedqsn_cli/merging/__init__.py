"""From updates to the next model, and the end of a job.

results.py          what a merge reports
job_model.py        a dense model that belongs to the job of a key
sums/               exact sums of updates, compiled
updates/            what clients sent back: read once, and refused where it does not belong to the round
step/               one chunk of the model and the same rows of all updates
rules/              how the updates of a round are put together
central_privacy.py  the noise of a merge, and its account in the ledger
average.py          one chunk of the average of a few updates
merge_pass.py       the pass of a merge
partial_pass.py     the pass of a partial sum
merged_clients.py   what is reported about each client
keep_adapter.py     the merged step as one adapter
ending/             the end of a job: step and blend, restore, what a consolidation trains
report/             pages for people who decide
add_up.py           the command merge --partial
merge.py            the command merge
consolidate.py      the command consolidate
"""
