"""How fast, in how much memory, and next to whom: `make bench`, or `python -m benchmarks --help`.

__main__.py   options in; every figure; table and JSON out
    figures.py    the figures, one function each: what runs next to what, on which files
    inputs.py     makes those files: models, jobs, updates
    measure.py    one process at a time: seconds, processor seconds, peak resident memory
    report.py     what was measured, as a table and as JSON
    synthetic.py  a Llama-shaped checkpoint of random bf16 weights
    updates.py    what clients would have sent back
    floor.py      plain loops that read and write: what the disk allows
    reading.py    all tensors, read once with the product's own reader
    kernels.py    quantizing in memory, ours and bitsandbytes'
    exposure.py   what many clients have seen
    training.py   a model, data, and the plain loop next to client-train
    lora.py       adapters: training, updates, and the plain loop of peft next to them
    lora_figures.py  the figures about them
    load.py       many exports at once, tensors, shards, releases, clients
    peers.py      the same work with other people's tools
"""
