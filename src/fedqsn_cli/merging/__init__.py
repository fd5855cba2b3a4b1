"""From updates to the next model, and the end of a job.

results.py        what a merge reports
job_model.py      a dense model that belongs to the job of a key
stored_values.py  where U is in a file, as values or as codes
products.py       products of two factors, compiled
adapter_config.py the configuration of adapters, which may say nothing else
adapters.py       U of adapters: products of factors, rows of them as they are asked for
exact_sum.py      sums that depend neither on the order nor on the grouping of their terms
arithmetic.py     the sums, compiled
stepping.py       the step, compiled
measures.py       what is measured of an update while its values go by
refusals.py       updates that are refused end the merge, or are noted
file_hash.py      a file that is read in pieces, and its digest
read_update.py    an update, and its values read once
partial_sum.py    a sum of some updates that is merged on
verify.py         which updates and partial sums belong to the round
admission.py      which updates of a round are merged: claims and norms
chunks.py         a model and updates read in step: one chunk of the model, then the same rows of every update
cosines.py        how an update points in comparison with the merged step
server_optimizer.py  the average of a round -> its step, with a memory of earlier rounds
noise.py          noise from the job's key
chunk_sum.py      one chunk of a step, and of a weighted average
order_rules.py    rules that put the values of one weight in order: median, trimmed mean
chunk_stack.py    one chunk of all updates side by side
distances.py      how far apart updates are
survey.py         a pass before a merge, where updates must be known beforehand
client_weights.py rules that decide what each update counts: krum, geometric median
central_privacy.py  the noise of a merge, and its account in the ledger
aggregation.py    how the updates of a round are put together
average_kernel.py the average of a few updates and its step, compiled
average.py        one chunk of that average
merge_pass.py     the pass of a merge
merged_clients.py what is reported about each client
partial_pass.py   the pass of a partial sum
add_up.py         the command merge --partial
keep_adapter.py   the merged step as one adapter
line_search.py    the step or blend with the lowest loss
interpolate.py    a loaded model moved along a line (imports torch)
restore.py        trained visible part + hidden part -> the whole model
page_updates.py   the part of the page that is about updates
page.py           the page about updates and what a search tried (page.html.j2)
merge.py          the command merge
students.py       what is trained of a restored model: all of it
lora_student.py   adapters on it, in 4 bits
written_texts.py  texts that a language model writes itself
weight_search.py  how much the clients' teacher counts
page_weights.py   the page about the weights that were tried
consolidate.py    the command consolidate
"""
