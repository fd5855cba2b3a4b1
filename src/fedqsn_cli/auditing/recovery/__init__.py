"""How much of the model an attacker gets back: weights and function.

attacks.py    estimates of a tensor from what an attacker holds
metrics.py    how close an estimate is to the truth
intervals.py  the range of a quantized weight over several readings
weights.py    all attacks on all tensors
low_rank.py   attacks that use the low rank of a fine-tune
function.py   what the recovered model can do: loss, accuracy, learning from few examples
"""
