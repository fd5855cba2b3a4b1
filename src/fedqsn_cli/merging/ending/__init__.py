"""The end of a job: the trained model becomes a whole one.

line_search.py    the step or blend with the lowest loss
interpolate.py    a loaded model moved along a line (imports torch)
restore.py        trained visible part + hidden part -> the whole model
students.py       what is trained of a restored model: all of it
lora_student.py   adapters on it, in 4 bits
distillation_data.py  what students are trained and measured on: soft targets of both teachers
written_texts.py  texts that a language model writes itself
rate_search.py    the learning rate of a consolidation
weight_search.py  how much the clients' teacher counts
"""
