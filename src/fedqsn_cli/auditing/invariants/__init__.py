"""The hard rules FQ001 to FQ013: a proxy that breaks one must not be sent.

reproduce.py        FQ012: the whole folder, made again by the export itself
compared_folder.py  a folder that compares what an export writes with what is there
contents.py         FQ006, FQ010: files, manifests and secrets
secrets.py          what must not be in any byte, and how it is recognised
signed.py           FQ013: a signature is the owner's, and holds nothing else
masks.py            FQ004, FQ005, FQ011: the masks are those of the key, the ratios those of the job
weak_seeds.py       masks that a seeded generator could have drawn
rebuild.py          FQ001: every byte of the tensors, made again from the truth
holes.py            FQ002, FQ003, FQ007: what is stored where units are hidden
same_codes.py       FQ009: two proxies of one round agree wherever both show a unit
sketches.py         sketches of units, to find near copies among millions
truth_index.py      the truth as sketches, and which of them are hidden
copied_units.py     hidden units that appear elsewhere in a proxy
other_models.py     FQ008: hidden units of the truth, held against those of a merged model and of a server model
"""
