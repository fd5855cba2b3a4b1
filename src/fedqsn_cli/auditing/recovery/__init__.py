"""How much of the model an attacker gets back: weights and function.

intervals.py     the range of a weight that a quantized value stands for
evidence.py      what proxies say about rows of a tensor: one by one, and put together
metrics.py       how close an estimate is to the truth
attacks.py       estimates of a tensor from what an attacker holds
low_rank.py      attacks that use the low rank of a fine-tune
sums.py          what is added up of rows of a tensor
weights.py       all attacks on all tensors
attackers/       attacks on the function, a file each
attack_state.py  results of attacks on the function, kept in a file
function.py      what the recovered model can do: loss, accuracy, learning from few examples
"""
