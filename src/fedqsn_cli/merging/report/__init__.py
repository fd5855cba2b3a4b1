"""Pages for people who decide.

page_updates.py   the part of the page that is about updates
page.py           the page about updates and what a search tried (page.html.j2)
page_weights.py   the page about the weights that were tried
"""
