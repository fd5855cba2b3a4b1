"""One chunk of the model and the same rows of all updates: their sum, and the step it makes.

chunks.py         a model and updates read in step: one chunk of the model, then the same rows of every update
model_measures.py  digest and sizes of the model that is read
cosines.py        how an update points in comparison with the merged step
server_optimizer.py  the average of a round -> its step, with a memory of earlier rounds
noise.py          noise from the job's key
chunk_sum.py      one chunk of a step, and of a weighted average
"""
