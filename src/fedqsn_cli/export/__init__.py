"""From the owner's model to what is sent: server models, quantized models, proxies.

session.py       a model opened with its job, its public base and its options, which must agree
pipeline.py      the pass: read, hide, quantize, several chunks at once
encode.py        rows of one tensor to codes and scales
outputs.py       what a pass writes: the server's own model, or the proxy of one client
companions.py    the files beside the weights: config, tokenizer
records.py       manifests, proxy ids, ledger lines
advice.py        what an owner should hear before a release
server_model.py  the commands mask and quantize
proxy.py         the command export-proxy
"""
