"""An opened model under its plan: its tensors as they were before packing, its public base, its content digest.

model.py        a checkpoint opened with its plan: rows of dense or packed tensors
tensor_task.py  one tensor with all that decides how it is processed
digest.py       the content digest of a model
public_base.py  the public base under the model's own names, dtypes and shapes
duplicates.py   refuse equal tensors under two names that would be masked apart
residual.py     what 16-bit weights could not hold of a merge
tokenizer_files.py  can texts be tokenized for a model, as far as its files tell
plan_file.py    a user's plan file on disk
child_process.py  work on strangers' files, with limits on time and memory
architecture.py what a model is for, from its config.json
dense.py        a model's tensors as dense torch tensors (imports torch)
messages.py     what transformers says while it works
tokenizer.py    the tokenizer of a checkpoint, tried in a child process first
torch_model.py  the transformers model of a checkpoint (imports torch)
stored_model.py the transformers model of a proxy, packed as it is (imports torch)
"""
