"""Training, step by step.

batching.py        examples -> batches; their loss
packing.py         several texts in one row
visible.py         which elements of a model's parameters are visible
compact.py         the visible part of the parameters, for the optimizer
schedule.py        the examples and the learning rate of every step
precision.py       number formats; what makes a training repeatable
optimizers.py      AdamW, 8-bit AdamW and SGD, a part of the model at a time
memory.py          how much memory a training takes
processes.py       several processes that share the work
shared_examples.py  the examples of the first of them, in all
states.py          states on disk, to go on from
interrupts.py      signals wait until a state is saved
journal.py         the figures of every step
loop.py            step by step
secure_random.py   random numbers that nobody can repeat
private_loop.py    the same with differential privacy of the examples (DP-SGD, opacus)
estimate.py        what a training would take
"""
