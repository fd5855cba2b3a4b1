"""What is sent back.

update_noise.py    clipping of the whole update, and noise on it
error_feedback.py  what encoding loses, kept for the next round
update.py          U = T − P on disk
privacy.py         what the options of privacy mean for an update
"""
