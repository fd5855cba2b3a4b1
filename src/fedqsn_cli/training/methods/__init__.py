"""What is trained of a proxy.

method.py          what both methods of training have in common
full.py            the visible weights themselves
lora_modules.py    which modules get adapters
lora.py            adapters on the proxy as it is stored
"""
