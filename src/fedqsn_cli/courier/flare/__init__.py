"""All that imports NVIDIA FLARE.

transfer.py  a part over FLARE: offered, and fetched
depot.py     at the server: its own process sends and receives the files, its workers say which
job.py       the two classes of a job: one at the server, one at the site; and the files that name them
launch.py    how the workers of jobs are started
session.py   the owner's session: jobs submitted, looked at, ended
"""
